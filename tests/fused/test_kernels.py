"""The fused kernels against the functions they stand for: in Triton's interpreter, and on a GPU where there is one.

tests/nvfp4/test_kernels.py compiles them, with the others.
"""

import torch

from tests.programs import compare_fused
from tests.support.checks import needs_gpu
from tests.support.processes import run_program


def test_interpreted_kernels_are_near_the_functions_they_stand_for():
    run_program(compare_fused, TRITON_INTERPRET="1")


@needs_gpu
def test_kernels_are_near_the_functions_they_stand_for_on_a_gpu():
    assert compare_fused.compare(torch.device("cuda")) == []
