"""What norms, gates and GELU keep for the backward, and that their gradients are those of autograd."""

from contextlib import nullcontext

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch.utils.checkpoint import checkpoint

from longlive_diffusers.fused import residual
from longlive_diffusers.models import lean_norms
from longlive_diffusers.models.lean_feed_forward import feed_forward


BATCH, FRAMES, TOKENS, DIM = 2, 3, 4, 8
EPS = 1e-6


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def states(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return leaf(BATCH, FRAMES * TOKENS, DIM, dtype=dtype)


def by_frame(batch: int = BATCH, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return leaf(batch, FRAMES, 1, DIM, dtype=dtype)


def for_all(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return leaf(DIM, dtype=dtype)


CASES = {
    "norm": ("norm", lambda d, w: [states(d), by_frame(dtype=w), by_frame(dtype=w)], {"eps": EPS}),
    "norm, one weight": ("norm", lambda d, w: [states(d), for_all(w), for_all(w)], {"eps": EPS}),
    "norm, a batch of weights": ("norm", lambda d, w: [states(d), by_frame(1, w), by_frame(1, w)], {"eps": EPS}),
    "gated": (
        "add_and_norm",
        lambda d, w: [states(d), states(d), by_frame(dtype=w), by_frame(dtype=w), by_frame(dtype=w)],
        {"eps": EPS},
    ),
    "gated, one weight": (
        "add_and_norm",
        lambda d, w: [states(d), states(d), by_frame(dtype=w), for_all(w), for_all(w)],
        {"eps": EPS},
    ),
    "without a gate": (
        "add_and_norm",
        lambda d, w: [states(d), states(d), None, by_frame(dtype=w), by_frame(dtype=w)],
        {"eps": EPS},
    ),
    "add without a gate": ("add", lambda d, w: [states(d), states(d), None], {"dtype": torch.float64}),
    "add": ("add", lambda d, w: [states(d), states(d), by_frame(dtype=w)], {"dtype": torch.float64}),
}


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_finite_differences(case):
    name, make, options = CASES[case]
    inputs = [tensor for tensor in make(torch.float64, torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: getattr(lean_norms, name)(*tensors, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_results_are_the_plain_ones_and_gradients_within_rounding(case, dtype):
    name, make, options = CASES[case]
    if name == "add":  # in which the stream goes on to the next block
        options = {"dtype": dtype}
    inputs = make(dtype, torch.float32)
    given = [tensor for tensor in inputs if tensor is not None]
    found, expected = (getattr(module, name)(*inputs, **options) for module in (lean_norms, residual))
    found, expected = ((found,), (expected,)) if isinstance(found, torch.Tensor) else (found, expected)
    weights = [torch.randn_like(result) for result in found]
    for result, plain in zip(found, expected, strict=True):
        assert result.dtype == plain.dtype and torch.equal(result, plain)
    gradients, plain_gradients = (torch.autograd.grad(results, given, weights) for results in (found, expected))
    for gradient, plain in zip(gradients, plain_gradients, strict=True):
        assert gradient.dtype == plain.dtype and gradient.shape == plain.shape
        error = (gradient.double() - plain.double()).norm() / plain.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def rms(dtype: torch.dtype) -> nn.RMSNorm:
    layer = nn.RMSNorm(DIM, eps=EPS).to(dtype)
    nn.init.normal_(layer.weight)
    return layer


def test_rms_norm_gradients_are_those_of_finite_differences():
    layer = rms(torch.float64)
    # The weight is changed in place.
    assert torch.autograd.gradcheck(lambda tensor, _: lean_norms.rms_norm(layer, tensor), [states(), layer.weight])


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_rms_norm_is_the_plain_one(dtype, weight_dtype, autocast):
    layer, tensor = rms(weight_dtype), states(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, plain = lean_norms.rms_norm(layer, tensor), layer(tensor).type_as(tensor)
    assert found.dtype == dtype and torch.equal(found, plain)
    weight = torch.randn_like(found)
    gradients, plain_gradients = (
        torch.autograd.grad(result, [tensor, layer.weight], weight) for result in (found, plain)
    )
    for gradient, expected in zip(gradients, plain_gradients, strict=True):
        assert gradient.dtype == expected.dtype
        error = (gradient.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def kept(make) -> int:
    """The bytes that are kept for the backward of what `make` makes."""
    sizes = {}
    keep = lambda tensor: sizes.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage()) and tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = make()
    del result
    return sum(storage.nbytes() for storage in sizes.values())


STATES = BATCH * FRAMES * TOKENS * DIM  # numbers
MODULATION = 4 * BATCH * FRAMES * DIM  # bytes of a weight, a bias or a gate


def test_what_is_kept_is_the_input():
    stream, update = states(torch.bfloat16), states(torch.bfloat16)
    gate, weight, bias = (by_frame(dtype=torch.float32) for _ in range(3))
    assert kept(lambda: lean_norms.norm(stream, weight, bias, eps=EPS)) == 2 * STATES + MODULATION
    assert kept(lambda: lean_norms.add(stream, update, gate, dtype=torch.bfloat16)) == 2 * STATES + MODULATION
    gated = kept(lambda: lean_norms.add_and_norm(stream, update, gate, weight, bias, eps=EPS))
    assert gated == 2 * 2 * STATES + 2 * MODULATION
    assert (
        kept(lambda: lean_norms.add_and_norm(stream, update, None, weight, bias, eps=EPS)) == 4 * STATES + MODULATION
    )
    layer = rms(torch.bfloat16)
    assert kept(lambda: lean_norms.rms_norm(layer, stream)) == 2 * STATES + 2 * DIM


def test_a_layer_keeps_what_its_input_was_made_of():
    stream, weight, bias = states(torch.bfloat16), by_frame(dtype=torch.float32), by_frame(dtype=torch.float32)
    layer = nn.Linear(DIM, DIM).bfloat16()
    normed = lean_norms.norm(stream, weight, bias, eps=EPS)

    def call():
        with lean_norms.remade_in_backward(normed, stream, weight, bias, eps=EPS):
            return layer(normed)

    assert kept(lambda: layer(normed)) == 2 * STATES + 2 * DIM * DIM
    assert kept(call) == 2 * STATES + 2 * MODULATION + 2 * DIM * DIM  # the stream, which the norm keeps anyway
    gradient = torch.randn_like(normed)
    leaves = [stream, weight, bias, layer.weight]
    found, plain = (
        torch.autograd.grad(result, leaves, gradient, retain_graph=True) for result in (call(), layer(normed))
    )
    for of_made_again, expected in zip(found, plain, strict=True):
        assert torch.equal(of_made_again, expected)


@pytest.mark.parametrize("is_gated", [False, True])
def test_an_input_is_made_again_of_a_sum(is_gated):
    stream, update, gate, weight, bias = states(), states(), by_frame(), by_frame(), by_frame()
    parts, layer = (stream, update, gate if is_gated else None, weight, bias), nn.Linear(DIM, DIM).double()
    _, normed = lean_norms.add_and_norm(*parts, eps=EPS)
    with lean_norms.remade_in_backward(normed, *parts, eps=EPS):
        found = layer(normed)
    gradient = torch.randn_like(found)
    (of_weight,) = torch.autograd.grad(found, layer.weight, gradient)
    torch.testing.assert_close(of_weight, gradient.flatten(0, 1).T @ normed.flatten(0, 1))


@pytest.fixture
def ffn() -> FeedForward:
    return FeedForward(DIM, inner_dim=4 * DIM, activation_fn="gelu-approximate")


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_feed_forward_keeps_one_of_its_large_activations(ffn, autocast, checkpoints):
    tensor = states(torch.float32)
    call = (lambda: checkpoint(feed_forward, ffn, tensor, use_reentrant=False)) if checkpoints else None
    call = call or (lambda: feed_forward(ffn, tensor))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, plain = call(), ffn(tensor)
        if not checkpoints and not autocast:
            assert kept(lambda: ffn(tensor)) - kept(call) == 4 * 4 * STATES
    assert torch.equal(found, plain)
    weight = torch.randn_like(plain)
    leaves = [tensor, *ffn.parameters()]
    for gradient, expected in zip(
        torch.autograd.grad(found, leaves, weight), torch.autograd.grad(plain, leaves, weight), strict=True
    ):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("where", ["layers", "activation"])
def test_feed_forward_layers_with_a_hook_are_called(ffn, where):
    called = []
    module = ffn if where == "layers" else ffn.net[0]
    module.register_forward_hook(lambda *args: called.append(where))
    feed_forward(ffn, states(torch.float32)).sum().backward()
    assert called == [where]


@pytest.mark.parametrize("enabled", [True, False])
def test_two_backwards_through_one_graph(enabled):
    """What is kept is read twice: gradients are the same again, and add up where a tensor is used twice."""
    stream, weight, bias = states(torch.float32), by_frame(dtype=torch.float32), by_frame(dtype=torch.float32)
    with nullcontext() if enabled else torch.autograd.graph.save_on_cpu():
        normed = lean_norms.norm(stream, weight, bias, eps=EPS)
        loss = (normed * lean_norms.norm(stream, weight, bias, eps=EPS)).sum()
    first, second = (torch.autograd.grad(loss, [stream, weight, bias], retain_graph=True) for _ in range(2))
    plain = residual.norm(stream, weight, bias, eps=EPS).square().sum()
    for one, other, expected in zip(first, second, torch.autograd.grad(plain, [stream, weight, bias]), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected)


def test_a_second_derivative_is_refused():
    stream, weight, bias = states(), by_frame(), by_frame()
    (gradient,) = torch.autograd.grad(
        lean_norms.norm(stream, weight, bias, eps=EPS).square().sum(), stream, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_compiled_it_is_the_plain_one():
    stream, weight, bias = states(torch.float32), by_frame(dtype=torch.float32), by_frame(dtype=torch.float32)
    layer = nn.Linear(DIM, DIM)

    def call(stream: torch.Tensor) -> torch.Tensor:
        normed = lean_norms.norm(stream, weight, bias, eps=EPS)
        with lean_norms.remade_in_backward(normed, stream, weight, bias, eps=EPS):
            return layer(normed)

    found, expected = torch.compile(call, backend="aot_eager", fullgraph=True)(stream), call(stream)
    torch.testing.assert_close(found, expected)
    gradients, plain_gradients = (torch.autograd.grad(result.sum(), [stream, weight]) for result in (found, expected))
    for one, other in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(one, other)
