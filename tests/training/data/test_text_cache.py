"""The cache of text embeddings: each prompt once, without its padding, and never of other settings."""

import pytest
import torch

from data.cache_files import module_settings, save_tensor
from data.text_cache import TextCache
from tests.support.tiny_pipeline import TEXT_DIM, TEXT_LENGTH, tiny_pipeline
from tests.support.training_caches import build_text, encode


def test_each_prompt_is_encoded_once_and_stored_without_padding(tmp_path):
    calls = []
    build_text(["a", "b c", "a"], tmp_path, lambda texts: calls.append(texts) or encode(texts), batch_size=2)
    build_text(["b c", "d", "a"], tmp_path, lambda texts: calls.append(texts) or encode(texts))
    assert calls == [["a", "b c"], ["d"]]
    cache = TextCache(tmp_path)
    for prompt in ("a", "b c", "d"):
        assert torch.equal(cache.load(prompt), encode([prompt])[0])
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < TEXT_LENGTH * TEXT_DIM * 4
    with pytest.raises(ValueError, match="The prompt 'e' is not in the cache"):
        cache.load("e")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, TEXT_LENGTH])
def test_padding_is_put_back_and_a_zero_row_within_a_prompt_stays(tmp_path, dtype, rows):
    embeds = torch.zeros(1, TEXT_LENGTH, TEXT_DIM, dtype=dtype)
    if rows:
        embeds[0, rows - 1, 3] = 1
    build_text(["x"], tmp_path, lambda texts: embeds)
    assert torch.equal(TextCache(tmp_path).load("x"), embeds[0])
    assert TextCache(tmp_path).load("x").dtype == dtype


def test_texts_of_a_pipeline(tmp_path):
    pipe = tiny_pipeline()

    def embed(texts):
        return pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)[0]

    settings = module_settings("text_encoder", pipe.text_encoder)
    build_text(["a cat", "a dog sleeps", ""], tmp_path, embed, settings=settings)
    cache = TextCache(tmp_path, max_sequence_length=TEXT_LENGTH)
    for text in ("a cat", "a dog sleeps", ""):
        torch.testing.assert_close(cache.load(text), embed([text])[0])
    with pytest.raises(ValueError, match=r"other settings: encoder is not recorded there, but 'words' here"):
        build_text(["a cat"], tmp_path)


def test_texts_that_are_refused_or_made_again(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"must be \[1, 8, D\], got \(1, 4, 3\)"):
        build_text(["a"], tmp_path, lambda texts: torch.zeros(1, 4, 3))
    with pytest.raises(ValueError, match="The embedding of 'a' has values that are not finite"):
        build_text(["a"], tmp_path, lambda texts: torch.full((1, TEXT_LENGTH, 3), torch.nan))
    build_text(["a"], tmp_path)
    with pytest.raises(ValueError, match="max_sequence_length is 8 there, but 9 here"):
        build_text(["a"], tmp_path, max_sequence_length=9)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        TextCache(tmp_path).load("a")
    build_text(["a"], tmp_path)
    assert torch.equal(TextCache(tmp_path).load("a"), encode(["a"])[0])
    assert path.name in caplog.text


def test_prompts_that_are_cleaned_to_the_same_text_are_one(tmp_path):
    """And what was cached before prompts were cleaned so is not taken for them."""
    build_text(["it\u2019s  a cat", "it's a cat", "it&amp;#39;s a cat", "a dog"], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    cache = TextCache(tmp_path)
    assert torch.equal(cache.load("it\u2019s a cat"), cache.load("it's a cat"))


def test_ranks_share_the_prompts(tmp_path):
    prompts = ["a", "b", "a", "c"]
    for rank in range(2):
        build_text(prompts, tmp_path, rank=rank, num_ranks=2)
    TextCache(tmp_path).check(prompts)
    with pytest.raises(ValueError, match=r"1 of 4 prompts are not in the cache '.*', first 'x'"):
        TextCache(tmp_path).check([*prompts, "x"])


def test_a_start_that_fails_leaves_nothing_that_refuses_the_next(tmp_path):
    with pytest.raises(ValueError, match=r"must be \[1, 9, D\], got \(1, 8, "):
        build_text(["a"], tmp_path, max_sequence_length=9)
    build_text(["a"], tmp_path)
    assert torch.equal(TextCache(tmp_path).load("a"), encode(["a"])[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "settings.json' is damaged: it is not JSON"),
        ("[]", "settings.json' is damaged: it holds no JSON object"),
        ("[" * 100_000, "settings.json' is damaged: it is nested too deeply"),
        ("{}", "text_format is not recorded there, but 1 here"),
        ('{"text_format": 1}', "max_sequence_length must be a whole number of at least 1, but it is None"),
        ('{"text_format": 1, "max_sequence_length": "8"}', "of at least 1, but it is '8'"),
        ('{"text_format": 1, "max_sequence_length": 0}', "of at least 1, but it is 0"),
        ('{"text_format": 1, "max_sequence_length": 8.0}', "of at least 1, but it is 8.0"),
    ],
)
def test_damaged_settings_are_named(tmp_path, content, message):
    build_text(["a"], tmp_path)
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        TextCache(tmp_path)
    with pytest.raises(ValueError, match="delete the folder, so that"):
        build_text(["a"], tmp_path)


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(9, 3), torch.zeros(2, 3, dtype=torch.int32)])
def test_a_file_that_holds_something_else_is_named(tmp_path, tensor):
    build_text(["a"], tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    save_tensor(path, tensor)
    with pytest.raises(ValueError, match=rf"{path.name}' is damaged: embeddings are \[up to 8, D\], but it holds "):
        TextCache(tmp_path).load("a")
