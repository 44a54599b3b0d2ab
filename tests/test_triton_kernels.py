"""The Triton kernels of `nvfp4`, `fused` and the VAE's decoder against what they stand for: in Triton's interpreter,
and on a GPU where there is one.

The interpreter takes what the compiler refuses, so that they are also compiled, which needs no GPU.
"""

import pytest
import torch

from tests.programs import (
    check_operators,
    compare_branches,
    compare_fused,
    compare_kernels,
    compile_kernels,
    wan_decoder_kernel,
)
from tests.support.checks import needs_gpu
from tests.support.processes import run_program


@pytest.mark.parametrize("program", [compare_kernels, compare_branches])
def test_interpreted_kernels_of_nvfp4_equal_the_reference(program):
    """Bit for bit: kernels by themselves; and streams, layers and training steps that call them."""
    told = run_program(program, TRITON_INTERPRET="1")
    assert told.startswith("0 of ") and "cases differ" in told


def test_interpreted_fused_kernels_are_near_the_functions_they_stand_for():
    run_program(compare_fused, TRITON_INTERPRET="1")


def test_the_interpreted_kernels_of_the_decoder_do_what_plain_pytorch_does():
    """By themselves, and in a stream of chunks."""
    assert run_program(wan_decoder_kernel, TRITON_INTERPRET="1").splitlines() == ["0 differ"]


def test_operators_are_what_torch_takes_them_for():
    run_program(check_operators, TRITON_INTERPRET="1")


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Ampere, Hopper, Blackwell's two kinds; to E2M1 and back, and to E4M3, by instruction where it exists."""
    told = run_program(compile_kernels, "90", "100", "120", "80", TRITON_CACHE_DIR=str(tmp_path))
    assert told.splitlines() == ["90 32 0 7", "100 14 8 2", "120 8 4 2", "80 13 0 0"]


def test_the_kernels_of_the_decoder_compile_for_gpus_that_are_not_here(tmp_path):
    told = run_program(wan_decoder_kernel, "90", "100", "120", TRITON_CACHE_DIR=str(tmp_path))
    assert told.splitlines() == ["90 4", "100 4", "120 4"]


@needs_gpu
def test_kernels_of_nvfp4_equal_the_reference_on_a_gpu():
    differing, total = compare_kernels.compare(torch.device("cuda"), large=True)
    assert total > 100 and differing == []


@needs_gpu
def test_fused_kernels_are_near_the_functions_they_stand_for_on_a_gpu():
    assert compare_fused.compare(torch.device("cuda")) == []
