"""The Triton kernels against the reference: bit for bit, in Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch

from tests.nvfp4 import compare_kernels


def test_interpreted_kernels_equal_the_reference():
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", compare_kernels.__name__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "0 of " in run.stdout and "cases differ" in run.stdout, run.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_equal_the_reference_on_a_gpu():
    differing, total = compare_kernels.compare(torch.device("cuda"), large=True)
    assert total > 100 and differing == []
