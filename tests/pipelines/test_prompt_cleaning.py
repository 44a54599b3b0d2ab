"""Prompts are cleaned as the captions were that the model learned from: text that is damaged means the same."""

import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from data.text_cache import TextCache
from longlive_diffusers.pipelines.prompt_cleaning import clean_prompt
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline, tiny_text_encoder
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.training_caches import build_text


# What damaged it, the damaged text, and what the model's captions had in its place.
DAMAGED = {
    "curly quotes": ("a \u2018cat\u2019 runs on the \u201cgrass\u201d", "a 'cat' runs on the \"grass\""),
    "full-width forms": ("\uff41 \uff43\uff41\uff54 \uff52\uff55\uff4e\uff53\uff0e", "a cat runs."),
    "a full-width space": ("a\u3000cat", "a cat"),
    "ligatures": ("a \ufb01eld, a \ufb02ower, e\ufb00ects", "a field, a flower, effects"),
    "mojibake": ("the cat\u00e2\u20ac\u2122s caf\u00c3\u00a9", "the cat's caf\u00e9"),
    "a byte order mark": ("\ufeffa cat", "a cat"),
    "control characters": ("a\x00 cat\x7f runs", "a cat runs"),
    "terminal escapes": ("a \x1b[1mcat\x1b[0m", "a cat"),
    "decomposed accents": ("cafe\u0301", "caf\u00e9"),
    "HTML escapes": ("cat &amp; dog", "cat & dog"),
    "HTML escapes of HTML escapes": ("cat &amp;amp; dog, it&amp;#39;s", "cat & dog, it's"),
    "line ends and tabs": ("\r\n a cat\r\n\truns \u2028 on\u00a0the grass \n", "a cat runs on the grass"),
}
MAX_TOKENS = 64
damaged_prompts = pytest.mark.parametrize(("damaged", "clean"), DAMAGED.values(), ids=DAMAGED)


@damaged_prompts
def test_a_damaged_prompt_is_repaired(damaged, clean):
    assert damaged != clean
    assert clean_prompt(damaged) == clean
    assert clean_prompt(clean) == clean


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat runs on the grass.",
        "",
        "\u732b\u304c\u8d70\u308b",
        "\u043a\u043e\u0442",
        "3 < 4 & 5 > 4",
        "\U0001f98a in snow",
    ],
)
def test_a_sound_prompt_stays_as_it_is(prompt):
    """In any script, and with characters that only look like HTML."""
    assert clean_prompt(prompt) == prompt


@pytest.fixture(scope="module")
def pipe():
    """A pipeline with a token for each character, so that any change of a prompt is a change of its tokens."""
    tokenizer = tiny_tokenizer(sorted({character for pair in DAMAGED.values() for text in pair for character in text}))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    encoder = tiny_text_encoder()
    encoder.resize_token_embeddings(len(tokenizer))
    return tiny_pipeline(tokenizer=tokenizer, text_encoder=encoder)


@damaged_prompts
def test_generation_and_training_embed_the_repaired_prompt(pipe, tmp_path, damaged, clean):
    @torch.no_grad()
    def embed(prompts: list[str]) -> torch.Tensor:
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=MAX_TOKENS)[0]

    assert pipe.tokenizer(damaged).input_ids != pipe.tokenizer(clean).input_ids
    expected = embed([clean])
    assert torch.equal(embed([damaged]), expected)
    build_text([damaged], tmp_path, embed, max_sequence_length=MAX_TOKENS)
    assert torch.equal(TextCache(tmp_path).load(clean), expected[0])
    assert torch.equal(TextCache(tmp_path).load(damaged), expected[0])


def test_a_damaged_prompt_makes_the_same_video():
    pipe = tiny_pipeline()
    videos = [pipe(**tiny_arguments(prompt=prompt)).frames for prompt in DAMAGED["curly quotes"]]
    shots = pipe(**tiny_arguments(prompt=None, shot_prompts=[DAMAGED["full-width forms"][0]])).frames
    assert torch.equal(*videos)
    assert torch.equal(shots, pipe(**tiny_arguments(prompt=DAMAGED["full-width forms"][1])).frames)
