"""The Hub repository of a result (a local stand-in) is made, and may be written to, before training begins."""

from tests.support.paths import ROOT


TRAINING = ROOT / "training"
TRY = """
import os, sys
sys.path[:0] = sys.argv[1:2]
from run.arguments import RunArguments
from run.publishing import make_repository

for name, token in [("someone/new", "t"), ("someone/new", "t"), ("someone/locked", "t"), ("other/locked", "t"),
                    ("someone/new", None), (None, "t")]:
    try:
        run = RunArguments(output_dir="runs/fox", hub_model_id=name, hub_token=token)
        print("made", make_repository(run))
    except ValueError as error:
        print("refused", " ".join(str(error).split()))
"""


def test_the_repository_is_made_or_the_reason_is_named(hub):
    hub.commit("someone/locked", {"README.md": b"# Mine"})
    hub.read_only = {"someone/locked", "other/locked"}
    lines = hub.run_python(TRY, str(TRAINING)).splitlines()
    assert lines[:2] == ["made someone/new"] * 2
    for line, name in zip(lines[2:4], ("someone/locked", "other/locked"), strict=True):
        assert line.startswith(f"refused --push_to_hub cannot write to the repository '{name}': ")
        assert "403" in line
    assert lines[4] == "refused --push_to_hub needs a token that may write: run `hf auth login`, or pass --hub_token"
    assert lines[5] == "made user/fox"
    assert set(hub.repositories) == {"someone/new", "someone/locked", "user/fox"}
