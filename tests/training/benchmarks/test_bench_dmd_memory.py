"""The measurement of the memory of distillation: what it counts, and that nothing needs to be computed for it."""

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

import bench_dmd_memory
from bench_dmd_memory import CACHE, KEPT, SETUPS, SIZES, THREE, TRAINED, WEIGHTS, Case, LedgerAccelerator, measure
from memory_ledger import TRANSIENT, MemoryLedger, Simulated


TINY = SIZES["tiny"]
SHARED = SETUPS[2]


@pytest.fixture
def accelerator() -> Iterator[LedgerAccelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield LedgerAccelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_ledger_knows_the_most_that_was_there_at_once():
    with MemoryLedger() as ledger:
        kept = torch.zeros(100)
        ledger.label([kept], KEPT)
        with ledger.labelled(CACHE):
            cached = torch.zeros(50).view(5, 10)[1:]  # all of its storage is held
        torch.zeros(1000).add_(1)[::2]
        torch.zeros(30)
        assert ledger.peak() == {KEPT: 400, CACHE: 200, TRANSIENT: 4000}
        ledger.begin()
        torch.zeros(10)
        del cached
        torch.zeros(20)
        assert ledger.peak() == {KEPT: 400, CACHE: 200, TRANSIENT: 40}


def test_the_ledger_sees_a_backward():
    weight = torch.zeros(1000, requires_grad=True)
    with MemoryLedger() as ledger:
        ledger.label([weight], WEIGHTS)
        loss = weight.exp().sum()
        ledger.label_the_rest(KEPT)
        loss.backward()
        ledger.label([weight.grad], TRAINED)
        assert ledger.peak() == {WEIGHTS: 4000, KEPT: 4004, TRAINED: 4000, TRANSIENT: 4}


def test_what_is_simulated_takes_the_memory_of_what_is_computed(accelerator):
    size = replace(TINY, window_size=2, sink_size=0, config=TINY.config | {"num_layers": 1})
    case = Case(SHARED, True, frames=4, scored_frames=2, score_context="clean", offloading=True)
    computed = measure(size, case, accelerator, None)
    assert measure(size, case, accelerator, Simulated(from_bytes=2**14)) == computed


def test_layers_are_alike(accelerator):
    """So that a network of many is measured by two of few; and networks differ in nothing but their weights."""
    size = replace(TINY, config=TINY.config | {"num_layers": 3})
    shared, three = (
        measure(size, Case(setup, True, 4, 4, "noisy"), accelerator, Simulated()) for setup in (SHARED, THREE)
    )
    assert bench_dmd_memory.simulate(size, shared[0].case, accelerator) == shared
    for own, others in zip(shared, three, strict=True):
        assert others.parts == own.parts | {WEIGHTS: 3 * own.parts[WEIGHTS]}


def test_checkpoints_on_the_host_are_not_kept(accelerator):
    case = Case(SHARED, True, 4, 4, "clean")
    on_device, on_host = (
        measure(TINY, replace(case, offloading=offloading), accelerator, Simulated(from_bytes=2**14))
        for offloading in (False, True)
    )
    inputs = 2 * TINY.config["num_layers"] * 4 * 16 * 4 * 32  # in bfloat16; of 4 frames of 16 tokens, of 4 heads of 32
    for row, other in zip(on_device, on_host, strict=True):
        assert row.parts[KEPT] - other.parts[KEPT] >= inputs


def test_under_autocast_loras_take_their_inputs_as_they_are(accelerator, monkeypatch):
    """PEFT would convert all of them to the float32 of the LoRA, for autocast to convert them back; also where the
    backward computes blocks again."""
    seen = set()
    linear = torch.nn.functional.linear

    def look(x, weight, bias=None):
        if TINY.rank in weight.shape:
            seen.add(x.dtype)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", look)
    measure(TINY, Case(SHARED, True, 4, 4, "noisy"), accelerator, None)
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--frames", "12"], "--frames 12 is no multiple of 8 (chunks)"),
        (["--size", "tiny", "--frames", "0"], "--frames 0 is no multiple of 2 (chunks)"),
    ],
)
def test_bad_options_are_named(monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["bench_dmd_memory.py", *words])
    with pytest.raises(SystemExit):
        bench_dmd_memory.main()
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_dmd_memory, "cases", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--json", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench_dmd_memory.main()
    assert "--json: " in capsys.readouterr().err
