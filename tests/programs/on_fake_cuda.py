"""Runs the package on a GPU that is not there: python -m tests.programs.on_fake_cuda [checks] [work] [kept]

This needs no GPU, but a build of PyTorch with CUDA, which can lie beside the environment's own PyTorch:

    pip install --target FOLDER torch==2.13.0    # about 4.7 GB; torch===2.13.0 where pip prefers a CPU build
    PYTHONPATH=FOLDER python -m tests.programs.on_fake_cuda

FOLDER has to come before everything else on PYTHONPATH. Tensors are fake: they have shapes, dtypes and devices, but no
numbers, so that the 5B model at 704x1280 takes a few minutes on a CPU. Nothing is timed. Three tables are printed:

- checks: whether streams, training steps and layers in few bits meet tensors of different devices, and where. If any
  does, the exit status is 1.
- work: the FLOPs, bytes and kernels of a forward, a chunk, its decoding, a training step, a layer; and where the CPU
  waits for the GPU meanwhile: for a number, or for a copy, as a GPU tensor made of Python's numbers is one. Bytes are
  those that operators read and write one by one, when nothing is compiled (`tests/support/traffic.py`).
- kept: what is kept for the backward of a training step, for clips of several lengths.

A Triton kernel can be followed where it is an operator of PyTorch's, with a fake implementation. A case that launches
one directly is listed as not run.
"""

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from diffusers.utils import logging

from longlive_diffusers.benchmark.markdown import markdown_table
from tests.support.fake_cuda import fake_gpu, is_mismatch, place_of
from tests.support.fake_cuda_checks import all_checks
from tests.support.fake_cuda_work import Work, all_work, kept_rows
from tests.support.traffic import Count, most_moving


NO_CUDA_BUILD = (
    "Nothing was run: PyTorch {version} is a build without CUDA. Have one beside it with `pip install --target FOLDER "
    "torch==2.13.0` (about 4.7 GB), and put FOLDER before everything on PYTHONPATH."
)
ERROR, NOT_RUN = "ERROR", "not run"
NO_DRIVER = "active drivers"  # what Triton says when it is to launch a kernel


def attempt(call: Callable[[], object]) -> str:
    """Run a case, and say what became of it."""
    try:
        call()
    except RuntimeError as error:
        if is_mismatch(error):
            return f"{ERROR} in {place_of(error)}: {error}"
        if NO_DRIVER in str(error):
            return f"{NOT_RUN}: {place_of(error)} launches a Triton kernel"
        raise
    return "ok"


def report_checks() -> list[str]:
    """Print, and return, what became of each check; and print where the CPU waits for the GPU in any of them."""
    outcomes, waits = {}, Counter()
    for name, capability, check in all_checks():
        began = time.perf_counter()
        with fake_gpu(capability) as host:
            outcomes[name] = attempt(check)
        waits.update(host.waits)
        print(f"{name}: {outcomes[name]} ({time.perf_counter() - began:.0f} s)", file=sys.stderr)
    print(markdown_table(["on a fake GPU", "tensors of different devices"], outcomes.items()), end="\n\n")
    print(*(f"- The CPU waits {count} x in {where}" for where, count in sorted(waits.items())), "", sep="\n")
    return list(outcomes.values())


def report_work(operators: int) -> list[str]:
    """Print the work of each case, and return what became of it."""
    outcomes, rows, details = [], [], []
    for name, capability, prepare in all_work():
        work = Work()
        with fake_gpu(capability) as host:
            outcome = attempt(lambda prepare=prepare, work=work, host=host: work.measure(prepare(), host))
        print(f"{name}: {outcome}", file=sys.stderr)
        outcomes.append(outcome)
        rows.append([name, *(work.cells() if outcome == "ok" else [outcome, "", "", "", ""])])
        details += [f"- {name}: {describe(found)}" for found in most_moving(work.totals, operators)]
        details += [f"- {name}: the CPU waits {count} x in {where}" for where, count in sorted(work.waits.items())]
    header = ["5B, 704x1280", "TFLOP", "GB moved", "in float32", "kernels", "waits"]
    print(markdown_table(header, rows, right_aligned=True), "", *details, "", sep="\n")
    return outcomes


def describe(found: tuple[str, Count]) -> str:
    operator, count = found
    sizes = f"{count.num_bytes / 1e9:.2f} GB, {count.wide_bytes / 1e9:.2f} GB of it in float32"
    return f"{count.kernels} x {operator}, {sizes}"


def report_kept() -> None:
    header = ["latent frames", "GiB per layer", "MiB per layer and frame", "the same, checkpointing"]
    with fake_gpu():
        print(markdown_table(header, kept_rows(), right_aligned=True), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="checks, work, kept (default: all of them)")
    parser.add_argument("--operators", type=int, default=0, help="How many operators of each case are listed.")
    arguments = parser.parse_args()
    parts = arguments.parts or ["checks", "work", "kept"]
    if unknown := set(parts) - {"checks", "work", "kept"}:
        parser.error(f"a part is checks, work or kept, not {', '.join(sorted(unknown))}")
    if torch.version.cuda is None:
        print(NO_CUDA_BUILD.format(version=torch.__version__), file=sys.stderr)
        raise SystemExit(2)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # a copy of the solver does
    outcomes = []
    if "checks" in parts:
        outcomes += report_checks()
    if "work" in parts:
        outcomes += report_work(arguments.operators)
    if "kept" in parts:
        report_kept()
    failed, left_out = (sum(outcome.startswith(start) for outcome in outcomes) for start in (ERROR, NOT_RUN))
    cases = f"of {len(outcomes)} cases, {failed} met tensors of different devices, {left_out} were not run"
    print(f"On torch {torch.__version__}: {cases}.")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
