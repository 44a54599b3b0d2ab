"""How the ranks of a process group share one stream: diffusers' configuration of context parallelism, and what a
stream has beyond it."""

from dataclasses import dataclass
from typing import Any

from diffusers import ContextParallelConfig, ParallelConfig

from ..number_checks import check_booleans, is_count
from .head_exchange import EXCHANGE_DTYPES
from .layout import check_heads


@dataclass
class StreamParallelConfig(ContextParallelConfig):
    """
    What `enable_parallelism` takes in place of a `ContextParallelConfig`, to choose more than the number of ranks.

    Args:
        ulysses_degree: The number of ranks N that share every forward: each has 1/N of a chunk's frames outside of
            self-attention, and 1/N of the heads, with their KV cache, within it. It divides the number of heads.
        exchange_dtype: What is exchanged between frames and heads: None for the network's own dtype; "fp8" for half
            the bytes of bfloat16, with rounding errors; or "nvfp4", the same except for keys and values on their way
            into an NVFP4 cache with absolute positions, which are sent as they are stored there.
        cfg_parallel: Whether the two branches of classifier-free guidance run on two halves of `2 * ulysses_degree`
            ranks, each with one of the two KV caches.
        parallel_decode: Whether the VAE works on a part of each frame's columns on every rank; else every rank decodes
            (and encodes) everything.
        mesh: A device mesh with a dimension "ulysses" and, for `cfg_parallel`, one "cfg" of size 2; by default,
            consecutive ranks of the world share a stream.

    The other settings of a `ContextParallelConfig` are for attention without a cache, and refused.
    """

    ulysses_degree: int = 1  # pyright: ignore[reportIncompatibleVariableOverride]  # diffusers' may be None
    exchange_dtype: str | None = None
    cfg_parallel: bool = False
    parallel_decode: bool = True

    def __post_init__(self):
        check_booleans(cfg_parallel=self.cfg_parallel, parallel_decode=self.parallel_decode)
        if self.exchange_dtype not in EXCHANGE_DTYPES:
            raise ValueError(f"`exchange_dtype` must be in {list(EXCHANGE_DTYPES)}, got {self.exchange_dtype!r}.")
        if not is_count(self.ulysses_degree) or self.ulysses_degree < 1:
            raise ValueError(f"`ulysses_degree` must be an integer of at least 1, got {self.ulysses_degree!r}.")
        if self.ulysses_degree > 1 or self.ring_degree not in (None, 1):  # one rank is no error here
            super().__post_init__()
        self.ring_degree = self.ring_degree or 1

    @property
    def num_ranks(self) -> int:
        """The number of ranks that make one stream."""
        return self.ulysses_degree * (2 if self.cfg_parallel else 1)


def resolve_stream_config(config: Any, cp_plan: Any, num_heads: int) -> StreamParallelConfig:
    """
    Check a configuration of diffusers, and return what it means for a stream.

    Args:
        config: A `ContextParallelConfig`, a [`StreamParallelConfig`], or a `ParallelConfig` of one.
        cp_plan: What `enable_parallelism` was given as `cp_plan`.
        num_heads: The number of attention heads of the network.

    Raises:
        ValueError: For every kind of parallelism but Ulysses, with the reason; if the number of ranks does not divide
            the number of heads.
    """
    given = type(config).__name__
    if isinstance(config, ParallelConfig):
        config = config.context_parallel_config
    if not isinstance(config, ContextParallelConfig):
        raise ValueError(
            f"A stream is shared with a ContextParallelConfig, got {given}. Tensor parallelism splits the channels "
            "over which queries and keys are normalized, and is not supported."
        )
    if cp_plan is not None:
        raise ValueError(
            "`cp_plan` must be None: plans split arguments and outputs of modules, and know nothing of the KV cache."
        )
    if config.ring_degree not in (None, 1):
        raise ValueError(
            f"`ring_degree` must be 1, got {config.ring_degree}: ring attention passes keys and values of the whole "
            "cache around in every forward; `ulysses_degree` exchanges only those of the chunk."
        )
    if config.ring_anything or config.ulysses_anything:
        raise ValueError(
            "`ring_anything` and `ulysses_anything` must be False: a stream needs no padding of its tokens, and each "
            "rank keeps the KV cache of as many heads."
        )
    if not isinstance(config, StreamParallelConfig):
        config = StreamParallelConfig(ulysses_degree=config.ulysses_degree or 1, mesh=config.mesh)
    check_heads(num_heads, config.ulysses_degree)
    return config
