"""The measurement of a training step."""

import sys

import pytest

import bench_training
from longlive_diffusers import LongLiveTransformer3DModel


def test_what_is_kept_grows_with_the_clip_and_shrinks_with_checkpointing():
    size = bench_training.SIZES["tiny"]
    model = LongLiveTransformer3DModel(**size.config | {"num_layers": 2}).train()
    kept = [bench_training.kept_bytes(bench_training.make_step(model, size, frames), model) for frames in (4, 8, 16)]
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.02)
    model.enable_gradient_checkpointing()
    assert bench_training.kept_bytes(bench_training.make_step(model, size, 16), model) < 0.2 * kept[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--backends", "dense", "flex"], "FlexAttention has no backward on a CPU"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--backends", "flex"], "ratios are to dense attention"),
    ],
)
def test_bad_options_are_named(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["bench_training.py", *words])
    with pytest.raises(SystemExit):
        bench_training.main()
    assert message in capsys.readouterr().err
