"""The newest message stands in a terminal's last row, and what is typed above it stays whole."""

import io
import os
import re
import sys

import pytest
from tqdm.utils import disp_len

from longlive_diffusers.cli.status_line import StatusLine


ROWS, COLUMNS = 6, 40


class Terminal(io.StringIO):
    """As much of a terminal as is needed: rows, a cursor, a region that scrolls, and what is typed into it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = [""] * ROWS
        self.row, self.column, self.last, self.saved = 0, 0, ROWS, (0, 0)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b7|\x1b8|\x1b\[[0-9;]*[a-zA-Z]|.|\n", text):
            self._obey(part)
        return len(text)

    def _obey(self, part: str) -> None:
        numbers = [int(number) for number in re.findall(r"\d+", part)]
        if part == "\x1b7":
            self.saved = (self.row, self.column)
        elif part == "\x1b8":
            self.row, self.column = self.saved
        elif part == "\n":
            if self.row == self.last - 1:
                self.rows[: self.last] = [*self.rows[1 : self.last], ""]
            else:
                self.row = min(self.row + 1, ROWS - 1)
            self.column = 0
        elif part.startswith("\x1b["):
            match part[-1]:
                case "r":
                    self.last, self.row, self.column = (numbers[1] if numbers else ROWS), 0, 0
                case "H":
                    self.row, self.column = numbers[0] - 1, numbers[1] - 1
                case "K":
                    self.rows[self.row] = self.rows[self.row][: self.column]
                case "A":
                    self.row -= numbers[0]
                case other:
                    raise AssertionError(other)
        else:
            if self.column == COLUMNS:
                self._obey("\n")
            self.rows[self.row] = self.rows[self.row][: self.column].ljust(self.column) + part
            self.column += 1


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((COLUMNS, ROWS)))
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


@pytest.mark.parametrize("lines_before", [0, 3, 20])
def test_what_is_typed_stays_whole_wherever_the_cursor_was(terminal, lines_before):
    terminal.write("before\n" * lines_before)
    typed = "a prompt that is longer than a row of this terminal"
    with StatusLine(terminal) as status:
        for index, letter in enumerate(typed):
            status.show(f"chunk {index}", "'fox'")
            terminal.write(letter)
        assert terminal.rows[-1] == f"chunk {len(typed) - 1}, 'fox'"
        assert typed in "".join(terminal.rows[:-1])
        terminal.write("\n" + "more\n" * 9)
        assert terminal.rows == ["more"] * 4 + ["", f"chunk {len(typed) - 1}, 'fox'"]
    assert terminal.rows == ["more"] * 4 + ["", ""]
    terminal.write("\n" * ROWS)  # the whole screen scrolls again
    assert terminal.rows == [""] * ROWS


def test_a_message_fits_in_its_row(terminal):
    with StatusLine(terminal) as status:
        status.show("chunk 0", "a long\nprompt " * 100)
        assert len(terminal.rows[-1]) == COLUMNS - 1
        status.show("chunk 0", "雪の中の狐" * 100)
        assert disp_len(terminal.rows[-1]) in (COLUMNS - 2, COLUMNS - 1)
        status.show("chunk 1", "short")
        assert terminal.rows[-1] == "chunk 1, short"


def test_a_closed_stdout_is_shown_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with StatusLine() as status:
        status.show("chunk 0", "fox")


@pytest.mark.parametrize("stream", ["a pipe", "a terminal without rows"])
def test_elsewhere_each_message_is_a_line(monkeypatch, stream):
    monkeypatch.setenv("TERM", "dumb")
    shown = io.StringIO()
    shown.isatty = lambda: stream != "a pipe"
    with StatusLine(shown) as status:
        for index, prompt in enumerate(["fox", "fox", "hen"]):
            status.show(f"chunk {index}", prompt)
    assert shown.getvalue() == "fox\nchunk 0\nchunk 1\nhen\nchunk 2\n"
