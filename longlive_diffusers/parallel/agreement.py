"""What the ranks of a stream agree on while they make it: the first one decides.

Every rank runs the same program, `for chunk in pipe.stream(...)`, but a user types, stops and changes things on one of
them, and random numbers are drawn on each. So before each chunk the first rank tells the others what it is made with,
and after it whether it is handed over; noise, prompts and images are the first rank's. Whatever is said bears the
number of its session, so that ranks that go on with different ones get an error.

What all ranks are told of before a session begins, an invalid request or a text encoder that fails, is a ValueError on
the others and leaves them together: they can make the next video. Any other error ends what they share.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

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
        self._session = 0  # its number, once it has one
        self._refusal: BaseException | None = None  # an error that all ranks have been told of
        self._is_refused_elsewhere = False  # whether another rank has an error of its own

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that decides."""
        return self.ranks is None or self.ranks.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether no other rank takes part."""
        return self.ranks is None

    @property
    def is_over(self) -> bool:
        """Whether a rank has failed, so that nothing can be said any more."""
        return self.ranks is not None and self.ranks.have_parted

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
        Begin a session: return what `check` returns, if no rank's raises an error and `describe` says the same of all.

        Raises:
            ValueError: On every rank, if one of them raised an error (which it raises itself), or they differ; if
                an asynchronous session is open.
            RanksParted: If a rank has failed.
        """
        if self.ranks is None:
            return check()
        try:
            self._session = self.ranks.open_session()
        except ValueError as error:
            self._refuse(error)
        result, description, error = None, {}, None
        try:
            result = check()
            description = describe(result)
        except BaseException as caught:
            error = caught
        self.order(None)  # or the error, if the first rank is busy with another session
        answers = self.ranks.ask_all((None if error is None else _named(error), description))
        if error is not None:
            self._refuse(error)
        for rank, (refusal, other) in enumerate(answers):
            if refusal is not None:
                self._refuse(ValueError(f"Rank {rank} refuses: {refusal}"), elsewhere=True)
            if different := [name for name in description if other.get(name) != answers[0][1].get(name)]:
                values = ", ".join(f"`{name}` is {answers[0][1][name]!r} and {other[name]!r}" for name in different)
                self._refuse(ValueError(f"Ranks 0 and {rank} do not ask for the same video: {values}."))
        return result

    def make_asynchronous(self) -> None:
        """
        Let the session be the only one, because its thread talks to the other ranks at any time.

        Raises:
            ValueError: If others are open.
        """
        if self.ranks is not None:
            self.ranks.make_asynchronous(self._session)

    def end(self) -> None:
        """Forget the session, on which nothing more is said."""
        if self.ranks is not None:
            self.ranks.close_session(self._session)

    def order(self, value: Any) -> Any:
        """Return the first rank's `value`, in the thread that denoises."""
        return self._tell("orders", value)

    def turn(self, value: Any) -> Any:
        """Return the first rank's `value`, in the thread that decodes."""
        return self._tell("turns", value)

    def tensor(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return what the first rank computes, on this rank's device.

        Raises:
            ValueError: If it cannot; the first rank raises its own error.
        """
        tensor = self.optional_tensor(compute)
        assert tensor is not None
        return tensor

    def optional_tensor(
        self, compute: Callable[[], torch.Tensor | None], device: torch.device | None = None
    ) -> torch.Tensor | None:
        """Like [`tensor`], for what there may be none of, or what another `device` is for, such as the host.

        Raises:
            ValueError: If it cannot; the first rank raises its own error.
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
            self._refuse(error)
        if isinstance(told, str):
            self._refuse(ValueError(f"Rank 0 refuses: {told}"), elsewhere=True)
        if told is None:
            return None
        (shape, dtype), device = told, device or self.device
        tensor = torch.empty(shape, dtype=dtype, device=device) if computed is None else computed.to(device)
        tensor = tensor.contiguous()
        group = self.ranks.group("orders" if device.type == "cpu" else "tensors")
        dist.broadcast(tensor, group=group, group_src=0)
        return tensor

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Within this, a session begins: ranks that were all told of an error stay together, any other error is
        treated like that of a session."""
        try:
            yield
        except BaseException as error:
            if error is not self._refusal:
                self.fail(error)
            self.end()
            raise

    def fail(self, error: BaseException) -> NoReturn:
        """Let the other ranks know that this one fails, and raise its error or, where that is only the consequence of
        another rank's, one that says so."""
        self.end()
        if self.ranks is None or isinstance(error, RanksParted):
            raise error
        is_consequence = is_lost_connection(error) or (error is self._refusal and self._is_refused_elsewhere)
        _forget_groups(error)
        failure = self.ranks.part(None if is_consequence else _named(error))
        if is_consequence:
            raise RanksParted(f"The video ends: {failure}.") from error
        raise error

    def _tell(self, group: str, value: Any) -> Any:
        if self.ranks is None:
            return value
        session, told = self.ranks.tell(group, (self._session, value))
        if session != self._session:
            raise ValueError(
                f"Rank 0 is busy with its session number {session}, rank {self.ranks.rank} with number "
                f"{self._session}: all ranks begin, advance and close their sessions in the same order."
            )
        return told

    def _refuse(self, error: BaseException, *, elsewhere: bool = False) -> NoReturn:
        self._refusal, self._is_refused_elsewhere = error, elsewhere
        raise error


ALONE = Agreement(None, torch.device("cpu"))
"""The agreement of a process by itself."""


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is not there any more. Gloo has no class for it."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and ("gloo" in str(error) or "onnection" in str(error))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _forget_groups(error: BaseException) -> None:
    """Clear the variables of the calls that an error came through: a group that one of them holds is not closed."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
