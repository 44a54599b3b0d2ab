"""Whether torch's launcher has started this process as one of several; does not import torch, which takes seconds."""

import os


def is_first_here() -> bool:
    """Whether this is the first process of a launcher on its machine, or was not started by one."""
    return not _is_one_of_several() or os.environ["LOCAL_RANK"] == "0"


def is_first() -> bool:
    """Whether this is the first of all processes, or was not started by a launcher."""
    return not _is_one_of_several() or os.environ["RANK"] == "0"


def _is_one_of_several() -> bool:
    # Other launchers set some of the same names: what they start shares nothing.
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1"
