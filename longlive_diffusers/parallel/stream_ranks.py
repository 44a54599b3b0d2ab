"""The ranks that make one stream together, and the process groups they meet in.

Each purpose has a group of its own, because groups are not to be used by two threads at once, and an asynchronous
session decodes in one thread while it denoises in another:

    heads, branches, tensors    in the thread that denoises, on the devices
    decode                      in the thread that decodes, on the devices
    orders, turns               what the first rank tells the others, on the hosts (gloo), in either thread

When a rank fails, the others wait for it in one of these groups. So it leaves word of its error (`last_words.py`), and
closes its groups: whoever waits there gets an error at once, closes its groups as well, and reads why.
"""

import threading
import uuid
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .head_exchange import FrameExchange, HeadExchange, WholeExchange
from .last_words import LastWords, parted_ranks
from .rank_rows import rank_rows
from .stream_config import StreamParallelConfig


_ENDLESS = timedelta(days=365)  # the first rank may wait for its user for as long as that user likes


class RanksParted(RuntimeError):
    """A rank cannot go on, because another one has failed or ended. No further video can be made: all of them have to
    be started again."""


class StreamRanks:
    """
    The ranks of one stream, seen from one of them. Every rank of the world makes its own, at the same time.

    Args:
        config: How the stream is shared, from `resolve_stream_config`.

    Attributes:
        rank, size: This rank among those of the stream, and how many there are.
        branch: Which branch of guidance this rank computes, 0 (the prompt) or 1 (the negative prompt), where the
            branches are split; else None.
        heads_size: How many ranks share the heads.

    Raises:
        ValueError: If torch.distributed is not initialized, or its ranks cannot be divided into streams.
        RanksParted: If one of them has parted from others before: they cannot meet again.
    """

    def __init__(self, config: StreamParallelConfig):
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                'Several ranks can share a stream after `torch.distributed.init_process_group("nccl")` on GPUs, or '
                '"gloo" on CPUs, in every process: start them with torchrun.'
            )
        rows = rank_rows(config)
        members = sorted(rank for row in rows for rank in row)
        if dist.get_rank() not in members:
            raise ValueError(f"`mesh` has ranks {members}, and this is rank {dist.get_rank()} of the world.")
        own_row = next(index for index, row in enumerate(rows) if dist.get_rank() in row)
        place = rows[own_row].index(dist.get_rank())
        store = dist.distributed_c10d._get_default_store()
        _check_unparted(store, members)
        self.config = config
        self.rank, self.size, self.heads_size = members.index(dist.get_rank()), len(members), len(rows[own_row])
        self.branch = own_row if config.cfg_parallel else None
        self.backend = dist.get_backend()
        self._groups = {
            "heads": _new_group(rows[own_row]),
            "branches": _new_group([row[place] for row in rows]) if config.cfg_parallel else None,
            "tensors": _new_group(members),
            "decode": _new_group(members),
            "orders": _new_group(members, backend="gloo", timeout=_ENDLESS),
            "turns": _new_group(members, backend="gloo", timeout=_ENDLESS),
        }
        self._exchanges = (
            FrameExchange(self.group("heads"), config.exchange_dtype),
            WholeExchange(self.group("heads")),
        )
        self.shares_tokens = False  # whether the forward that runs is of a part of a chunk
        self._num_sessions = 0
        self._open_sessions: dict[int, bool] = {}  # by their number: whether they are asynchronous
        self._failure, self._parting = "another rank has failed", threading.Lock()  # until more is known
        name = self.tell("orders", uuid.uuid4().hex if self.rank == 0 else None)
        self._last_words = LastWords(store, name, self.rank, self.size)

    def __deepcopy__(self, memo: dict) -> "StreamRanks":
        return self  # a copy of a network is on the same ranks

    def __getstate__(self) -> dict:
        raise ValueError("A network that several ranks share cannot be pickled: save it with `save_pretrained`.")

    @property
    def have_parted(self) -> bool:
        """Whether a rank has failed, as far as this one knows."""
        return not self._groups

    def group(self, name: str) -> dist.ProcessGroup:
        """
        Return a group by its name.

        Raises:
            RanksParted: If a rank has failed, and the groups are closed.
        """
        if not self._groups:
            raise RanksParted(f"The ranks of this stream have parted: {self._failure}. Start them all again.")
        group = self._groups[name]
        assert group is not None  # "branches" is asked for only where there are some
        return group

    def check_request(self, devices: Iterable[torch.device], *, is_guided: bool) -> None:
        """
        Check that these ranks can make a video.

        Raises:
            ValueError: If their backend cannot send what is on one of the `devices`, or branches are split and there
                is one.
        """
        if self.backend == "nccl" and any(device.type == "cpu" for device in devices):
            raise ValueError(
                "The backend 'nccl' sends between GPUs, and the transformer or the VAE is on the CPU: that is for "
                "'gloo'. With `parallel_decode=False`, the VAE sends nothing."
            )
        if self.branch is not None and not is_guided:
            raise ValueError(
                "`cfg_parallel` is for the two branches of guidance, and `guidance_scale` 1 or 0 means none: half of "
                f"the {self.size} ranks would have nothing to do."
            )

    def exchange(self, num_frames: int) -> HeadExchange:
        """Return the exchange of a chunk of `num_frames`."""
        self.group("heads")  # or its error
        return self._exchanges[0 if num_frames % self.heads_size == 0 else 1]

    def share_amax(self, amax: torch.Tensor) -> torch.Tensor:
        """Return the largest number over the ranks that share the heads, where each has other tokens of a chunk."""
        if not self.shares_tokens:
            return amax
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group("heads"))
        return amax

    def tell(self, group: str, value: Any) -> Any:
        """Return the first rank's `value` on every rank; anything small that can be pickled."""
        holder = [value]
        dist.broadcast_object_list(holder, group=self.group(group), group_src=0)
        return holder[0]

    def ask_all(self, value: Any) -> list[Any]:
        """Return every rank's `value` on every rank, in their order."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group("orders"))
        return values

    def open_session(self) -> int:
        """
        Count a session that begins, before anything is said about it, and return its number: the same on every rank.

        Raises:
            ValueError: If an asynchronous session is open. Its thread and this one would talk in the same group.
            RanksParted: If a rank has failed.
        """
        self.group("orders")  # or its error
        if any(self._open_sessions.values()):
            raise ValueError(
                "An asynchronous session is open. Ranks that share their streams make nothing else beside one: close "
                "it first."
            )
        self._num_sessions += 1
        self._open_sessions[self._num_sessions] = False
        return self._num_sessions

    def make_asynchronous(self, number: int) -> None:
        """
        Let an open session be the only one.

        Raises:
            ValueError: If there are others.
        """
        if others := len(self._open_sessions) - 1:
            raise ValueError(
                f"{others} other session(s) of these ranks are open: `async_decode` needs the ranks for itself. Close "
                "them first, or make this one without it."
            )
        self._open_sessions[number] = True

    def close_session(self, number: int) -> None:
        """Forget a session; also one that is closed already."""
        self._open_sessions.pop(number, None)

    def part(self, reason: str | None) -> str:
        """Leave word of the `reason` (None if another rank's end is the reason), close this rank's groups, and return
        why the ranks have parted, as far as their words tell within seconds."""
        with self._parting:  # a second thread waits for what the first finds out
            if self._groups:
                groups = [group for group in self._groups.values() if group is not None]
                self._groups, self._exchanges = {}, ()
                self._last_words.say(reason or "")
                while groups:  # Gloo's connections end when nothing refers to a group any more
                    groups[-1].abort()  # NCCL would wait for what is under way
                    dist.destroy_process_group(groups.pop())
                self._failure = self._last_words.gather()
            return self._failure


def _check_unparted(store: dist.Store, ranks: Sequence[int]) -> None:
    try:
        parted = parted_ranks(store, ranks)
    except dist.DistError as error:
        raise RanksParted("The process that keeps the ranks' store has ended. Start all ranks again.") from error
    if parted:
        raise RanksParted(
            f"Ranks {parted} have failed, or parted from one that did, and cannot share streams any more. Start all "
            "ranks again."
        )


def _new_group(ranks: Sequence[int], **options: Any) -> dist.ProcessGroup:
    # Made by its members alone: other streams of the same world need not take part.
    group = dist.new_group(list(ranks), use_local_synchronization=True, **options)
    assert isinstance(group, dist.ProcessGroup)  # else this process were no member
    return group
