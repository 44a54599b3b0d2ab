"""The schedule of the toy's scripts, also of very short runs."""

import pytest
import torch

from schedules import one_cycle


@pytest.mark.parametrize("warmup", [0.02, 0.05, 0.1])
def test_any_number_of_updates_has_a_schedule(warmup):
    for steps in range(1, 120):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = one_cycle(optimizer, 0.5, steps=steps, warmup=warmup)
        rates = []
        for _ in range(steps):
            rates += schedule.get_last_lr()
            optimizer.step()
            if len(rates) < steps:
                schedule.step()
        assert all(0 < rate <= 0.5 for rate in rates), steps
