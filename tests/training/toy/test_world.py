"""The toy world: what is drawn, said and held out."""

import itertools
import json
import random
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

import world
from data.prompt_dataset import plan_chunks
from data.prompt_list import read_prompts
from longlive_diffusers.video.reader import read_video
from world import COLORS, MOTIONS, SHAPES, SIDE, Part, Scene, Thing


THING = Thing("red", "square", "large", "left", 10.0, 20.0)


def test_a_fifth_is_held_out_and_every_pair_of_attributes_is_seen():
    triples = list(itertools.product(COLORS, SHAPES, MOTIONS))
    seen = [triple for triple in triples if not world.is_held_out(*triple)]
    assert len(seen) == len(triples) * 4 // 5
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert {tuple(triple[i] for i in pair) for triple in seen} == {
            tuple(triple[i] for i in pair) for triple in triples
        }


def test_samples_are_never_of_held_out_combinations_and_fill_their_chunks():
    kinds = Counter()
    for seed in range(300):
        parts = world.draw_sample(random.Random(seed), 8, 2)
        assert sum(part.num_chunks for part in parts) == 8 and parts[0].cut
        kinds[len(parts), all(part.cut for part in parts)] += 1
        for part in parts:
            for thing in part.scene.things:
                assert not world.is_held_out(thing.color, thing.shape, thing.motion)
    assert set(kinds) == {(1, True), (2, True), (3, True), (2, False)}


@pytest.mark.parametrize("num_things", [1, 2])
def test_held_out_scenes_are_all_held_out(num_things):
    for seed in range(50):
        scene = world.draw_scene(random.Random(seed), num_things=num_things, held_out=True)
        assert all(world.is_held_out(thing.color, thing.shape, thing.motion) for thing in scene.things)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4])
def test_short_samples(num_chunks):
    for seed in range(40):
        parts = world.draw_sample(random.Random(seed), num_chunks, 2)
        assert sum(part.num_chunks for part in parts) == num_chunks


def test_a_scene_goes_on_where_it_was():
    for seed in range(6):
        scene = world.draw_scene(random.Random(seed), num_things=1 + seed % 2)
        whole = world.render(scene, 13)
        np.testing.assert_array_equal(whole[5:], world.render(scene.after(5), 8))
        np.testing.assert_array_equal(world.render(scene.after(SIDE), 1)[0], whole[0])


def test_things_start_on_few_places():
    rng = random.Random(4)
    scenes = [world.draw_scene(rng, num_things=1 + index % 2) for index in range(200)]
    places = {(thing.x, thing.y) for scene in scenes if len(scene.things) == 1 for thing in scene.things}
    assert places == set(itertools.product((8, 24, 40, 56), repeat=2))
    assert {thing.y for scene in scenes if scene.arrangement == "stacked" for thing in scene.things} == {16, 48}


def test_the_picture_is_a_torus():
    centered = world.render(Scene("black", (replace(THING, x=32.0, y=32.0),)), 1)
    corner = world.render(Scene("black", (replace(THING, x=0.0, y=0.0),)), 1)
    np.testing.assert_array_equal(np.roll(corner, (32, 32), axis=(1, 2)), centered)


def test_directions():
    for motion, (right, down) in MOTIONS.items():
        thing = replace(THING, motion=motion).after(3)
        assert (thing.x, thing.y) == (10 + 3 * right, 20 + 3 * down)


def test_two_things_never_meet():
    for seed in range(8):
        scene = world.draw_scene(random.Random(seed), num_things=2)
        alone = [world.render(replace(scene, things=(thing,)), 64) for thing in scene.things]
        background = np.array(world.BACKGROUNDS[scene.background])
        covered = [(frames != background).any(axis=3) for frames in alone]
        assert not (covered[0] & covered[1]).any()


def test_a_redirected_scene_changes_motion_or_color_only():
    for seed in range(100):
        rng = random.Random(seed)
        scene = world.draw_scene(rng, num_things=1)
        (before,), (after,) = scene.things, world.redirect(scene, rng).things
        assert (before.motion, before.color) != (after.motion, after.color)
        assert replace(before, motion=after.motion, color=after.color) == after


def test_a_sample_on_disk(tmp_path):
    parts = [
        Part(Scene("black", (THING,)), "one", 2),
        Part(Scene("grey", (THING,)), "two", 1, cut=False),
    ]
    world.write_sample(tmp_path, "000000", parts, 2)
    folder = tmp_path / "caption" / "000000"
    assert (folder / "shot_durations.txt").read_text() == "2 1\n"
    assert json.loads((folder / "000001.json").read_text()) == {"caption": "one"}
    assert json.loads((folder / "000002.json").read_text()) == {"caption": "two", "cut": False}
    for name, frames in (("000001.mp4", 13), ("000002.mp4", 8)):
        pixels, fps = read_video(tmp_path / "video" / "000000" / name)
        assert len(pixels) == frames and fps == world.FPS


def draw(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["world.py", "--num_chunks", "6", "--chunk_size", "2", *options])
    world.main()


def test_prompts_are_the_captions_of_the_videos(tmp_path, monkeypatch):
    draw(monkeypatch, "--prompts", str(tmp_path / "prompts.jsonl"), "--num_samples", "12", "--seed", "3")
    draw(monkeypatch, "--output", str(tmp_path / "set"), "--num_samples", "12", "--seed", "3")
    prompts = read_prompts(tmp_path / "prompts.jsonl")
    videos = read_prompts(tmp_path / "set")
    assert len(prompts) == len(videos) == 12
    for listed, captions in zip(prompts, videos, strict=True):
        assert plan_chunks(listed, 6, "Cut. ") == plan_chunks(captions, 6, "Cut. ")


def test_prompts_have_cuts_and_switches_and_one_or_two_things(tmp_path, monkeypatch):
    draw(monkeypatch, "--prompts", str(tmp_path / "prompts.jsonl"), "--num_samples", "300")
    prompts = read_prompts(tmp_path / "prompts.jsonl")
    kinds = {(len(sample.shots), all(shot.cut for shot in sample.shots)) for sample in prompts}
    assert kinds == {(1, True), (2, True), (3, True), (2, False)}
    assert all(sum(shot.chunks for shot in sample.shots) == 6 for sample in prompts if len(sample.shots) > 1)
    captions = [shot.prompt for sample in prompts for shot in sample.shots]
    things = Counter(sum(text.count(shape) for shape in SHAPES) for text in captions)
    assert set(things) == {1, 2} and things[1] > things[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "missing/prompts.jsonl"], "'missing' does not exist"),
        (["--prompts", "prompts.txt"], "must be a .jsonl file"),
        (["--prompts", "prompts.jsonl", "--output", "set"], "not allowed with argument"),
        (["--prompts", "prompts.jsonl", "--num_samples", "0"], "must be at least 1"),
        ([], "one of the arguments --output --prompts is required"),
    ],
)
def test_where_captions_cannot_be_written(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        draw(monkeypatch, *options)
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_bad_input(monkeypatch, capsys):
    with pytest.raises(ValueError, match="got 3"):
        world.draw_scene(random.Random(0), num_things=3)
    with pytest.raises(ValueError, match="'star'"):
        world.coverage("star", 6.0, np.zeros(1), np.zeros(1))
    monkeypatch.setattr(sys, "argv", ["world.py", "--output", "unused", "--num_samples", "0"])
    with pytest.raises(SystemExit):
        world.main()
    assert "--num_samples" in capsys.readouterr().err
