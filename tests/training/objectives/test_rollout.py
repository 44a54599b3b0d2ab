"""The roll-out of distillation: what a pipeline generates, up to the exit step, and what is differentiated of it."""

from dataclasses import replace

import pytest
import torch

from objectives.distillation_networks import Role
from objectives.rollout import ChunkPlan, roll_out
from tests.support.distillation import ROPE_OFFSET, THREE_SHOTS, batch, cache, shared_networks
from tests.support.tiny_pipeline import CHANNELS, CHUNK_SIZE, SIDE, tiny_pipeline, tiny_transformer


NUM_CHUNKS = 4


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(2, CHANNELS, NUM_CHUNKS * CHUNK_SIZE, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def plan_of(**options) -> ChunkPlan:
    return ChunkPlan.of_batch(batch(**options), torch.device("cpu"), uses_image=True)


def rolled(transformer, noise, plan, *, exit_step, steps=3, kv_cache=None, differentiated=()) -> list[torch.Tensor]:
    scheduler = tiny_pipeline().scheduler
    kv_cache = cache(transformer) if kv_cache is None else kv_cache
    return roll_out(
        transformer,
        scheduler,
        noise,
        plan,
        kv_cache,
        num_inference_steps=steps,
        exit_step=exit_step,
        multi_shot_rope_offset=ROPE_OFFSET,
        differentiated=differentiated,
    )


PIPELINE = {"multi_shot_sink": True, "multi_shot_rope_offset": ROPE_OFFSET}


def generated(noise, *, steps=3, **options) -> torch.Tensor:
    """What the pipeline makes of a single video's noise, under the prompts of `shot_prompts`."""
    pipe = tiny_pipeline(**PIPELINE)
    return pipe(latents=noise, num_inference_steps=steps, guidance_scale=1.0, output_type="latent", **options).frames


def pipeline_plan(prompts_by_chunk, shot_index, cuts, switches=None, first_frame=None) -> ChunkPlan:
    pipe = tiny_pipeline(**PIPELINE)
    embeds = {text: pipe.encode_prompt([text], do_classifier_free_guidance=False)[0] for text in prompts_by_chunk}
    return ChunkPlan(
        prompt_embeds=[embeds[text] for text in prompts_by_chunk],
        shot_index=[[index] for index in shot_index],
        cuts=[[cut] for cut in cuts],
        switches=[[switch] for switch in switches or [False] * len(prompts_by_chunk)],
        rewrites=switches or [False] * len(prompts_by_chunk),
        first_frame=first_frame,
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_roll_out_to_the_last_step_is_what_the_pipeline_generates(noise, steps):
    noise = noise[:1]
    plan = pipeline_plan(["a red ball"] * NUM_CHUNKS, [0] * NUM_CHUNKS, [False] * NUM_CHUNKS)
    transformer = tiny_transformer()
    kv_cache = transformer.create_kv_cache(1, SIDE, SIDE, window_size=6, sink_size=2, multi_shot_sink=True)
    chunks = rolled(transformer, noise, plan, exit_step=steps - 1, steps=steps, kv_cache=kv_cache)
    expected = generated(noise, steps=steps, prompt="a red ball")
    torch.testing.assert_close(torch.cat(chunks, dim=2), expected, rtol=0, atol=1e-6)


def test_shots_pins_and_the_distance_at_a_cut_are_those_of_generation(noise):
    noise, prefix = noise[:1], tiny_pipeline().config.scene_cut_prefix
    texts = ["a red ball", "a red ball", f"{prefix}a blue box", "a blue box"]
    plan = pipeline_plan(texts, [0, 0, 1, 1], [False, False, True, False])
    transformer = tiny_transformer()
    kv_cache = transformer.create_kv_cache(1, SIDE, SIDE, window_size=6, sink_size=2, multi_shot_sink=True)
    chunks = rolled(transformer, noise, plan, exit_step=2, kv_cache=kv_cache)
    expected = generated(noise, shot_prompts=["a red ball", "a blue box"], chunks_per_shot=2)
    torch.testing.assert_close(torch.cat(chunks, dim=2), expected, rtol=0, atol=1e-6)
    # The distance at the cut matters, so that one that was lost would have been seen.
    other = roll_out(
        transformer,
        tiny_pipeline().scheduler,
        noise,
        plan,
        transformer.create_kv_cache(1, SIDE, SIDE, window_size=6, sink_size=2, multi_shot_sink=True),
        num_inference_steps=3,
        exit_step=2,
        multi_shot_rope_offset=0.0,
    )
    assert (torch.cat(other, dim=2) - expected).abs().max() > 1e-4


def test_a_prompt_switch_rewrites_history_as_a_session_does(noise):
    noise = noise[:1]
    plan = pipeline_plan(
        ["a red ball"] * 2 + ["a blue box"] * 2, [0] * 4, [False] * 4, switches=[False, False, True, False]
    )
    transformer = tiny_transformer()
    kv_cache = transformer.create_kv_cache(1, SIDE, SIDE, window_size=6, sink_size=2, multi_shot_sink=True)
    chunks = rolled(transformer, noise, plan, exit_step=2, kv_cache=kv_cache)
    pipe = tiny_pipeline(**PIPELINE)
    made = []
    with pipe.stream(
        prompt="a red ball", latents=noise, num_inference_steps=3, guidance_scale=1.0, output_type="latent"
    ) as session:
        for chunk in session:
            made.append(chunk.frames)
            if chunk.index == 1:
                session.prompt = "a blue box"
    torch.testing.assert_close(torch.cat(chunks, dim=2), torch.cat(made, dim=2), rtol=0, atol=1e-6)


def test_a_given_first_frame_stays_and_conditions_as_in_generation(noise):
    noise, image = noise[:1], torch.randn(1, CHANNELS, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    plan = pipeline_plan(["a red ball"] * 4, [0] * 4, [False] * 4, first_frame=image)
    transformer = tiny_transformer()
    kv_cache = transformer.create_kv_cache(1, SIDE, SIDE, window_size=6, sink_size=2, multi_shot_sink=True)
    chunks = rolled(transformer, noise, plan, exit_step=2, kv_cache=kv_cache)
    assert torch.equal(chunks[0][:, :, :1], image)
    expected = generated(noise, prompt="a red ball", image_latents=image)
    torch.testing.assert_close(torch.cat(chunks, dim=2), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_the_exit_step_predicts_from_the_latents_that_the_pipeline_has_there(noise, exit_step):
    noise = noise[:1, :, :CHUNK_SIZE]
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    generated(noise, steps=3, prompt="a red ball", callback_on_step_end=note)
    before = [noise, *seen][exit_step]
    plan = pipeline_plan(["a red ball"], [0], [False])
    transformer = tiny_transformer()
    kv_cache = transformer.create_kv_cache(1, SIDE, SIDE, window_size=6, sink_size=2, multi_shot_sink=True)
    (chunk,) = rolled(transformer, noise, plan, exit_step=exit_step, kv_cache=kv_cache)
    solver = tiny_pipeline().scheduler
    solver.set_timesteps(3)
    fresh = transformer.create_kv_cache(1, SIDE, SIDE, window_size=6, sink_size=2, multi_shot_sink=True)
    fresh.begin_chunk(CHUNK_SIZE)
    with torch.no_grad():
        velocity = transformer(
            before, solver.timesteps[exit_step].expand(1, CHUNK_SIZE), plan.prompt_embeds[0], kv_cache=fresh
        ).sample
    torch.testing.assert_close(chunk, before - solver.sigmas[exit_step] * velocity, rtol=0, atol=1e-6)


def test_rows_of_a_batch_have_their_own_shots(noise):
    """A row of a batch is what it is alone, though the other row has other cuts, thus other pins and positions."""
    networks = shared_networks()
    transformer = networks.network(Role.GENERATOR)
    together = torch.cat(rolled(transformer, noise, plan_of(shots=THREE_SHOTS), exit_step=1), dim=2)
    for row in (0, 1):
        items = {name: value[row : row + 1] for name, value in batch(shots=THREE_SHOTS).items()}
        plan = ChunkPlan.of_batch(items, torch.device("cpu"), uses_image=True)
        sizes = {"window_size": 6, "sink_size": 2, "multi_shot_sink": True}
        kv_cache = transformer.create_kv_cache(1, SIDE, SIDE, **sizes)
        alone = torch.cat(rolled(transformer, noise[row : row + 1], plan, exit_step=1, kv_cache=kv_cache), dim=2)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=2e-6)


SWITCHES = {
    "one cuts where the other switches": (((0, 1, 1, 1), (0, 0, 0, 0)), [[0, 0, 0, 0], [0, 1, 0, 0]]),
    "one has cut before the other switches": (((0, 1, 1, 1), (0, 0, 0, 0)), [[0, 0, 0, 0], [0, 0, 0, 1]]),
    "both switch, one after the other": (((0, 0, 0, 1), (0, 0, 1, 1)), [[0, 1, 0, 0], [0, 1, 0, 1]]),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in SWITCHES), *zip(SWITCHES, ("fp8", "nvfp4", "fp8_attention"), strict=False)],
)
def test_a_switch_rewrites_the_history_of_its_own_video_alone(noise, case, dtype):
    """A row of a batch is what it is alone, whatever is switched beside it; also where its chunks have a gradient."""
    shots, switches = SWITCHES[case]
    transformer = tiny_transformer(attention_head_dim=16) if dtype == "nvfp4" else tiny_transformer()
    items = batch(shots=shots) | {"switches": torch.tensor(switches, dtype=torch.bool)}
    sizes = {"window_size": 6, "sink_size": 2, "multi_shot_sink": True, "dtype": dtype}

    def made(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        own = {name: value[rows] for name, value in items.items()}
        plan = ChunkPlan.of_batch(own, torch.device("cpu"), uses_image=True)
        kv_cache = transformer.create_kv_cache(plan.num_videos, SIDE, SIDE, **sizes)
        chunks = rolled(transformer, noise[rows], plan, exit_step=1, kv_cache=kv_cache, differentiated=range(4))
        video = torch.cat(chunks, dim=2)
        (gradient,) = torch.autograd.grad(video[0].sum(), transformer.blocks[0].attn1.to_q.weight)
        return video.detach(), gradient

    together, gradient = made(slice(None))
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3  # a number of few bits may be rounded the other way
    for row in (0, 1):
        alone, own_gradient = made(slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=tolerance)
        if row == 0:
            torch.testing.assert_close(gradient, own_gradient, rtol=1e-3, atol=10 * tolerance)


def test_a_batch_without_switches_runs_the_forwards_of_another_that_has_some(noise):
    """Under FSDP, where a forward of one process waits for those of all others."""
    transformer, plan = tiny_transformer(), plan_of(shots=THREE_SHOTS)
    runs = []
    transformer.register_forward_hook(lambda *_: runs.append(1))
    alone = torch.cat(rolled(transformer, noise, plan, exit_step=1), dim=2)
    count = len(runs)
    beside = replace(plan, rewrites=[False, True, False, True])
    assert torch.equal(torch.cat(rolled(transformer, noise, beside, exit_step=1), dim=2), alone)
    assert len(runs) - count == count + 1 + 3  # the chunks that were made before chunk 1, and before chunk 3


def gradients(networks, loss) -> dict[str, torch.Tensor]:
    parameters = networks.parameters_of(Role.GENERATOR)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("shots", [((0,) * 4, (0,) * 4), THREE_SHOTS])
@pytest.mark.parametrize("exit_step", [0, 2])
def test_the_gradient_is_that_of_the_exit_steps_alone(noise, shots, exit_step):
    """One backward through all chunks, long after the cache went on, against a forward for each chunk on a cache that
    was filled with the same, detached history."""
    networks = shared_networks()
    plan, weight = plan_of(shots=shots), torch.randn(noise.shape, generator=torch.Generator().manual_seed(4))
    with networks.using(Role.GENERATOR) as generator:
        network = networks.network(Role.GENERATOR)
        chunks = rolled(generator, noise, plan, exit_step=exit_step, kv_cache=cache(network), differentiated=range(4))
        loss = (torch.cat(chunks, dim=2) * weight).sum()
        together = gradients(networks, loss)
        total = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
        for index in range(4):
            kv_cache = cache(network)
            one = rolled(generator, noise, plan, exit_step=exit_step, kv_cache=kv_cache, differentiated=[index])
            assert [chunk.requires_grad for chunk in one] == [number == index for number in range(4)]
            part = one[index] * weight[:, :, index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE]
            for name, gradient in gradients(networks, part.sum()).items():
                total[name] += gradient
    assert max(gradient.abs().max() for gradient in together.values()) > 1e-2
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, total[name], rtol=1e-4, atol=2e-5)


def test_checkpointed_roll_outs_have_the_same_gradients(noise):
    networks = shared_networks()
    plan = plan_of(shots=THREE_SHOTS)
    found = []
    for checkpointing in (False, True):
        network = networks.network(Role.GENERATOR)
        (network.enable_gradient_checkpointing if checkpointing else network.disable_gradient_checkpointing)()
        with networks.using(Role.GENERATOR) as generator:
            chunks = rolled(generator, noise, plan, exit_step=1, kv_cache=cache(network), differentiated=range(4))
            found.append((torch.cat(chunks, dim=2).detach(), gradients(networks, torch.cat(chunks, dim=2).sum())))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=0, atol=0)


def test_a_longer_roll_out_begins_like_a_shorter_one(noise):
    networks = shared_networks()
    transformer = networks.network(Role.GENERATOR)
    long = rolled(transformer, noise, plan_of(), exit_step=1, kv_cache=cache(transformer))
    items = batch()
    short = {name: value[:, :2] if value.ndim > 1 else value for name, value in items.items()}
    plan = ChunkPlan.of_batch(short, torch.device("cpu"), uses_image=False)
    begun = rolled(transformer, noise, plan, exit_step=1, kv_cache=cache(transformer))
    assert len(begun) == 2
    for ours, theirs in zip(begun, long, strict=False):
        assert torch.equal(ours, theirs)


def test_equal_prompts_of_consecutive_chunks_are_one_tensor():
    plan = plan_of(shots=((0, 0, 1, 1), (0, 0, 0, 0)))
    first, second, third, fourth = plan.prompt_embeds
    assert first is second and second is not third and third is not fourth
    assert plan.num_chunks == 4 and plan.num_videos == 2
    assert plan.cuts == [[False, False], [False, False], [True, False], [False, False]]
