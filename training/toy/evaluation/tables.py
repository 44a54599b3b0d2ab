"""The shares of right marks, and tables of them, as aligned text and as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evaluation.marks import ATTRIBUTES, STEADY, Marks, judge_shot
from evaluation.videos import JudgedChunk
from longlive_diffusers.benchmark.markdown import markdown_table


COLUMNS = ("all", *ATTRIBUTES, STEADY)
Cell = str | float | int | None
Videos = Sequence[Sequence[JudgedChunk]]


@dataclass(frozen=True)
class Table:
    """A table; `note` explains it, below the title. Floats are shown with one decimal, None as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Cell]] = field(default_factory=list)
    note: str = ""

    def as_text(self) -> str:
        cells = [list(self.columns), *([_shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in cells
        ]
        return "\n".join([self.title, *([self.note] if self.note else []), *(line.rstrip() for line in lines)])

    def as_markdown(self) -> str:
        table = markdown_table(self.columns, [[_shown(cell) for cell in row] for row in self.rows], right_aligned=True)
        return "\n".join([f"### {self.title}", "", *([self.note, ""] if self.note else []), table])


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)


def percent(marks: Sequence[bool]) -> float | None:
    return 100.0 * sum(marks) / len(marks) if marks else None


def chunk_shares(videos: Videos, is_wanted: Callable[[int], bool] = lambda index: True) -> list[Cell]:
    """Return in what percentage of chunks each of `COLUMNS` is right, among those whose index in the video is wanted.
    "all" means that everything that was asked for is right at once."""
    chunks = [chunk.marks for video in videos for index, chunk in enumerate(video) if is_wanted(index)]
    return _shares([{"all": is_right(marks)} | marks for marks in chunks])


def shot_shares(videos: Videos, segment: int | None = None) -> list[Cell]:
    """Return in what percentage of shots each of `COLUMNS` is right in every chunk; "all" includes steadiness.

    Args:
        videos: The judged chunks of each video.
        segment: The index of the segment whose chunks count; None for all chunks.
    """
    shots = [[chunk.marks for chunk in video if segment in (None, chunk.segment)] for video in videos]
    return _shares([judge_shot(shot) for shot in shots])


def is_right(marks: Marks) -> bool:
    """Whether a chunk shows everything that was asked for."""
    return all(right for name, right in marks.items() if name != STEADY)


def _shares(marks: Sequence[Marks]) -> list[Cell]:
    return [percent([one[name] for one in marks if name in one]) for name in COLUMNS]
