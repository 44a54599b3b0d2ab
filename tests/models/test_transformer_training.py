"""Training the network as diffusers' models are trained: gradients, EMA, gradient checkpointing, mixed precision."""

import pytest
import torch
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import set_checkpoint_early_stop

from longlive_diffusers import LongLiveScheduler, LongLiveTransformer3DModel
from tests.support.tiny_pipeline import (
    CHUNK_SIZE,
    FORWARDS,
    random_inputs,
    stream_chunks,
    teacher_forcing_inputs,
    tiny_cache,
    tiny_transformer,
)


TEXT = random_inputs()["encoder_hidden_states"]
TRAINED = {"block causal": random_inputs, "teacher forcing": teacher_forcing_inputs}
every_training_forward = pytest.mark.parametrize("make_inputs", TRAINED.values(), ids=TRAINED)


@pytest.fixture
def model() -> LongLiveTransformer3DModel:
    return tiny_transformer().train()


def loss_of(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    prediction = model(**inputs).sample
    target = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(5))
    return mse_loss(prediction.float(), target)


def gradients_of(model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = loss_of(model, inputs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_training_forward
def test_every_parameter_gets_a_gradient(model, make_inputs):
    _, gradients = gradients_of(model, make_inputs())
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients.values())


@every_training_forward
def test_a_step_of_training_lowers_the_loss(model, make_inputs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = make_inputs()
    before = loss_of(model, inputs)
    before.backward()
    optimizer.step()
    assert loss_of(model, inputs) < before


def test_trains_on_the_noise_process_of_the_scheduler(model):
    scheduler, clean = LongLiveScheduler(), teacher_forcing_inputs()["clean_hidden_states"]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    timestep = scheduler.training_timesteps[[100, 700]].repeat_interleave(2)[None]  # one for each chunk
    inputs = teacher_forcing_inputs() | {
        "hidden_states": scheduler.add_noise(clean, noise, timestep),
        "timestep": timestep,
    }
    errors = (model(**inputs).sample - scheduler.velocity(clean, noise)).square().mean(dim=(1, 3, 4))
    loss = (errors * scheduler.weight(timestep)).mean()
    loss.backward()
    assert torch.isfinite(loss) and model.proj_out.weight.grad.any()


def test_the_teacher_forced_loss_reaches_the_clean_history(model):
    inputs = teacher_forcing_inputs()
    inputs["clean_hidden_states"].requires_grad_()
    loss_of(model, inputs).backward()
    gradient = inputs["clean_hidden_states"].grad
    assert gradient[:, :, :2].any()
    assert not gradient[:, :, 2:].any(), "nothing sees the last clean chunk but itself"


def stream_step(model, cache, seed: int = 0) -> torch.Tensor:
    """One forward on the open chunk of `cache`."""
    inputs = random_inputs(CHUNK_SIZE, seed=seed) | {"encoder_hidden_states": TEXT}
    return model(**inputs, kv_cache=cache).sample


def test_a_stream_passes_gradients_to_every_parameter(model):
    """As in distillation, where earlier steps and earlier chunks run without gradient, on the same cache."""
    cache = tiny_cache(model)
    with torch.no_grad():
        cache.begin_chunk(CHUNK_SIZE)
        stream_step(model, cache)
        cache.begin_chunk(CHUNK_SIZE)
        stream_step(model, cache, seed=1)
    stream_step(model, cache, seed=2).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_gradients_of_a_stream_do_not_depend_on_how_the_text_came_into_the_cache(model):
    gradients = []
    for first_without_gradient in (True, False):
        cache = tiny_cache(model)
        cache.begin_chunk(CHUNK_SIZE)
        if first_without_gradient:
            with torch.no_grad():
                stream_step(model, cache, seed=1)
        model.zero_grad()
        stream_step(model, cache).square().mean().backward()
        gradients.append(model.blocks[1].attn2.to_v.weight.grad.clone())
    assert torch.equal(*gradients)


def test_every_chunk_of_a_stream_can_be_trained_on_its_own(model):
    cache = tiny_cache(model)
    for seed in range(3):
        cache.begin_chunk(CHUNK_SIZE)
        stream_step(model, cache, seed=seed).square().mean().backward()
    assert torch.isfinite(model.blocks[0].attn1.to_k.weight.grad).all()


def test_an_ema_follows_and_survives_saving(model, tmp_path):
    ema = EMAModel(model.parameters(), decay=0.9, model_cls=LongLiveTransformer3DModel, model_config=model.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    biases = []
    for _ in range(2):
        loss_of(model, random_inputs()).backward()
        optimizer.step()
        ema.step(model.parameters())
        biases.append(model.proj_out.bias.detach().clone())

    ema.save_pretrained(tmp_path)
    averaged = LongLiveTransformer3DModel.from_pretrained(tmp_path)
    assert_between(biases[0], averaged.proj_out.bias, biases[1])
    assert EMAModel.from_pretrained(tmp_path, LongLiveTransformer3DModel).decay == 0.9

    ema.copy_to(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), averaged.parameters(), strict=True))


def assert_between(start: torch.Tensor, average: torch.Tensor, end: torch.Tensor):
    fractions = ((average - start) / (end - start)).flatten()
    assert (fractions > 0).all() and (fractions < 1).all()


# -- gradient checkpointing ------------------------------------------------------------------------------------------


def test_checkpointing_is_switched_on_the_network_alone(model):
    model.enable_gradient_checkpointing()
    switched = {
        type(module).__name__ for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    }
    assert switched == {"LongLiveTransformer3DModel"}
    assert model.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@every_training_forward
def test_checkpointing_changes_neither_loss_nor_gradients(model, make_inputs):
    expected_loss, expected = gradients_of(model, make_inputs())
    model.enable_gradient_checkpointing()
    loss, gradients = gradients_of(model, make_inputs())
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-6, rtol=1e-5)


@every_training_forward
def test_checkpointing_runs_every_block_again_in_the_backward(model, make_inputs):
    runs = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    model.enable_gradient_checkpointing()
    loss = loss_of(model, make_inputs())
    assert len(runs) == len(model.blocks)
    loss.backward()
    assert len(runs) == 2 * len(model.blocks)


def test_a_checkpointing_function_of_the_callers_own_is_used(model):
    used = []

    def checkpoint(block, *arguments):
        used.append(block)
        return block(*arguments)

    model.enable_gradient_checkpointing(checkpoint)
    loss_of(model, random_inputs()).backward()
    assert used == list(model.blocks)


def test_checkpointing_works_where_only_a_lora_is_trained(model):
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    _, expected = gradients_of(model, teacher_forcing_inputs())
    model.enable_gradient_checkpointing()
    _, gradients = gradients_of(model, teacher_forcing_inputs())
    assert expected and all("lora_" in name for name in expected)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-6, rtol=1e-5)


def test_checkpointing_runs_every_block_of_a_stream_again(model):
    """What this computes is checked in `test_roll_out_gradients.py`."""
    expected = stream_chunks(model)
    model.enable_gradient_checkpointing()
    runs = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    with set_checkpoint_early_stop(False):
        output = stream_chunks(model, num_chunks=4)
    assert torch.equal(output, expected)
    assert len(runs) == 4 * len(model.blocks)
    output.mean().backward()
    assert len(runs) == 2 * 4 * len(model.blocks)


# -- mixed precision -------------------------------------------------------------------------------------------------


@every_training_forward
def test_trains_under_autocast(model, make_inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, make_inputs())
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in model.parameters())
    torch.testing.assert_close(loss, loss_of(model, make_inputs()), atol=0.02, rtol=0.02)


def test_trains_a_float32_lora_on_bfloat16_weights(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    model = LongLiveTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16).requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    cast_training_params(model, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FORWARDS["teacher forcing"](model).float().square().mean()
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in trained)


CONVERTED = ("hidden_states", "clean_hidden_states", "encoder_hidden_states")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@every_training_forward
def test_latents_and_text_take_the_dtype_of_the_weights_and_times_keep_theirs(model, make_inputs, dtype):
    """As with FSDP, whose sharded weights are in float32 while the network computes in bfloat16."""
    model.to(dtype)
    inputs = make_inputs()
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    rounded = {name: tensor.bfloat16() if name in CONVERTED else tensor for name, tensor in inputs.items()}
    given = {name: tensor.to(other) if name in CONVERTED else tensor for name, tensor in rounded.items()}
    expected = {name: tensor.to(dtype) if name in CONVERTED else tensor for name, tensor in rounded.items()}
    assert torch.equal(model(**given).sample, model(**expected).sample)


@every_training_forward
def test_under_autocast_the_dtype_of_latents_and_text_does_not_matter(model, make_inputs):
    inputs = make_inputs()
    rounded = {name: tensor.bfloat16() if name in CONVERTED else tensor for name, tensor in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(**rounded).sample, model(**inputs).sample)
