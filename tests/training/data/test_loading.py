"""From a training set to items: what is refused before long work begins, and what a run without its videos checks."""

import contextlib
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import clip_index
from data.loading import ClipShape, open_dataset, read_ahead
from data.text_encoder import TextEncoder, prompt_length
from longlive_diffusers.assets import toy_pipeline_path
from run.arguments import DataArguments, ModelArguments
from run.saving import load_start
from tests.support.training_sets import gray_frames, write_video


SHAPE = ClipShape(height=64, width=64, num_latent_frames=4, chunk_size=2)


class Start:
    """The start of a run of the embedded model, in one process; it is changed by what it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipe, _ = load_start(ModelArguments(str(toy_pipeline_path())))
        (folder / "run").mkdir()

    def open(self, shape: ClipShape = SHAPE, cache: Path | None = None, **changed):
        arguments = DataArguments(**{"train_data_dir": str(self.folder / "set"), "num_latent_frames": 4, **changed})
        length = prompt_length(arguments.max_sequence_length, self.pipe.tokenizer)
        accelerator = SimpleNamespace(
            is_main_process=True,
            process_index=0,
            num_processes=1,
            device=torch.device("cpu"),
            wait_for_everyone=lambda: None,
            main_process_first=contextlib.nullcontext,
        )
        encoder = TextEncoder(str(toy_pipeline_path()), None, None, torch.float32, torch.device("cpu"), length)
        run = self.folder / "run"
        cache = cache or run / "cache"
        return open_dataset(accelerator, arguments, shape, self.pipe, encoder, ["a dot"], cache, run)[0]

    def cached(self) -> dict[str, bytes]:
        """What is encoded, and what it was made with."""
        cache = self.folder / "run" / "cache"
        return {str(path): path.read_bytes() for path in cache.glob("[lt]*/*")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A flat training set of two videos, and the caches of a run of it."""
    folder = tmp_path_factory.mktemp("prepared")
    for number in (10, 9):
        write_video(folder / "set" / f"{number}.mkv", gray_frames(13, number, height=64, width=64))
        (folder / "set" / f"{number}.txt").write_text(f"a red circle moves {number}")
    Start(folder).open()
    return folder


@pytest.fixture
def start(prepared, tmp_path) -> Start:
    """The same once more, which a test may change."""
    shutil.copytree(prepared / "set", tmp_path / "set")
    start = Start(tmp_path)
    shutil.copytree(prepared / "run", tmp_path / "run", dirs_exist_ok=True)
    return start


def test_a_flat_folder_is_encoded_to_the_length_that_the_model_takes(start):
    dataset = start.open()
    assert dataset.names == ["9", "10"] and dataset.prompts == ["a red circle moves 9", "a red circle moves 10"]
    assert dataset[0]["prompt_embeds"].shape[:2] == (2, 32) and dataset[0]["latents"].shape[1] == 4


@pytest.mark.parametrize(
    ("shape", "changed", "folder", "message"),
    [
        ({"height": 32}, {}, "latents", "height is 64 there, but 32 here"),
        ({"num_latent_frames": 6}, {}, "latents", "num_latent_frames is 4 there, but 6 here"),
        ({"chunk_size": 1}, {}, "latents", "chunk_size is 2 there, but 1 here"),
        ({}, {"fps": 12}, "latents", "fps is '24' there, but '12' here"),
        ({}, {"max_sequence_length": 16}, "text", "max_sequence_length is 32 there, but 16 here"),
    ],
)
def test_other_sizes_are_named_before_a_clip_is_looked_at(start, monkeypatch, shape, changed, folder, message):
    monkeypatch.setattr(clip_index, "count_frames", lambda *_: pytest.fail("a clip was looked at"))
    shutil.rmtree(start.folder / "run" / "cache" / "index")
    before = start.cached()
    for train_data_dir in (str(start.folder / "set"), None):
        with pytest.raises(ValueError, match=f"cache/{folder}' was made with other settings: .*{message}.*delete the"):
            start.open(replace(SHAPE, **shape), train_data_dir=train_data_dir, **changed)
    assert start.cached() == before


def test_another_vae_is_named_before_a_prompt_is_encoded(start):
    (start.folder / "set" / "9.txt").write_text("another caption")
    with torch.no_grad():
        next(iter(start.pipe.vae.parameters())).add_(1e-3)
    before = start.cached()
    for train_data_dir in (str(start.folder / "set"), None):
        with pytest.raises(ValueError, match=r"latents' was made with other settings: vae.weights is '\w+' there"):
            start.open(train_data_dir=train_data_dir)
    assert start.cached() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_chunks_per_shot": 1}, "max_chunks_per_shot is None there, but 1 here"),
        ({"pad_short_videos": False}, "pad_short_videos is True there, but False here"),
        ({"recache_switches": False}, "recache_switches is True there, but False here"),
    ],
)
def test_what_cannot_be_done_without_the_videos_is_named(start, changed, message):
    shutil.rmtree(start.folder / "set")
    assert start.open(train_data_dir=None).names == ["9", "10"]
    with pytest.raises(ValueError, match=message):
        start.open(train_data_dir=None, **changed)


def test_a_start_with_a_wrong_setting_does_not_stand_in_the_way_of_the_right_one(start):
    shutil.rmtree(start.folder / "run" / "cache")
    with pytest.raises(ValueError, match="--max_sequence_length 512: the tokenizer of the model takes at most 32"):
        start.open(max_sequence_length=512)
    assert start.cached() == {}
    start.pipe.tokenizer.model_max_length = 512  # as if only the encoder knew its limit
    with pytest.raises(ValueError, match=r"must be \[4, 512, D\]"):
        start.open()
    start.pipe.tokenizer.model_max_length = 32
    assert len(start.open()) == 2


def test_a_cache_that_cannot_be_written_is_named_before_a_clip_is_looked_at(start, monkeypatch):
    monkeypatch.setattr(clip_index, "count_frames", lambda *_: pytest.fail("a clip was looked at"))
    (start.folder / "file").touch()
    with pytest.raises(ValueError, match=r"The cache '.*file/index' cannot be written: Not a directory"):
        start.open(cache=start.folder / "file")


def test_what_is_left_out_is_listed_whatever_it_is_called(start):
    broken = start.folder / "set" / os.fsdecode(b"caf\xe9.mkv")
    broken.write_bytes(b"no video")
    broken.with_suffix(".txt").write_text("a caption")
    (start.folder / "set" / "11.txt").write_text("a caption")
    assert start.open().names == ["9", "10"]
    listed = (start.folder / "run" / "skipped_samples.txt").read_text()
    assert listed.count("\n") == 2
    assert "  11: there is no clip beside '11.txt'" in listed and r"  caf\udce9: " in listed
    for name in (broken, broken.with_suffix(".txt"), start.folder / "set" / "11.txt"):
        name.unlink()
    start.open()
    assert not (start.folder / "run" / "skipped_samples.txt").exists()


def test_one_training_set_at_a_time(start):
    with pytest.raises(ValueError, match=r"neither a training set \(--train_data_dir or --dataset_name\) nor a ca"):
        start.open(train_data_dir=None, cache=start.folder / "elsewhere")
    with pytest.raises(ValueError, match=r"--train_data_dir '.*set' and --dataset_name 'a/b' are two training sets"):
        start.open(dataset_name="a/b")
    with pytest.raises(ValueError, match="--train_data_dir is empty"):  # not the current folder
        start.open(train_data_dir="")
    with pytest.raises(ValueError, match="it needs --train_data_dir or --dataset_name"):
        start.open(train_data_dir=None, cache_latents=False)


def test_a_hub_data_set_is_read_like_a_folder(start, monkeypatch):
    def write_list(name, folder, **arguments):
        assert (name, arguments) == ("a/b", {"config": "small", "split": "train", "caption_column": None})
        shutil.copytree(start.folder / "set", folder)

    monkeypatch.setattr("data.loading.write_list", write_list)
    dataset = start.open(train_data_dir=None, dataset_name="a/b", dataset_config_name="small")
    assert dataset.names == ["9", "10"]
    assert len(list((start.folder / "run" / "cache" / "latents").glob("*.safetensors"))) == 2, "the same clips"


def test_batches_are_made_ahead_in_another_thread():
    made = []

    def batches():
        for number in range(10):
            made.append((number, threading.get_ident()))
            yield number

    with read_ahead(batches()) as ahead:
        assert next(ahead) == 0
        deadline = time.monotonic() + 30
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [number for number, _ in made] == [0, 1, 2]  # two more than were asked for
        assert {thread for _, thread in made}.isdisjoint({threading.get_ident()})
        assert [next(ahead) for _ in range(9)] == list(range(1, 10))
    before = len(made)
    with pytest.raises(KeyError), read_ahead(batches()) as ahead:
        next(ahead)
        raise KeyError
    assert len(made) <= before + 3  # the rest is not made


def test_what_fails_ahead_is_raised_where_it_is_needed():
    def batches():
        yield 0
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    with read_ahead(batches()) as ahead:
        assert next(ahead) == 0
        with pytest.raises(RuntimeError, match="killed by signal"):
            next(ahead)


def test_texts_of_another_encoder_are_named_where_there_are_only_caches(start, monkeypatch):
    other = start.folder / "other"
    shutil.copytree(toy_pipeline_path(), other)
    (weights,) = (other / "text_encoder").glob("*.safetensors")
    tensors = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    monkeypatch.setattr("tests.training.data.test_loading.toy_pipeline_path", lambda: other)
    with pytest.raises(ValueError, match=r"text' was made with other settings: text_encoder.weights is '\w+' there"):
        start.open(train_data_dir=None)


def test_a_folder_without_a_text_encoder_is_enough_where_nothing_has_to_be_encoded(start, monkeypatch):
    other = start.folder / "other"
    shutil.copytree(toy_pipeline_path(), other)
    shutil.rmtree(other / "text_encoder")
    monkeypatch.setattr("tests.training.data.test_loading.toy_pipeline_path", lambda: other)
    assert len(start.open(train_data_dir=None)) == 2
    with pytest.raises(ValueError, match=rf"'{other}' has no folder text_encoder/"):
        start.open()
