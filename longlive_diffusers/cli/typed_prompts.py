"""Prompts that are typed while a stream runs."""

import io
import os
import queue
import select
import stat
import sys
import threading
from typing import TYPE_CHECKING, TextIO


if TYPE_CHECKING:
    from ..pipelines.pipeline_output import VideoChunk
    from ..pipelines.session import StreamingSession

BLEND_CHUNKS = 4
HELP = (
    "type a line to change the prompt, '/cut TEXT' to cut to a new shot, "
    f"'/blend TEXT' to move to it over {BLEND_CHUNKS} chunks, '/quit' to end"
)


class TypedPrompts:
    """
    Reads lines from a terminal or a pipe, and applies them to a session, one at a time.

    Args:
        descriptor: The descriptor of the open file that is read, in a separate thread, until it ends.
    """

    def __init__(self, descriptor: int) -> None:
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._awaited: str | None = None
        self._chunks_awaited = 0  # that are still to show it
        threading.Thread(target=self._read, args=(descriptor,), name="longlive-prompts", daemon=True).start()

    def apply_next(self, session: "StreamingSession", chunk: "VideoChunk") -> bool:
        """Act on the next line, if there is one; return False if it says to end.

        A line has to wait until `chunk`, the last that was made, shows the prompt of the line before, or has completed
        the way to it, so that each of several lines that came at once is seen.
        """
        if self._awaited is not None:
            self._chunks_awaited -= chunk.prompt == self._awaited
            if self._chunks_awaited > 0:
                return True
        self._awaited = None
        try:
            line = self._lines.get_nowait().strip()
        except queue.Empty:
            return True
        command, _, text = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/cut" and text.strip():
            self._await(text.strip())
            session.cut(text.strip())
        elif command == "/blend" and text.strip():
            self._await(text.strip(), BLEND_CHUNKS)
            session.blend(text.strip(), BLEND_CHUNKS)
        elif command in ("/cut", "/blend"):
            print(f"'{command}' needs a prompt: {command} TEXT", file=sys.stderr)
        elif line.startswith("/"):
            print(f"'{line}' is not a command: {HELP}", file=sys.stderr)
        elif line:
            self._await(line)
            session.prompt = line
        return True

    def _await(self, prompt: str, chunks: int = 1) -> None:
        self._awaited, self._chunks_awaited = prompt, chunks

    def _read(self, descriptor: int) -> None:
        # Not sys.stdin's own methods: a thread that waits in one holds a lock that Python needs in order to exit.
        pending = b""
        while received := _received(descriptor):
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                self._lines.put(line.decode("utf-8", errors="replace"))
        self._lines.put(pending.decode("utf-8", errors="replace"))


def _received(descriptor: int) -> bytes:
    """Wait for what is typed; nothing at the end, or where a terminal is gone."""
    while True:
        try:
            return os.read(descriptor, 4096)
        except BlockingIOError:  # another program that has it open has set it not to wait
            select.select([descriptor], [], [])
        except OSError:
            return b""


def readable_descriptor(stream: TextIO | None) -> int | None:
    """Return the descriptor of a stream that somebody may type into (a terminal, a pipe or a socket), else None."""
    try:
        descriptor = None if stream is None else stream.fileno()
    except io.UnsupportedOperation:
        return None
    if descriptor is None:
        return None
    mode = os.fstat(descriptor).st_mode
    return descriptor if os.isatty(descriptor) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None
