"""How the scripts of this folder end where something fails: with one line."""

import sys
from collections.abc import Callable
from pathlib import Path


def run(main: Callable[[], None]) -> int:
    """
    Run a script's work.

    Returns:
        The exit status: 0 on success; 1 if the disk or memory failed; 2 if something was asked for that is not
        possible; 130 after Ctrl-C.
    """
    name = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, OSError, MemoryError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
