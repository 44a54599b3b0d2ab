"""The judge of the toy world reads true videos rightly, and is not fooled by wrong ones."""

import random
from dataclasses import replace

import numpy as np
import pytest

from check_judge import blurred, share_right, through_mp4, unchanged
from evaluation.marks import Expectation, ExpectedThing, expect, is_steady, judge_chunk, judge_shot
from judge import label_patches, read_chunk
from world import COLORS, MOTIONS, SIDE, Scene, Thing, caption, coverage, draw_scene, render


RED = Thing("red", "circle", "large", "right", 20.0, 30.0)
SCENE = Scene("black", (RED,))
PAIR = Scene(
    "teal",
    (Thing("white", "cross", "small", "left", 3.0, 16.0), Thing("pink", "triangle", "large", "still", 60.0, 48.0)),
    "stacked",
)


def marks_of(frames: np.ndarray, scene: Scene = SCENE) -> dict[str, bool]:
    return judge_chunk(read_chunk(frames), expect(scene))


def wrong(frames: np.ndarray, scene: Scene = SCENE) -> set[str]:
    return {name for name, right in marks_of(frames, scene).items() if not right}


def with_thing(scene: Scene, **changes) -> Scene:
    return replace(scene, things=(replace(scene.things[0], **changes),))


@pytest.mark.parametrize(
    "change, num_scenes", [(unchanged, 70), (through_mp4, 20), (blurred, 30)], ids=["drawn", "mp4", "blurred"]
)
def test_true_videos_are_read(change, num_scenes):
    share, psnr = share_right(num_scenes, change, seed=1)
    assert share >= 0.99
    assert change is unchanged or psnr > 26


@pytest.mark.parametrize("frames", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("scene", [SCENE, PAIR], ids=["one", "two"])
def test_any_number_of_frames(scene, frames):
    assert not wrong(render(scene, frames), scene)


def test_floating_frames_and_a_reading():
    reading = read_chunk(render(SCENE, 8).astype(np.float32) / 255)
    assert str(reading) == "large red circle right at 20,30 on black"
    (thing,) = reading.things
    assert (thing.x, thing.y) == pytest.approx((20, 30), abs=0.3)
    assert (thing.dx, thing.dy) == pytest.approx((1, 0), abs=0.05)


def test_things_across_the_border_and_corner():
    for x, y in [(0.0, 0.0), (63.5, 0.3), (32.0, 63.9), (1.0, 33.0)]:
        for motion in MOTIONS:
            scene = with_thing(SCENE, shape="triangle", size="small", x=x, y=y, motion=motion)
            assert not wrong(render(scene, 5), scene)


# -------------------------------------------------- what must not pass as right
def test_other_attributes():
    other = replace(RED, color="blue", shape="square", size="small", motion="up")
    assert wrong(render(Scene("grey", (other,)), 8)) == {"background", "color", "shape", "size", "motion"}


@pytest.mark.parametrize("changes", [{"color": "blue"}, {"shape": "cross"}, {"size": "small"}, {"motion": "left"}])
def test_a_change_half_way(changes):
    before, after = SCENE.after(0), with_thing(SCENE.after(4), **changes)
    assert wrong(np.concatenate([render(before, 4), render(after, 4)])) >= set(changes)


def test_color_and_shape_that_drift():
    red, blue = (render(with_thing(SCENE, color=color), 8).astype(float) for color in ("red", "blue"))
    share = np.linspace(0, 1, 8)[:, None, None, None]
    assert "color" in wrong((red + share * (blue - red)).astype(np.uint8))
    circle, cross = (render(with_thing(SCENE, shape=shape), 8).astype(float) for shape in ("circle", "cross"))
    assert "shape" in wrong((circle + share * (cross - circle)).astype(np.uint8))


def test_two_colors_in_one_thing():
    frames = render(with_thing(SCENE, motion="still"), 8)
    frames[:, 30:] = render(with_thing(SCENE, motion="still", color="yellow"), 8)[:, 30:]
    assert "color" in wrong(frames)


def test_vanishing_fading_and_third_things():
    frames = render(SCENE, 8)
    empty = render(Scene("black", ()), 8)
    flickering = frames.copy()
    flickering[1::2] = empty[1::2]
    assert wrong(flickering) >= {"count", "color", "shape", "motion"}
    fading = frames + np.linspace(0, 1, 8)[:, None, None, None] * (empty.astype(float) - frames)
    assert "count" in wrong(fading.astype(np.uint8))
    assert wrong(empty) >= {"count", "color"}
    third = render(Scene(PAIR.background, (*PAIR.things, replace(RED, size="small", x=32.0, y=32.0))), 8)
    assert wrong(third, PAIR) >= {"count", "color", "shape"}
    assert "background" not in wrong(third, PAIR)


def test_a_ghost_left_behind():
    ghost = replace(RED, x=50.0, y=8.0, size="small")
    both, alone = render(Scene("black", (RED, ghost)), 8), render(SCENE, 8)
    assert "count" in wrong((0.4 * both + 0.6 * alone).astype(np.uint8))


def test_one_odd_frame_in_eight_is_forgiven_two_are_not():
    frames, other = render(SCENE, 8), render(with_thing(SCENE, color="green"), 8)
    frames[3] = other[3]
    assert not wrong(frames)
    frames[6] = other[6]
    assert wrong(frames) == {"color"}


@pytest.mark.parametrize("background", ["brown", "grey"])
def test_background_that_changes(background):
    other = render(replace(SCENE, background=background), 8)
    frames = render(SCENE, 8)
    frames[4:] = other[4:]
    assert wrong(frames) == {"background"}
    halved = render(SCENE, 8)
    halved[:, :, 40:] = other[:, :, 40:]
    assert wrong(halved) >= {"background"}


def moved(speed_x: float, speed_y: float = 0.0, frames: int = 8) -> np.ndarray:
    """The scene with other speeds, in pixels per frame."""
    places = [(RED.x + speed_x * time, RED.y + speed_y * time) for time in range(frames)]
    return np.concatenate([render(with_thing(SCENE, x=x, y=y, motion="still"), 1) for x, y in places])


def motion_of(frames: np.ndarray) -> str | None:
    return read_chunk(frames).things[0].motion


@pytest.mark.parametrize("frames", [5, 8])
@pytest.mark.parametrize(
    "speed, motion",
    [((0.5, 0), "right"), ((-0.5, 0), "left"), ((0, 2.0), "down"), ((0.2, -0.2), "still"), ((1, 1), None)],
)
def test_speeds(speed, motion, frames):
    assert motion_of(moved(*speed, frames)) == motion


def test_motions_that_turn_stop_or_jump():
    there = moved(1.0, frames=5)
    assert motion_of(np.concatenate([there, there[-2:0:-1]])) is None  # there and back
    assert motion_of(np.concatenate([there[:4], np.repeat(there[4:], 5, axis=0)])) is None  # and then it stays
    jumping = render(SCENE, 8)
    jumping[4:] = render(with_thing(SCENE, x=26.0, y=40.0), 4)
    assert motion_of(jumping) is None


def test_pairs_are_told_apart_by_their_places():
    first, second = PAIR.things
    swapped = replace(PAIR, things=(replace(second, y=16.0), replace(first, y=48.0)))
    assert wrong(render(swapped, 8), PAIR) == {"color", "shape", "size", "motion"}
    same_half = replace(PAIR, things=(replace(first, y=2.0, x=10.0), replace(second, y=24.0, x=40.0)))
    assert wrong(render(same_half, 8), PAIR) == {"color", "shape", "size", "motion"}
    one_wrong = replace(PAIR, things=(first, replace(second, color="red")))
    assert wrong(render(one_wrong, 8), PAIR) == {"color"}


def test_pictures_of_noise_are_read_without_harm():
    noise = np.random.default_rng(0)
    for frames in (noise.integers(0, 256, (5, SIDE, SIDE, 3), np.uint8), np.zeros((5, SIDE, SIDE, 3), np.float32)):
        read_chunk(frames)
    coarse = noise.integers(0, 256, (5, 8, 8, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
    assert wrong(coarse) >= {"color", "shape", "motion"}
    ring = np.zeros((5, SIDE, SIDE, 3), np.uint8)
    ring[:, 5:60, 5:60] = 255
    ring[:, 9:56, 9:56] = 0
    assert "shape" in wrong(ring)


# -------------------------------------------------- expectations
def test_expectations_say_what_captions_say():
    texts = set()
    for seed in range(200):
        rng = random.Random(seed)
        scene = draw_scene(rng, num_things=1 + seed % 2)
        text = caption(scene, rng)
        expected = expect(scene, text)
        texts.add(text)
        assert (expected.background is not None) == (scene.background in text)
        words = text.split()
        said = sum(thing.size is not None for thing in expected.things)
        assert said == words.count("small") + words.count("large")
        assert [thing.color for thing in expected.things] == [thing.color for thing in scene.things]
        assert set(judge_chunk(read_chunk(render(scene, 2)), expected).values()) == {True}
    assert len(texts) > 190


def test_sizes_go_to_the_right_thing_of_a_pair():
    text = "a small white cross slides left and below it a pink triangle does not move"
    assert [thing.size for thing in expect(PAIR, text).things] == ["small", None]
    text = "a white cross moves left above a large pink triangle that stays still, teal background"
    expected = expect(PAIR, text)
    assert [thing.size for thing in expected.things] == [None, "large"] and expected.background == "teal"


@pytest.mark.parametrize(
    "text",
    [
        "a blue circle moves right",
        "a red square moves right",
        "a small red circle moves right",
        "a red circle moves left",
        "a red circle stays still",
        "a red circle moves right, grey background",
        "a red circle moves right above a blue cross that moves left",
    ],
)
def test_a_caption_of_another_scene(text):
    with pytest.raises(ValueError, match="about"):
        expect(SCENE, text)


def test_a_switch_keeps_what_its_caption_leaves_out():
    before = Expectation("grey", (ExpectedThing("red", "cross", "small", "up"),))
    after = Expectation(None, (ExpectedThing("blue", "cross", None, "up"),))
    assert after.or_as(before) == Expectation("grey", (ExpectedThing("blue", "cross", "small", "up"),))
    with pytest.raises(ValueError, match="1 things cannot go on with 2"):
        expect(PAIR).or_as(before)


def test_shots_and_steadiness():
    assert judge_shot([{"count": True, "size": True}, {"count": False, "size": True}]) == {
        "count": False,
        "size": True,
        "all": False,
    }
    with pytest.raises(ValueError, match="none"):
        judge_shot([])
    for scene in (SCENE, PAIR):
        first, second = read_chunk(render(scene, 5)), read_chunk(render(scene.after(5), 8))
        assert is_steady(first, second)
    first = read_chunk(render(SCENE, 5))
    for changes in ({"x": 40.0}, {"color": "blue"}, {"shape": "square"}, {"size": "small"}):
        assert not is_steady(first, read_chunk(render(with_thing(SCENE.after(5), **changes), 8)))
    assert not is_steady(first, read_chunk(render(replace(SCENE.after(5), background="brown"), 8)))
    assert not is_steady(first, read_chunk(render(PAIR, 8)))
    recolored = read_chunk(render(with_thing(SCENE.after(5), color="blue", motion="up"), 8))
    assert is_steady(first, recolored, same_prompt=False)


# -------------------------------------------------- bad input
@pytest.mark.parametrize("shape", [(1, SIDE, SIDE, 3), (5, 32, 32, 3), (SIDE, SIDE, 3)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match=str(list(shape)).replace("[", r"\[")):
        read_chunk(np.zeros(shape, np.uint8))


def test_bad_numbers():
    with pytest.raises(ValueError, match="int64"):
        read_chunk(np.zeros((5, SIDE, SIDE, 3), np.int64))
    with pytest.raises(ValueError, match="1 values"):
        frames = np.zeros((5, SIDE, SIDE, 3), np.float32)
        frames[0, 0, 0, 0] = np.nan
        read_chunk(frames)


def test_patches_connect_on_the_torus():
    mask = np.zeros((2, 6, 6), bool)
    mask[0, 0, 0] = mask[0, 5, 0] = mask[0, 0, 5] = mask[0, 3, 3] = mask[1, 0, 0] = True
    labels = label_patches(mask)
    assert labels[0, 0, 0] == labels[0, 5, 0] == labels[0, 0, 5] != labels[0, 3, 3]
    assert len(np.unique(labels)) == 4 and (labels[~mask] == -1).all()


def test_all_shapes_have_the_area_of_their_circle():
    pixels = np.arange(SIDE) - SIDE / 2 + 0.5
    for shape in ("circle", "square", "triangle", "cross"):
        area = coverage(shape, 9.0, pixels[None, :], pixels[:, None]).sum()
        assert area == pytest.approx(np.pi * 81, rel=0.05)
    assert len(COLORS) == 6
