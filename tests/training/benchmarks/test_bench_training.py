"""The measurement of a training step."""

import sys
from contextlib import nullcontext

import pytest
import torch

import bench_training
from longlive_diffusers import LongLiveTransformer3DModel


def test_what_is_kept_grows_with_the_clip_and_shrinks_with_checkpointing():
    size = bench_training.SIZES["tiny"]
    model = LongLiveTransformer3DModel(**size.config | {"num_layers": 2}).train()
    kept = [bench_training.kept_bytes(bench_training.make_step(model, size, frames), model) for frames in (4, 8, 16)]
    assert kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.02)
    model.enable_gradient_checkpointing()
    assert bench_training.kept_bytes(bench_training.make_step(model, size, 16), model) < 0.2 * kept[2]


@pytest.mark.parametrize("dtype", bench_training.DTYPES)
def test_half_is_kept_of_what_autograd_keeps_by_itself(monkeypatch, dtype):
    """That is, with norms, gates and GELU called as they are. The least is saved of float32 numbers, which keep their
    size."""
    size = bench_training.SIZES["tiny"]
    model = LongLiveTransformer3DModel(**size.config | {"num_layers": 1}).to(bench_training.DTYPES[dtype]).train()
    step = bench_training.make_step(model, size, 16, autocasts=dtype == "autocast")
    ours, loss = bench_training.kept_bytes(step, model), step()
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for module in ("lean_norms", "lean_feed_forward"):
        monkeypatch.setattr(f"longlive_diffusers.models.{module}.in_plain_autograd", lambda: False)
    monkeypatch.setattr("longlive_diffusers.models.lean_norms.saved_as_recipe", lambda *parts: nullcontext())
    plain = bench_training.kept_bytes(step, model)
    assert ours < {"float32": 0.7, "bfloat16": 0.55, "autocast": 0.6}[dtype] * plain
    plain_loss = step()
    plain_loss.backward()
    assert torch.equal(loss, plain_loss)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        error = (gradient - parameter.grad).norm() / parameter.grad.norm()
        assert error < (1e-5 if dtype == "float32" else 2e-2)


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


def test_a_file_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_training, "measure", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--json", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench_training.main()
    assert "--json: " in capsys.readouterr().err
