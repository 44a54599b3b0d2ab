"""Signals that are handled for a while."""

import os
import signal

import pytest

from longlive_diffusers.cli.termination import ends_cleanly
from longlive_diffusers.signal_handling import handled


HANGUP = signal.SIGUSR1  # stands for SIGHUP, SIGINT and SIGTERM, with which the tests themselves are ended


@pytest.fixture
def before():
    """How the signal is handled before, put back after the test."""
    found = signal.getsignal(HANGUP)
    yield lambda handler: signal.signal(HANGUP, handler)
    signal.signal(HANGUP, found)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_is_handled_in_the_block_and_as_before_after_it(before):
    earlier, received = [], []
    before(lambda number, frame: earlier.append(number))
    with pytest.raises(KeyError), handled([HANGUP], lambda number, frame: received.append(number)):
        send(HANGUP)
        raise KeyError
    send(HANGUP)
    assert received == earlier == [HANGUP]


def test_what_is_ignored_stays_ignored(before):
    before(signal.SIG_IGN)
    received = []
    with handled([HANGUP], lambda number, frame: received.append(number)):
        send(HANGUP)
    send(HANGUP)
    assert received == [] and signal.getsignal(HANGUP) is signal.SIG_IGN


def test_a_handler_that_is_not_pythons_becomes_the_default(before, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with handled([HANGUP], lambda number, frame: None):
        pass
    monkeypatch.undo()
    assert signal.getsignal(HANGUP) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_what_nohup_ignores_ends_no_command(number):
    found = signal.signal(number, signal.SIG_IGN)
    try:
        with ends_cleanly():
            send(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, found)
