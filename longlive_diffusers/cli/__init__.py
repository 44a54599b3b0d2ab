"""The command line: `longlive generate | convert | quantize | bench | env`.

`generate.py`, `bench.py`, ... hold the options of each command. What a command does is imported when it runs, because
torch and diffusers take seconds to import.
"""

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from .bench import add_parser as add_bench
from .console import flush, show_any_character
from .convert import add_parser as add_convert
from .env import add_parser as add_env
from .errors import one_line
from .generate import add_parser as add_generate
from .quantize import add_parser as add_quantize


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0 on success; 1 if memory, the disk or the network failed; 2 if the user asked for something
        that is not possible (all are reported in one line); 130 after Ctrl-C; 141 if nobody reads the output any more.
    """
    show_any_character()
    args = None
    try:
        try:
            args = parse_arguments(sys.argv[1:] if argv is None else argv)
            return args.run(args)
        finally:
            flush()
    except KeyboardInterrupt:
        print("longlive: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and error.filename is None:  # as in `longlive env | head -1`
            return 141
        message = one_line(error, args)
        if message is None:
            raise
        print(f"longlive: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of any command; its options may stand between its positional arguments.

    Returns:
        The namespace; its `run` is the function to call with it.
    """
    parser, commands = _build_parsers()
    if argv and argv[0] in commands:
        return commands[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)  # shows the help or the version, or says what is wrong, and exits


def _build_parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Build the parser of the whole command line, and those of the commands, by name."""
    parser = argparse.ArgumentParser(
        prog="longlive", description="Streaming, multi-shot video with LongLive-2.0 and diffusers."
    )
    parser.add_argument("--version", action="version", version=f"longlive_diffusers {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_parser in (add_generate, add_convert, add_quantize, add_bench, add_env):
        add_parser(commands)
    return parser, commands.choices
