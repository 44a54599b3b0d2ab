"""`longlive bench --compare`: which settings it takes, and a run on the toy. Which is faster is never asserted."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from longlive_diffusers.benchmark.compare import compare
from longlive_diffusers.benchmark.options import BenchOptions
from longlive_diffusers.benchmark.sizes import SIZES
from longlive_diffusers.cli import main
from longlive_diffusers.models.attend import MATMUL_ATTENTION


SMALL = ["--window", "4", "--sink", "0", "--chunks", "2", "--steps", "1", "--height", "32", "--width", "32"]
TIMES = ["forward", "denoise", "decode"] + [
    f"{how} {what}" for how in ("synchronous", "asynchronous") for what in ("video", "first frame", "between chunks")
]


@pytest.fixture(autouse=True)
def quick_matmul(monkeypatch):
    monkeypatch.setattr("longlive_diffusers.benchmark.report.measure_matmul", lambda device, dtype: 2e9)


def test_two_settings_are_measured_in_turns(tmp_path, capfd):
    options = "--dtype bfloat16 --kv-cache-dtype fp8 --decoder tiny --clean-pass last --attention-density 0.5"
    command = ["bench", *SMALL, "--compare", options, "--rounds", "2", "--results", str(tmp_path)]
    assert main(command) == 0
    table, progress = capfd.readouterr()
    (json_file,) = tmp_path.glob("*.json")
    report = json.loads(json_file.read_text())
    assert json_file.stem.endswith(
        "_vs_dtype-bfloat16-kv-cache-dtype-fp8-decoder-tiny-clean-pass-last-attention-density-0.5"
    )
    assert report["labels"][0].startswith("float32 ") and report["labels"][1] == options

    first, second = report["setting"], report["compared_setting"]
    assert (first["dtype"], first["stream"]["kv_cache_dtype"], first["decoder"]) == ("float32", None, "vae")
    assert (second["dtype"], second["stream"]["kv_cache_dtype"], second["decoder"]) == ("bfloat16", "fp8", "tiny")
    same = set(first) - {"date", "load_average", "dtype", "stream", "decoder"}
    assert all(first[name] == second[name] for name in same)

    before, after = report["results"]["once"]
    assert before["kv_cache_bytes"] > after["kv_cache_bytes"] > 0
    assert before["forward_flops"] > after["forward_flops"] > 0, "of the blocks that are attended to"
    assert before["part_flops"]["linear"] == after["part_flops"]["linear"]
    assert "1 step and the clean pass: 2 forwards a chunk" in table
    assert "1 step, the last of which is remembered: 1 forward a chunk" in table
    assert before["weights_bytes"]["transformer"] > after["weights_bytes"]["transformer"]
    assert next(iter(after["attention_kernels"])) == MATMUL_ATTENTION
    ratios = report["results"]["ratios"]
    assert list(ratios) == TIMES
    for found in ratios.values():
        (a, b), (c, d) = found["pairs"]
        assert min(a, b, c, d) > 0
        assert found["ratio"] == pytest.approx((b / a + d / c) / 2)
        assert found["least_ratio"] == pytest.approx(min(b / a, d / c))

    for name in TIMES:
        assert f"{ratios[name]['ratio']:.3f}" in table and any(line.startswith(name) for line in table.splitlines())
    markdown = json_file.with_suffix(".md").read_text()
    assert f"| {TIMES[0]} |" in markdown and f"{ratios['forward']['ratio']:.3f}" in markdown
    assert "`longlive bench --window 4" in markdown and first["versions"]["torch"] in markdown
    assert "second / first" in table and "longlive bench: denoising, in turns ...\n" in progress


@pytest.mark.parametrize(("device", "rates"), [("meta", [1e9, 2e9]), ("cpu", [1e9, 1e9])])
def test_each_setting_is_measured_by_the_rate_of_its_own_device(monkeypatch, device, rates):
    first = BenchOptions("toy", SIZES["toy"](), torch.device("cpu"), torch.float32)
    second = replace(first, device=torch.device(device))
    place = "longlive_diffusers.benchmark.compare."
    monkeypatch.setattr(
        place + "matmul_rates", lambda options, *_: {"float32": {"cpu": 1e9}.get(options.device.type, 2e9)}
    )
    for name in ("warm_up", "weights"):
        monkeypatch.setattr(place + name, lambda *args, **options: {})
    monkeypatch.setattr(place + "build", lambda options: SimpleNamespace(pipe=None))
    monkeypatch.setattr(place + "measure_one_forward", lambda setup, options, matmul: {"matmul": matmul})
    stages = compare(first, second, 1, lambda stage: None, lambda pipe: None)
    once = next(stage["once"] for stage in stages if "once" in stage)
    assert [found["matmul"] for found in once] == rates
    told = [found.get("matmul_flops_per_second") for found in once]
    assert told == ([None, None] if device == "cpu" else [{"float32": rate} for rate in rates])


def test_a_setting_is_compared_with_itself(tmp_path, monkeypatch):
    """Which shows how far ratios stray by themselves."""
    asked = []

    def compare(*args):
        asked.extend(args[:3])
        yield {"ratios": {}}

    monkeypatch.setattr("longlive_diffusers.cli.run_bench.compare", compare)
    path = tmp_path / "bench.json"
    assert main(["bench", *SMALL, "--dtype", "bfloat16", "--compare", "", "--json", str(path)]) == 0
    assert asked[0] == asked[1] and asked[0].dtype == torch.bfloat16 and asked[2] == 4
    assert json.loads(path.read_text())["labels"][1] == "itself"


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ("--dtype bfloat16", {"dtype": torch.bfloat16}),
        ("--compile", {"compile": True}),
        ("--nvfp4", {"nvfp4_backend": "auto"}),
        ("--kv-cache-dtype nvfp4 --decoder tiny", {"stream": {"kv_cache_dtype": "nvfp4"}, "decoder": "tiny"}),
        ("--attention-backend native", {"attention_backend": "native"}),
    ],
)
def test_only_what_is_named_changes(monkeypatch, options, changed):
    asked = []

    def compare(*args):
        asked.extend(args[:2])
        yield {}

    monkeypatch.setattr("longlive_diffusers.cli.run_bench.compare", compare)
    assert main(["bench", *SMALL, "--compare", options]) == 0
    first, second = map(vars, asked)
    assert {name: value for name, value in second.items() if value != first[name]} == changed


def test_what_the_parser_refuses_is_refused_before_anything_runs(capsys):
    assert main(["bench", "--compare", "--dtype float8"]) == 2
    assert "--compare '--dtype float8': argument --dtype: invalid choice: 'float8'" in capsys.readouterr().err


def test_ctrl_c_keeps_the_pairs_that_were_measured(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("longlive_diffusers.benchmark.compare.measure_whole", interrupted)
    assert main(["bench", *SMALL, "--compare", "", "--rounds", "2", "--results", str(tmp_path)]) == 130
    (json_file,) = tmp_path.glob("*.json")
    assert list(json.loads(json_file.read_text())["results"]["ratios"]) == TIMES[:3]
    table = capsys.readouterr().out
    assert "decode" in table and "synchronous" not in table
