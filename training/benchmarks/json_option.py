"""The option of the benchmarks that names a file for their rows."""

import argparse
from pathlib import Path

from longlive_diffusers.atomic_write import check_new_file


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`; a file that cannot be written is an error of the command line, before the work."""
    parser.add_argument("--json", type=_writable, help="Also write the rows to this file.")


def _writable(path: str) -> Path:
    try:
        return check_new_file(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
