"""The Triton kernels against the reference: bit for bit, in Triton's interpreter, and on a GPU where there is one.

The interpreter takes what the compiler refuses, so that they are also compiled, which needs no GPU.
"""

import pytest
import torch

from tests.programs import check_operators, compare_branches, compare_kernels, compile_kernels
from tests.support.checks import needs_gpu
from tests.support.processes import run_program


@pytest.mark.parametrize("program", [compare_kernels, compare_branches])
def test_interpreted_kernels_equal_the_reference(program):
    """Kernels by themselves; and streams, layers and training steps that call them."""
    told = run_program(program, TRITON_INTERPRET="1")
    assert told.startswith("0 of ") and "cases differ" in told


def test_operators_are_what_torch_takes_them_for():
    run_program(check_operators, TRITON_INTERPRET="1")


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Ampere, Hopper, Blackwell's two kinds; to E2M1 and back by instruction where it exists, and is needed."""
    told = run_program(compile_kernels, "80", "120", "--whole", "90", "100", TRITON_CACHE_DIR=str(tmp_path))
    assert told.splitlines() == ["80 8 0", "120 8 3", "90 22 0", "100 22 8"]


@needs_gpu
def test_kernels_equal_the_reference_on_a_gpu():
    differing, total = compare_kernels.compare(torch.device("cuda"), large=True)
    assert total > 100 and differing == []
