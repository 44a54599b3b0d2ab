"""How a script ends: what it fails with is one line, and its exit status says of what kind it is."""

import sys
from collections.abc import Callable

import torch

from run.publishing import HUB_ERRORS


def run_script(name: str, argv: list[str], main: Callable[[list[str]], None]) -> int:
    """
    Run a script, and report in one line what it fails with.

    Args:
        name: The name of the script.
        argv: The arguments of the command line.
        main: The script's work.

    Returns:
        The exit status: 0 on success; 1 if the disk, the network or the training itself failed; 2 if something was
        asked for that is not possible; 130 after Ctrl-C.
    """
    try:
        main(argv)
    except (ValueError, FloatingPointError, MemoryError, torch.OutOfMemoryError, *HUB_ERRORS) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
