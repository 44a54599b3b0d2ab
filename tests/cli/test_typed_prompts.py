"""Typed lines: what each makes a session do, and when the next one has its turn."""

import errno
import os
import time
from types import SimpleNamespace

import pytest

from longlive_diffusers.cli.typed_prompts import BLEND_CHUNKS, HELP, TypedPrompts


class Session:
    """Notes what it is told."""

    def __init__(self):
        self.told: list[tuple] = []

    def cut(self, prompt: str) -> None:
        self.told.append(("cut", prompt))

    def blend(self, prompt: str, chunks: int) -> None:
        self.told.append(("blend", prompt, chunks))

    prompt = property(fset=lambda self, prompt: self.told.append(("prompt", prompt)))


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.fixture
def typed():
    """Create prompts that were typed, all at once."""
    descriptors = []

    def type_lines(*lines: str) -> TypedPrompts:
        reader, writer = os.pipe()
        descriptors.append(reader)
        os.write(writer, "\n".join(lines).encode())
        os.close(writer)
        prompts = TypedPrompts(reader)
        wait_for(lambda: prompts._lines.qsize() >= len(lines))
        return prompts

    yield type_lines
    for descriptor in descriptors:
        os.close(descriptor)


def after_chunks(prompts: TypedPrompts, session: Session, *shown: str) -> list[bool]:
    """Make chunks that show these prompts; return whether each is followed by another one."""
    return [prompts.apply_next(session, SimpleNamespace(prompt=prompt)) for prompt in shown]


LINES = {
    "a dog": [("prompt", "a dog")],
    "  a dog ": [("prompt", "a dog")],
    "/cut a dog": [("cut", "a dog")],
    "/blend a dog": [("blend", "a dog", BLEND_CHUNKS)],
    "/blend   a dog in the snow ": [("blend", "a dog in the snow", BLEND_CHUNKS)],
    "": [],
}


@pytest.mark.parametrize(("line", "told"), LINES.items())
def test_a_line_is_done(typed, line, told):
    session = Session()
    assert after_chunks(typed(line), session, "a cat") == [True]
    assert session.told == told


@pytest.mark.parametrize("line", ["/blend", "/blend  ", "/cut", "/blending a dog", "/"])
def test_what_is_no_command_is_answered(typed, capsys, line):
    session = Session()
    assert after_chunks(typed(line), session, "a cat") == [True]
    assert session.told == []
    command = line.strip()
    needs = command in ("/blend", "/cut")
    expected = f"needs a prompt: {command} TEXT" if needs else f"is not a command: {HELP}"
    assert capsys.readouterr().err == f"'{command}' {expected}\n"


def test_each_of_several_lines_is_seen(typed):
    """Also if its chunk comes later, as it does with asynchronous decoding."""
    session, prompts = Session(), typed("a dog", "/cut a bird", "/quit")
    assert after_chunks(prompts, session, "a cat", "a cat", "a cat") == [True] * 3
    assert session.told == [("prompt", "a dog")]
    assert after_chunks(prompts, session, "a dog", "a dog") == [True] * 2
    assert session.told[1:] == [("cut", "a bird")]
    assert after_chunks(prompts, session, "a bird") == [False]


def test_a_blend_is_complete_before_the_next_line(typed):
    session, prompts = Session(), typed("/blend a dog", "a bird")
    assert after_chunks(prompts, session, "a cat", "a cat") == [True] * 2
    for _ in range(BLEND_CHUNKS):
        assert session.told == [("blend", "a dog", BLEND_CHUNKS)]
        assert after_chunks(prompts, session, "a dog") == [True]
    assert session.told[1:] == [("prompt", "a bird")]


def test_every_form_is_told_of():
    assert all(f"'{form}" in HELP for form in ("/cut TEXT", "/blend TEXT", "/quit")) and str(BLEND_CHUNKS) in HELP


def test_what_was_opened_not_to_wait_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    prompts = TypedPrompts(reader)
    time.sleep(0.02)
    os.write(writer, b"a dog\n")
    assert wait_for(lambda: prompts._lines.qsize() == 1)
    os.close(writer)
    assert wait_for(lambda: prompts._lines.qsize() == 2)
    os.close(reader)


def test_a_terminal_that_goes_away_is_the_end_of_what_is_typed(monkeypatch):
    def hung_up(descriptor, size):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "read", hung_up)
    prompts = TypedPrompts(0)
    assert wait_for(lambda: prompts._lines.qsize() == 1)
