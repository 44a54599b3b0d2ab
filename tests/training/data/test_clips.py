"""Items: which frames, prompts, shots and losses they have; and which samples give none."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import clip_index
from data.clips import Clip, VideoDataset
from data.conditioning import condition_chunks
from tests.support.training_sets import (
    SIDE,
    clip_path,
    frame_numbers,
    truncate,
    write_captions,
    write_sample,
    write_sound,
)


PREFIX = "The scene transitions. "


def dataset(root, **arguments) -> VideoDataset:
    """Of 6 latent frames (21 frames) in chunks of 2 (5, then 8 frames)."""
    defaults = {"num_latent_frames": 6, "chunk_size": 2, "height": SIDE, "width": SIDE, "progress": False}
    return VideoDataset(root, **{**defaults, **arguments})


# Chunks and prompts, without videos.


@st.composite
def clips_and_chunks(draw):
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    clips = [Clip(None, f"clip {number}", number == 0 or draw(st.booleans())) for number in range(len(counts))]
    return clips, counts, sum(counts) + draw(st.integers(0, 3))


@settings(deadline=None)
@given(clips_and_chunks(), st.booleans())
def test_the_conditioning_of_chunks(drawn, recache):
    clips, counts, num_chunks = drawn
    conditioning = condition_chunks(clips, counts, num_chunks, scene_cut_prefix=PREFIX, recache_switches=recache)
    assert len(conditioning.prompts) == len(conditioning.shot_index) == len(conditioning.loss_mask) == num_chunks
    used = sum(counts)
    clip_of_chunk = [number for number, count in enumerate(counts) for _ in range(count)]
    assert conditioning.shot_index[0] == 0
    for i in range(1, used):
        begins = clip_of_chunk[i] != clip_of_chunk[i - 1] and clips[clip_of_chunk[i]].cut
        assert conditioning.shot_index[i] == conditioning.shot_index[i - 1] + begins
        assert conditioning.prompts[i].startswith(PREFIX) == begins, (
            "the prefix is on the first chunk of every shot but one"
        )
    assert not conditioning.prompts[0].startswith(PREFIX)
    for i in range(used):
        own = clips[clip_of_chunk[i]].caption
        last = max(j for j in range(used) if conditioning.shot_index[j] == conditioning.shot_index[i])
        shown = clips[clip_of_chunk[last]].caption if recache else own
        assert conditioning.prompts[i].removeprefix(PREFIX) == shown
        assert conditioning.loss_mask[i] == (shown == own)
    for i in range(used, num_chunks):
        assert conditioning.prompts[i] == clips[-1].caption
        assert conditioning.shot_index[i] == conditioning.shot_index[used - 1]
        assert not conditioning.loss_mask[i]


# Items.


def test_an_item(tmp_path):
    write_sample(tmp_path, "a", [21])
    item = dataset(tmp_path)[0]
    assert item["pixels"].shape == (3, 21, SIDE, SIDE) and item["pixels"].dtype == torch.float32
    assert item["pixels"].min() >= -1 and item["pixels"].max() <= 1
    assert frame_numbers(item["pixels"]) == list(range(21))
    assert item["prompts"] == ["shot 0"] * 3
    assert item["shot_index"].tolist() == [0, 0, 0] and item["shot_index"].dtype == torch.int64
    assert item["loss_mask"].tolist() == [True] * 3 and item["loss_mask"].dtype == torch.bool
    assert item["name"] == "a"


def test_shots_give_whole_chunks_and_the_prefix_is_where_they_begin(tmp_path):
    write_sample(tmp_path, "a", [7, 11, 9])
    data = dataset(tmp_path)
    assert frame_numbers(data[0]["pixels"]) == [0, 1, 2, 3, 4, *range(7, 15), *range(18, 26)]
    assert data[0]["prompts"] == ["shot 0", PREFIX + "shot 1", PREFIX + "shot 2"]
    assert data[0]["shot_index"].tolist() == [0, 1, 2]
    assert data.distinct_prompts() == ["shot 0", PREFIX + "shot 1", PREFIX + "shot 2"]
    assert dataset(tmp_path, scene_cut_prefix="Cut: ")[0]["prompts"][1] == "Cut: shot 1"


def test_a_full_video_takes_no_more_clips(tmp_path):
    write_sample(tmp_path, "a", [5, 16, 2])  # the last would be too short
    assert dataset(tmp_path)[0]["shot_index"].tolist() == [0, 1, 1]


def test_durations_and_the_longest_shot(tmp_path):
    write_sample(tmp_path, "a", [21, 21, 21], durations="1 2 1")
    data = dataset(tmp_path, num_latent_frames=8)
    assert data[0]["shot_index"].tolist() == [0, 1, 1, 2]
    assert frame_numbers(data[0]["pixels"]) == [*range(5), *range(21, 37), *range(42, 50)]
    data = dataset(tmp_path, num_latent_frames=8, max_chunks_per_shot=1)
    assert data[0]["shot_index"].tolist() == [0, 1, 2, 2]
    assert data[0]["loss_mask"].tolist() == [True] * 3 + [False]


def test_a_short_video_is_padded_or_left_out(tmp_path):
    write_sample(tmp_path, "long", [21])
    write_sample(tmp_path, "short", [5, 8], durations="9 9")
    item = dataset(tmp_path)[1]
    assert frame_numbers(item["pixels"]) == [*range(13), *[12] * 8]
    assert torch.equal(item["pixels"][:, 20], item["pixels"][:, 12])
    assert item["prompts"] == ["shot 0", PREFIX + "shot 1", "shot 1"]
    assert item["shot_index"].tolist() == [0, 1, 1]
    assert item["loss_mask"].tolist() == [True] * 2 + [False]
    data = dataset(tmp_path, pad_short_videos=False)
    assert data.names == ["long"]
    assert data.skipped == {"short": "its 2 clip(s) give 2 chunks of 2 latent frames, but a video has 3"}


def test_a_prompt_switch_is_trained_as_it_is_generated(tmp_path):
    goes_on = {"caption": "new", "cut": False}
    write_sample(tmp_path, "a", [5, 8, 8, 8], ["first", "old", goes_on, {"caption": "newest", "cut": False}])
    item = dataset(tmp_path, num_latent_frames=8)[0]
    assert item["prompts"] == ["first", PREFIX + "newest", "newest", "newest"]
    assert item["shot_index"].tolist() == [0, 1, 1, 1]
    assert item["loss_mask"].tolist() == [True, False, False, True]
    item = dataset(tmp_path)[0]  # the last switch is not reached
    assert item["prompts"] == ["first", PREFIX + "new", "new"]
    item = dataset(tmp_path, num_latent_frames=8, recache_switches=False)[0]
    assert item["prompts"] == ["first", PREFIX + "old", "new", "newest"]
    assert item["loss_mask"].all()


# Samples that are left out.


def test_samples_with_clips_that_cannot_be_used_are_left_out_and_named(tmp_path, caplog):
    write_sample(tmp_path, "good", [21])
    write_sample(tmp_path, "short", [4])
    write_sample(tmp_path, "second short", [5, 7])
    write_sample(tmp_path, "truncated", [20])
    truncate(clip_path(tmp_path, "truncated"))
    write_sample(tmp_path, "empty", [21])
    clip_path(tmp_path, "empty").write_bytes(b"")
    write_captions(tmp_path, "sound", ["a song"])
    write_sound(clip_path(tmp_path, "sound"))
    data = dataset(tmp_path)
    assert data.names == ["good"] and len(data) == 1
    reasons = {
        "short": "000001.mp4' has 4 frames at 24 a second, but its first chunk of 2 latent frames needs 5",
        "second short": "000002.mp4' has 7 frames at 24 a second, but its first chunk of 2 latent frames needs 8",
        "truncated": "000001.mp4' is damaged or incomplete: it breaks off after 19",
        "empty": "000001.mp4' cannot be read as a video",
        "sound": "000001.mp4' holds no video",
    }
    assert data.skipped.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in data.skipped[name]
        assert reason in caplog.text
    assert "5 of 6 samples were left out" in caplog.text


def test_a_set_without_a_usable_video_is_refused(tmp_path):
    write_sample(tmp_path, "short", [4])
    with pytest.raises(ValueError, match=r"no sample that can be used; 1 of 1 .* left out: 'short': .* needs 5"):
        dataset(tmp_path)


def test_a_clip_that_breaks_after_the_dataset_was_made_is_an_error_that_names_it(tmp_path):
    write_sample(tmp_path, "a", [21])
    data = dataset(tmp_path)
    path = clip_path(tmp_path, "a")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a/000001.mp4'"):
        data[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_latent_frames": 5}, r"a multiple of 2 \(chunks\), got 5"),
        ({"num_latent_frames": 0}, "got 0"),
        ({"chunk_size": 0}, "got 6"),
        ({"height": 0}, "at least 1, got 0x32"),
        ({"fps": 0}, r"fps must be in \(0, 1000\], got 0"),
        ({"max_chunks_per_shot": 0}, "max_chunks_per_shot must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, **arguments)


# What is remembered about clips.


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The clips that are decoded to find out how long they are, by name of the sample."""
    looked_at: list[str] = []
    count_frames = clip_index.count_frames

    def counted(path, fps, limit):
        looked_at.append(path.parent.name)
        return count_frames(path, fps, limit)

    monkeypatch.setattr(clip_index, "count_frames", counted)
    return looked_at


def test_a_clip_is_looked_at_once_until_it_changes(tmp_path, decoded):
    root, index = tmp_path / "set", tmp_path / "index"
    for name in ("a", "b", "short"):
        write_sample(root, name, [4 if name == "short" else 21])
    first = dataset(root, index_folder=index)
    assert decoded == ["a", "b", "short"]
    second = dataset(root, index_folder=index)
    assert decoded == ["a", "b", "short"]
    assert (second.names, second.skipped) == (first.names, first.skipped)
    assert [path.name for path in index.iterdir()] == ["clips.json"], "nothing temporary is left"

    status = clip_path(root, "b").stat()
    os.utime(clip_path(root, "b"), ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    write_sample(root, "short", [21])
    assert dataset(root, index_folder=index).names == ["a", "b", "short"]
    assert decoded[3:] == ["b", "short"]
    dataset(root, index_folder=index, fps=12)
    assert decoded[5:] == ["a", "b", "short"], "another rate is another question"
    dataset(root)
    assert decoded[8:] == ["a", "b", "short"], "without a folder nothing is remembered"


@pytest.mark.parametrize(
    "content",
    [
        '{"format": 2, "clips": {"',
        '{"format": 1, "clips": {}}',
        '{"format": 2}',
        '{"format": 2, "clips": []}',
        '{"format": 2, "clips": {"/a.mp4|24|24": {}}}',
        '{"format": 2, "clips": {"/a.mp4|24|24": {"stamp": 1, "frames": 2, "digest": "0", "problem": null}}}',
        '{"format": 2, "clips": {"/a.mp4|24|24": {"stamp": [1], "frames": "2", "digest": "0", "problem": null}}}',
        "[" * 100_000,
        "[]",
        "\x00",
    ],
    ids=lambda content: content[:90],
)
def test_a_damaged_index_is_made_again(tmp_path, decoded, caplog, content):
    write_sample(tmp_path, "a", [21])
    (tmp_path / "clips.json").write_text(content)
    dataset(tmp_path, index_folder=tmp_path)
    assert decoded == ["a"] and "clips.json" in caplog.text
    assert len(json.loads((tmp_path / "clips.json").read_text())["clips"]) == 1


def test_what_was_found_out_survives_an_interruption(tmp_path, monkeypatch):
    for name in "ab":
        write_sample(tmp_path, name, [21])
    count_frames = clip_index.count_frames

    def interrupted(path, fps, limit):
        if path.parent.name == "b":
            raise KeyboardInterrupt
        return count_frames(path, fps, limit)

    monkeypatch.setattr(clip_index, "count_frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset(tmp_path, index_folder=tmp_path)
    assert len(json.loads((tmp_path / "clips.json").read_text())["clips"]) == 1


def test_two_processes_keep_each_others_answers(tmp_path):
    write_sample(tmp_path, "a", [21])
    ours, theirs = (clip_index.ClipIndex(tmp_path, rate, 24) for rate in (24, 12))
    ours.look_at(clip_path(tmp_path, "a"))
    theirs.look_at(clip_path(tmp_path, "a"))
    ours.save()
    theirs.save()
    assert len(json.loads((tmp_path / "clips.json").read_text())["clips"]) == 2
