"""The command line: `longlive generate | serve | convert | quantize | bench | env`.

`generate.py`, `bench.py`, ... hold the options of each command. What a command does is imported when it runs, because
torch and diffusers take seconds to import.
"""

import signal
import sys
from collections.abc import Sequence

from .launched import own_rank


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0 on success; 1 if memory, the disk or the network failed; 2 if the user asked for something
        that is not possible (all are reported in one line); 130 after Ctrl-C; 141 if nobody reads the output any more.
    """
    if not own_rank().leads:  # the first process tells of Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from .command_line import run  # here, because Ctrl-C may come at any time

        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("longlive: interrupted", file=sys.stderr)
        return 130
