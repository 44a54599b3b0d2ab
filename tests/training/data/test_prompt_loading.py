"""From prompts to the data of distillation: what is encoded and when, and what is refused before anything is."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import text_encoder
from data.clips import VideoDataset
from data.loading import ClipShape, batches
from data.prompt_dataset import PromptDataset
from data.prompt_loading import open_prompts
from data.text_encoder import TextEncoder, prompt_length
from longlive_diffusers import LongLivePipeline
from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.models.streaming_vae import encode_video
from run.arguments import ModelArguments, PromptDataArguments
from run.saving import load_start
from tests.support.training_sets import gray_frames, write_captions, write_video


SHAPE = ClipShape(height=64, width=64, num_latent_frames=8, chunk_size=2)


class Start:
    """The start of a distillation of the embedded model, in one process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.pipe, _ = load_start(ModelArguments(str(toy_pipeline_path())))
        self.run.mkdir()

    def open(self, shape: ClipShape = SHAPE, others=("a dot",), **arguments):
        settings = PromptDataArguments(**arguments)
        accelerator = SimpleNamespace(
            is_main_process=True,
            process_index=0,
            num_processes=1,
            device=torch.device("cpu"),
            wait_for_everyone=lambda: None,
            main_process_first=contextlib.nullcontext,
        )
        length = prompt_length(settings.max_sequence_length, self.pipe.tokenizer)
        encoder = TextEncoder(str(toy_pipeline_path()), None, None, torch.float32, torch.device("cpu"), length)
        data, texts = open_prompts(
            accelerator, settings, shape, self.pipe, encoder, list(others), self.run / "cache", self.run
        )
        assert data.texts is texts and isinstance(data, PromptDataset)
        return data

    def encoded(self) -> dict[str, int]:
        """What is encoded, and when it was."""
        files = self.run.glob("cache/[tf][ei]*/*.safetensors")
        return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in files}


@pytest.fixture
def start(tmp_path) -> Start:
    return Start(tmp_path)


def test_texts_alone(start, monkeypatch):
    path = start.folder / "prompts.txt"
    path.write_text("a red circle | a blue square\na green cross")
    data = start.open(prompts=str(path))
    prefix = start.pipe.config.scene_cut_prefix
    prompts = ["a red circle", prefix + "a blue square", "a blue square", "a green cross"]
    assert data.distinct_prompts() == prompts and data.first_frames is None
    embeds = LongLivePipeline.from_pretrained(toy_pipeline_path(), transformer=None, vae=None).encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=32
    )[0]
    assert torch.allclose(data[0]["prompt_embeds"], embeds[[0, 0, 1, 2]], atol=1e-6)
    data.texts.check(["", "a dot", *prompts])
    before = start.encoded()
    assert len(before) == 6

    monkeypatch.setattr(text_encoder, "build_text_cache", lambda *_, **__: pytest.fail("a text is encoded again"))
    start.open(prompts=str(path), num_latent_frames=8)
    monkeypatch.undo()
    path.write_text("a red circle\na new one")
    assert start.open(prompts=str(path)).distinct_prompts() == ["a red circle", "a new one"]
    after = start.encoded()
    assert len(after) == 7 and before.items() <= after.items()


def test_batches_of_a_run(start):
    path = start.folder / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"shots": [{"prompt": "b"}, {"prompt": "c", "cut": false}]}\n{"prompt": "d"}')
    data = start.open(prompts=str(path), others=())
    mesh = SimpleNamespace(dp_size=1, dp_rank=0)
    loader = batches(data, mesh, batch_size=3, num_workers=0, seed=0, start_batch=1)
    batch = next(loader)
    assert batch["sample_id"].tolist() == [3, 4, 5] and batch["prompt_embeds"].shape[:3] == (3, 4, 32)
    assert sorted(batch["switches"].sum(1).tolist()) == [0, 0, 1] and not batch["cuts"].any()


@pytest.fixture
def videos(start) -> Path:
    """Two samples; their second clips are too short for a chunk, but are not needed."""
    root = start.folder / "set"
    for name, number in (("a", 10), ("b", 30)):
        write_video(root / "video" / name / "000001.mp4", gray_frames(5, number, height=64, width=64))
        write_video(root / "video" / name / "000002.mp4", gray_frames(1, 0, height=64, width=64))
        write_captions(root, name, ["one", {"caption": "two", "cut": False}])
    (root / "caption" / "b" / "shot_durations.txt").write_text("3 1")
    return root


def test_first_frames(start, videos):
    data = start.open(train_data_dir=str(videos), image_conditioning=True)
    whole = VideoDataset(start.folder / "set", num_latent_frames=2, chunk_size=2, height=64, width=64, progress=False)
    assert data.names == whole.names == ["a", "b"]
    for index in range(2):
        latents = encode_video(start.pipe.vae, whole[index]["pixels"][None])[0]
        frame = data[index]["first_frame"]
        assert frame.dtype == torch.float32 and frame.shape == latents[:, :1].shape
        torch.testing.assert_close(frame, latents[:, :1], rtol=0, atol=1e-5)
    assert not torch.allclose(data[0]["first_frame"], data[1]["first_frame"], atol=0.1)
    assert data[0]["switches"].tolist() == [False, False, True, False]
    assert data[1]["switches"].tolist() == [False, False, False, True]


def test_only_what_is_new_is_encoded(start, videos):
    start.open(train_data_dir=str(videos), image_conditioning=True)
    before = start.encoded()
    assert sum(name.startswith("first_frames/") for name in before) == 2
    (videos / "caption" / "a" / "000001.json").write_text('{"caption": "another"}')
    write_video(videos / "video" / "c" / "000001.mp4", gray_frames(1, 40, height=64, width=64))
    write_captions(videos, "c", ["three"])
    data = start.open(train_data_dir=str(videos), image_conditioning=True)
    assert data.names == ["a", "b", "c"] and data.distinct_prompts() == ["another", "two", "one", "three"]
    after = start.encoded()
    new = sorted(name.split("/")[0] for name in after.keys() - before.keys())
    assert before.items() <= after.items() and new == ["first_frames", "text", "text"]


def test_samples_without_a_first_frame_are_left_out(start, videos):
    (videos / "video" / "a" / "000001.mp4").write_bytes(b"no video")
    data = start.open(train_data_dir=str(videos), image_conditioning=True)
    assert data.names == ["b"]
    assert "  a: '" in (start.run / "skipped_samples.txt").read_text()
    image = VideoDataset(videos, num_latent_frames=1, chunk_size=1, height=64, width=64, progress=False)[0]["pixels"]
    latents = encode_video(start.pipe.vae, image[None])[0]
    torch.testing.assert_close(data[0]["first_frame"], latents, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "--prompts is missing: a .txt or .jsonl file, or a training set with captions"),
        ({"train_data_dir": "set"}, "--train_data_dir 'set' is only for --image_conditioning true"),
        ({"prompts": "a.txt", "train_data_dir": "set"}, "--train_data_dir 'set' is only for --image_conditioning"),
        ({"image_conditioning": True}, "--image_conditioning true .* needs --train_data_dir"),
        ({"image_conditioning": True, "prompts": "a.txt"}, "--image_conditioning true .* needs --train_data_dir"),
        (
            {"image_conditioning": True, "prompts": "a.txt", "train_data_dir": "set"},
            "takes the captions of --train_data_dir 'set': leave out --prompts 'a.txt'",
        ),
        ({"prompts": "missing.txt"}, "There is no file 'missing.txt' with prompts"),
        ({"prompts": "missing"}, "There is no folder 'missing'"),
        (
            {"image_conditioning": True, "train_data_dir": "missing"},
            "There is no folder 'missing' with a training set",
        ),
    ],
)
def test_what_is_refused_before_anything_is_encoded(start, monkeypatch, arguments, message):
    monkeypatch.setattr(text_encoder, "build_text_cache", lambda *_, **__: pytest.fail("a text is encoded"))
    with pytest.raises(ValueError, match=message):
        start.open(**arguments)
    assert start.encoded() == {}


def test_caches_of_other_settings_are_refused(start, videos):
    settings = {"train_data_dir": str(videos), "image_conditioning": True}
    start.open(**settings)
    before = start.encoded()
    for shape, changed, message in (
        (replace(SHAPE, height=32), {}, "first_frames' was made with other settings: height is 64 there, but 32 here"),
        (SHAPE, {"fps": 12}, "first_frames' was made with other settings: fps is '24' there, but '12' here"),
        (SHAPE, {"max_sequence_length": 16}, "text' was made with other settings: max_sequence_length is 32 there"),
    ):
        with pytest.raises(ValueError, match=message):
            start.open(shape, **settings, **changed)
    start.open(replace(SHAPE, num_latent_frames=16), **settings)  # a longer roll-out begins with the same frame
    with torch.no_grad():
        next(iter(start.pipe.vae.parameters())).add_(1e-3)
    (videos / "caption" / "a" / "000001.json").write_text('{"caption": "another"}')
    with pytest.raises(ValueError, match=r"first_frames' was made with other settings: vae.weights is"):
        start.open(**settings)
    assert start.encoded() == before
