"""Help and errors come at once; and a command ends in one line, or none, whatever becomes of its output."""

import io
import os
import subprocess
import sys

import pytest

from longlive_diffusers.cli import main
from longlive_diffusers.cli.command_line import CommandParser
from tests.support.paths import ROOT


HEAVY = ("torch", "diffusers", "transformers", "numpy", "av", "PIL")
LONGLIVE = [sys.executable, "-m", "longlive_diffusers.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

PARSE_EVERYTHING = f"""
import sys
from longlive_diffusers.cli import main
for line in ("--help", "--version", "", "gnerate", "generate --stepz 4", "generate --steps x", "generate x --nvfp4 y",
             "generate -h", "convert -h", "quantize -h", "bench -h", "bench --kv-cache-dtype z", "env -h"):
    try:
        main(line.split())
    except SystemExit:
        pass
    else:
        raise AssertionError(line)
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def test_help_and_typos_import_nothing_heavy():
    run = subprocess.run([sys.executable, "-c", PARSE_EVERYTHING], env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines()[-1] == "[]"


def test_a_reader_that_is_gone_ends_the_command_without_a_word():
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run([*LONGLIVE, "--help"], stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_output_that_does_not_fit_is_one_line(unbuffered):
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        run = subprocess.run([*LONGLIVE, "generate", "--help"], stdout=full, stderr=subprocess.PIPE, env=environment)
    assert (run.returncode, run.stderr) == (1, b"longlive: error: No space left on device\n")


@pytest.mark.parametrize("length", [10, 100_000])
def test_help_that_cannot_be_written_is_an_error_however_long_it_is(length, monkeypatch):
    class Full:
        def write(self, text: str) -> None:
            assert len(text) > length
            raise OSError(28, "No space left on device")

    parser = CommandParser(prog="longlive", epilog=length * "x")
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="No space left"):
        parser.parse_args(["--help"])
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--help"])
    assert ended.value.code == 0


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams_are_no_error(closed):
    number = {"stdout": 1, "stderr": 2}[closed]
    run = subprocess.run(
        [*LONGLIVE, "--version"], env=ENVIRONMENT, capture_output=True, preexec_fn=lambda: os.close(number)
    )
    assert run.returncode == 0
    assert b"Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", b"\\xe9 \\u6c34 \\udcff"), ("cp1252", b"\xe9 \\u6c34 \\udcff")]
)
def test_characters_that_cannot_be_shown_are_replaced(monkeypatch, encoding, shown):
    shows = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", shows)
    with pytest.raises(SystemExit):
        main(["--version"])
    print("\u00e9 \u6c34 \udcff", end="", flush=True)
    assert shows.buffer.getvalue().endswith(shown)


def test_an_argument_that_is_not_utf8_is_one_line():
    run = subprocess.run([*LONGLIVE, "generate", b"caf\xe9"], env={**ENVIRONMENT, "LC_ALL": "C"}, capture_output=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].endswith(b"argument PROMPT: is not UTF-8 text: 'caf\\udce9'")
