"""Sessions: those of a server, on one device or on several that make each of them together.

Where several ranks share the streams, all of them begin, advance and close the same sessions in the same order: the
first one, which has the clients, tells the others what it does before it does it.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch

from ..models.tiny_decoder import TinyVideoDecoder
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..pipelines.pipeline_output import VideoChunk
from ..pipelines.session import StreamingSession


class Sessions:
    """
    The open sessions of a server, by name. One thread calls all of its methods.

    Args:
        pipelines: The pipelines that make them, by name.
        decoder: Makes their frames in place of the VAE, or None.
    """

    def __init__(self, pipelines: Mapping[str | None, LongLivePipeline], decoder: TinyVideoDecoder | None = None):
        self._pipelines, self._decoder = pipelines, decoder
        self._ranks = next(iter(pipelines.values())).stream_ranks
        self._open: dict[str, StreamingSession] = {}

    @property
    def num_open(self) -> int:
        """How many there are."""
        return len(self._open)

    def open(self, name: str, pipeline: str | None, seed: int, options: Mapping[str, Any]) -> StreamingSession:
        """
        Begin a session.

        Args:
            name: What it is called from now on.
            pipeline: The name of the pipeline that makes it.
            seed: The seed of its noise.
            options: The other arguments of `LongLivePipeline.stream`.

        Raises:
            ValueError: If it cannot be made.
        """
        self._tell(("open", name, pipeline, seed, options))
        generator = torch.Generator().manual_seed(seed)
        self._open[name] = self._pipelines[pipeline].stream(generator=generator, decoder=self._decoder, **options)
        return self._open[name]

    def advance(self, name: str) -> VideoChunk | None:
        """Return the next chunk of a session; None at its end."""
        self._tell(("advance", name))
        return next(self._open[name], None)

    def close(self, name: str) -> None:
        """Close a session and forget it; one that was never opened, too."""
        if name in self._open:
            self._tell(("close", name))
            self._open.pop(name).close()

    def end(self) -> None:
        """Let the other ranks go."""
        self._tell(None)

    def follow(self) -> None:
        """Do what the first rank does, until it ends; for the others.

        Raises:
            RanksParted: If one of the ranks has failed.
        """
        while (order := self._tell(None)) is not None:
            action, *arguments = order
            with contextlib.suppress(ValueError):  # of a session that cannot begin, which the first one has as well
                {"open": self.open, "advance": self.advance, "close": self.close}[action](*arguments)

    def _tell(self, order: tuple | None) -> tuple | None:
        """Return the first rank's order on every rank; what another one does by order, it tells nobody."""
        if self._ranks is None or (self._ranks.rank > 0 and order is not None):
            return order
        return self._ranks.tell("orders", order)
