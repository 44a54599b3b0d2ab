"""The command line: `longlive generate | convert | quantize | bench | env`."""

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from .bench import add_parser as add_bench
from .convert import add_parser as add_convert
from .env import add_parser as add_env
from .generate import add_parser as add_generate
from .quantize import add_parser as add_quantize


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0 on success; 1 if the disk or the network failed; 2 if the user asked for something that is
        not possible (both are reported in one line); 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"longlive: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("longlive: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; the namespace's `run` is the function to call with it."""
    parser = argparse.ArgumentParser(
        prog="longlive", description="Streaming, multi-shot video with LongLive-2.0 and diffusers."
    )
    parser.add_argument("--version", action="version", version=f"longlive_diffusers {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_parser in (add_generate, add_convert, add_quantize, add_bench, add_env):
        add_parser(commands)
    return parser
