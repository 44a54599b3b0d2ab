"""LongLiveScheduler: the solver of streaming generation and the noise process of training, on one shifted schedule.

Both work on the straight path `x_t = (1 - sigma) x0 + sigma noise`, whose velocity `noise - x0` the network predicts,
and both shift the noise level, `sigma = 5 s / (1 + 4 s)`, to the noisy end, where the layout of a video is decided.
"""

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from ..dtypes import float64_device
from ..number_checks import check_booleans, is_count, is_finite
from .coordinates import step_by_coordinates


class LongLiveScheduler(UniPCMultistepScheduler):
    """
    UniPC (order 2, flow prediction) on LongLive-2.0's grid; per-frame noising, targets and loss weights for training.

    Args:
        num_train_timesteps: The length of the training table; timesteps lie in [0, num_train_timesteps].
        flow_shift: The shift of the noise levels.
        solver_order, lower_order_final, disable_corrector: As in `UniPCMultistepScheduler` (in its variant bh2).

    Raises:
        ValueError: For a shift that is no positive number, a table of less than 2 timesteps, an order below 1, or an
            order above 1 that does not fall at the end: the last noise level is 0, by which the solver would divide.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        flow_shift: float = 5.0,
        solver_order: int = 2,
        lower_order_final: bool = True,
        disable_corrector: tuple[int, ...] = (),
    ):
        check_solver(num_train_timesteps, flow_shift, solver_order, lower_order_final)
        check_steps_of_corrector(disable_corrector)
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            solver_order=solver_order,
            solver_type="bh2",
            lower_order_final=lower_order_final,
            disable_corrector=list(disable_corrector),
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=flow_shift,
        )
        levels = torch.linspace(1, 0, num_train_timesteps + 1, dtype=torch.float32)[:-1]
        self.training_sigmas = flow_shift * levels / (1 + (flow_shift - 1) * levels)  # [num_train_timesteps], falling
        self.training_timesteps = self.training_sigmas * num_train_timesteps
        bell = torch.exp(-2 * ((self.training_timesteps - num_train_timesteps / 2) / num_train_timesteps) ** 2)
        bell = bell - bell.min()
        self.training_weights = bell * (num_train_timesteps / bell.sum())  # mean 1

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """Take only this class's own arguments from another scheduler's configuration: its other settings of UniPC
        (`prediction_type`, `use_karras_sigmas`, ...) would undo what defines this scheduler."""
        init_dict, unused_kwargs, _ = super().extract_init_dict(config_dict, **kwargs)
        return init_dict, unused_kwargs, {}

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | np.ndarray | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a chunk on the grid `linspace(0.999, 0, n + 1)[:-1]`, shifted; `sigmas` replaces it, before the shift.

        Raises:
            ValueError: If there is no step, or more than the training table has; if sigmas are no list of numbers,
                outside (0, 1], not strictly decreasing, or not as many as `num_inference_steps`; if two of them are so
                close that the solver cannot tell them apart; or for `mu`: the shift does not depend on the size.
        """
        if mu is not None:
            raise ValueError(f"`mu` is of other schedulers, got {mu!r}: this one shifts by `flow_shift`.")
        if sigmas is None:
            table = self.config["num_train_timesteps"]
            if not is_count(num_inference_steps) or not 1 <= num_inference_steps <= table:
                raise ValueError(
                    f"`num_inference_steps` must be an integer from 1 to {table}, the timesteps that the network was "
                    f"trained on, got {num_inference_steps!r}."
                )
            largest = np.float32(1 - 1 / table)  # float32, to equal the reference exactly
            sigmas = np.linspace(float(largest), 0, num_inference_steps + 1)[:-1]
        given = sigmas
        try:
            sigmas = np.array(sigmas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`sigmas` must be a list of numbers, got {given!r}.") from error
        if sigmas.ndim != 1:
            raise ValueError(f"`sigmas` must be a list of numbers, got {given!r}.")
        if not len(sigmas) or not (sigmas.min() > 0 and sigmas.max() <= 1 and (np.diff(sigmas) < 0).all()):
            raise ValueError(f"`sigmas` must fall strictly within (0, 1], got {sigmas.tolist()}.")
        if num_inference_steps not in (None, len(sigmas)):
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r}, and there are {len(sigmas)} `sigmas`."
            )
        # UniPC takes all of these; its annotations say less.
        super().set_timesteps(device=device, sigmas=sigmas)  # pyright: ignore[reportArgumentType]
        levels = self.sigmas[:-1]
        log_snr = torch.log(1 - levels) - torch.log(levels)  # what the solver divides by differences of
        if not torch.isfinite(log_snr).all() or not (log_snr.diff() > 0).all():
            raise ValueError(
                f"{len(levels)} steps with `flow_shift` {self.config['flow_shift']} have noise levels that the solver "
                "cannot tell apart: take fewer steps, or a shift closer to 1."
            )

    def index_for_timestep(self, timestep: int | torch.Tensor, schedule_timesteps: torch.Tensor | None = None) -> int:
        """Return the index of the first step with this timestep. Many steps share timesteps, which are integers;
        diffusers would begin with the second of those, and step beyond the end."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (schedule == timestep).nonzero()
        return int(found[0]) if len(found) else super().index_for_timestep(timestep, schedule_timesteps)

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple:
        """Take one step of the solver, in the precision of `sample`, also under autocast: from order 3 on, sums over
        previous steps are matrix products. A GPU is given the sums to make, and not the coefficients to compute."""
        check_booleans(return_dict=return_dict)
        if sample.device.type != "cpu":
            previous = step_by_coordinates(self, super().step, model_output, timestep, sample)
            return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)
        with torch.autocast(sample.device.type, enabled=False):
            return super().step(model_output, timestep, sample, return_dict)

    def sigmas_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the noise level of each timestep, float32, in the same shape: the training table's if the timestep is
        in the table, else `t / num_train_timesteps`."""
        table = self.training_timesteps.to(timesteps.device)
        timesteps = timesteps.to(table.dtype)
        nearest = (table - timesteps[..., None]).abs().argmin(dim=-1)
        in_table = table[nearest] == timesteps
        sigmas = self.training_sigmas.to(timesteps.device)[nearest]
        return torch.where(in_table, sigmas, timesteps / self.config["num_train_timesteps"])

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return `(1 - sigma) x0 + sigma noise`, with a noise level for each latent frame.

        Args:
            original_samples, noise: `[B, C, F, h, w]`.
            timesteps: `[B]` or `[B, F]`, in [0, num_train_timesteps].
        """
        sigma = self._broadcast_sigmas(timesteps, original_samples)
        return ((1 - sigma) * original_samples + sigma * noise).type_as(original_samples)

    def velocity(self, original_samples: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the network's target, `noise - x0`."""
        return noise - original_samples

    def x0(self, sample: torch.Tensor, velocity: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the clean latents that a velocity points to, `x_t - sigma v`; `timesteps` are `[B]` or `[B, F]`. The
        product is computed in float64, because it cancels most of `sample` where there is much noise."""
        device = float64_device(sample.device)
        sigma = self._broadcast_sigmas(timesteps, sample)
        noisy, sigma, velocity = (states.to(device, torch.float64) for states in (sample, sigma, velocity))
        return (noisy - sigma * velocity).to(sample)

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the loss weight of each timestep (that of the nearest one in the training table); the mean over the
        table is 1."""
        table = self.training_timesteps.to(timesteps.device)
        nearest = (table - timesteps.to(table.dtype)[..., None]).abs().argmin(dim=-1)
        return self.training_weights.to(timesteps.device)[nearest]

    def _broadcast_sigmas(self, timesteps: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        batch, _, frames = sample.shape[:3]
        if not isinstance(timesteps, torch.Tensor):
            raise ValueError(f"`timesteps` must be a tensor, [{batch}] or [{batch}, {frames}], got {timesteps!r}.")
        if timesteps.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"`timesteps` must be [{batch}] or [{batch}, {frames}], got {tuple(timesteps.shape)}.")
        sigmas = self.sigmas_at(timesteps.to(sample.device))
        return sigmas.reshape(batch, 1, -1, 1, 1)


def check_solver(num_train_timesteps: int, flow_shift: float, solver_order: int, lower_order_final: bool) -> None:
    """Raise a ValueError that states the numbers, unless there is a schedule and a solver of this kind."""
    if not is_count(num_train_timesteps) or num_train_timesteps < 2:
        raise ValueError(f"`num_train_timesteps` must be a whole number of at least 2, got {num_train_timesteps!r}.")
    if not is_finite(flow_shift) or flow_shift <= 0:
        raise ValueError(f"`flow_shift` must be a finite number above 0, got {flow_shift!r}.")
    if not is_count(solver_order) or solver_order < 1:
        raise ValueError(f"`solver_order` must be a whole number of at least 1, got {solver_order!r}.")
    check_booleans(lower_order_final=lower_order_final)
    if solver_order > 1 and not lower_order_final:
        raise ValueError(
            f"`lower_order_final` False with `solver_order` {solver_order} divides by the last noise level, which is "
            "0: the last step must be of order 1."
        )


def check_steps_of_corrector(disable_corrector: object) -> None:
    """Raise a ValueError unless these are the indices of steps."""
    if not isinstance(disable_corrector, list | tuple) or not all(
        is_count(step) and step >= 0 for step in disable_corrector
    ):
        raise ValueError(f"`disable_corrector` must be a list of steps, from 0 on, got {disable_corrector!r}.")
