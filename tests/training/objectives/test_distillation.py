"""Distribution-matching distillation: what the scores see, and the gradients, against a slow implementation of the
formulas in float64 that runs each chunk by itself."""

import pytest
import torch

from longlive_diffusers import LongLiveScheduler, LongLiveTransformer3DModel
from objectives.distillation import DistillationSettings, Purpose, RolloutShape, guided
from objectives.distillation_networks import Role
from objectives.rollout import ChunkPlan
from tests.support.distillation import ONE_SHOT, ROPE_OFFSET, THREE_SHOTS, batch, objective, shared_networks
from tests.support.tiny_pipeline import CHANNELS, CHUNK_SIZE, SIDE, TEXT_DIM, TEXT_LENGTH, tiny_transformer


NUM_CHUNKS = 4
CPU = torch.device("cpu")


@pytest.fixture
def video() -> torch.Tensor:
    return torch.randn(2, CHANNELS, NUM_CHUNKS * CHUNK_SIZE, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def negative() -> torch.Tensor:
    return torch.randn(1, TEXT_LENGTH, TEXT_DIM, generator=torch.Generator().manual_seed(3))


def slow_velocity(
    network: LongLiveTransformer3DModel,
    history: torch.Tensor,
    history_timestep: torch.Tensor,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    plan: ChunkPlan,
    prompt: torch.Tensor | None,
) -> torch.Tensor:
    """The velocity of every chunk: history is written into a cache chunk by chunk, and the chunk attends to it. This
    shares no code with the forwards of whole clips. Each row is a batch of its own."""
    rows = []
    for row in range(noisy.shape[0]):
        sizes = {"window_size": noisy.shape[2], "sink_size": 0, "multi_shot_sink": False}
        kv_cache = network.create_kv_cache(1, SIDE, SIDE, **sizes)
        chunks = []
        for index in range(plan.num_chunks):
            own = slice(index * CHUNK_SIZE, (index + 1) * CHUNK_SIZE)
            text = plan.prompt_embeds[index][row : row + 1] if prompt is None else prompt
            kv_cache.begin_chunk(CHUNK_SIZE, rope_offset=plan.shot_index[index][row] * ROPE_OFFSET)
            chunks.append(
                network(noisy[row : row + 1, :, own], timestep[row : row + 1, own], text, kv_cache=kv_cache).sample
            )
            kv_cache.finish_chunk()
            past = history[row : row + 1, :, own], history_timestep[row : row + 1, own]
            network(*past, text, kv_cache=kv_cache)
        rows.append(torch.cat(chunks, dim=2))
    return torch.cat(rows)


def slow_scores(networks, video, draws, plan, *, clean: bool, image: bool):
    """What the scores see, and a function that gives a role's velocity for it."""
    sigma = LongLiveScheduler().sigmas_at(draws.score_timestep)[:, None, :, None, None].double()
    noisy = ((1 - sigma) * video.double() + sigma * draws.score_noise.double()).float()
    timestep = draws.score_timestep.clone()
    if image:
        noisy[:, :, 0], timestep[:, 0], sigma[:, :, 0] = video[:, :, 0], 0, 0
    history = (video, torch.zeros_like(timestep)) if clean else (noisy, timestep)

    @torch.no_grad()
    def velocity(role: Role, prompt: torch.Tensor | None = None) -> torch.Tensor:
        with networks.using(role):
            return slow_velocity(networks.network(role), *history, noisy, timestep, plan, prompt).double()

    return noisy.double(), sigma, velocity


CASES = [
    pytest.param(context, image, scale, shots, id=f"{context}-{'image' if image else 'text'}-{scale}-{name}")
    for context, image, scale, (name, shots) in [
        ("clean", False, 1.0, ("one", ONE_SHOT)),
        ("clean", False, 4.0, ("three", THREE_SHOTS)),
        ("clean", True, 2.0, ("three", THREE_SHOTS)),
        ("noisy", False, 1.0, ("three", THREE_SHOTS)),
        ("noisy", False, 4.0, ("one", ONE_SHOT)),
        ("noisy", True, 3.0, ("three", THREE_SHOTS)),
        ("clean", True, 1.0, ("one", ONE_SHOT)),
        ("noisy", True, 1.0, ("one", ONE_SHOT)),
    ]
]


def fast_direction(networks, dmd, video, draws, plan, negative, scale):
    inputs = dmd.score_inputs(video, draws, plan)
    prompts = dmd.prompts_of_scores(plan)
    velocities = {}
    for role in (Role.FAKE_SCORE, Role.REAL_SCORE):
        with torch.no_grad(), networks.using(role) as score:
            velocities[role] = score(**inputs.arguments, encoder_hidden_states=prompts, return_dict=False)[0]
    unconditional = None
    if scale != 1:
        with torch.no_grad(), networks.using(Role.REAL_SCORE) as score:
            text = negative.expand(2, -1, -1)
            unconditional = score(**inputs.arguments, encoder_hidden_states=text, return_dict=False)[0]
    real = guided(velocities[Role.REAL_SCORE], unconditional, scale)
    fake = velocities[Role.FAKE_SCORE]
    return dmd.direction(dmd.predicted_x0(fake, inputs), dmd.predicted_x0(real, inputs), inputs)


@pytest.mark.parametrize("timesteps", ["clip", "chunk"])
@pytest.mark.parametrize(("context", "image", "scale", "shots"), CASES)
def test_the_gradient_of_the_generator_is_that_of_the_formulas(
    video, negative, context, image, scale, shots, timesteps
):
    networks = shared_networks()
    dmd = objective(score_context=context, score_guidance_scale=scale, score_timestep=timesteps)
    plan = ChunkPlan.of_batch(batch(shots, has_image=image), CPU, uses_image=image)
    if image:
        video[:, :, :1] = plan.first_frame
    draws = dmd.draw([0, 1], 0, Purpose.GENERATOR)
    video.requires_grad_()
    chunks = list(video.split(CHUNK_SIZE, dim=2))
    direction = fast_direction(networks, dmd, video.detach(), draws, plan, negative, scale)
    total = dmd.generator_loss_sum(chunks, direction, range(NUM_CHUNKS))
    count = dmd.differentiated_with_loss(plan, range(NUM_CHUNKS))
    (gradient,) = torch.autograd.grad(total / count, video)

    noisy, sigma, velocity = slow_scores(networks, video.detach(), draws, plan, clean=context == "clean", image=image)
    fake = noisy - sigma * velocity(Role.FAKE_SCORE)
    real = noisy - sigma * velocity(Role.REAL_SCORE)
    if scale != 1:
        without = noisy - sigma * velocity(Role.REAL_SCORE, negative)
        real = without + scale * (real - without)
    expected = torch.zeros_like(noisy)
    loss = 0.0
    for row in range(2):
        for index in range(NUM_CHUNKS):
            frames = list(range(index * CHUNK_SIZE, (index + 1) * CHUNK_SIZE))
            frames = frames[1:] if image and index == 0 else frames
            x0 = video.detach()[row, :, frames].double()
            norm = (x0 - real[row, :, frames]).abs().mean()
            expected[row, :, frames] = (fake[row, :, frames] - real[row, :, frames]) / norm
            loss += 0.5 * float(expected[row, :, frames].square().sum())
    frames_with_loss = 2 * (NUM_CHUNKS * CHUNK_SIZE - image)
    elements = frames_with_loss * CHANNELS * SIDE * SIDE
    assert count == frames_with_loss
    assert float(total / count) == pytest.approx(loss / elements, rel=2e-4)
    scale_of = expected.abs().max() / elements
    torch.testing.assert_close(gradient.double() / scale_of, expected / elements / scale_of, rtol=0, atol=5e-4)
    if image:
        assert not gradient[:, :, 0].any()


@pytest.mark.parametrize(("context", "image", "scale", "shots"), CASES)
def test_the_loss_of_the_fake_score_is_that_of_the_formula(video, context, image, scale, shots):
    del scale  # the teacher's
    networks = shared_networks()
    dmd = objective(score_context=context)
    plan = ChunkPlan.of_batch(batch(shots, has_image=image), CPU, uses_image=image)
    if image:
        video[:, :, :1] = plan.first_frame
    draws = dmd.draw([0, 1], 0, Purpose.CRITIC)
    inputs = dmd.score_inputs(video, draws, plan)
    with networks.using(Role.FAKE_SCORE) as score:
        velocity = score(**inputs.arguments, encoder_hidden_states=dmd.prompts_of_scores(plan), return_dict=False)[0]
        loss = dmd.critic_error_sum(velocity, inputs) / dmd.scored_with_loss(plan)
    _, _, slow = slow_scores(networks, video, draws, plan, clean=context == "clean", image=image)
    error = slow(Role.FAKE_SCORE) - (draws.score_noise.double() - video.double())
    error = error[:, :, 1:] if image else error
    assert dmd.scored_with_loss(plan) == 2 * error.shape[2]
    assert float(loss) == pytest.approx(float(error.square().mean()), rel=1e-5)


def test_an_update_of_one_role_leaves_the_other_and_the_base_untouched(video):
    networks = shared_networks()
    dmd = objective()
    plan = ChunkPlan.of_batch(batch(), CPU, uses_image=False)
    before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    inputs = dmd.score_inputs(video, dmd.draw([0, 1], 0, Purpose.CRITIC), plan)
    for role, other in ((Role.FAKE_SCORE, Role.GENERATOR), (Role.GENERATOR, Role.FAKE_SCORE)):
        own, theirs = networks.parameters_of(role), networks.parameters_of(other)
        assert own and theirs and not own.keys() & theirs.keys()
        with networks.using(role) as network:
            velocity = network(
                **inputs.arguments, encoder_hidden_states=dmd.prompts_of_scores(plan), return_dict=False
            )[0]
            dmd.critic_error_sum(velocity, inputs).backward()
        assert all(parameter.grad is not None for parameter in own.values())
        assert all(parameter.grad is None for parameter in theirs.values())
        torch.optim.AdamW(own.values(), lr=1e-2).step()
        changed = {name for name, tensor in networks.state_dict().items() if not torch.equal(tensor, before[name])}
        adapter = networks.adapter(role)
        assert changed and all(f".{adapter}." in name for name in changed)
        before = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
        for parameter in own.values():
            parameter.grad = None


def test_the_real_score_is_the_base_bit_for_bit(video):
    networks, base = shared_networks(), tiny_transformer()
    text = batch()["prompt_embeds"]
    timestep = torch.tensor([500.0, 100.0])
    with torch.no_grad():
        expected = base(video, timestep, text, clean_hidden_states=video).sample
        with networks.using(Role.REAL_SCORE) as real_score:
            assert torch.equal(real_score(video, timestep, text, clean_hidden_states=video).sample, expected)
        for role in (Role.GENERATOR, Role.FAKE_SCORE):
            with networks.using(role) as network:
                other = network(video, timestep, text, clean_hidden_states=video).sample
            assert (other - expected).abs().max() > 1e-3


def test_draws_are_a_samples_own_and_the_exit_step_is_common():
    dmd = objective(num_inference_steps=4)
    both = dmd.draw([7, 8], 3, Purpose.GENERATOR)
    alone = dmd.draw([8], 3, Purpose.GENERATOR)
    assert torch.equal(both.noise[1:], alone.noise) and torch.equal(both.score_noise[1:], alone.score_noise)
    assert torch.equal(both.score_timestep[1:], alone.score_timestep) and both.exit_step == alone.exit_step
    critic = dmd.draw([7, 8], 3, Purpose.CRITIC)
    assert not torch.equal(critic.noise, both.noise) and not torch.equal(critic.score_noise, both.score_noise)
    assert not torch.equal(objective(seed=1).draw([8], 3, Purpose.GENERATOR).noise, alone.noise)
    exits = [dmd.draw([0], step, Purpose.GENERATOR).exit_step for step in range(400)]
    assert sorted(set(exits)) == [0, 1, 2, 3]
    assert all(70 < exits.count(step) < 130 for step in range(4))
    last = objective(num_inference_steps=4, last_step_only=True)
    assert {last.draw([0], step, Purpose.CRITIC).exit_step for step in range(20)} == {3}


def test_timesteps_of_the_scores():
    """Uniform before the shift, within the range, for a clip or for each chunk."""
    drawn = {
        kind: torch.stack(
            [objective(score_timestep=kind).draw([i], 0, Purpose.CRITIC).score_timestep[0] for i in range(300)]
        )
        for kind in ("clip", "chunk")
    }
    assert all(bool((steps >= 20).all() and (steps <= 980).all()) for steps in drawn.values())
    assert (drawn["clip"] == drawn["clip"][:, :1]).all()
    by_chunk = drawn["chunk"].unflatten(1, (NUM_CHUNKS, CHUNK_SIZE))
    assert (by_chunk == by_chunk[..., :1]).all() and not (by_chunk == by_chunk[:, :1]).all()
    for steps in drawn.values():  # the median of the shifted schedule
        assert abs(float(steps.median()) - 1000 * 5 * 0.5 / (1 + 4 * 0.5)) < 40


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("image", [False, True])
def test_ranks_see_their_own_frames_of_the_same_clip(video, num_ranks, image):
    plan = ChunkPlan.of_batch(batch(THREE_SHOTS, has_image=image), CPU, uses_image=image)
    whole = objective(score_timestep="chunk")
    draws = whole.draw([0, 1], 0, Purpose.CRITIC)
    expected = whole.score_inputs(video, draws, plan)
    parts = [
        objective(num_ranks=num_ranks, rank=rank, score_timestep="chunk").score_inputs(video, draws, plan)
        for rank in range(num_ranks)
    ]
    for name, dim in (("hidden_states", 2), ("clean_hidden_states", 2), ("timestep", 1), ("frame_positions", 1)):
        joined = torch.cat([part.arguments[name] for part in parts], dim=dim)
        assert torch.equal(joined, expected.arguments[name]), name
    counts = [objective(num_ranks=num_ranks, rank=rank).scored_with_loss(plan) for rank in range(num_ranks)]
    assert sum(counts) == whole.scored_with_loss(plan) == 2 * (8 - image)
    assert torch.equal(torch.cat([part.bears_loss for part in parts], dim=1), expected.bears_loss)


def test_only_the_last_frames_of_a_long_roll_out_are_scored(video):
    dmd = objective(score_latent_frames=4, gradient_chunks=1)
    plan = ChunkPlan.of_batch(batch(THREE_SHOTS), CPU, uses_image=False)
    draws = dmd.draw([0, 1], 0, Purpose.GENERATOR)
    assert draws.noise.shape[2] == 8 and draws.score_noise.shape[2] == draws.score_timestep.shape[1] == 4
    inputs = dmd.score_inputs(video, draws, plan)
    assert torch.equal(inputs.x0, video[:, :, 4:])
    # Positions count from the first scored frame, and so do the distances of cuts.
    assert inputs.arguments["frame_positions"].tolist() == [[0, 1, 5, 6], [0, 1, 2, 3]]
    assert torch.equal(dmd.prompts_of_scores(plan), torch.stack(list(plan.prompt_embeds[2:]), dim=1))
    assert list(dmd.shape.with_gradient) == [3]
    direction = torch.ones(2, CHANNELS, 4, SIDE, SIDE, dtype=torch.float64)
    direction[:, :, 2:] = 2
    chunks = list(video.split(CHUNK_SIZE, dim=2))
    assert float(dmd.generator_loss_sum(chunks, direction, [3])) == pytest.approx(2 * 2 * 0.5 * 4)


def test_a_chunk_that_the_teacher_takes_for_true_gives_no_nan(video):
    dmd = objective()
    inputs = dmd.score_inputs(
        video, dmd.draw([0, 1], 0, Purpose.GENERATOR), ChunkPlan.of_batch(batch(), CPU, uses_image=False)
    )
    direction = dmd.direction(video.double(), video.double(), inputs)
    assert torch.equal(direction, torch.zeros_like(direction))


def test_guidance_is_diffusers_convention():
    conditional, negative = torch.tensor([3.0]), torch.tensor([1.0])
    assert guided(conditional, negative, 4.0).item() == 9.0  # cond + 3 (cond - neg)
    assert guided(conditional, None, 1.0).item() == 3.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_inference_steps": 0}, r"--num_inference_steps must be in \[1, 1000\], got 0"),
        ({"generator_interval": 0}, "--generator_interval must be at least 1, got 0"),
        ({"gradient_chunks": -1}, "--gradient_chunks must be at least 1, got -1"),
        ({"image_probability": 1.5}, r"--image_probability must be in \[0, 1\], got 1.5"),
        ({"score_guidance_scale": -1.0}, "--score_guidance_scale must be at least 0, got -1.0"),
        ({"score_guidance_scale": float("nan")}, "--score_guidance_scale must be at least 0, got nan"),
        ({"min_score_timestep": 500.0, "max_score_timestep": 400.0}, "got 500.0 and 400.0"),
        ({"max_score_timestep": 1001.0}, "got 20.0 and 1001.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationSettings(**settings)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((7, 4, 2, 1), "--num_latent_frames 7 is no multiple of 2"),
        ((8, 3, 2, 1), "--score_latent_frames 3 is no multiple of 2"),
        ((8, 10, 2, 1), "--score_latent_frames 10 are more than the roll-out has, --num_latent_frames 8"),
        ((8, 4, 2, 3), "--gradient_chunks 3 .* more than the scores see, 4"),
    ],
)
def test_parts_of_a_roll_out_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        RolloutShape(*shape)


@pytest.mark.parametrize(
    ("start", "context", "clean"),
    [
        ("direct", "auto", True),
        ("standalone", "auto", False),
        ("direct", "noisy", False),
        ("standalone", "clean", True),
    ],
)
def test_the_context_of_the_scores_follows_the_start(start, context, clean):
    assert DistillationSettings(start=start, score_context=context).sees_clean_history is clean
