"""The parts of `programs/on_fake_cuda.py` that can be trusted only if they are right on tensors that are there."""

import re
import sys
from functools import partial

import pytest
import torch

from tests.programs import on_fake_cuda
from tests.support.fake_backward import backward
from tests.support.fake_cuda import fake_gpu
from tests.support.tiny_pipeline import teacher_forcing_inputs, tiny_transformer
from tests.support.traffic import Traffic, most_moving, moved_tensors


def test_it_says_what_it_needs_where_pytorch_has_no_cuda(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "argv", ["on_fake_cuda"])
    with pytest.raises(SystemExit) as exit_:
        on_fake_cuda.main()
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("Nothing was run:") and "pip install --target FOLDER torch==" in printed.err


MATRIX = 3 * 4 * 4  # bytes of the float32 matrix that the operators below begin with
OPERATORS = {
    "view": (lambda x: x.view(4, 3).t()[1:].unflatten(1, (2, 2)), 0, 0, 0),
    "allocation": (lambda x: torch.empty_like(x), 0, 0, 0),
    "elementwise": (lambda x: x.exp(), 1, 2 * MATRIX, 2 * MATRIX),
    "filled": (lambda x: torch.zeros(3, 4), 1, MATRIX, MATRIX),
    "copied": (lambda x: x.t().contiguous(), 1, 2 * MATRIX, 2 * MATRIX),
    "converted": (lambda x: x.to(torch.bfloat16), 1, MATRIX + MATRIX // 2, MATRIX),
    "slice": (lambda x: x[:1] + 1, 1, 2 * MATRIX // 3, 2 * MATRIX // 3),
    "broadcast": (lambda x: x[:1].expand(3, 4) + x, 1, MATRIX // 3 + 2 * MATRIX, MATRIX // 3 + 2 * MATRIX),
    "product": (lambda x: x @ x.t(), 1, 2 * MATRIX + 9 * 4, 2 * MATRIX + 9 * 4),
    "in place": (lambda x: x.mul_(x[:1].expand(3, 4)), 1, 2 * MATRIX + MATRIX // 3, 2 * MATRIX + MATRIX // 3),
    "bits in place": (lambda x: x.view(torch.int32).bitwise_and_(1), 1, 2 * MATRIX, 0),
    "overwritten": (lambda x: x[:1].copy_(x[1:2]), 1, 2 * MATRIX // 3, 2 * MATRIX // 3),
    "joined": (lambda x: torch.cat([x, x]), 1, 4 * MATRIX, 4 * MATRIX),
    "two results": (lambda x: x.max(dim=1), 1, MATRIX + 3 * (4 + 8), MATRIX + 3 * 4),
    "selected": (lambda x: x[torch.tensor([2, 0])], 1, 4 * MATRIX // 3 + 2 * 8, 4 * MATRIX // 3),
}


@pytest.mark.parametrize(("operator", "kernels", "num_bytes", "wide_bytes"), OPERATORS.values(), ids=OPERATORS)
def test_traffic_of_an_operator(operator, kernels, num_bytes, wide_bytes):
    x = torch.randn(3, 4)
    with Traffic("cpu") as traffic:
        operator(x)
    totals = traffic.totals
    assert (totals.kernels, totals.num_bytes, totals.wide_bytes) == (kernels, num_bytes, wide_bytes)


def test_traffic_of_values_written_by_index():
    """Of what is written into, only the new values count, and the index."""
    x, index, values = torch.randn(300, 4), torch.tensor([1, 2]), torch.randn(2, 4)
    with Traffic("cpu") as traffic:
        x[index] = values
    assert traffic.totals.num_bytes == 2 * values.nbytes + index.nbytes


def test_traffic_of_frames_written_to_a_cache_in_few_bits():
    """Of a window of four frames and their places, the two that are written."""
    window, codes, scale = torch.zeros(1, 2, 4, 5, 8), torch.zeros(1, 2, 6, 5, 8), torch.zeros(1, 2, 6, 1, 1)
    arguments = (window, torch.tensor([[3, 1]]), codes.to(torch.uint8), scale)
    moved = moved_tensors(torch.ops.longlive_diffusers.fp8_write_frames.default, arguments, {}, None)
    assert [tensor.nbytes for tensor in moved] == [2 * 2 * 5 * 8 * 4, 2 * 2 * 5 * 8, 2 * 2 * 4]


def test_traffic_is_listed_by_operator_and_of_one_kind_of_device():
    x = torch.randn(3, 4)
    with Traffic("cpu") as here, Traffic("cuda") as elsewhere:
        (x.exp() + x.exp()).to(torch.bfloat16)
    assert [(name, count.kernels, count.num_bytes) for name, count in most_moving(here.totals, 2)] == [
        ("exp", 2, 4 * MATRIX),
        ("add", 1, 3 * MATRIX),
    ]
    assert elsewhere.totals.kernels == 0


def test_traffic_counts_the_backward():
    x = torch.randn(3, 4, requires_grad=True)
    with Traffic("cpu") as forward:
        loss = x.exp().sum()
    with Traffic("cpu") as whole:
        backward(loss)
    assert forward.totals.kernels == 2
    assert "mul" in whole.totals.by_operator, "the gradient of exp"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_gives_the_gradients_of_autograds_engine(checkpointing):
    model = tiny_transformer().train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    gradients = []
    for own in (True, False):
        loss = model(**teacher_forcing_inputs()).sample.square().mean()
        if own:
            found = backward(loss)
            gradients.append([found[parameter] for parameter in model.parameters()])
        else:
            loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
    for own, engines in zip(*gradients, strict=True):
        torch.testing.assert_close(own, engines)


def test_tensors_of_different_devices_are_an_error():
    with fake_gpu():
        there, here = torch.empty(2, device="cuda"), torch.ones(2)
        assert on_fake_cuda.attempt(lambda: there + there) == "ok"
        outcome = on_fake_cuda.attempt(lambda: there + here)
    assert re.match("ERROR in outside of the package: (Expected all tensors|.* two different devices)", outcome)


def test_custom_operators_do_not_take_tensors_of_different_devices():
    """They have no check of their own."""
    with fake_gpu():
        codes, scales = torch.empty(16, 16, device="cuda"), torch.ones(32)
        product = torch.ops.longlive_diffusers.nvfp4_matmul
        outcome = on_fake_cuda.attempt(lambda: product(codes, scales, scales, codes, scales, scales))
    assert outcome.startswith("ERROR") and "cpu, cuda" in outcome


def test_waits_for_the_gpu_are_noted():
    to_gpu = partial(torch.ops.aten._to_copy, device="cuda")  # `Tensor.to`, where PyTorch has no CUDA
    with fake_gpu() as host:
        there = torch.ones(2, device="cuda")
        there * 2 + there.sum()
        to_gpu(torch.ones(2).pin_memory(), non_blocking=True)
        assert not host.waits
        to_gpu(torch.ones(2), non_blocking=True)  # not from pinned memory
        torch.tensor([1.0, 2.0], device="cuda")
        assert there.sum() == 0, "what is asked is answered"
        there.cpu()
    assert dict(host.waits) == {
        "outside of the package: copied to the GPU": 2,
        "outside of the package: a number is read": 1,
        "outside of the package: copied to the CPU": 1,
    }
