"""What a server has done so far, in the text format of Prometheus."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping

from ..latency import quantile
from ..pipelines.pipeline_output import VideoChunk


RECENT = 1000  # measurements that quantiles are of


class Summary:
    """A measured duration: its sum and count since the beginning, and quantiles of the latest."""

    def __init__(self):
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._sum, self._count = 0.0, 0

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self._sum += seconds
        self._count += 1

    def lines(self, name: str) -> Iterable[str]:
        """Yield the samples of this summary, with all their digits: a rate is the small difference of large sums."""
        if self._recent:
            for part in (0.5, 0.95):
                yield f'{name}{{quantile="{part}"}} {quantile(self._recent, part)!r}'
        yield f"{name}_sum {self._sum!r}"
        yield f"{name}_count {self._count}"


class Metrics:
    """Counts what a server does."""

    def __init__(self):
        self._chunks, self._frames = 0, 0
        self._ended: Counter[str] = Counter()
        self._summaries = {
            "denoise": (Summary(), "To denoise a chunk."),
            "decode": (Summary(), "To decode a chunk."),
            "first_frame": (Summary(), "From a stream's start to its first frames, encoded; waiting is not in it."),
            "between_chunks": (Summary(), "Between two chunks of a stream, as they leave."),
        }

    def count_chunk(self, chunk: VideoChunk) -> None:
        """Count a chunk that was made, or a part of one; how long a part takes to decode says nothing of chunks."""
        self._chunks += chunk.is_complete
        self._frames += len(chunk.frames[0])
        if chunk.part == 0:
            self.measure("denoise", chunk.denoise_seconds)
        if chunk.num_parts == 1:
            self.measure("decode", chunk.decode_seconds)

    def count_end(self, reason: str) -> None:
        """Count a stream that is over."""
        self._ended[reason] += 1

    def measure(self, name: str, seconds: float) -> None:
        """Add a measurement of one of the summaries."""
        self._summaries[name][0].add(seconds)

    def as_text(self, gauges: Mapping[str, tuple[float, str]]) -> str:
        """Return all of it, with what is measured now: values and their descriptions, by name."""
        lines = []
        for name, (value, text) in gauges.items():
            lines += [*_head(name, "gauge", text), f"longlive_{name} {value!r}"]
        lines += [*_head("chunks_total", "counter", "Chunks made."), f"longlive_chunks_total {self._chunks}"]
        lines += [*_head("frames_total", "counter", "Frames made."), f"longlive_frames_total {self._frames}"]
        lines += _head("streams_ended_total", "counter", "Streams that are over, by the reason of their end.")
        lines += [f'longlive_streams_ended_total{{reason="{name}"}} {n}' for name, n in sorted(self._ended.items())]
        for name, (summary, text) in self._summaries.items():
            lines += [*_head(f"{name}_seconds", "summary", text), *summary.lines(f"longlive_{name}_seconds")]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP longlive_{name} {text}", f"# TYPE longlive_{name} {kind}"]
