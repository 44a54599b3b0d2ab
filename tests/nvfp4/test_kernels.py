"""The Triton kernels against the reference: bit for bit, in Triton's interpreter, and on a GPU where there is one.

The interpreter takes what the compiler refuses, so that they are also compiled, which needs no GPU.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests.programs import compare_kernels, compile_kernels


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
    assert run.stdout.startswith("0 of ") and "cases differ" in run.stdout, run.stdout


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Ampere, Hopper, Blackwell's two kinds; to E2M1 and back by instruction where it exists, and is needed."""
    run = subprocess.run(
        [sys.executable, "-m", compile_kernels.__name__, "80", "90", "100", "120"],
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == ["80 10 0", "90 10 0", "100 10 8", "120 10 8"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_equal_the_reference_on_a_gpu():
    differing, total = compare_kernels.compare(torch.device("cuda"), large=True)
    assert total > 100 and differing == []
