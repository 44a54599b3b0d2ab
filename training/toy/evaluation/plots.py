"""The pictures of the evaluation. This is the only file that needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from longlive_diffusers.atomic_write import new_file


ENLARGED = 3  # pixels of the strip for one pixel of a frame
GAP = 2  # white pixels between frames, enlarged as well


def plot_curves(
    path: Path,
    curves: dict[str, tuple[Sequence[float], Sequence[float | None]]],
    *,
    x_label: str,
    y_label: str,
    marker: tuple[float, str] | None = None,
) -> None:
    """Plot lines of percentages as a PNG.

    Args:
        path: The file to write.
        curves: The x and y values of each line, by its label; None leaves a gap.
        x_label, y_label: The labels of the axes.
        marker: The x value and the label of a vertical line.
    """
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    styles = ("-", "--", "-.", ":")  # so that lines that coincide at 100 % can all be seen
    for index, (label, (x, y)) in enumerate(curves.items()):
        values = [np.nan if value is None else value for value in y]
        axes.plot(x, values, styles[index % len(styles)], marker="." if len(x) < 20 else "", label=label)
    if marker is not None:
        axes.axvline(marker[0], color="gray", linewidth=1)
        axes.annotate(marker[1], (marker[0], 2), color="gray", xytext=(4, 0), textcoords="offset points")
    axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_strip(path: Path, rows: Sequence[tuple[str, np.ndarray]], columns: int) -> None:
    """Draw videos as rows of frames, evenly spaced in time, each under its caption, as a PNG.

    Args:
        path: The file to write.
        rows: The caption and the frames of each video, floating-point `[F, H, W, 3]` in [0, 1].
        columns: The number of frames that are shown of each video.
    """
    height, width = rows[0][1].shape[1:3]
    size = (columns * (width + GAP) * ENLARGED / 100, len(rows) * (height * ENLARGED + 26) / 100)
    figure = Figure(figsize=size, dpi=100)
    for index, (caption, frames) in enumerate(rows):
        moments = np.linspace(0, len(frames) - 1, columns).round().astype(int)
        row = np.ones((height, columns * (width + GAP) - GAP, 3), np.float32)
        for column, moment in enumerate(moments):
            start = column * (width + GAP)
            row[:, start : start + width] = frames[moment]
        bottom = 1 - (index + 1) / len(rows)
        axes = figure.add_axes((0, bottom, 1, height * ENLARGED / (height * ENLARGED + 26) / len(rows)))
        axes.imshow(np.clip(row, 0, 1), interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        axes.set_title(caption, loc="left", fontsize=9, pad=4)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as file:
        figure.savefig(file, format="png")
