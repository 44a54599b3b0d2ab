"""What a caption asks for, and whether a chunk shows it: a mark for each attribute that the caption mentions.

A caption may leave out the background or a size; what it does not say cannot be wrong. Where things cannot be told
apart - because their number is not the one asked for, or two are in the same half of the picture - none of their
attributes is right, so that no mark is earned by choosing the most suitable of several.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from judge import Reading, ThingReading, apart
from world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIDE, SIZES, Scene, Thing


ATTRIBUTES = ("count", "background", "color", "shape", "size", "motion")
THING_ATTRIBUTES = ("color", "shape", "size", "motion")
STEADY = "steady"  # the mark for what no caption says: that the same scene goes on
MAX_JUMP = 4.0  # pixels between where a chunk's thing was heading and where the next chunk has it
Marks = dict[str, bool]
_PHRASE = rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_MOTION = rf"\b({'|'.join(MOTIONS)}|not)\b"


@dataclass(frozen=True)
class ExpectedThing:
    """What a thing has to look like; `size` is None if the caption does not say it."""

    color: str
    shape: str
    size: str | None
    motion: str


@dataclass(frozen=True)
class Expectation:
    """What a shot has to show; `background` is None if the caption does not say it. If there are two things, the first
    is the upper one ("stacked") or the left one ("beside")."""

    background: str | None
    things: tuple[ExpectedThing, ...]
    arrangement: str | None = None

    def or_as(self, before: "Expectation") -> "Expectation":
        """Return the expectation after a prompt switch in a shot: what the new caption leaves out stays as `before`.

        Raises:
            ValueError: If the two have different numbers of things, so that they cannot be the same shot.
        """
        if len(self.things) != len(before.things):
            raise ValueError(f"A shot of {len(before.things)} things cannot go on with {len(self.things)}.")
        things = tuple(
            replace(thing, size=thing.size or old.size) for thing, old in zip(self.things, before.things, strict=True)
        )
        return replace(self, background=self.background or before.background, things=things)


def expect(scene: Scene, caption: str | None = None) -> Expectation:
    """
    Return what a caption of a scene asks for.

    Args:
        scene: The scene that is to be seen.
        caption: A result of `world.caption(scene, ...)`; None to ask for everything, as for a video that begins with
            an image of the scene.

    Raises:
        ValueError: If the caption is not one of this scene.
    """
    if caption is None:
        things = tuple(ExpectedThing(thing.color, thing.shape, thing.size, thing.motion) for thing in scene.things)
        return Expectation(scene.background, things, scene.arrangement)
    backgrounds = [name for name in BACKGROUNDS if re.search(rf"\b{name}\b", caption)]
    if backgrounds not in ([], [scene.background]):
        raise ValueError(f"{caption!r} is about a background of {backgrounds}, not {scene.background}.")
    # The upper or left one of two things comes first in captions, as in scenes.
    phrases = list(re.finditer(_PHRASE, caption))
    if len(phrases) != len(scene.things):
        raise ValueError(f"{caption!r} is about {len(phrases)} things, not {len(scene.things)}.")
    ends = [phrase.start() for phrase in phrases[1:]] + [len(caption)]
    things = tuple(
        _said_of(thing, phrase, caption[phrase.end() : end])
        for thing, phrase, end in zip(scene.things, phrases, ends, strict=True)
    )
    return Expectation(scene.background if backgrounds else None, things, scene.arrangement)


def _said_of(thing: Thing, phrase: re.Match, rest: str) -> ExpectedThing:
    """Return what `phrase`, and the first motion in the `rest` after it, say about `thing`."""
    size, *said = phrase.groups()
    moves = re.search(_MOTION, rest)
    motion = "still" if moves is None or moves.group() == "not" else moves.group()
    if said != [thing.color, thing.shape] or size not in (None, thing.size) or motion != thing.motion:
        raise ValueError(f"'{phrase.group()}{rest}' is not about {thing}.")
    return ExpectedThing(thing.color, thing.shape, size, thing.motion)


def judge_chunk(reading: Reading, expected: Expectation) -> Marks:
    """Mark each attribute that is asked for as right or wrong. If there are two things, both have to be right."""
    marks = {"count": reading.count == len(expected.things)}
    if expected.background is not None:
        marks["background"] = reading.background == expected.background
    seen = _in_order(reading, expected)
    for name in THING_ATTRIBUTES:
        expected_values = [getattr(thing, name) for thing in expected.things]
        asked = [index for index, value in enumerate(expected_values) if value is not None]
        if asked:
            marks[name] = bool(seen) and all(getattr(seen[index], name) == expected_values[index] for index in asked)
    return marks


def _in_order(reading: Reading, expected: Expectation) -> Sequence[ThingReading]:
    """Return the things in the order of the scene; none if they cannot be told apart."""
    if len(reading.things) != len(expected.things):
        return ()
    if expected.arrangement is None:
        return reading.things
    axis = "y" if expected.arrangement == "stacked" else "x"
    halves = {getattr(thing, axis) >= SIDE / 2: thing for thing in reading.things}
    return (halves[False], halves[True]) if len(halves) == 2 else ()


def is_steady(before: Reading, after: Reading, *, same_prompt: bool = True) -> bool:
    """Whether a chunk shows the things of the chunk before it, where they were heading.

    Args:
        before: The reading of the chunk before.
        after: The reading of the chunk.
        same_prompt: Whether both have the same prompt. If not, colors may change (motions may always change: the marks
            tell whether they are those asked for).
    """
    if None in (before.count, before.background) or before.count != after.count:
        return False
    if before.background != after.background:
        return False
    names = ("color", "shape", "size") if same_prompt else ("shape", "size")
    remaining = list(after.things)
    for thing in before.things:
        heading = thing.x + thing.dx * before.num_frames, thing.y + thing.dy * before.num_frames
        same = min(remaining, key=lambda other: float(np.hypot(*apart((other.x, other.y), heading))))
        remaining.remove(same)
        if np.hypot(*apart((same.x, same.y), heading)) > MAX_JUMP:
            return False
        if any(getattr(thing, name) is None or getattr(thing, name) != getattr(same, name) for name in names):
            return False
    return True


def judge_shot(chunks: Sequence[Marks]) -> Marks:
    """Mark a shot: an attribute is right if it is right in all chunks, and `"all"` if every attribute is."""
    if not chunks:
        raise ValueError("A shot has at least one chunk, got none.")
    names = dict.fromkeys(name for marks in chunks for name in marks)
    marks = {name: all(chunk.get(name, True) for chunk in chunks) for name in names}
    return marks | {"all": all(marks.values())}
