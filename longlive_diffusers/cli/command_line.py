"""All commands in one parser, and what becomes of a command's errors."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..version import __version__
from .arguments import with_values_joined
from .bench import add_parser as add_bench
from .console import flush, show_any_character, warnings_in_one_line
from .convert import add_parser as add_convert
from .env import add_parser as add_env
from .errors import is_told_by_another, one_line
from .generate import add_parser as add_generate
from .quantize import add_parser as add_quantize
from .serve import add_parser as add_serve


PATIENCE = 10.0  # seconds


def run(argv: Sequence[str]) -> int:
    """Parse the arguments and run the command; return the exit status (see `main`)."""
    show_any_character()
    args = None
    try:
        try:
            args = parse_arguments(argv)
            with warnings_in_one_line():
                return args.run(args)
        finally:
            flush()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:  # as in `longlive env | head -1`
            return 141
        message = one_line(error, args)
        if message is None:
            raise
        if is_told_by_another(error):
            time.sleep(PATIENCE)  # the launcher ends all processes with the first, which may still have to tell
        else:
            print(f"longlive: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of any command; its options may stand between its positional arguments.

    Returns:
        The namespace; its `run` is the function to call with it, and its `argv` the arguments.
    """
    parser, commands = _build_parsers()
    if argv and argv[0] in commands:
        command, rest = commands[argv[0]], with_values_joined(argv[1:], ("--compare",))
        # Parsing intermixed forgets that what follows "--" is no option.
        args = command.parse_args(rest) if "--" in rest else command.parse_intermixed_args(rest)
        args.argv = list(argv)
        return args
    return parser.parse_args(argv)  # shows the help or the version, or says what is wrong, and exits


class CommandParser(argparse.ArgumentParser):
    """argparse's own, but that help which cannot be written is an error: argparse passes over that, where the text is
    longer than the buffer of the output."""

    def print_help(self, file: Any = None) -> None:
        """Write the help to a file, by default to the standard output, if there is one."""
        stream = sys.stdout if file is None else file
        if stream is not None:
            stream.write(self.format_help())


def _build_parsers() -> tuple[CommandParser, dict[str, CommandParser]]:
    """Build the parser of the whole command line, and those of the commands, by name."""
    parser = CommandParser(prog="longlive", description="Streaming, multi-shot video with LongLive-2.0 and diffusers.")
    parser.add_argument("--version", action="version", version=f"longlive_diffusers {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_parser in (add_generate, add_serve, add_convert, add_quantize, add_bench, add_env):
        add_parser(commands)
    return parser, commands.choices
