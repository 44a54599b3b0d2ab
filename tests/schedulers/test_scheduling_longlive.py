"""One schedule for two uses: the solver of generation, and the noise process of training."""

import copy
import itertools
import json
import re

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from longlive_diffusers import LongLiveScheduler
from longlive_diffusers.dtypes import float64_device
from longlive_diffusers.schedulers import scheduling_longlive
from tests.support.checks import default_dtype, logged_by
from tests.support.paths import GOLDEN


GOLDEN_SCHEDULES = load_file(GOLDEN / "schedules.safetensors")
STEPS = [1, 2, 3, 4, 8, 50]
every_number_of_steps = pytest.mark.parametrize("steps", STEPS)


def golden(name: str) -> torch.Tensor:
    return GOLDEN_SCHEDULES[name]


def grid(steps: int) -> np.ndarray:
    """The reference's unshifted noise levels; they begin at 0.999 rounded to float32."""
    return np.linspace(float(np.float32(0.999)), 0, steps + 1)[:-1]


def golden_clip(name: str) -> torch.Tensor:
    """A tensor of the training examples, in our layout `[B, C, F, h, w]`."""
    return golden(f"train.{name}").transpose(1, 2)


def stock_solver(steps: int, **options) -> UniPCMultistepScheduler:
    """diffusers' own, given the unshifted noise levels of the grid."""
    defaults = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    scheduler = UniPCMultistepScheduler(**{**defaults, **options})
    scheduler.set_timesteps(sigmas=grid(steps))
    return scheduler


def our_solver(steps: int, **options) -> LongLiveScheduler:
    scheduler = LongLiveScheduler(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def solve(scheduler, sample: torch.Tensor, velocities: torch.Tensor) -> torch.Tensor:
    """All samples from the initial noise on, `[steps + 1, ...]`."""
    samples = [sample]
    for timestep, velocity in zip(scheduler.timesteps, velocities, strict=True):
        samples.append(scheduler.step(velocity, timestep, samples[-1]).prev_sample)
    return torch.stack(samples)


# -- the solver ------------------------------------------------------------------------------------------------------


@every_number_of_steps
def test_grid_is_the_references_to_the_last_bit(steps):
    scheduler = our_solver(steps)
    assert torch.equal(scheduler.timesteps, golden(f"unipc_{steps}.timesteps"))
    assert torch.equal(scheduler.sigmas, golden(f"unipc_{steps}.sigmas"))


def test_grid_of_four_steps():
    """0.999, 0.74925, 0.4995 and 0.24975, shifted by 5."""
    scheduler = our_solver(4)
    assert scheduler.timesteps.tolist() == [999, 937, 833, 624]
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.sigmas.tolist() == pytest.approx([0.9998, 0.93726, 0.83306, 0.62468, 0.0], abs=1e-5)


@every_number_of_steps
def test_steps_are_those_of_diffusers_solver_to_the_last_bit(steps):
    velocities, noise = golden(f"unipc_{steps}.velocity"), golden(f"unipc_{steps}.samples")[0]
    ours, stock = our_solver(steps), stock_solver(steps)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert torch.equal(solve(ours, noise, velocities), solve(stock, noise, velocities))


@pytest.mark.parametrize(
    "options",
    [{"solver_order": 3}, {"solver_order": 1}, {"disable_corrector": [0, 1, 2]}, {"flow_shift": 3.0}],
    ids=str,
)
def test_options_of_the_solver_reach_it(options):
    velocities, noise = golden("unipc_8.velocity"), golden("unipc_8.samples")[0]
    solved = solve(our_solver(8, **options), noise, velocities)
    assert torch.equal(solved, solve(stock_solver(8, **options), noise, velocities))
    assert not torch.equal(solved, solve(our_solver(8), noise, velocities))


@every_number_of_steps
def test_samples_match_the_reference(steps):
    """The solver takes logarithms of noise levels, whose last bits differ between machines."""
    samples = golden(f"unipc_{steps}.samples")
    solved = solve(our_solver(steps), samples[0], golden(f"unipc_{steps}.velocity"))
    assert solved.shape == samples.shape
    torch.testing.assert_close(solved, samples, atol=5e-6, rtol=0)


def test_setting_timesteps_begins_anew():
    """As at every chunk of a stream."""
    velocities, noise = golden("unipc_4.velocity"), golden("unipc_4.samples")[0]
    scheduler = our_solver(4)
    first = solve(scheduler, noise, velocities)
    scheduler.set_timesteps(4)
    assert torch.equal(solve(scheduler, noise, velocities), first)


class ProductDtypes(TorchDispatchMode):
    """Notes the dtypes of the matrix products that are computed."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default, torch.ops.aten.mv.default):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", [2, 3])
def test_autocast_does_not_reach_into_the_solver(order):
    """Of order 3, it sums over several previous steps, as a matrix product; of order 2, there is one to sum over."""
    velocities, noise = golden("unipc_8.velocity"), golden("unipc_8.samples")[0]
    expected = solve(our_solver(8, solver_order=order), noise, velocities)
    with torch.autocast("cpu", dtype=torch.bfloat16), ProductDtypes() as products:
        found = solve(our_solver(8, solver_order=order), noise, velocities)
    assert products.dtypes == ({torch.float32} if order == 3 else set())
    assert torch.equal(found, expected)


def test_a_copy_made_in_mid_solution_goes_on_by_itself():
    velocities, samples = golden("unipc_4.velocity"), golden("unipc_4.samples")
    expected = solve(our_solver(4), samples[0], velocities)
    scheduler = our_solver(4)
    sample = scheduler.step(velocities[0], scheduler.timesteps[0], samples[0]).prev_sample
    copied = copy.deepcopy(scheduler)
    for solver in (copied, scheduler):
        result = sample
        for timestep, velocity in zip(solver.timesteps[1:], velocities[1:], strict=True):
            result = solver.step(velocity, timestep, result).prev_sample
        assert torch.equal(result, expected[-1])
    copied.set_timesteps(2)
    copied.training_sigmas.zero_()
    assert len(scheduler.timesteps) == 4
    assert scheduler.training_sigmas[0] == 1


def test_other_noise_levels_can_be_given_before_the_shift():
    scheduler = LongLiveScheduler()
    scheduler.set_timesteps(sigmas=[0.5, 0.25])
    assert scheduler.sigmas.tolist() == pytest.approx([2.5 / 3, 1.25 / 2, 0.0])
    assert scheduler.timesteps.tolist() == [833, 625]


def test_given_noise_levels_are_not_changed():
    levels = np.array([1.0, 0.5])
    LongLiveScheduler().set_timesteps(sigmas=levels)
    assert levels.tolist() == [1.0, 0.5]


def test_timesteps_go_to_the_device_and_noise_levels_stay():
    scheduler = LongLiveScheduler()
    scheduler.set_timesteps(2, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert scheduler.sigmas.device.type == "cpu"


@pytest.mark.parametrize(
    "levels", [[], [1.1], [0.5, 0.0], [0.5, 0.5], [0.2, 0.5], [-0.1], [float("nan"), 0.5]], ids=str
)
def test_noise_levels_that_do_not_fall_within_bounds_raise(levels):
    with pytest.raises(ValueError, match=r"must fall strictly within \(0, 1\], got \["):
        LongLiveScheduler().set_timesteps(sigmas=levels)


@pytest.mark.parametrize("levels", [0.5, "0.5", [[0.9, 0.5]], ["much", "little"], [0.9, [0.5]]], ids=str)
def test_noise_levels_that_are_no_list_of_numbers_raise(levels):
    with pytest.raises(ValueError, match=r"`sigmas` must be a list of numbers, got"):
        LongLiveScheduler().set_timesteps(sigmas=levels)


def test_nothing_that_is_given_is_passed_over():
    scheduler = LongLiveScheduler()
    with pytest.raises(ValueError, match="`num_inference_steps` is 3, and there are 2 `sigmas`"):
        scheduler.set_timesteps(3, sigmas=[0.9, 0.5])
    with pytest.raises(ValueError, match=r"`mu` is of other schedulers, got 1\.2"):
        scheduler.set_timesteps(3, mu=1.2)
    scheduler.set_timesteps(2, sigmas=[0.9, 0.5])
    assert len(scheduler.timesteps) == 2


@pytest.mark.parametrize("steps", [None, "x", [-1], [0.5], [True], 1], ids=str)
def test_a_corrector_is_disabled_at_steps(steps):
    with pytest.raises(ValueError, match="`disable_corrector` must be a list of steps, from 0 on, got"):
        LongLiveScheduler(disable_corrector=steps)


@pytest.mark.parametrize("timesteps", [500, [500.0], None], ids=str)
def test_timesteps_of_noise_are_a_tensor(timesteps):
    latents = torch.zeros(1, 4, 2, 2, 2)
    with pytest.raises(ValueError, match=r"`timesteps` must be a tensor, \[1\] or \[1, 2\], got"):
        LongLiveScheduler().add_noise(latents, latents, timesteps)


# -- the training table ----------------------------------------------------------------------------------------------


def assert_weights_equal(weights: torch.Tensor, expected: torch.Tensor) -> None:
    """To two units in the last place of the largest: the last bits of exponentials differ between machines."""
    unit = float(np.spacing(golden("train.weights").max().numpy()))
    torch.testing.assert_close(weights, expected, atol=2 * unit, rtol=0)


def test_training_table_is_the_references():
    scheduler = LongLiveScheduler()
    assert torch.equal(scheduler.training_sigmas, golden("train.sigmas"))
    assert torch.equal(scheduler.training_timesteps, golden("train.timesteps"))
    assert_weights_equal(scheduler.training_weights, golden("train.weights"))


def test_weights_have_mean_one_and_are_largest_in_the_middle():
    scheduler = LongLiveScheduler()
    assert scheduler.training_weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert scheduler.training_weights.min() == 0
    largest = scheduler.training_timesteps[scheduler.training_weights.argmax()]
    assert largest.item() == pytest.approx(500, abs=1)


def test_shift_one_leaves_the_noise_levels_evenly_spaced():
    scheduler = LongLiveScheduler(flow_shift=1.0)
    assert torch.equal(scheduler.training_sigmas, torch.linspace(1, 0, 1001)[:-1])


def golden_timesteps() -> torch.Tensor:
    """`[B, F]`: the times of the table that the examples were noised at."""
    return golden("train.timesteps")[golden("train.index")]


def test_noising_is_the_references_to_the_last_bit():
    noisy = LongLiveScheduler().add_noise(golden_clip("x0"), golden_clip("noise"), golden_timesteps())
    assert torch.equal(noisy, golden_clip("noisy"))


def test_recovered_latents_are_the_references_to_the_last_bit():
    recovered = LongLiveScheduler().x0(golden_clip("noisy"), golden_clip("velocity"), golden_timesteps())
    assert torch.equal(recovered, golden_clip("x0_from_velocity"))


def test_weights_at_timesteps_are_the_references():
    assert_weights_equal(LongLiveScheduler().weight(golden_timesteps()), golden("train.weight_at_index"))


def test_velocity_points_from_the_latents_to_the_noise():
    scheduler, x0, noise = LongLiveScheduler(), golden_clip("x0"), golden_clip("noise")
    velocity = scheduler.velocity(x0, noise)
    assert torch.equal(velocity, noise - x0)
    noisy = scheduler.add_noise(x0, noise, golden_timesteps())
    torch.testing.assert_close(scheduler.x0(noisy, velocity, golden_timesteps()), x0, atol=1e-6, rtol=0)


def test_one_timestep_for_a_clip_is_that_timestep_for_each_frame():
    scheduler, x0, noise = LongLiveScheduler(), golden_clip("x0"), golden_clip("noise")
    timesteps = scheduler.training_timesteps[[100, 900]]
    each = timesteps[:, None].expand(-1, x0.shape[2])
    assert torch.equal(scheduler.add_noise(x0, noise, timesteps), scheduler.add_noise(x0, noise, each))
    assert torch.equal(scheduler.x0(x0, noise, timesteps), scheduler.x0(x0, noise, each))


def test_no_noise_at_time_nought_and_nothing_else_at_time_1000():
    scheduler, x0, noise = LongLiveScheduler(), golden_clip("x0"), golden_clip("noise")
    assert torch.equal(scheduler.add_noise(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(scheduler.add_noise(x0, noise, torch.full((2,), 1000.0)), noise)


def test_the_noise_level_of_a_timestep_outside_the_table_is_a_thousandth_of_it():
    """As for the solver's whole timesteps in a few-step rollout."""
    scheduler = LongLiveScheduler()
    assert scheduler.sigmas_at(torch.tensor([[0, 250], [937, 1000]])).tolist() == [
        pytest.approx([0.0, 0.25]),
        pytest.approx([0.937, 1.0]),
    ]
    in_table = scheduler.training_timesteps[::7]
    assert torch.equal(scheduler.sigmas_at(in_table), scheduler.training_sigmas[::7])


def test_noising_keeps_the_dtype_of_the_latents():
    x0, noise = golden_clip("x0").bfloat16(), golden_clip("noise").bfloat16()
    scheduler = LongLiveScheduler()
    assert scheduler.add_noise(x0, noise, golden_timesteps()).dtype == torch.bfloat16
    assert scheduler.x0(x0, noise, golden_timesteps()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (1, 6)])
def test_timesteps_of_another_shape_raise(shape):
    scheduler, x0 = LongLiveScheduler(), golden_clip("x0")
    for use in (scheduler.add_noise, scheduler.x0):
        with pytest.raises(ValueError, match=r"`timesteps` must be \[2\] or \[2, 6\], got \("):
            use(x0, x0, torch.zeros(shape))


# -- every schedule there can be -------------------------------------------------------------------------------------


def point_mass(scheduler: LongLiveScheduler, steps: int) -> float:
    """Solve for a single clean video, 0, whose velocity is known; returns how far from it the solution ends."""
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    for index, timestep in enumerate(scheduler.timesteps):
        x = scheduler.step(x / scheduler.sigmas[index], timestep, x).prev_sample
        assert scheduler.step_index == index + 1
    return x.abs().max().item()


@pytest.mark.parametrize(("shift", "steps"), [(8, 143), (8, 144), (8, 1000), (5, 333), (3, 999), (12, 100), (100, 12)])
def test_every_step_is_taken_where_timesteps_repeat(shift, steps):
    """Timesteps are whole numbers, so that many steps share some; the noise levels are apart."""
    assert point_mass(LongLiveScheduler(flow_shift=shift), steps) < 1e-6


@pytest.mark.parametrize(
    ("steps", "shift"),
    [*itertools.product((1, 2, 50), (1e-6, 0.01, 0.5, 1, 1000)), (1000, 1e-6), (1000, 1000)],
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unusual_shifts_are_solved(shift, steps, order):
    assert point_mass(LongLiveScheduler(flow_shift=shift, solver_order=order), steps) < 1e-6


@pytest.mark.parametrize(("shift", "steps"), [(1e4, 144), (1e6, 2), (1e8, 3), (1e30, 50)])
def test_noise_levels_that_are_one_in_float32_raise(shift, steps):
    with pytest.raises(ValueError, match=rf"{steps} steps with `flow_shift` {re.escape(str(shift))} .* fewer steps"):
        LongLiveScheduler(flow_shift=shift).set_timesteps(steps)


@pytest.mark.parametrize("steps", [None, 0, -1, 1001, 10**9, 2.5, True, "4", float("nan")])
def test_no_step_more_steps_than_timesteps_and_what_is_no_number_raise_at_once(steps):
    with pytest.raises(ValueError, match=f"`num_inference_steps` must be an integer from 1 to 1000, .*got {steps!r}"):
        LongLiveScheduler().set_timesteps(steps)


BAD_OPTIONS = [
    *({"flow_shift": value} for value in (0, 0.0, -5.0, float("nan"), float("inf"), "5", None, True)),
    *({"num_train_timesteps": value} for value in (0, 1, -1000, 10.5, None)),
    *({"solver_order": value} for value in (0, -1, 1.5, "2")),
    {"lower_order_final": False},
    {"lower_order_final": False, "solver_order": 3},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_options_of_which_there_is_no_schedule_raise(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=re.escape(f"`{name}`") + f".*{re.escape(repr(value))}"):
        LongLiveScheduler(**options)


def test_options_are_checked_where_they_are_loaded_too(tmp_path):
    LongLiveScheduler().save_pretrained(tmp_path)
    path = tmp_path / "scheduler_config.json"
    path.write_text(path.read_text().replace('"flow_shift": 5.0', '"flow_shift": 0.0'))
    with pytest.raises(ValueError, match=r"`flow_shift` must be a finite number above 0, got 0\.0"):
        LongLiveScheduler.from_pretrained(tmp_path)


# -- saving and loading ----------------------------------------------------------------------------------------------

CHANGED = {"flow_shift": 3.0, "solver_order": 3, "disable_corrector": (0,), "num_train_timesteps": 500}


def settings(scheduler) -> dict:
    """The configuration without diffusers' own notes."""
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("options", [{}, CHANGED], ids=["default", "changed"])
def test_saving_and_loading_keeps_everything_and_says_nothing(tmp_path, options):
    scheduler = LongLiveScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    with logged_by() as messages:
        loaded = LongLiveScheduler.from_pretrained(tmp_path)
        from_config = LongLiveScheduler.from_config(scheduler.config)
    assert messages == []
    for other in (loaded, from_config):
        assert json.dumps(settings(other), sort_keys=True) == json.dumps(settings(scheduler), sort_keys=True)
        assert torch.equal(other.training_weights, scheduler.training_weights)
        for one in (other, scheduler):
            one.set_timesteps(4)
        assert torch.equal(other.sigmas, scheduler.sigmas)


def test_what_is_saved_names_the_class_and_its_options(tmp_path):
    LongLiveScheduler(flow_shift=3.0).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "LongLiveScheduler"
    assert (saved["flow_shift"], saved["prediction_type"], saved["use_flow_sigmas"]) == (3.0, "flow_prediction", True)


def test_a_single_option_can_be_changed_when_loading():
    scheduler = LongLiveScheduler.from_config(LongLiveScheduler(solver_order=3).config, flow_shift=2.0)
    assert (scheduler.config.flow_shift, scheduler.config.solver_order) == (2.0, 3)


def test_takes_over_from_the_scheduler_of_wan(tmp_path):
    """Wan's repositories hold diffusers' UniPC with the shift that the model was trained with."""
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    wan.save_pretrained(tmp_path)
    with logged_by() as messages:
        schedulers = [LongLiveScheduler.from_pretrained(tmp_path), LongLiveScheduler.from_config(wan.config)]
    assert messages == []
    for scheduler in schedulers:
        assert settings(scheduler) == settings(LongLiveScheduler(flow_shift=3.0))
        scheduler.set_timesteps(4)
        assert torch.equal(scheduler.sigmas, stock_solver(4, flow_shift=3.0).sigmas)


FOREIGN = {
    "another prediction": {"prediction_type": "epsilon", "use_flow_sigmas": False},
    "Karras levels": {"use_flow_sigmas": True, "use_karras_sigmas": True},
    "an end above nought": {"use_flow_sigmas": True, "final_sigmas_type": "sigma_min"},
    "a dynamic shift": {"use_flow_sigmas": True, "use_dynamic_shifting": True},
}


@pytest.mark.parametrize("options", FOREIGN.values(), ids=FOREIGN)
def test_no_option_of_another_scheduler_undoes_what_makes_this_one(tmp_path, options):
    UniPCMultistepScheduler(**options, flow_shift=5.0).save_pretrained(tmp_path)
    scheduler = LongLiveScheduler.from_pretrained(tmp_path)
    assert settings(scheduler) == settings(LongLiveScheduler())
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.sigmas, golden("unipc_4.sigmas"))


def test_takes_over_from_a_scheduler_of_another_kind():
    scheduler = LongLiveScheduler.from_config(FlowMatchEulerDiscreteScheduler().config)
    scheduler.set_timesteps(4)
    assert torch.equal(scheduler.timesteps, golden("unipc_4.timesteps"))


def test_diffusers_solver_can_take_over_in_turn():
    """With our noise levels given, it makes the same steps."""
    stock = UniPCMultistepScheduler.from_config(LongLiveScheduler(flow_shift=3.0).config)
    stock.set_timesteps(sigmas=grid(4))
    assert torch.equal(stock.sigmas, our_solver(4, flow_shift=3.0).sigmas)
    assert stock.config.prediction_type == "flow_prediction"


def test_schedulers_do_not_share_their_options():
    first, second = LongLiveScheduler(), LongLiveScheduler()
    first.disable_corrector.append(0)
    assert second.disable_corrector == []
    assert LongLiveScheduler().disable_corrector == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_schedule_does_not_depend_on_the_default_dtype(dtype):
    expected = our_solver(4)
    with default_dtype(dtype):
        found = our_solver(4)
    for name in ("training_sigmas", "training_timesteps", "training_weights", "sigmas", "timesteps"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype


def test_clean_latents_are_computed_where_there_is_float64(monkeypatch):
    """Metal has none: there it is the CPU."""
    asked = []
    monkeypatch.setattr(scheduling_longlive, "float64_device", lambda device: asked.append(device) or device)
    scheduler, sample, timesteps = LongLiveScheduler(), torch.randn(1, 2, 3, 4, 4), torch.tensor([500.0])
    expected = sample.double() - scheduler.sigmas_at(timesteps).double() * 2 * sample.double()
    found = scheduler.x0(sample.bfloat16(), 2 * sample.bfloat16(), timesteps)
    assert found.dtype == torch.bfloat16 and asked == [sample.device]
    torch.testing.assert_close(scheduler.x0(sample, 2 * sample, timesteps), expected.float())


def test_metal_has_no_float64():
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64_device(torch.device("cuda:1")) == torch.device("cuda:1")
