"""Why ranks part: each leaves word in the store of the process group before it closes its connections.

A rank that fails leaves its error. Whoever loses the connection leaves an empty word, and reads those of the others. A
rank that was killed is the one without a word.
"""

import contextlib
import time
from collections.abc import Iterable, Sequence

import torch.distributed as dist


_PATIENCE, _PAUSE = 4.0, 0.05  # seconds to wait for the words of the other ranks, and between two looks


class LastWords:
    """
    The last words of the ranks of one stream.

    Args:
        store: The store of the world's process group.
        name: A name that no other stream has.
        rank, size: This rank among those of the stream, and how many there are.
    """

    def __init__(self, store: dist.Store, name: str, rank: int, size: int):
        self._world_store, self._store = store, dist.PrefixStore(f"longlive/{name}", store)
        self._rank, self._size = rank, size

    def say(self, word: str) -> None:
        """Leave this rank's word; empty where another rank's end is the reason."""
        word = word.encode("utf-8", "backslashreplace").decode()  # names of files may be no text
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may be gone
            self._world_store.set(_parted_key(dist.get_rank()), word)
            self._store.set(f"word {self._rank}", word)

    def gather(self) -> str:
        """Return why the ranks part. Waits for the words of all ranks, and until they have read this one's: the store
        may end with the process."""
        everyone = range(self._size)
        words: dict[int, str] = {}
        with contextlib.suppress(RuntimeError):
            self._collect("word", words, everyone)
            self._store.set(f"read {self._rank}", "")
            self._collect("read", {}, words)
        if not words:  # the store has ended before
            return f"rank {1 - self._rank if self._size == 2 else 0} has ended, without a word"
        failures = [f"rank {rank} failed with {word.removesuffix('.')}" for rank, word in words.items() if word]
        silent = [f"rank {rank} has ended or is stuck, without a word" for rank in everyone if rank not in words]
        return "; ".join(failures + silent)

    def _collect(self, what: str, found: dict[int, str], ranks: Iterable[int]) -> None:
        """Fill in what these ranks leave in the store, for as long as there is patience."""
        deadline = time.monotonic() + _PATIENCE
        while missing := [rank for rank in ranks if rank not in found]:
            for rank in missing:
                if self._store.check([f"{what} {rank}"]):
                    found[rank] = self._store.get(f"{what} {rank}").decode()
            if time.monotonic() > deadline:
                break
            time.sleep(_PAUSE)


def parted_ranks(store: dist.Store, ranks: Sequence[int]) -> list[int]:
    """Return which of these ranks of the world have left a word in any stream.

    Raises:
        torch.distributed.DistError: If the process that keeps the store has ended.
    """
    return [rank for rank in ranks if store.check([_parted_key(rank)])]


def _parted_key(world_rank: int) -> str:
    return f"longlive/parted/{world_rank}"
