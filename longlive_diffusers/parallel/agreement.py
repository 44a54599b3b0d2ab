"""What the ranks of a stream agree on while they make it: the first one decides.

Every rank runs the same program, `for chunk in pipe.stream(...)`, but a user types, stops and changes things on one of
them, and random numbers are drawn on each. So before each chunk the first rank tells the others what it is made with,
and after it whether it is handed over; noise, prompts and images are the first rank's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from .stream_ranks import RanksParted, StreamRanks


class Agreement:
    """
    The agreement of the ranks of one stream. With `ranks` None, a process by itself, it agrees with everything, and
    costs nothing.

    Args:
        ranks: The ranks of the stream, or None.
        device: The device that tensors are computed on.
    """

    def __init__(self, ranks: StreamRanks | None, device: torch.device):
        self.ranks, self.device = ranks, device

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that decides."""
        return self.ranks is None or self.ranks.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part."""
        return self.ranks is None

    @property
    def branch(self) -> int | None:
        """Which branch of guidance this rank computes, 0 or 1; None for both."""
        return None if self.ranks is None else self.ranks.branch

    @property
    def branch_group(self) -> dist.ProcessGroup | None:
        """The two ranks that compute a branch of guidance each, for the same frames and heads; None without them."""
        return None if self.branch is None or self.ranks is None else self.ranks.group("branches")

    def unanimous(self, check: Callable[[], Any], describe: Callable[[Any], Mapping[str, Any]]) -> Any:
        """
        Return what `check` returns, if no rank's raises an error and `describe` says the same of all.

        Raises:
            ValueError: On every rank, if one of them raised an error (which it raises itself), or they differ.
        """
        if self.ranks is None:
            return check()
        result, description, error = None, {}, None
        try:
            result = check()
            description = describe(result)
        except BaseException as caught:
            error = caught
        answers = self.ranks.ask_all((None if error is None else _named(error), description))
        if error is not None:
            raise error
        for rank, (refusal, other) in enumerate(answers):
            if refusal is not None:
                raise ValueError(f"Rank {rank} refuses: {refusal}")
            if different := [name for name in description if other.get(name) != answers[0][1].get(name)]:
                values = ", ".join(f"`{name}` is {answers[0][1][name]!r} and {other[name]!r}" for name in different)
                raise ValueError(f"Ranks 0 and {rank} do not ask for the same video: {values}.")
        return result

    def order(self, value: Any) -> Any:
        """Return the first rank's `value`, in the thread that denoises."""
        return value if self.ranks is None else self.ranks.tell("orders", value)

    def turn(self, value: Any) -> Any:
        """Return the first rank's `value`, in the thread that decodes."""
        return value if self.ranks is None else self.ranks.tell("turns", value)

    def tensor(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what the first rank computes, on this rank's device.

        Raises:
            ValueError: If it cannot.
        """
        tensor = self.optional_tensor(compute)
        assert tensor is not None
        return tensor

    def optional_tensor(self, compute: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Like [`tensor`], for what there may be none of.

        Raises:
            ValueError, RuntimeError: If it cannot.
        """
        if self.ranks is None:
            return compute()
        computed, error, told = None, None, None
        if self.leads:
            try:
                computed = compute()
                told = None if computed is None else (tuple(computed.shape), computed.dtype)
            except BaseException as caught:
                error, told = caught, _named(caught)
        told = self.order(told)
        if error is not None:
            raise error
        if isinstance(told, str):
            raise ValueError(f"Rank 0 refuses: {told}")
        if told is None:
            return None
        shape, dtype = told
        tensor = torch.empty(shape, dtype=dtype, device=self.device) if computed is None else computed.to(self.device)
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group=self.ranks.group("tensors"), group_src=0)
        return tensor

    def fail(self, error: BaseException) -> BaseException:
        """Let the other ranks know that this one fails, and return the error to raise here: where it is only the
        consequence of another rank's, one that says so."""
        if self.ranks is None:
            return error
        is_consequence = is_lost_connection(error)
        self.ranks.part(None if is_consequence else _named(error))
        return RanksParted(f"The stream ends: {self.ranks.failure()}.") if is_consequence else error


ALONE = Agreement(None, torch.device("cpu"))
"""The agreement of a process by itself."""


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is not there any more. Gloo has no class for it."""
    if isinstance(error, RanksParted | dist.DistError):
        return True
    return type(error) is RuntimeError and ("gloo" in str(error) or "onnection" in str(error))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
