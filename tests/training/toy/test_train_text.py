"""The toy's tokenizer and text encoder."""

import random

import pytest
import torch

from train_text import (
    MAX_LENGTH,
    UNSAID,
    answers,
    build_text_encoder,
    build_tokenizer,
    captions,
    draw_texts,
    questions,
)
from world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, Scene, Thing, caption, draw_scene


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(captions(), MAX_LENGTH)


def test_every_word_of_the_toy_world_is_one_token(tokenizer):
    for word in (*COLORS, *SHAPES, *SIZES, *MOTIONS, *BACKGROUNDS, "above", "below"):
        assert len(tokenizer(word).input_ids) == 2, word
    assert len(tokenizer("The scene transitions. ").input_ids) == 4


def test_no_caption_is_cut_off(tokenizer):
    rng = random.Random(0)
    texts = [caption(draw_scene(rng, num_things=2), rng) for _ in range(500)]
    lengths = [len(tokenizer(f"The scene transitions. {text}").input_ids) for text in texts]
    assert max(lengths) <= MAX_LENGTH == tokenizer.model_max_length


def test_labels_say_what_the_caption_says():
    things = (Thing("red", "circle", "small", "left", 0, 16), Thing("blue", "cross", "large", "still", 0, 48))
    scene = Scene("teal", things, "stacked")
    labels = answers(scene, "a red circle moves left above a large blue cross that stays still over teal")
    said = dict(zip(questions(), labels, strict=True))
    assert said["arrangement"] == 1 and said["background"] == list(BACKGROUNDS).index("teal")
    assert said["color 0"] == list(COLORS).index("red") and said["shape 1"] == SHAPES.index("cross")
    assert said["motion 1"] == list(MOTIONS).index("still")
    assert said["size 0"] == said["size 1"] == UNSAID  # one size, and it would take a parser to tell whose
    assert answers(Scene("teal", things[:1]), "a red circle moves left")[1] == UNSAID


def test_held_out_captions_are_of_held_out_scenes_only():
    seen, held_out = (set(draw_texts("x", 300, held_out=held)[0]) for held in (False, True))
    assert not seen & held_out


def test_the_encoder_gives_a_row_for_each_token(tokenizer):
    encoder = build_text_encoder(len(tokenizer))
    tokens = tokenizer(["a red circle"], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
    with torch.no_grad():
        embeds = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    assert embeds.shape == (1, MAX_LENGTH, 64)
