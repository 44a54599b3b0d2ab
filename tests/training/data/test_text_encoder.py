"""The text encoder of a run is loaded by the processes that have prompts to encode, and by no other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.text_cache import TextCache
from data.text_encoder import TextEncoder, encode_missing, prompt_length
from longlive_diffusers import LongLivePipeline


LENGTH = 16


def process(rank: int = 0, num_ranks: int = 1) -> SimpleNamespace:
    """What is asked of an accelerator; ranks that are simulated do not wait for each other."""
    return SimpleNamespace(
        is_main_process=rank == 0, process_index=rank, num_processes=num_ranks, wait_for_everyone=lambda: None
    )


def encoder_of(folder: Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    return TextEncoder(str(folder), None, None, dtype=dtype, device=torch.device("cpu"), max_sequence_length=LENGTH)


def encode(
    folder: Path, cache: Path, prompts: list[str], accelerator=None, dtype: torch.dtype = torch.float32
) -> bool:
    """Encode what is missing, and return whether the text encoder was loaded."""
    encoder = encoder_of(folder, dtype)
    encode_missing(accelerator or process(), encoder, prompts, cache)
    return "pipe" in vars(encoder)


@pytest.fixture
def copied(workshop, tmp_path) -> Path:
    """Files of the same content, written at another time."""
    return Path(shutil.copytree(workshop.folder / "pipeline", tmp_path / "copied", copy_function=shutil.copy))


def test_it_is_loaded_where_prompts_are_missing(workshop, tmp_path):
    folder, cache = workshop.folder / "pipeline", tmp_path / "cache"
    assert encode(folder, cache, ["a red circle", ""])
    assert not encode(folder, cache, ["", "a red circle"])
    assert encode(folder, cache, ["a red circle", "a blue square"])
    pipe = LongLivePipeline.from_pretrained(folder)
    for prompt in ("a red circle", "a blue square", ""):
        expected = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=LENGTH)[0][0]
        torch.testing.assert_close(TextCache(cache).load(prompt), expected)


def test_it_is_loaded_by_the_ranks_whose_prompts_are_missing(workshop, tmp_path):
    folder, cache = workshop.folder / "pipeline", tmp_path / "cache"
    prompts = ["a red circle", "a blue square", "a green cross"]
    assert [encode(folder, cache, prompts[:2], process(rank, 2)) for rank in (0, 1)] == [True, True]
    assert [encode(folder, cache, prompts, process(rank, 3)) for rank in (0, 1, 2)] == [False, False, True]
    TextCache(cache).check(prompts)


def test_files_that_are_not_known_are_read_once_to_tell_whether_they_are_the_same(workshop, copied, tmp_path):
    cache = tmp_path / "cache"
    assert encode(workshop.folder / "pipeline", cache, ["a red circle"])
    assert [encode(copied, cache, ["a red circle"], process(rank, 2)) for rank in (0, 1)] == [True, False]
    assert not encode(copied, cache, ["a red circle"])
    assert not encode(workshop.folder / "pipeline", cache, ["a red circle"]), "known still"


def test_another_text_encoder_is_refused_although_all_prompts_are_there(workshop, copied, tmp_path):
    cache = tmp_path / "cache"
    assert encode(workshop.folder / "pipeline", cache, ["a red circle"])
    (file,) = (copied / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"made with other settings: text_encoder\.weights is"):
            encode(copied, cache, ["a red circle"])


def test_it_computes_in_the_dtype_that_is_asked_for_and_the_two_are_not_mixed(workshop, tmp_path):
    folder, cache = workshop.folder / "pipeline", tmp_path / "cache"
    assert encode(folder, cache, ["a red circle"], dtype=torch.bfloat16)
    assert TextCache(cache).load("a red circle").dtype == torch.bfloat16
    # transformers 5.0 keeps some of its weights in float32.
    with pytest.raises(ValueError, match=r"text_encoder\.dtype is 'torch.bfloat16.*' there, but 'torch.float32' here"):
        encode(folder, cache, ["a red circle"])


def test_what_is_remembered_of_text_encoders_is_of_the_cache_as_it_is(workshop, tmp_path):
    folder, cache = workshop.folder / "pipeline", tmp_path / "cache"
    assert encode(folder, cache, ["a red circle"])
    settings = json.loads((cache / "settings.json").read_text())
    (cache / "settings.json").write_text(json.dumps(settings | {"text_encoder.weights": "others"}))
    with pytest.raises(ValueError, match=r"text_encoder\.weights is 'others' there"):
        encode(folder, cache, ["a red circle"])
    shutil.rmtree(cache)
    assert encode(folder, cache, ["a red circle"]), "nothing is known of a cache that was deleted"


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"files": ["0"]}', "\x00"])
def test_a_damaged_memory_of_text_encoders_is_made_again(workshop, tmp_path, content):
    folder, cache = workshop.folder / "pipeline", tmp_path / "cache"
    encode(folder, cache, ["a red circle"])
    (cache / "known_encoders.json").write_text(content)
    assert [encode(folder, cache, ["a red circle"]) for _ in range(2)] == [True, False]


def test_a_start_that_fails_leaves_nothing_that_refuses_the_next(workshop, tmp_path):
    folder, cache = workshop.folder / "pipeline", tmp_path / "cache"
    too_long = replace(encoder_of(folder), max_sequence_length=64)
    too_long.pipe.tokenizer.model_max_length = LENGTH
    with pytest.raises(ValueError, match="must be at most 16, the tokenizer's limit, got 64"):
        encode_missing(process(), too_long, ["a red circle"], cache)
    assert encode(folder, cache, ["a red circle"])
    assert TextCache(cache).max_sequence_length == LENGTH


@pytest.mark.parametrize(
    ("requested", "limit", "expected"),
    [(None, 32, 32), (None, 512, 512), (None, 1024, 512), (None, int(1e30), 512), (16, 32, 16), (1024, 1024, 1024)],
)
def test_the_length_of_prompts(requested, limit, expected):
    assert prompt_length(requested, SimpleNamespace(model_max_length=limit)) == expected


def test_a_length_that_the_tokenizer_does_not_take():
    with pytest.raises(ValueError, match="--max_sequence_length 33: the tokenizer of the model takes at most 32 tok"):
        prompt_length(33, SimpleNamespace(model_max_length=32))
