"""Training forwards: those of the reference implementation, and how they relate to streaming."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from longlive_diffusers import KVCache, LongLiveTransformer3DModel
from tests.support.golden_models import CHUNK_SIZE, TEXT_LENGTH, golden_transformer
from tests.support.paths import GOLDEN


TENSORS = load_file(GOLDEN / "training_forward.safetensors")
BATCH, _, FRAMES, HEIGHT, WIDTH = TENSORS["noisy"].shape
NUM_CHUNKS = FRAMES // CHUNK_SIZE
TEXTS = TENSORS["embeds_per_chunk"].unflatten(0, (BATCH, NUM_CHUNKS))  # [B, chunks, L, D]

BLOCK_CAUSAL = {
    "hidden_states": TENSORS["noisy"],
    "timestep": TENSORS["timestep"],
    "encoder_hidden_states": TEXTS,
}
TEACHER_FORCING = {**BLOCK_CAUSAL, "clean_hidden_states": TENSORS["clean"]}
AUGMENTED = {**TEACHER_FORCING, "clean_timestep": TENSORS["aug_timestep"]}


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return golden_transformer()


def own_frames(chunk: int) -> slice:
    return slice(chunk * CHUNK_SIZE, (chunk + 1) * CHUNK_SIZE)


def whole_clip_cache(model: LongLiveTransformer3DModel) -> KVCache:
    """A cache with room for every frame of the clip."""
    return model.create_kv_cache(BATCH, HEIGHT, WIDTH, window_size=FRAMES, sink_size=CHUNK_SIZE, multi_shot_sink=False)


def stream(model, latents: torch.Tensor, timestep: torch.Tensor, texts: torch.Tensor, cache=None) -> torch.Tensor:
    """The clip's chunks one after the other through a cache, each with its own text; `[B, C, F, h, w]`."""
    cache = whole_clip_cache(model) if cache is None else cache
    outputs = []
    for chunk in range(latents.shape[2] // CHUNK_SIZE):
        cache.begin_chunk(CHUNK_SIZE)
        own = own_frames(chunk)
        outputs.append(model(latents[:, :, own], timestep[:, own], texts[:, chunk], kv_cache=cache).sample)
    return torch.cat(outputs, dim=2)


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


# -- the reference's numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, arguments",
    [("teacher_forcing", TEACHER_FORCING), ("teacher_forcing_aug", AUGMENTED), ("block_causal", BLOCK_CAUSAL)],
)
@torch.no_grad()
def test_forward_matches_reference(model, name, arguments):
    velocity = model(**arguments).sample
    assert velocity.shape == TENSORS[name].shape
    torch.testing.assert_close(velocity, TENSORS[name], atol=2e-5, rtol=0)


def test_loss_and_gradients_match_reference(model):
    velocity = model(**TEACHER_FORCING).sample
    loss = (velocity - TENSORS["target"]).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(TENSORS["teacher_forcing_loss"].item(), rel=1e-4)

    prefix = "grad."
    expected = {key.removeprefix(prefix): value for key, value in TENSORS.items() if key.startswith(prefix)}
    expected = convert_wan_transformer_to_diffusers(expected)
    assert len(expected) == 8
    parameters = dict(model.named_parameters())
    errors = {name: relative_error(parameters[name].grad, gradient) for name, gradient in expected.items()}
    assert {name: error for name, error in errors.items() if error > 1e-4} == {}


def test_the_clean_timestep_of_teacher_forcing_is_nought_unless_given(model):
    with torch.no_grad():
        by_default = model(**TEACHER_FORCING).sample
        given = model(**TEACHER_FORCING, clean_timestep=torch.zeros(BATCH, FRAMES)).sample
    assert torch.equal(by_default, given)


# -- training is streaming, all chunks at once -----------------------------------------------------------------------


@torch.no_grad()
def test_streaming_clean_latents_is_the_block_causal_forward(model):
    clean, nought = TENSORS["clean"], torch.zeros(BATCH, FRAMES)
    at_once = model(clean, nought, TEXTS).sample
    torch.testing.assert_close(stream(model, clean, nought, TEXTS), at_once, atol=1e-5, rtol=0)


@torch.no_grad()
def test_streaming_at_any_time_is_the_block_causal_forward(model):
    """History need not be clean: whatever was written last is what later chunks see."""
    streamed = stream(model, TENSORS["noisy"], TENSORS["timestep"], TEXTS)
    torch.testing.assert_close(streamed, TENSORS["block_causal"], atol=2e-5, rtol=0)


@torch.no_grad()
def test_each_teacher_forced_chunk_is_that_chunk_streamed_after_its_clean_history(model):
    """What teacher forcing is for: all chunks train at once, each under the conditions of streaming."""
    cache = whole_clip_cache(model)
    outputs = []
    for chunk in range(NUM_CHUNKS):
        own, text = own_frames(chunk), TEXTS[:, chunk]
        cache.begin_chunk(CHUNK_SIZE)
        noisy, timestep = TENSORS["noisy"][:, :, own], TENSORS["timestep"][:, own]
        outputs.append(model(noisy, timestep, text, kv_cache=cache).sample)
        model(TENSORS["clean"][:, :, own], torch.zeros(BATCH), text, kv_cache=cache)
    torch.testing.assert_close(torch.cat(outputs, dim=2), TENSORS["teacher_forcing"], atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_text_for_each_chunk_is_each_chunk_with_its_text(model):
    """Teacher-forced chunk b depends on the texts of chunks 0..b and on no other."""
    expected = model(**TEACHER_FORCING).sample
    for chunk in range(NUM_CHUNKS):
        others = torch.randn(TEXTS.shape, generator=torch.Generator().manual_seed(chunk))
        others[:, : chunk + 1] = TEXTS[:, : chunk + 1]
        result = model(**{**TEACHER_FORCING, "encoder_hidden_states": others}).sample
        until = (chunk + 1) * CHUNK_SIZE
        torch.testing.assert_close(result[:, :, :until], expected[:, :, :until], atol=1e-5, rtol=0)
        if chunk + 1 < NUM_CHUNKS:
            assert (result[:, :, until:] - expected[:, :, until:]).abs().max() > 1e-3


@pytest.mark.parametrize("arguments", [BLOCK_CAUSAL, TEACHER_FORCING], ids=["block causal", "teacher forcing"])
@torch.no_grad()
def test_the_same_text_for_each_chunk_is_one_text(model, arguments):
    text = TEXTS[:, 0]
    one = model(**{**arguments, "encoder_hidden_states": text}).sample
    repeated = text[:, None].expand(-1, NUM_CHUNKS, -1, -1)
    each = model(**{**arguments, "encoder_hidden_states": repeated}).sample
    torch.testing.assert_close(each, one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arguments", [BLOCK_CAUSAL, TEACHER_FORCING], ids=["block causal", "teacher forcing"])
@torch.no_grad()
def test_the_rows_of_a_batch_do_not_meet(model, arguments):
    together = model(**arguments).sample
    for row in range(BATCH):
        alone = model(**{name: tensor[row : row + 1] for name, tensor in arguments.items()}).sample
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_a_forward_is_depends_on_its_arguments_alone(model):
    """The reference leaves a mark on the model when it streams, and then splits the texts of its training wrongly."""
    before = {name: model(**arguments).sample for name, arguments in (("tf", AUGMENTED), ("bc", BLOCK_CAUSAL))}
    stream(model, TENSORS["clean"], torch.zeros(BATCH, FRAMES), TEXTS)
    assert torch.equal(model(**AUGMENTED).sample, before["tf"])
    assert torch.equal(model(**BLOCK_CAUSAL).sample, before["bc"])


@torch.no_grad()
def test_a_training_forward_in_mid_stream_does_not_disturb_the_stream(model):
    nought = torch.zeros(BATCH, FRAMES)
    expected = stream(model, TENSORS["clean"], nought, TEXTS)
    cache, outputs = whole_clip_cache(model), []
    for chunk in range(NUM_CHUNKS):
        own = own_frames(chunk)
        cache.begin_chunk(CHUNK_SIZE)
        model(**TEACHER_FORCING)
        latents, timestep = TENSORS["clean"][:, :, own], nought[:, own]
        outputs.append(model(latents, timestep, TEXTS[:, chunk], kv_cache=cache).sample)
    assert torch.equal(torch.cat(outputs, dim=2), expected)


# -- gradients of a streaming forward --------------------------------------------------------------------------------


def detach_history(model: LongLiveTransformer3DModel, tokens: int) -> None:
    """Block the gradient that reaches the keys and values of a clip's first `tokens` tokens, in every layer: with
    that, a block-causal forward has the gradients of a stream whose history is a constant."""

    def cut(module, inputs, output):
        return torch.cat([output[:, :tokens].detach(), output[:, tokens:]], dim=1)

    for block in model.blocks:
        block.attn1.norm_k.register_forward_hook(cut)
        block.attn1.to_v.register_forward_hook(cut)


def last_chunk_loss(velocity: torch.Tensor) -> torch.Tensor:
    return (velocity[:, :, -CHUNK_SIZE:] - TENSORS["target"][:, :, -CHUNK_SIZE:]).square().mean()


def gradients(model: LongLiveTransformer3DModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_of_a_streamed_chunk_are_those_of_the_block_causal_forward(model):
    """As in distillation: history and earlier steps run without gradient, one step with it, and the chunk is written
    clean before the backward comes."""
    last, text = own_frames(NUM_CHUNKS - 1), TEXTS[:, :1]
    texts = text.expand(-1, NUM_CHUNKS, -1, -1)
    cache = whole_clip_cache(model)
    noisy, timestep = TENSORS["noisy"], TENSORS["timestep"]
    streamed_input = noisy[:, :, last].clone().requires_grad_()
    one_text = texts[:, 0].contiguous()
    with torch.no_grad():
        for chunk in range(NUM_CHUNKS - 1):
            own = own_frames(chunk)
            cache.begin_chunk(CHUNK_SIZE)
            model(noisy[:, :, own], timestep[:, own], one_text, kv_cache=cache)
        cache.begin_chunk(CHUNK_SIZE)
        model(noisy[:, :, last], torch.full((BATCH,), 999.0), one_text, kv_cache=cache)
    velocity = model(streamed_input, timestep[:, last], one_text, kv_cache=cache).sample
    with torch.no_grad():
        model(TENSORS["clean"][:, :, last], torch.zeros(BATCH), one_text, kv_cache=cache)
    last_chunk_loss(velocity).backward()
    streamed = gradients(model)

    model.zero_grad()
    detach_history(model, tokens=(FRAMES - CHUNK_SIZE) * (HEIGHT // 2) * (WIDTH // 2))
    clip_input = noisy.clone().requires_grad_()
    last_chunk_loss(model(clip_input, timestep, texts).sample).backward()

    assert all(gradient.any() for gradient in streamed.values())
    errors = {name: relative_error(streamed[name], gradient) for name, gradient in gradients(model).items()}
    assert {name: error for name, error in errors.items() if error > 1e-4} == {}
    assert not clip_input.grad[:, :, : last.start].any(), "history is a constant"
    assert relative_error(streamed_input.grad, clip_input.grad[:, :, last]) < 1e-4


@pytest.mark.parametrize("trained", ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.attn1.to_v"])
def test_a_single_projection_of_the_first_layer_can_be_trained(model, trained):
    """Nothing before it needs a gradient; it gets the one that it has when everything is trained."""
    text = torch.randn(BATCH, TEXT_LENGTH, 32, generator=torch.Generator().manual_seed(0))
    expected = None
    for names in ("", trained):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(names))
            parameter.grad = None
        cache = whole_clip_cache(model)
        for chunk in range(2):
            own = own_frames(chunk)
            cache.begin_chunk(CHUNK_SIZE)
            velocity = model(TENSORS["noisy"][:, :, own], TENSORS["timestep"][:, own], text, kv_cache=cache).sample
            with torch.no_grad():
                model(TENSORS["clean"][:, :, own], torch.zeros(BATCH), text, kv_cache=cache)
        velocity.square().mean().backward()
        gradient = model.get_parameter(f"{trained}.weight").grad
        if expected is None:
            expected = gradient.clone()
    torch.testing.assert_close(gradient, expected, atol=0, rtol=0)
