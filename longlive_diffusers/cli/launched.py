"""This process's place among those that torch's launcher has started; known without importing torch, which takes
seconds."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """This process among those that make the video: its place and how many there are, in all and on its machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process reads, prints and writes."""
        return self.index == 0


def own_rank() -> Rank:
    """Return this process's place, as torch's launcher has told it; without one, it is alone."""
    # Other launchers set some of the same names: what they start shares nothing.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Rank()
    return Rank(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
