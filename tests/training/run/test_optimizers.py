"""The optimizers of a run: which parameters are whose, and that they learn and go on."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from run.arguments import OptimizationArguments
from run.muon import Muon
from run.optimizers import build_optimizers, build_schedules, check_optimizer


ONE_PROCESS = SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("cpu"))
ONE_GPU = SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("cuda", 0))
ONE_MPS = SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("mps"))
MUON = {"optimizer": "muon", "learning_rate": 1e-2, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))


def build(model: nn.Module, **options) -> list[torch.optim.Optimizer]:
    return build_optimizers(list(model.parameters()), ONE_PROCESS, OptimizationArguments(**{**MUON, **options}))


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> float:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    target = torch.sin(3 * x[:, :4])
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return loss.item()


def test_adamw_has_everything():
    (optimizer,) = build(network(), optimizer="adamw")
    assert type(optimizer) is torch.optim.AdamW
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(
    ("accelerator", "fused"), [(ONE_PROCESS, True), (ONE_GPU, True), (ONE_MPS, None)], ids=["CPU", "GPU", "Metal"]
)
def test_adamw_makes_no_large_temporaries(accelerator, fused):
    options = OptimizationArguments(optimizer="adamw")
    (optimizer,) = build_optimizers(list(network().parameters()), accelerator, options)
    assert optimizer.param_groups[0]["fused"] is fused


def test_muon_has_the_matrices_and_adamw_the_rest():
    muon, adamw = build(network())
    assert type(muon) is Muon and type(adamw) is torch.optim.AdamW
    assert {parameter.ndim for parameter in muon.param_groups[0]["params"]} == {2}
    assert {parameter.ndim for parameter in adamw.param_groups[0]["params"]} == {1}
    assert muon.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw", "so that AdamW's learning rates serve"
    assert muon.param_groups[0]["weight_decay"] == adamw.param_groups[0]["weight_decay"] == 0.1


def test_a_step_of_muon_is_as_large_as_one_of_adamw():
    """Numbers of a matrix move by 0.2 times the learning rate, in the mean square, whatever its shape."""
    model = nn.Linear(256, 64, bias=False)
    before = model.weight.detach().clone()
    (muon,) = build(model, adam_weight_decay=0.0)
    model.weight.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    muon.step()
    moved = (model.weight.detach() - before).square().mean().sqrt().item()
    assert moved == pytest.approx(0.2 * 1e-2, rel=0.2)


def test_it_learns():
    model = network()
    optimizers = build(model)
    first = train(model, optimizers, 1)
    assert train(model, optimizers, 200) < 0.5 * first


def test_schedules_go_together():
    optimizers = build(network())
    options = OptimizationArguments(**MUON, lr_scheduler="linear", lr_warmup_steps=2, max_train_steps=10)
    schedules = build_schedules(optimizers, options)
    rates = []
    for _ in range(4):
        rates.append([schedule.get_last_lr()[0] for schedule in schedules])
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert [muon for muon, _ in rates] == [adamw for _, adamw in rates] == pytest.approx([0, 5e-3, 1e-2, 8.75e-3])


def test_it_goes_on_from_its_state_bit_for_bit():
    model = network()
    optimizers = build(model)
    train(model, optimizers, 5)
    again = copy.deepcopy(model)
    resumed = build(again, learning_rate=1.0)
    for optimizer, other in zip(optimizers, resumed, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizers, 5) == train(again, resumed, 5)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))


def test_muon_is_refused_where_matrices_are_sharded():
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match="needs whole matrices, and FSDP shards them"):
        check_optimizer(sharded, OptimizationArguments(**MUON))
    check_optimizer(sharded, OptimizationArguments())
    check_optimizer(ONE_PROCESS, OptimizationArguments(**MUON))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "polynomial", "cosine_with_restarts"])
def test_a_schedule_begins_after_any_update(optimizer, schedule):
    """The rates are those of a run that nothing interrupted, whatever the optimizer was loaded with."""
    options = OptimizationArguments(**MUON | {"optimizer": optimizer}, lr_scheduler=schedule, max_train_steps=8)
    whole = build(network(), optimizer=optimizer)
    schedules = build_schedules(whole, options)
    for step in range(8):
        rate = schedules[0].get_last_lr()
        resumed = build(network(), optimizer=optimizer)
        for other in resumed:
            other.param_groups[0] |= {"lr": 7.0, "initial_lr": 7.0, "weight_decay": 0.7}
        resumed[-1].param_groups[0] |= {"betas": (0.7, 0.7), "eps": 0.7}
        assert build_schedules(resumed, options, step)[-1].get_last_lr() == rate
        for ours, theirs in zip(resumed, whole, strict=True):
            names = ("lr", "initial_lr", "weight_decay", "betas", "eps", "momentum")
            values = [
                {name: value for name, value in optimizer.param_groups[0].items() if name in names}
                for optimizer in (ours, theirs)
            ]
            assert values[0] == values[1]
        for stepped, its_schedule in zip(whole, schedules, strict=True):
            stepped.step()
            its_schedule.step()


def test_adamw_is_fused_and_goes_on_from_the_state_of_one_that_was_not():
    before, after = network(), network()
    plain = torch.optim.AdamW(before.parameters(), lr=1e-2)
    train(before, [plain], 3)
    after.load_state_dict(before.state_dict())
    (fused,) = build(after, optimizer="adamw", adam_beta1=0.9, adam_beta2=0.999, adam_weight_decay=1e-2)
    assert fused.param_groups[0]["fused"]
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert train(after, [fused], 5) == pytest.approx(train(before, [plain], 5), rel=1e-5)
    for ours, theirs in zip(after.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fused_adamw_is_adamw():
    ours, theirs = network(), network()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    (fused,) = build(ours, optimizer="adamw")
    plain = torch.optim.AdamW(theirs.parameters(), **options)
    assert train(ours, [fused], 20) == pytest.approx(train(theirs, [plain], 20), rel=1e-4)
