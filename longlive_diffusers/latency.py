"""The latency of a stream, as numbers."""


class Latency:
    """The chunks of a stream, as they are handed over."""

    def __init__(self, fps: float = 24):
        self._fps, self._arrivals = fps, []

    def add(self, seconds: float, num_frames: int) -> None:
        """Add a chunk, handed over so many seconds after the beginning."""
        self._arrivals.append((seconds, num_frames))

    def as_dict(self) -> dict[str, float | None]:
        """Return the numbers by name."""
        return {"first_frame": self._arrivals[0][0] if self._arrivals else None, "stalls": 0}


def quantile(values, part: float) -> float:
    """Return a quantile."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]
