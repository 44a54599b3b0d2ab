"""How far a video has come that is decoded or encoded call by call."""

from collections.abc import Iterator
from contextlib import contextmanager


class VideoSoFar:
    """`shape` has what the calls of a video have in common, (batch, height, width); None before the first is done."""

    def __init__(self):
        self.shape: tuple[int, ...] | None = None
        self._is_torn = False

    @contextmanager
    def continued(self, shape: tuple[int, ...]) -> Iterator[bool]:
        """
        Do the work of a call, which tells it whether it opens the video. An error in it, out of memory for example,
        leaves features of two moments: to undo that, all of them would have to be kept twice.

        Raises:
            RuntimeError: If the work of an earlier call was not done to its end.
        """
        if self._is_torn:
            raise RuntimeError("An error has ended the call before in the middle of the video: `reset()` first.")
        self._is_torn = True
        yield self.shape is None
        self.shape, self._is_torn = shape, False
