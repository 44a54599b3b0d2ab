"""Caches: what direct encoding gives, whole after any interruption, and never of other settings."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data.latent_cache import LatentDataset, collate
from data.sampler import EpochSampler, WithSampleId
from longlive_diffusers.models.streaming_vae import encode_video, normalize_latents
from tests.support.paths import PROGRAMS, ROOT
from tests.support.tiny_pipeline import TEXT_DIM, TEXT_LENGTH, tiny_pipeline
from tests.support.tiny_vae import tiny_vae
from tests.support.training_caches import build, build_text, contents, dataset, encode
from tests.support.training_sets import clip_path, write_captions, write_sample


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
    assert sorted(path.name for path in together.glob("*.safetensors")) == ["00000001.safetensors"]
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
    path = folder / "00000001.safetensors"
    path.write_bytes(before[path.name][:size])
    with pytest.raises(ValueError, match=r"00000001.safetensors' is damaged: .*; delete it and build the cache again"):
        LatentDataset(folder, text)[1]
    build(data, vae, folder)
    assert contents(folder) == before
    assert "00000001.safetensors' is damaged and is made again" in caplog.text


def test_a_changed_file_is_noticed_when_it_is_read(root, tmp_path, vae):
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents")
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    before = contents(folder)
    path = folder / "00000002.safetensors"
    changed = bytearray(before[path.name])
    changed[-3] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"00000002.safetensors' is damaged: its content does not match its checksum"):
        LatentDataset(folder, text)[2]
    build(data, vae, folder)
    assert path.read_bytes() == changed, "that would take reading every file"


@pytest.mark.parametrize("content", ["", "{}", None])
def test_a_list_of_samples_that_is_damaged_or_missing_is_made_again(root, tmp_path, vae, content):
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents")
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    before = contents(folder)
    if content is None:
        (folder / "samples.json").unlink()
    else:
        (folder / "samples.json").write_text(content)
    build(data, vae, folder)
    assert contents(folder) == before
    LatentDataset(folder, text)


def test_two_that_build_the_same_do_no_harm(root, tmp_path):
    data = dataset(root)
    vaes = [tiny_vae(VAE_CHANNELS) for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(build, data, vae, tmp_path / "both") for vae in vaes[:2]]
        assert [future.result() for future in both] == [tmp_path / "both"] * 2
    assert contents(tmp_path / "both") == contents(build(data, vaes[2], tmp_path / "alone"))


def test_a_build_that_is_killed_goes_on(root, tmp_path, vae):
    folder = tmp_path / "latents"
    program = [sys.executable, str(PROGRAMS / "build_latent_cache.py"), str(root), str(folder), str(VAE_CHANNELS)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "training")])
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment) as process:
        written = [process.stdout.readline().strip() for _ in range(2)]
        process.kill()
    assert written == ["00000000.safetensors", "00000001.safetensors"]
    assert process.returncode == -signal.SIGKILL
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [f"0000000{i}.safetensors" for i in (0, 1)]
    first = (folder / "00000000.safetensors").stat().st_mtime_ns
    leftover = folder / "00000002.safetensors.0123.tmp"
    leftover.write_bytes(b"what was being written")
    build(dataset(root), vae, folder)
    assert (folder / "00000000.safetensors").stat().st_mtime_ns == first, "what was whole is kept"
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
        ({"scene_cut_prefix": ""}, "scene_cut_prefix is 'The scene transitions. ' there, but '' here"),
        ({"pad": False}, "num_samples is 3 there, but 2 here"),
        ({"max_chunks_per_shot": 2}, "max_chunks_per_shot is None there, but 2 here"),
        ({"recache_switches": False}, "recache_switches is True there, but False here"),
    ],
)
def test_a_cache_of_other_data_settings_is_refused(root, tmp_path, vae, arguments, message):
    folder = build(dataset(root), vae, tmp_path / "latents")
    before = contents(folder)
    with pytest.raises(ValueError, match=f"latents' was made with other settings: .*{message}"):
        build(dataset(root, **arguments), vae, folder)
    assert contents(folder) == before


def test_a_cache_of_other_samples_or_another_vae_is_refused(root, tmp_path, vae):
    data = dataset(root)
    folder = build(data, vae, tmp_path / "latents")
    other = tiny_vae(VAE_CHANNELS)
    with torch.no_grad():
        next(iter(other.parameters())).add_(1e-3)
    with pytest.raises(ValueError, match=r"other settings: vae.weights is '\w{64}' there, but '\w{64}' here$"):
        build(data, other, folder)
    with pytest.raises(ValueError, match=r"latent_dtype is 'torch.float32' there, but 'torch.bfloat16' here"):
        build(data, vae, folder, dtype=torch.bfloat16)
    other.register_to_config(latents_mean=[0.5] * VAE_CHANNELS)
    with pytest.raises(ValueError, match=r"vae.latents_mean is .* there, but '\[0.5, "):
        build(data, other, folder)
    write_captions(root, "c", ["another caption"])
    with pytest.raises(ValueError, match=r"other settings: samples is '\w{64}' there"):
        build(dataset(root), vae, folder)
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
    with pytest.raises(ValueError, match="there are no videos to encode"):
        build(dataset(root, text_only=True), vae, tmp_path / "latents")
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


def test_what_is_kept_in_memory_cannot_be_changed_from_outside(root, tmp_path, vae):
    data = dataset(root)
    text = build_text(data.distinct_prompts(), tmp_path / "text")
    cached = LatentDataset(build(data, vae, tmp_path / "latents"), text)
    latents, embeds = (cached[0][key].clone() for key in ("latents", "prompt_embeds"))
    for _ in range(2):
        cached[0]["latents"].zero_()
        cached[0]["prompt_embeds"].zero_()
    assert torch.equal(cached[0]["latents"], latents) and torch.equal(cached[0]["prompt_embeds"], embeds)
