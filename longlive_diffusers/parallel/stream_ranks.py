"""The ranks that make one stream together, and the process groups they meet in.

Each purpose has a group of its own, because groups are not to be used by two threads at once, and an asynchronous
session decodes in one thread while it denoises in another:

    heads, branches, tensors    in the thread that denoises, on the devices
    decode                      in the thread that decodes, on the devices
    orders, turns               what the first rank tells the others, on the hosts (gloo), in either thread

When a rank fails, the others wait for it in one of these groups. So it leaves word of its error in the store of the
process group, and closes its groups: whoever waits there gets an error at once, leaves word that it has no error of
its own, closes its groups, and reads what the others have left. A rank that was killed is the one without a word.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .head_exchange import FrameExchange, HeadExchange, WholeExchange
from .stream_config import StreamParallelConfig


_ENDLESS = timedelta(days=365)  # the first rank may wait for its user for as long as that user likes
_PATIENCE, _PAUSE = 4.0, 0.05  # seconds to wait for the word of the other ranks, and between two looks


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
        rows = _rank_rows(config)
        members = sorted(rank for row in rows for rank in row)
        if dist.get_rank() not in members:
            raise ValueError(f"`mesh` has ranks {members}, and this is rank {dist.get_rank()} of the world.")
        own_row = next(index for index, row in enumerate(rows) if dist.get_rank() in row)
        place = rows[own_row].index(dist.get_rank())
        self._world_store = dist.distributed_c10d._get_default_store()
        _check_unparted(self._world_store, members)
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
        self._store = dist.PrefixStore(f"longlive/{name}", self._world_store)

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
                self._say_last_word(reason or "")
                while groups:  # Gloo's connections end when nothing refers to a group any more
                    groups[-1].abort()  # NCCL would wait for what is under way
                    dist.destroy_process_group(groups.pop())
                self._failure = self._gather_last_words()
            return self._failure

    def _say_last_word(self, word: str) -> None:
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may be gone
            self._world_store.set(_parted_key(dist.get_rank()), word)
            self._store.set(f"word {self.rank}", word)

    def _gather_last_words(self) -> str:
        """Wait for the words of all ranks, and until they have read this one's: the store may end with the process."""
        everyone = range(self.size)
        words: dict[int, str] = {}
        with contextlib.suppress(RuntimeError):
            self._collect("word", words, everyone)
            self._store.set(f"read {self.rank}", "")
            self._collect("read", {}, words)
        if not words:  # the store has ended before
            return f"rank {1 - self.rank if self.size == 2 else 0} has ended, without a word"
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


def _check_unparted(store: dist.Store, ranks: Sequence[int]) -> None:
    try:
        parted = [rank for rank in ranks if store.check([_parted_key(rank)])]
    except dist.DistError as error:
        raise RanksParted("The process that keeps the ranks' store has ended. Start all ranks again.") from error
    if parted:
        raise RanksParted(
            f"Ranks {parted} have failed, or parted from one that did, and cannot share streams any more. Start all "
            "ranks again."
        )


def _parted_key(world_rank: int) -> str:
    return f"longlive/parted/{world_rank}"


def _rank_rows(config: StreamParallelConfig) -> list[list[int]]:
    """Return the ranks that share a stream with this one: one row or, with split branches, one for each branch."""
    if config.mesh is not None:
        return _rows_of_mesh(config, config.mesh)
    world, rank, degree = dist.get_world_size(), dist.get_rank(), config.ulysses_degree
    if world % config.num_ranks:
        branches = " for each of two branches of guidance" if config.cfg_parallel else ""
        raise ValueError(
            f"{world} ranks cannot be divided into streams of {config.num_ranks}: `ulysses_degree` is {degree}"
            f"{branches}."
        )
    first = rank - rank % config.num_ranks
    return [list(range(start, start + degree)) for start in range(first, first + config.num_ranks, degree)]


def _rows_of_mesh(config: StreamParallelConfig, mesh: DeviceMesh) -> list[list[int]]:
    names = ("cfg", "ulysses") if config.cfg_parallel else ("ulysses",)
    missing = [name for name in names if name not in (mesh.mesh_dim_names or ())]
    if missing:
        raise ValueError(f"`mesh` needs dimensions named {names}, it has {mesh.mesh_dim_names}.")
    rows = mesh[names].mesh.reshape(-1, mesh["ulysses"].size()).tolist()
    if len(rows) != (2 if config.cfg_parallel else 1) or len(rows[0]) != config.ulysses_degree:
        raise ValueError(
            f"`mesh` has {len(rows)} x {len(rows[0])} ranks of a stream, but `ulysses_degree` is "
            f"{config.ulysses_degree} and `cfg_parallel` {config.cfg_parallel}."
        )
    in_order = [rank for row in rows for rank in row]
    if in_order != sorted(in_order):  # as the members of a process group are
        raise ValueError(f"The ranks of a stream must ascend in its `mesh`, they are {rows}.")
    return rows


def _new_group(ranks: Sequence[int], **options: Any) -> dist.ProcessGroup:
    # Made by its members alone: other streams of the same world need not take part.
    group = dist.new_group(list(ranks), use_local_synchronization=True, **options)
    assert isinstance(group, dist.ProcessGroup)  # else this process were no member
    return group
