"""Muon and the AdamW beside it."""

import copy

import pytest
import torch
from run.muon import Muon, orthogonalize
from torch import nn


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_singular_values_become_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonalize(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = (left.mT @ made @ right.mT).diagonal(dim1=1, dim2=2)  # in the singular vectors of what was given
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    target = torch.sin(3 * x[:, :4])
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_it_learns():
    model = network()
    optimizer = Muon(model.parameters(), lr=1e-2)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    first = train(model, optimizer, 1)
    assert train(model, optimizer, 200) < 0.5 * first


def test_what_is_no_matrix_is_adamws():
    model, other = network(), network()
    muon = Muon(model.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    biases = [parameter for parameter in other.parameters() if parameter.ndim == 1]
    adamw = torch.optim.AdamW(biases, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    for seed in range(5):
        for parameters in zip(model.parameters(), other.parameters(), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=torch.Generator().manual_seed(seed))
            for parameter in parameters:
                parameter.grad = gradient.clone()
        muon.step()
        adamw.step()
    ours = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    torch.testing.assert_close(ours, biases, atol=1e-6, rtol=1e-5)


def test_it_goes_on_from_its_state_bit_for_bit():
    model = network()
    optimizer = Muon(model.parameters(), lr=1e-2)
    train(model, optimizer, 5)
    again = copy.deepcopy(model)
    resumed = Muon(again.parameters(), lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 5) == train(again, resumed, 5)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))
