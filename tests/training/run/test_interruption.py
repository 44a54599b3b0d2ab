"""Signals that ask a run to end: noted once, agreed on, and then as always."""

import os
import signal

import pytest
from accelerate import Accelerator

from run.interruption import StopRequest


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_is_as_always(number):
    before = handlers()
    with StopRequest(Accelerator(cpu=True)) as stop:
        assert handlers() != before and stop.agreed() == 0
        os.kill(os.getpid(), number)
        assert stop.agreed() == number
        assert handlers() == before
    assert handlers() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_jobs_in_the_background_ignore_ends_no_run(number):
    found = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest(Accelerator(cpu=True)) as stop:
            os.kill(os.getpid(), number)
            assert stop.agreed() == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, found)


def test_handlers_are_those_of_before_after_an_error():
    before = handlers()
    with pytest.raises(FloatingPointError), StopRequest(Accelerator(cpu=True)):
        raise FloatingPointError
    assert handlers() == before


def test_data_that_cannot_be_read_any_more_is_no_error_if_a_signal_came():
    def fetch():
        raise RuntimeError("DataLoader worker exited unexpectedly")

    stop = StopRequest(Accelerator(cpu=True))
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        stop.unless_requested(fetch)
    assert stop.unless_requested(lambda: [1]) == [1]
    stop.signal = signal.SIGTERM
    assert stop.unless_requested(fetch) == []
