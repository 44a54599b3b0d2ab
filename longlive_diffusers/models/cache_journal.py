"""What a KV cache held at earlier moments, for backwards that run long after its slots were overwritten.

In distillation, forwards with gradients and the chunks after them share one cache, and a single backward comes at the
end. By then, frames were evicted, sinks and pins were rotated again, perhaps everything was rewritten for a new
prompt. To keep a copy of the window for each forward would take the memory of many caches. So the cache keeps a
journal: whatever is about to be overwritten, and may still be asked for, is copied first - each frame once, however
many forwards saw it.

    moment a --(frames overwritten)--> moment b --(frames overwritten)--> now

A moment refers to those after it, and the journal refers to the last one weakly. So copies live for as long as
somebody holds on to a moment before them; where nobody does, as in inference, nothing is ever copied.
"""

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from .frame_store import Frames


Place = tuple[int, int]
"""A sample of the batch and a slot."""


@dataclass(frozen=True)
class Overwritten:
    """Keys or values (`part`) that were overwritten, at `places`; the same in tensors, `samples` and `slots`, int64
    `[n]`. `frames` has them by layer: n samples with one slot each."""

    part: int
    places: list[Place]
    samples: torch.Tensor
    slots: torch.Tensor
    frames: list[Frames]


class Moment:
    """A moment in the life of a cache. What was overwritten after it can be read for as long as it is referred to."""

    def __init__(self, watched: tuple[set[Place], set[Place]]):
        self.watched = watched  # where keys, and where values, are as somebody may still ask for
        self.next: tuple[Overwritten, Moment] | None = None

    def overwritten_since(self, part: int, places: frozenset[Place]) -> Iterator[tuple[Overwritten, list[int]]]:
        """What was at `places` at this moment and no longer is: entries of the journal, and which of their frames. No
        place comes twice."""
        missing, moment = set(places), self
        while moment.next is not None and missing:
            overwritten, moment = moment.next
            if overwritten.part == part:
                rows = [row for row, place in enumerate(overwritten.places) if place in missing]
                missing.difference_update(overwritten.places)
                if rows:
                    yield overwritten, rows


class CacheJournal:
    """Knows the present moment of a cache, and who may still ask for what is in it."""

    def __init__(self):
        self._now: weakref.ref[Moment] | None = None

    def __reduce__(self):
        return type(self), ()  # who remembers a cache does not remember copies of it

    def remember(self, places: Iterable[Place]) -> Moment:
        """Return the present moment, to be able to read later what is at `places` now."""
        moment = self._present() or Moment((set(), set()))
        self._now = weakref.ref(moment)
        for watched in moment.watched:
            watched.update(places)
        return moment

    def asked_for(self, part: int, places: Iterable[Place]) -> list[Place]:
        """Which of `places`, whose keys or values are about to be overwritten, must be recorded before."""
        moment = self._present()
        return [] if moment is None else [place for place in places if place in moment.watched[part]]

    def record(self, overwritten: Overwritten) -> None:
        """Enter what is overwritten now: a new moment begins."""
        moment = self._present()
        if moment is None:
            return
        following = Moment(moment.watched)
        following.watched[overwritten.part].difference_update(overwritten.places)
        moment.next = (overwritten, following)
        self._now = weakref.ref(following)

    def _present(self) -> Moment | None:
        return None if self._now is None else self._now()
