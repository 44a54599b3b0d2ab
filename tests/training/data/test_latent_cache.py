"""Caches: what direct encoding gives, whole after any interruption, and never of other settings."""

import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from data.cache_files import save_tensor
from data.clips import VideoDataset
from data.latent_cache import LatentDataset, collate
from data.loading import batches
from data.sample_list import describe
from data.sampler import EpochSampler, WithSampleId
from longlive_diffusers.models.streaming_vae import encode_video, normalize_latents
from tests.support.paths import PROGRAMS
from tests.support.processes import ForkedProcess, environment
from tests.support.tiny_pipeline import TEXT_DIM, TEXT_LENGTH, tiny_pipeline
from tests.support.tiny_vae import tiny_vae
from tests.support.training_caches import build, build_text, contents, dataset, encode, latents_file
from tests.support.training_sets import clip_path, gray_frames, write_captions, write_sample, write_video


VAE_CHANNELS = 8


@pytest.fixture(scope="module")
def vae():
    return tiny_vae(VAE_CHANNELS)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """Three samples: one of one shot, one of two shots, one that is padded."""
    root = tmp_path_factory.mktemp("set")
    write_sample(root, "a", [13], ["a cat runs"])
    write_sample(root, "b", [5, 8], ["a cat runs", "a dog sleeps on the grass"])
    write_sample(root, "c", [5], ["a fox"])
    return root


@pytest.fixture
def root(written, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "set"))


@pytest.fixture
def built(root, tmp_path, vae) -> tuple[VideoDataset, AutoencoderKLWan, Path, Path]:
    """The videos, their VAE, and the complete caches of latents and texts."""
    data = dataset(root)
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    return data, vae, build(data, vae, tmp_path / "latents"), text


# Latents.


def test_items_are_those_of_direct_encoding(root, tmp_path, vae):
    data = dataset(root)
    build(data, vae, tmp_path / "latents")
    build_text(data.distinct_prompts(), tmp_path / "text")
    cached = LatentDataset(tmp_path / "latents", tmp_path / "text", TEXT_LENGTH)
    assert (len(cached), cached.names, cached.chunk_size, cached.num_latent_frames) == (3, ["a", "b", "c"], 2, 4)
    assert cached.prompts == data.distinct_prompts()
    for direct, item in zip(data, cached, strict=True):
        latents = encode_video(vae, direct["pixels"][None])[0]
        assert item["latents"].dtype == torch.float32 and torch.equal(item["latents"], latents)
        assert torch.equal(item["prompt_embeds"], encode(direct["prompts"]))
        assert torch.equal(item["shot_index"], direct["shot_index"])
        assert torch.equal(item["loss_mask"], direct["loss_mask"])
        assert item["name"] == direct["name"]


def test_latents_are_those_of_the_pipeline(root, vae):
    pixels = dataset(root)[1]["pixels"][None]
    latents = encode_video(vae, pixels)
    assert torch.equal(latents, tiny_pipeline(vae=vae).encode_video(pixels))
    with torch.no_grad():
        torch.testing.assert_close(latents, normalize_latents(vae, vae.encode(pixels).latent_dist.mean))
        first = encode_video(vae, pixels[:, :, :1])
    assert torch.equal(first, latents[:, :, :1]), "latent frame 0 is the encoding of the first image alone"


def test_the_videos_are_no_longer_needed(root, tmp_path, vae):
    data = dataset(root)
    build(data, vae, tmp_path / "latents")
    build_text(data.distinct_prompts(), tmp_path / "text")
    names = data.names
    shutil.rmtree(root)
    cached = LatentDataset(tmp_path / "latents", tmp_path / "text")
    assert [item["name"] for item in cached] == names


def test_batches_and_dtypes(root, tmp_path, vae):
    data = dataset(root)
    whole = build(data, vae, tmp_path / "one by one")
    batched = build(data, vae, tmp_path / "batched", batch_size=2)
    half = build(data, vae, tmp_path / "half", dtype=torch.bfloat16)
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    one, two, low = (LatentDataset(folder, text) for folder in (whole, batched, half))
    for i in range(3):
        torch.testing.assert_close(two[i]["latents"], one[i]["latents"])
        assert low[i]["latents"].dtype == torch.float32
        assert torch.equal(low[i]["latents"], one[i]["latents"].bfloat16().float())


def test_ranks_share_the_work(root, tmp_path, vae):
    data = dataset(root)
    alone = build(data, vae, tmp_path / "alone")
    together = build(data, vae, tmp_path / "together", rank=1, num_ranks=2)
    assert list(together.glob("*.safetensors")) == [latents_file(together, 1)]
    build(data, vae, together, rank=0, num_ranks=2)
    assert contents(together) == contents(alone)


def test_decoding_in_other_processes(root, tmp_path, vae):
    data = dataset(root)
    assert contents(build(data, vae, tmp_path / "2", num_workers=2)) == contents(build(data, vae, tmp_path / "0"))


def test_an_incomplete_cache_is_refused(root, tmp_path, vae):
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents", rank=0, num_ranks=2)
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    with pytest.raises(ValueError, match="is not complete: 1 of 3 samples are missing, first 'b'"):
        LatentDataset(folder, text)
    build(data, vae, folder)
    LatentDataset(folder, text)
    shutil.rmtree(text)
    build_text(data.distinct_prompts()[:1], text)
    with pytest.raises(ValueError, match="2 of 3 prompts are not in the cache"):
        LatentDataset(folder, text)
    with pytest.raises(ValueError, match=r"'.*nowhere' is no cache: it has no 'settings.json'"):
        LatentDataset(tmp_path / "nowhere", text)


# Damage and interruptions.


def test_what_is_complete_is_not_made_again(root, tmp_path, vae):
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    build(data, vae, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("size", [0, 5, -1])
def test_a_truncated_file_is_named_and_made_again(root, tmp_path, vae, caplog, size):
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents")
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    before = contents(folder)
    path = latents_file(folder, 1)
    path.write_bytes(before[path.name][:size])
    with pytest.raises(ValueError, match=rf"{path.name}' is damaged: .*; delete it and build the cache again"):
        LatentDataset(folder, text)[1]
    build(data, vae, folder)
    assert contents(folder) == before
    assert f"{path.name}' is damaged and is made again" in caplog.text


def test_a_changed_file_is_noticed_when_it_is_read(root, tmp_path, vae):
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents")
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    before = contents(folder)
    path = latents_file(folder, 2)
    changed = bytearray(before[path.name])
    changed[-3] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=rf"{path.name}' is damaged: its content does not match its checksum"):
        LatentDataset(folder, text)[2]
    build(data, vae, folder)
    assert path.read_bytes() == changed, "that would take reading every file"


def test_a_list_of_samples_that_is_missing_is_made_again(built):
    data, vae, folder, text = built
    before = contents(folder)
    (folder / "samples.json").unlink()
    with pytest.raises(ValueError, match=r"is no cache: it has no 'samples.json'"):
        LatentDataset(folder, text)
    build(data, vae, folder)
    assert contents(folder) == before


def test_two_that_build_the_same_do_no_harm(root, tmp_path):
    data = dataset(root)
    vaes = [tiny_vae(VAE_CHANNELS) for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(build, data, vae, tmp_path / "both") for vae in vaes[:2]]
        assert [future.result() for future in both] == [tmp_path / "both"] * 2
    assert contents(tmp_path / "both") == contents(build(data, vaes[2], tmp_path / "alone"))


def test_a_build_that_is_killed_goes_on(root, tmp_path, vae):
    folder = tmp_path / "latents"
    process = ForkedProcess([PROGRAMS / "build_latent_cache.py", root, folder, VAE_CHANNELS], environment())
    written = list(itertools.islice(process.lines(), 2))
    process.kill()
    assert written == [latents_file(folder, i).name for i in (0, 1)]
    assert process.poll() == -signal.SIGKILL
    assert {path.name for path in folder.glob("*.safetensors")} == set(written)
    first = latents_file(folder, 0).stat().st_mtime_ns
    leftover = folder / f"{latents_file(folder, 2).name}.0123.tmp"
    leftover.write_bytes(b"what was being written")
    build(dataset(root), vae, folder)
    assert latents_file(folder, 0).stat().st_mtime_ns == first, "what was whole is kept"
    leftover.unlink()
    assert contents(folder) == contents(build(dataset(root), vae, tmp_path / "at once"))


# Other settings.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 16}, "height is 32 there, but 16 here"),
        ({"width": 48}, "width is 32 there, but 48 here"),
        ({"num_latent_frames": 2}, "num_latent_frames is 4 there, but 2 here"),
        ({"chunk_size": 1}, "chunk_size is 2 there, but 1 here"),
        ({"fps": 12.5}, "fps is '24' there, but '25/2' here"),
    ],
)
def test_a_cache_of_other_data_settings_is_refused(root, tmp_path, vae, arguments, message):
    folder = build(dataset(root), vae, tmp_path / "latents")
    before = contents(folder)
    advice = r"Use its settings or another --data_cache_dir; or delete the folder, so that it is made again"
    with pytest.raises(ValueError, match=f"latents' was made with other settings: .*{message}.*{advice}"):
        build(dataset(root, **arguments), vae, folder)
    assert contents(folder) == before


def test_a_cache_of_another_vae_or_dtype_is_refused(root, tmp_path, vae):
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents")
    other = tiny_vae(VAE_CHANNELS)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1e-3)
    with pytest.raises(ValueError, match=r"other settings: vae.weights is '\w{64}' there, but '\w{64}' here\. "):
        build(data, other, folder)
    with pytest.raises(ValueError, match=r"latent_dtype is 'torch.float32' there, but 'torch.bfloat16' here"):
        build(data, vae, folder, dtype=torch.bfloat16)
    other.register_to_config(latents_mean=[0.5] * VAE_CHANNELS)
    with pytest.raises(ValueError, match=r"vae.latents_mean is .* there, but '\[0.5, "):
        build(data, other, folder)
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    with pytest.raises(ValueError, match="height is 32 there, but 704 here"):
        LatentDataset(folder, text, settings={"height": 704})
    with pytest.raises(ValueError, match=f"max_sequence_length is {TEXT_LENGTH} there, but 512 here"):
        LatentDataset(folder, text, 512)


def test_arguments_that_cannot_be(root, tmp_path, vae):
    data = dataset(root)
    for arguments, message in [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 2, "num_ranks": 2}, r"rank in \[0, 2\), got 1 and 2"),
        ({"dtype": torch.int8}, "got torch.int8"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(data, vae, tmp_path / "latents", **arguments)
    with pytest.raises(ValueError, match="multiples of 16 pixels, but videos are 24x32"):
        build(dataset(root, height=24), vae, tmp_path / "latents")
    assert not (tmp_path / "latents").exists(), "refused before anything is written"


def test_latents_that_are_not_finite_are_refused(root, tmp_path):
    broken = tiny_vae(VAE_CHANNELS)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="The latents of 'a' have values that are not finite"):
        build(dataset(root), broken, tmp_path / "latents")
    assert not list((tmp_path / "latents").glob("*.safetensors"))


def test_a_video_that_breaks_while_the_cache_is_built_is_named(root, tmp_path, vae):
    data = dataset(root)
    clip_path(root, "b", 2).write_bytes(b"")
    with pytest.raises(ValueError, match=r"b/000002.mp4' cannot be read"):
        build(data, vae, tmp_path / "latents")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_chunks_per_shot", 2),
        ("scene_cut_prefix", ""),
        ("pad_short_videos", False),
        ("recache_switches", False),
        ("fps", "12"),
        ("height", 704),
    ],
)
def test_without_the_videos_settings_that_differ_are_named_as_well(root, tmp_path, vae, name, value):
    data = dataset(root)
    folder, text = build(data, vae, tmp_path / "latents"), build_text(data.distinct_prompts(), tmp_path / "text")
    found = (data.pixel_settings() | data.sample_settings())[name]
    LatentDataset(folder, text, settings={name: found})
    with pytest.raises(ValueError, match=f"{name} is {found!r} there, but {value!r} here"):
        LatentDataset(folder, text, settings={name: value})


def test_a_start_that_fails_leaves_nothing_that_refuses_the_next(root, tmp_path, vae):
    broken = tiny_vae(VAE_CHANNELS)
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        build(dataset(root, height=48), broken, tmp_path / "latents")
    build(dataset(root), vae, tmp_path / "latents")


# A training set that changed.


@pytest.fixture
def changing(root, tmp_path, vae) -> Callable[..., tuple[LatentDataset, int, int]]:
    """Build the caches again, and return what they give, and how many samples and prompts were encoded for it."""

    def build_again(**arguments) -> tuple[LatentDataset, int, int]:
        latents, text = tmp_path / "latents", tmp_path / "text"
        before = [len(list(folder.glob("*.safetensors"))) for folder in (latents, text)]
        data = dataset(root, index_folder=tmp_path / "index", **arguments)
        build(data, vae, latents)
        build_text(data.distinct_prompts(), text)
        now = [len(list(folder.glob("*.safetensors"))) for folder in (latents, text)]
        cached = LatentDataset(latents, text)
        assert cached.names == data.names
        for direct, item in zip(data, cached, strict=True):
            assert torch.equal(item["latents"], encode_video(vae, direct["pixels"][None])[0])
            assert torch.equal(item["prompt_embeds"], encode(direct["prompts"]))
            assert torch.equal(item["loss_mask"], direct["loss_mask"])
        return cached, now[0] - before[0], now[1] - before[1]

    assert build_again()[1:] == (3, 3)
    return build_again


def rename(root: Path, old: str, new: str) -> None:
    for kind in ("video", "caption"):
        (root / kind / old).rename(root / kind / new)


def replace_keeping_size_and_time(root: Path) -> None:
    """Put another video in the place of one, with its size and its modification time."""
    path = clip_path(root, "a")
    before = path.stat()
    write_video(path, gray_frames(13, 30))
    assert path.stat().st_size <= before.st_size + 400
    path.write_bytes(path.read_bytes().ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "nothing": (lambda root: None, ["a", "b", "c"], 0, 0),
    "a caption": (lambda root: write_captions(root, "c", ["a red fox"]), ["a", "b", "c"], 0, 1),
    "a cut": (
        lambda root: write_captions(root, "b", ["a cat runs", {"caption": "a dog sleeps on the grass", "cut": False}]),
        ["a", "b", "c"],
        0,
        1,
    ),
    "one more": (lambda root: write_sample(root, "aa", [12], ["a crow"]), ["a", "aa", "b", "c"], 1, 1),
    "one less": (lambda root: shutil.rmtree(root / "video" / "a"), ["b", "c"], 0, 0),
    "a name": (lambda root: rename(root, "c", "0"), ["0", "a", "b"], 0, 0),
    "the order": (lambda root: (rename(root, "a", "z"), rename(root, "c", "a")), ["a", "b", "z"], 0, 0),
    "a copy": (lambda root: shutil.copytree(root / "video" / "a", root / "video" / "d"), ["a", "b", "c"], 0, 0),
    "a video": (lambda root: write_video(clip_path(root, "b", 2), gray_frames(8, 20)), ["a", "b", "c"], 1, 0),
    "durations": (lambda root: (root / "caption" / "a" / "shot_durations.txt").write_text("1"), ["a", "b", "c"], 1, 0),
}


@pytest.mark.parametrize(("change", "names", "videos", "prompts"), CHANGES.values(), ids=CHANGES)
def test_what_changed_is_encoded_and_nothing_else(root, changing, change, names, videos, prompts):
    change(root)
    cached, *encoded = changing()
    assert (cached.names, encoded) == (names, [videos, prompts])


def test_a_video_is_another_if_its_content_is(root, changing, tmp_path):
    size, time = clip_path(root, "a").stat().st_size, clip_path(root, "a").stat().st_mtime_ns
    replace_keeping_size_and_time(root)
    assert (clip_path(root, "a").stat().st_size, clip_path(root, "a").stat().st_mtime_ns) == (size, time)
    assert changing()[1:] == (1, 0)
    os.utime(clip_path(root, "b"))
    shutil.move(shutil.copytree(root, tmp_path / "elsewhere"), tmp_path / "moved")
    shutil.rmtree(root)
    (tmp_path / "moved").rename(root)
    assert changing()[1:] == (0, 0), "copied and moved, but the same"


@pytest.mark.parametrize(
    ("arguments", "videos", "prompts"),
    [
        ({"scene_cut_prefix": "Cut: "}, 0, 1),
        ({"recache_switches": False}, 0, 0),
        ({"pad_short_videos": False}, 0, 0),
        ({"max_chunks_per_shot": 1}, 1, 0),
    ],
)
def test_settings_that_do_not_change_what_is_encoded_need_no_other_cache(changing, arguments, videos, prompts):
    assert changing(**arguments)[1:] == (videos, prompts)
    assert changing()[1:] == (0, 0), "what was there before is there still"


def test_samples_of_the_same_clips_share_their_latents(root, tmp_path, vae):
    for kind in ("video", "caption"):
        shutil.copytree(root / kind / "a", root / kind / "twin")
    write_captions(root, "twin", ["the same cat"])
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents", rank=0, num_ranks=2)
    build(data, vae, folder, rank=1, num_ranks=2)
    cached = LatentDataset(folder, build_text(data.distinct_prompts(), tmp_path / "text"))
    assert len(cached) == 4 and len(list(folder.glob("*.safetensors"))) == 3
    assert torch.equal(cached[0]["latents"], cached[3]["latents"]) and cached[3]["name"] == "twin"


def test_two_training_sets_may_share_a_folder(root, tmp_path, vae, caplog):
    caplog.set_level("INFO")
    other = Path(shutil.copytree(root, tmp_path / "other"))
    write_sample(other, "b", [13], ["an owl"])
    shutil.rmtree(other / "caption" / "a")
    first, second = dataset(root), dataset(other)
    folder = build(first, vae, tmp_path / "latents")
    text = build_text([*first.distinct_prompts(), *second.distinct_prompts()], tmp_path / "text")
    build(second, vae, folder)
    assert re.search(r"1 file\(s\) in '.*latents' .* belong to no sample of the training set", caplog.text)
    # The list in the folder is that of the second now; a run takes its own.
    assert LatentDataset(folder, text).names == ["b", "c"]
    ours = LatentDataset(folder, text, samples=describe(first))
    assert ours.names == ["a", "b", "c"]
    assert torch.equal(ours[1]["latents"], encode_video(vae, first[1]["pixels"][None])[0])


# Damage to what is written beside the latents.

SAMPLE = {"name": "a", "latents": "0" * 32, "prompts": [0, 0], "shot_index": [0, 0], "loss_mask": [True, True]}


def damaged_samples(**changes) -> str:
    return json.dumps({"settings": {}, "prompts": ["a cat"], "samples": [SAMPLE | changes]})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        '{"prompts": ' + "9" * 5000 + "}",
        "\ufeff{",
        json.dumps({"settings": [], "prompts": [], "samples": [SAMPLE]}),
        json.dumps({"settings": {}, "prompts": "a cat", "samples": [SAMPLE]}),
        json.dumps({"settings": {}, "prompts": ["a cat"], "samples": []}),
        json.dumps({"settings": {}, "prompts": ["a cat"], "samples": [[]]}),
        damaged_samples(name=3),
        damaged_samples(latents="../secret"),
        damaged_samples(latents=None),
        damaged_samples(prompts=[0, 1]),
        damaged_samples(prompts=[0, -1]),
        damaged_samples(prompts=[0]),
        damaged_samples(prompts=["0", "0"]),
        damaged_samples(shot_index=[0, 1.5]),
        damaged_samples(loss_mask=[1, 1]),
        damaged_samples(loss_mask=[True] * 3),
        damaged_samples(more=1),
    ],
    ids=lambda content: content[:40].strip("\ufeff"),
)
def test_a_damaged_list_of_samples_is_named_and_made_again(built, content):
    data, vae, folder, text = built
    before = contents(folder)
    (folder / "samples.json").write_text(content)
    with pytest.raises(ValueError, match=r"samples.json' is damaged: it "):
        LatentDataset(folder, text)
    build(data, vae, folder)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged: it is not JSON"),
        ("[]", "is damaged: it holds no JSON object"),
        ("null", "is damaged: it holds no JSON object"),
        ('"text"', "is damaged: it holds no JSON object"),
        ("[" * 100_000, "is damaged: it is nested too deeply"),
        ('{"latent_format": ' + "9" * 5000 + "}", "is damaged: it has a number of too many digits"),
        (b"\xff\xfe", "is damaged: it is not JSON in UTF-8"),
        ("{}", "latent_format is not recorded there, but 2 here"),
        ('{"latent_format": 1}', "latent_format is 1 there, but 2 here"),
        ('{"latent_format": 2}', "num_latent_frames must be a whole number of at least 1, but it is None"),
        ('{"latent_format": 2, "num_latent_frames": "4"}', "of at least 1, but it is '4'"),
        ('{"latent_format": 2, "num_latent_frames": 4, "chunk_size": 0}', "chunk_size must be .* but it is 0"),
        ('{"latent_format": 2, "num_latent_frames": 4, "chunk_size": true}', "chunk_size must be .* but it is True"),
    ],
)
def test_damaged_settings_are_named(built, content, message):
    data, vae, folder, text = built
    (folder / "settings.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        LatentDataset(folder, text)
    with pytest.raises(ValueError, match="delete the folder, so that"):
        build(data, vae, folder)


def test_latents_of_unknown_settings_are_not_taken_for_those_of_this_run(built):
    data, vae, folder, _ = built
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has encoded files, but no 'settings.json' .*: delete the folder"):
        build(data, vae, folder)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3), torch.zeros(8, 5, 2, 2), torch.zeros(1, 8, 4, 2, 2), torch.zeros(8, 4, 2, 2, dtype=torch.int64)],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_a_file_that_holds_something_else_is_named(built, tensor):
    _, _, folder, text = built
    save_tensor(latents_file(folder, 0), tensor)
    with pytest.raises(ValueError, match=r"is damaged: latents are \[C, 4, h, w\], but it holds torch.*; delete it"):
        LatentDataset(folder, text)[0]


def test_files_of_other_programs_are_named(built):
    _, _, folder, text = built
    path = latents_file(folder, 0)
    save_file({"other": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=f"{path.name}' is damaged: .*tensor"):
        LatentDataset(folder, text)[0]
    save_file({"tensor": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="does not match its checksum"):
        LatentDataset(folder, text)[0]
    cached = LatentDataset(folder, text)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}' is damaged: it is no longer there; delete it"):
        cached[0]
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path.name}' is damaged: "):
        cached[0]


def test_a_folder_that_cannot_be_is_named(root, tmp_path, vae):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"The cache '.*file/latents' cannot be written: Not a directory"):
        build(dataset(root), vae, tmp_path / "file" / "latents")


# Reading in batches.


@pytest.mark.parametrize("memory_limit", [0, 2**30])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_with_sample_ids(root, tmp_path, vae, memory_limit, num_workers):
    data = dataset(root)
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    cached = LatentDataset(build(data, vae, tmp_path / "latents"), text, memory_limit=memory_limit)
    sampler = EpochSampler(len(cached), batch_size=2, seed=1)
    loader = DataLoader(WithSampleId(cached), batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)
    for k, batch in zip(range(4), loader, strict=False):
        assert batch["sample_id"].tolist() == [2 * k, 2 * k + 1]
        expected = [cached[draw.index] for draw in sampler.batch(k)]
        assert batch["latents"].shape == (2, VAE_CHANNELS, 4, 2, 2)
        assert batch["prompt_embeds"].shape == (2, 2, TEXT_LENGTH, TEXT_DIM)
        assert batch["shot_index"].shape == (2, 2) and batch["loss_mask"].shape == (2, 2)
        assert batch["name"] == [item["name"] for item in expected]
        assert torch.equal(batch["latents"], torch.stack([item["latents"] for item in expected]))
        batch["latents"].zero_()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_batch_fails_with_is_told_as_it_is(root, tmp_path, vae, num_workers):
    """Without the traceback of the process that reads."""
    data = dataset(root)
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    latents = build(data, vae, tmp_path / "latents")
    cached = LatentDataset(latents, text, memory_limit=0)
    for path in (tmp_path / "latents").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    mesh = SimpleNamespace(dp_size=1, dp_rank=0)
    loader = batches(cached, mesh, batch_size=2, num_workers=num_workers, seed=0, start_batch=0)
    with pytest.raises(ValueError, match=r"^'.*\.safetensors'") as failed:
        next(loader)
    assert "\n" not in str(failed.value) and "Traceback" not in str(failed.value)


def test_what_is_kept_in_memory_cannot_be_changed_from_outside(root, tmp_path, vae):
    data = dataset(root)
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    cached = LatentDataset(build(data, vae, tmp_path / "latents"), text)
    latents, embeds = (cached[0][key].clone() for key in ("latents", "prompt_embeds"))
    for _ in range(2):
        cached[0]["latents"].zero_()
        cached[0]["prompt_embeds"].zero_()
    assert torch.equal(cached[0]["latents"], latents) and torch.equal(cached[0]["prompt_embeds"], embeds)
