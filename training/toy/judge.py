"""Read a chunk of a toy-world video: what things it shows, of which color, shape and size, and how they move.

    reading = read_chunk(frames)  # [F, 64, 64, 3]; it is not told the prompt

Every frame is read by itself: the background is the color of most pixels, things are connected patches (on the torus)
of anything else, and each has a color, an outline and a center. Then the frames have to agree. What changes within a
chunk - a color that drifts, a shape that melts, a thing that comes and goes, a motion that turns - is read as None,
"cannot be told". No caption asks for that, so an error is never averaged away. `evaluation/marks.py` compares readings
with what a caption asked for.

It needs only numpy, and takes a few milliseconds per chunk.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIDE, SIZES, coverage


FOREGROUND = 40.0  # distance in RGB from the background; the weakest contrast of the world is 106
DEBRIS = 20  # pixels; patches smaller than that are ignored (a small thing has 113)
NEAR_BACKGROUND = 45.0  # distance in RGB within which a background has its name; two of them are 102 apart or more
NEAR_COLOR = 60.0  # the same for things; the closest two are 128 apart
BACKGROUND_SHARE = 0.7  # of the pixels; two large things leave 0.87
STRONG_SHARE = 0.75  # of the contrast that a thing's strongest pixels have
CORE_SHARE = 0.7  # of the pixels inside a thing that have its color
MIXED_COSINE = 0.97  # between a color and a mixture of it with the background's, both less the background's
MIN_OVERLAP = 0.7  # with the shape it is taken for; the wrong shape of the same area overlaps by 0.55 to 0.85
AGREEMENT = 0.8  # of the frames: 4 of 5, 7 of 8
STILL = 0.35  # pixels per frame; slower is still
MAX_STRAY = 1.5  # pixels that a center may be off the straight line it moves on
RADII = {"small": (4.5, 7.5), "large": (7.5, 11.0)}  # of the circle of the same area: halfway between the two sizes
HALF_WINDOW = 20  # pixels around a center in which outlines are compared; the farthest corner is 14 away
NEXT = np.eye(2 * HALF_WINDOW + 1, k=1)
SOFTEN = np.linalg.matrix_power((NEXT + 2 * np.eye(len(NEXT)) + NEXT.T) / 4, 2)  # binomial blur by one pixel


@dataclass(frozen=True)
class ThingReading:
    """One object throughout a chunk; what cannot be told is None.

    Args:
        color, shape, size, motion: The names that `world.py` uses.
        x, y: The center in the first frame, in pixels.
        dx, dy: The mean velocity, in pixels per frame.
    """

    color: str | None
    shape: str | None
    size: str | None
    motion: str | None
    x: float
    y: float
    dx: float
    dy: float


@dataclass(frozen=True)
class Reading:
    """What a chunk shows. `count` is None where frames differ in how many things they show; then `things` is empty."""

    background: str | None
    count: int | None
    things: tuple[ThingReading, ...]
    num_frames: int

    def __str__(self) -> str:
        """`a large red circle right at 12,50 on black`; a question mark for what cannot be told."""
        things = [
            f"{thing.size or '?'} {thing.color or '?'} {thing.shape or '?'} {thing.motion or '?'} "
            f"at {thing.x:.0f},{thing.y:.0f}"
            for thing in self.things
        ]
        what = "?" if self.count is None else " and ".join(things) or "nothing"
        return f"{what} on {self.background or '?'}"


@dataclass(frozen=True)
class _Patch:
    """A thing in one frame."""

    color: str | None
    shape: str | None
    size: str | None
    center: tuple[float, float]
    area: float


def read_chunk(frames: np.ndarray) -> Reading:
    """
    Read what a chunk shows.

    Args:
        frames: The frames `[F, 64, 64, 3]` with F >= 2, in uint8, or in a floating dtype with values in [0, 1].

    Raises:
        ValueError: For another shape, another dtype, or values that are not finite.
    """
    pictures = _pictures(frames)
    grounds = np.median(pictures.reshape(len(pictures), -1, 3), axis=1)  # things cover an eighth of a frame at most
    difference = np.linalg.norm(pictures - grounds[:, None, None], axis=3)
    labels = label_patches(difference > FOREGROUND)
    patches = [_patches(*frame) for frame in zip(pictures, grounds, labels, strict=True)]
    background = agreed([_background(*frame) for frame in zip(pictures, grounds, strict=True)])
    count = agreed([len(found) for found in patches])
    things = () if count is None else tuple(_thing(*track) for track in _tracks(patches, count))
    return Reading(background, count, things, len(pictures))


def agreed(values: Sequence) -> object | None:
    """Return the value that nearly all frames agree on; None if there is no such value, or if it is None."""
    commonest = max(values, key=lambda value: sum(other == value for other in values))
    return commonest if sum(other == commonest for other in values) >= AGREEMENT * len(values) else None


def apart(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """Return the shortest way from `b` to `a` on the torus, `[x, y]` in pixels."""
    return (np.asarray(a, float) - np.asarray(b, float) + SIDE / 2) % SIDE - SIDE / 2


def label_patches(mask: np.ndarray) -> np.ndarray:
    """Label connected patches on the torus by the smallest index of their pixels.

    Args:
        mask: The pixels that belong to patches, bool `[F, H, W]`.

    Returns:
        int `[F, H, W]`: a different label for each patch of each frame, -1 outside.
    """
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), mask.size)
    while True:
        lowest = labels
        for axis in (1, 2):
            for step in (-1, 1):
                lowest = np.minimum(lowest, np.roll(labels, step, axis))
        lowest = np.where(mask, lowest, mask.size)
        # A label is itself the index of a pixel, whose label may be lower still: jumping there saves iterations.
        lowest = np.append(lowest.ravel(), mask.size)[lowest]
        if np.array_equal(lowest, labels):
            return np.where(mask, labels, -1)
        labels = lowest


def _pictures(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[0] < 2 or frames.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(f"A chunk has shape [F >= 2, {SIDE}, {SIDE}, 3], got {list(frames.shape)}.")
    if frames.dtype == np.uint8:
        return frames.astype(np.float32)
    if not np.issubdtype(frames.dtype, np.floating):
        raise ValueError(f"Frames are uint8, or floating in [0, 1], got {frames.dtype}.")
    if not np.isfinite(frames).all():
        raise ValueError(f"{int((~np.isfinite(frames)).sum())} values of the frames are not finite.")
    return frames.astype(np.float32) * 255


# ------------------------------------------------------------------------------------------------------ single frames
def _background(picture: np.ndarray, ground: np.ndarray) -> str | None:
    name, distance = _nearest(ground, BACKGROUNDS)
    if distance > NEAR_BACKGROUND:
        return None
    pixels = np.linalg.norm(picture - np.array(BACKGROUNDS[name], np.float32), axis=2)
    return name if (pixels < NEAR_BACKGROUND).mean() >= BACKGROUND_SHARE else None


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = np.linalg.norm(np.array(list(palette.values()), np.float32) - color, axis=1)
    return list(palette)[distances.argmin()], float(distances.min())


def _patches(picture: np.ndarray, ground: np.ndarray, labels: np.ndarray) -> list[_Patch]:
    found, areas = np.unique(labels[labels >= 0], return_counts=True)
    return [_patch(picture, ground, labels, label) for label in found[areas >= DEBRIS]]


def _patch(picture: np.ndarray, ground: np.ndarray, labels: np.ndarray, label: int) -> _Patch:
    """Read the patch with the label `label`, in a window around it that is not a torus any more."""
    rows, columns = np.nonzero(labels == label)
    left, top = (_middle(pixels) - HALF_WINDOW for pixels in (columns, rows))
    span = np.arange(2 * HALF_WINDOW + 1)
    window = np.ix_((top + span) % SIDE, (left + span) % SIDE)
    own, others = labels[window] == label, (labels[window] >= 0) & (labels[window] != label)
    if not own.any():  # a ring so wide that it goes around the window
        return _Patch(None, None, None, (left % SIDE, top % SIDE), float(len(rows)))
    above_ground = picture[window] - ground

    distance = np.linalg.norm(above_ground, axis=2)
    strong = own & (distance >= STRONG_SHARE * np.percentile(distance[own], 95))  # edges are mixed with background
    contrast = np.median(above_ground[strong], axis=0)
    color = _color(above_ground[_eroded(own)], contrast, ground)

    # How much of each pixel the thing covers: where the pixel's color lies between the background's and the thing's.
    opacity = np.clip(above_ground @ contrast / max(contrast @ contrast, 1.0), 0, 1)
    opacity = np.where(_grown(_grown(own)) & ~others, opacity, 0)
    area = float(opacity.sum())
    if area < DEBRIS:  # colors that cancel each other out
        return _Patch(color, None, None, (left % SIDE, top % SIDE), area)
    x, y = (float((opacity.sum(axis=axis) * (span + 0.5)).sum() / area) for axis in (0, 1))
    radius = math.sqrt(area / math.pi)
    size = next((name for name, (low, high) in RADII.items() if low <= radius < high), None)
    shape = _shape(opacity, span[None, :] + 0.5 - x, span[:, None] + 0.5 - y, radius)
    return _Patch(color, shape, size, ((left + x) % SIDE, (top + y) % SIDE), area)


def _middle(pixels: np.ndarray) -> int:
    """Return the mean of coordinates on the torus."""
    return round(np.angle(np.exp(2j * np.pi * pixels / SIDE).sum()) / (2 * np.pi) * SIDE)


def _color(pixels: np.ndarray, contrast: np.ndarray, ground: np.ndarray) -> str | None:
    """Return the palette's name for `ground + contrast`, if most of the thing's inner `pixels` `[n, 3]`, less the
    ground, are of that color too, or of it mixed with the background's: a thing of two colors has no name."""
    name, distance = _nearest(ground + contrast, COLORS)
    if distance > NEAR_COLOR or not len(pixels):
        return None
    palette = np.array(list(COLORS.values()), np.float32) - ground
    nearest = np.linalg.norm(pixels[:, None] - palette, axis=2).argmin(axis=1)
    lengths = np.linalg.norm(pixels, axis=1) * np.linalg.norm(contrast)
    alike = pixels @ contrast > MIXED_COSINE * lengths
    is_own = (nearest == list(COLORS).index(name)) | alike
    return name if is_own.mean() >= CORE_SHARE else None


def _eroded(mask: np.ndarray) -> np.ndarray:
    return ~_grown(~mask)


def _grown(mask: np.ndarray) -> np.ndarray:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _shape(opacity: np.ndarray, dx: np.ndarray, dy: np.ndarray, radius: float) -> str | None:
    """Return the shape of this area that overlaps most with `opacity` (intersection over union), drawn sharply or
    blurred by a pixel, because a blurred square must not pass for a circle."""
    sharp = np.stack([coverage(name, radius, dx, dy) for name in SHAPES])
    drawn = np.stack([sharp, SOFTEN @ sharp @ SOFTEN])  # [2, shapes, H, W]
    overlaps = np.minimum(opacity, drawn).sum(axis=(2, 3)) / np.maximum(opacity, drawn).sum(axis=(2, 3))
    best = int(overlaps.max(axis=0).argmax())
    return SHAPES[best] if overlaps[:, best].max() >= MIN_OVERLAP else None


# ------------------------------------------------------------------------------------------------ from frame to frame
def _tracks(frames: list[list[_Patch]], count: int) -> list[tuple[list[int], list[_Patch]]]:
    """Return, for each thing, the indices of the frames that show `count` things, and its patches in these frames."""
    tracks: list[tuple[list[int], list[_Patch]]] = []
    for index, patches in enumerate(frames):
        if len(patches) != count:
            continue
        if not tracks:
            tracks = [([index], [patch]) for patch in sorted(patches, key=lambda patch: -patch.area)]
            continue
        ways = [
            (np.hypot(*apart(patch.center, track[1][-1].center)), i, j)
            for i, track in enumerate(tracks)
            for j, patch in enumerate(patches)
        ]
        continued, taken = set(), set()
        for _, i, j in sorted(ways):  # the closest go together
            if i not in continued and j not in taken:
                tracks[i][0].append(index)
                tracks[i][1].append(patches[j])
                continued.add(i)
                taken.add(j)
    return tracks


def _thing(times: list[int], patches: list[_Patch]) -> ThingReading:
    steps = [apart(later.center, earlier.center) for earlier, later in pairwise(patches)]
    path = np.array(patches[0].center) + np.concatenate([np.zeros((1, 2)), np.cumsum(np.array(steps), axis=0)])
    when = np.array(times, float)
    velocity, start = np.polyfit(when, path, 1)
    strays = np.abs(start + velocity * when[:, None] - path).max()
    # Both halves have to move like the whole: a thing that stops, starts or turns on the way has no single motion.
    half = len(when) // 2
    parts = [(when, path)]
    if len(when) >= 4:
        parts += [(when[: half + 1], path[: half + 1]), (when[half:], path[half:])]
    motions = {_motion(np.polyfit(part_when, part_path, 1)[0]) for part_when, part_path in parts}
    motion = motions.pop() if len(motions) == 1 and strays <= MAX_STRAY else None
    x, y = start % SIDE
    return ThingReading(
        agreed([patch.color for patch in patches]),
        agreed([patch.shape for patch in patches]),
        agreed([patch.size for patch in patches]),
        motion,
        *(float(value) for value in (x, y, *velocity)),
    )


def _motion(velocity: np.ndarray) -> str | None:
    """Return the motion of a velocity `[x, y]` in pixels per frame; None for a diagonal one."""
    direction = tuple(int(speed) for speed in np.where(np.abs(velocity) < STILL, 0, np.sign(velocity)))
    return next((name for name, step in MOTIONS.items() if step == direction), None)


assert set(RADII) == set(SIZES)
