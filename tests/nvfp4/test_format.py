"""The NVFP4 format: golden vectors, rounding, packing, bad input, accuracy."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from longlive_diffusers.nvfp4 import dequantize, e2m1, quantize, random_hadamard, swizzle, unswizzle
from longlive_diffusers.nvfp4.format import NVFP4Tensor, check_stored, quantize_unchecked
from longlive_diffusers.nvfp4.matmul import multiply
from longlive_diffusers.nvfp4.rules import RULES
from tests.support.paths import GOLDEN


VECTORS = load_file(GOLDEN / "nvfp4_vectors.safetensors")
CASES = sorted(name.removesuffix(".codes") for name in VECTORS if name.endswith(".codes"))


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def equal(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in ((a.codes, b.codes), (a.scales, b.scales), (a.amax, b.amax))
    )


# ------------------------------------------------------------------------------------------------------------ golden
@pytest.mark.parametrize("case", CASES)
def test_golden_vectors(case):
    distribution, rule, *blocks = case.split(".")
    result = quantize(VECTORS[f"{distribution}.x"], rule, (16, 16) if blocks else (1, 16))
    assert torch.equal(result.codes, VECTORS[f"{case}.codes"])
    assert torch.equal(result.scales.view(torch.uint8), VECTORS[f"{case}.scales"])
    assert torch.equal(result.amax, VECTORS[f"{case}.amax"])
    if distribution == "normal":
        assert torch.equal(result.dequantize(torch.float32), VECTORS[f"{case}.dequant"])
        assert torch.equal(swizzle(result.scales).view(torch.uint8), VECTORS[f"{case}.scales_swizzled"])


def test_golden_cases_are_all_there():
    assert len(CASES) == 28


def test_golden_hadamard():
    assert torch.equal(random_hadamard(torch.eye(16)), VECTORS["rht_matrix"])
    case = "outlier.static_6.rht_transpose"
    result = quantize(random_hadamard(VECTORS["outlier.x"].T.contiguous()), "static_6")
    assert torch.equal(result.amax, VECTORS[f"{case}.amax"])
    assert torch.equal(result.dequantize(torch.float32), VECTORS[f"{case}.dequant"])


# ---------------------------------------------------------------------------------------------------------- accuracy
# Of research on the format (numbers for N(0, 1), 2048 x 2048): relative errors that a round trip may not exceed.
GATES = {"static_6": 0.0965, "static_4": 0.0990, "mse": 0.0885, "mae": 0.0895, "abs_max": 0.0905}


@pytest.mark.parametrize("rule", GATES)
def test_a_round_trip_is_as_accurate_as_the_format_allows(rule):
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    error = relative(quantize(x, rule).dequantize(torch.float32), x.float())
    assert 0.08 < error < GATES[rule]  # nor can 4 bits be better than this


def test_the_hadamard_transform_changes_no_product():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 64, generator=generator) for _ in range(2))
    transformed = random_hadamard(a) @ random_hadamard(b).T
    assert relative(transformed, a @ b.T) < 5e-3  # it rounds to bfloat16
    one = torch.zeros(1, 16)
    one[0, 3] = 8.0
    assert torch.equal(random_hadamard(one).abs(), torch.full((1, 16), 2.0))  # an outlier is spread evenly


def test_four_over_six_takes_the_better_scale_of_each_block():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    errors = {}
    for rule in ("static_6", "mse"):
        stored = quantize_unchecked(x, rule)
        errors[rule] = (stored.dequantize(torch.float32) - x).unflatten(-1, (-1, 16)).square().sum(-1)
    assert errors["mse"].sum() < 0.9 * errors["static_6"].sum()


# --------------------------------------------------------------------------------------------------------- stochastic
def test_stochastic_rounding_is_right_on_average():
    """256 draws: what is left of the error of their mean is noise, in the rule that leaves room above the largest."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) ** 3
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack(
        [quantize(x, "unbiased", rounding="stochastic", generator=generator).dequantize(torch.float32)
         for _ in range(256)]
    )  # fmt: skip
    floor = draws.std(dim=0).norm() / math.sqrt(len(draws))
    assert 0.9 < (draws.mean(dim=0) - x).norm() / floor < 1.1


def test_stochastic_rounding_of_static_6_is_not():
    """What the rule "unbiased" is for: at the end of the scale, rounding up is cut off."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) ** 3
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack(
        [quantize(x, "mse", rounding="stochastic", generator=generator).dequantize(torch.float32) for _ in range(256)]
    )
    floor = draws.std(dim=0).norm() / math.sqrt(len(draws))
    assert (draws.mean(dim=0) - x).norm() / floor > 1.5


def test_stochastic_rounding_repeats_with_its_generator_and_in_no_tile():
    x = torch.full((256, 256), 0.7)  # beside a 6 in each block, so that it may become 0.5 or 1
    x[:, ::16] = 6.0
    first, second = (
        quantize(x, "static_6", rounding="stochastic", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1)
    )
    assert equal(first, second)
    other = quantize(x, "static_6", rounding="stochastic", generator=torch.Generator().manual_seed(2))
    assert not torch.equal(first.codes, other.codes)
    tiles = first.codes.unflatten(0, (-1, 16)).unflatten(-1, (-1, 16)).transpose(1, 2).flatten(0, 1).flatten(1)
    assert len(tiles.unique(dim=0)) == len(tiles)
    codes = e2m1.unpack(first.codes).unflatten(-1, (-1, 16))[..., 1:].float()
    assert 1.39 < codes.mean() < 1.41  # 0.7 lies at 1.4 steps of 0.5
    pairs = torch.stack([codes[..., :-1].flatten(), codes[..., 1:].flatten()])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.02


# --------------------------------------------------------------------------------------------------------- properties
finite = st.floats(-(2.0**99), 2.0**99, width=32)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(finite, min_size=32, max_size=32),
    st.sampled_from(sorted(RULES)),
    st.sampled_from(("nearest", "stochastic")),
)
@example([*[0.0] * 15, 5.2929862699354855e29, *[0.0] * 15, 4.946071405581597e29], "static_4", "stochastic")
def test_any_finite_numbers(numbers, rule, rounding):
    x = torch.tensor(numbers).reshape(2, 16)
    stored = quantize(x, rule, rounding=rounding, generator=torch.Generator().manual_seed(0))
    back = stored.dequantize(torch.float32)
    assert torch.isfinite(back).all()
    amax = x.abs().max()
    # Where a block's largest number is brought to 4 and its scale is rounded down, that number lies between 4 and 6.
    assert back.abs().max() <= (1.13 if rounding == "nearest" else 6 / 4) * amax
    # A number is off by less than the coarsest step of its block, and by what a block scale that vanishes takes.
    peak = x.abs().amax(dim=1, keepdim=True)
    assert ((back - x).abs() <= 0.5 * peak + amax * 2**-9 + 1e-35).all()
    check_stored(stored)


@settings(max_examples=50, deadline=None)
@given(st.lists(finite, min_size=16, max_size=16), st.integers(-20, 20))
def test_powers_of_two_change_nothing_but_the_global_scale(numbers, power):
    """As long as the squares of the errors, by which a block's scale is chosen, are numbers of float32."""
    x = torch.tensor(numbers).reshape(1, 16).clamp(-1e9, 1e9)
    x[x.abs() < 1e-6] = 0
    once, again = quantize(x), quantize(x * 2.0**power)
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.scales.view(torch.uint8), again.scales.view(torch.uint8))


def test_rounding_to_a_value_goes_to_the_nearest_and_ties_to_the_even_code():
    y = torch.linspace(0, 8, 4001)
    values = e2m1.magnitudes_of(torch.arange(8.0))
    assert values.tolist() == list(e2m1.MAGNITUDES)
    nearest = (y[:, None].clamp(max=6) - values).abs().amin(dim=1)
    assert torch.equal((y.clamp(max=6) - e2m1.magnitudes_of(e2m1.round_magnitudes(y))).abs(), nearest)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1.round_magnitudes(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    # The next floats above and below a tie are no ties: coarser rulers must not lose their last bits.
    assert e2m1.round_magnitudes(ties.nextafter(torch.tensor(9.0))).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert e2m1.round_magnitudes(ties.nextafter(torch.tensor(0.0))).tolist() == [0, 1, 2, 3, 4, 5, 6]
    y = torch.tensor([-0.0, 0.0, -0.1, 7.5, -1e9])
    assert e2m1.with_signs(e2m1.round_magnitudes(y.abs()), y).tolist() == [8, 0, 8, 7, 15]


def test_packing_puts_the_even_element_in_the_low_half():
    codes = torch.randint(0, 16, (4, 32), dtype=torch.uint8)
    packed = e2m1.pack(codes[:, ::2], codes[:, 1::2])
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]
    assert torch.equal(e2m1.unpack(packed), codes)
    values = torch.tensor(e2m1.MAGNITUDES)
    assert torch.equal(e2m1.unpack_values(packed), torch.cat([values, -values])[codes.int()])


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (7, 5), (130, 9)])
def test_swizzling_is_undone(shape):
    scales = torch.rand(shape).to(torch.float8_e4m3fn)
    tiles = swizzle(scales)
    assert tiles.numel() % 512 == 0
    assert torch.equal(unswizzle(tiles, *shape).view(torch.uint8), scales.view(torch.uint8))
    rows, columns = shape
    row, column = rows - 1, columns - 1
    width = -(-columns // 4)
    place = ((row // 128) * width + column // 4) * 512 + (row % 32) * 16 + (row % 128) // 32 * 4 + column % 4
    assert tiles.view(torch.uint8)[place] == scales.view(torch.uint8)[row, column]
    with pytest.raises(ValueError, match=f"got {tiles.numel() - 1}"):
        unswizzle(tiles[:-1], *shape)


def test_a_transposed_weight_has_the_same_numbers():
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    stored = quantize(x, "static_6", (16, 16))
    turned = stored.transpose()
    assert turned.shape == (32, 48)
    assert torch.equal(turned.dequantize(torch.float32), stored.dequantize(torch.float32).T)
    assert equal(turned, quantize(x.T.contiguous(), "static_6", (16, 16)))
    with pytest.raises(ValueError, match="1x16"):
        quantize(x).transpose()


def test_zeros_and_tiny_tensors():
    for x in (torch.zeros(16, 32), torch.full((16, 32), 1e-38), torch.full((16, 32), -0.0)):
        for rule in RULES:
            stored = quantize(x, rule)
            assert not stored.scales.view(torch.uint8).any()
            assert torch.equal(stored.dequantize(torch.float32).abs(), torch.zeros(16, 32))
    x = torch.randn(2, 32)
    x[1] *= 1e-7  # a block whose scale vanishes
    assert torch.equal(quantize(x, "static_6").dequantize(torch.float32)[1].abs(), torch.zeros(32))


def test_dequantised_in_the_dtype_that_is_asked_for():
    x = torch.randn(16, 32)
    stored = quantize(x)
    assert dequantize(stored).dtype == torch.bfloat16
    assert torch.equal(stored.dequantize(torch.float16), stored.dequantize(torch.float32).half())
    assert stored.num_bytes == 16 * 32 // 2 + 16 * 2 + 4


def test_it_moves_but_has_no_other_dtype():
    stored = quantize(torch.randn(16, 32))
    assert equal(stored.to("cpu"), stored)
    assert stored.to("meta").scales.dtype == torch.float8_e4m3fn
    with pytest.raises(TypeError, match="dequantize"):
        stored.to(torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 24)}, "4 rows and 24 columns"),
        ({"x": torch.zeros(24, 32), "block": (16, 16)}, "24 rows and 32 columns"),
        ({"x": torch.zeros(16)}, r"shape \(16,\)"),
        ({"x": torch.zeros(2, 16, dtype=torch.int32)}, "int32"),
        ({"x": torch.tensor([[math.inf, math.nan] + 14 * [0.0]])}, "2 of 16 numbers are infinite or NaN"),
        ({"x": torch.zeros(1, 16), "scale_rule": "static_5"}, "static_6, static_4, mse.*'static_5'"),
        ({"x": torch.zeros(1, 16), "block": (1, 32)}, r"\(1, 32\)"),
        ({"x": torch.zeros(1, 16), "rounding": "up"}, "nearest, stochastic, got 'up'"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(**arguments)


def test_buffers_that_do_not_belong_together():
    stored = quantize(torch.randn(16, 32))
    with pytest.raises(ValueError, match=r"need scales \(16, 2\), got \(16, 3\)"):
        NVFP4Tensor(stored.codes, torch.zeros(16, 3).to(torch.float8_e4m3fn), stored.amax, "mse")
    with pytest.raises(ValueError, match=r"scales are torch\.float8_e4m3fn, got torch\.bfloat16"):
        NVFP4Tensor(stored.codes, stored.scales.bfloat16(), stored.amax, "mse")
    with pytest.raises(ValueError, match="amax"):
        NVFP4Tensor(stored.codes, stored.scales, torch.zeros(2), "mse")
    with pytest.raises(ValueError, match="'best'"):
        NVFP4Tensor(stored.codes, stored.scales, stored.amax, "best")


@pytest.mark.parametrize(("wrote", "reads"), [("mse", "static_6"), ("static_6", "mse")])
def test_another_rule_is_found_out(wrote, reads):
    for seed in range(20):
        stored = quantize(torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)), wrote)
        check_stored(stored)
    with pytest.raises(ValueError, match=f"by the rule '{reads}'"):
        check_stored(NVFP4Tensor(stored.codes, stored.scales, stored.amax, reads))


def test_damaged_scales_are_found_out():
    stored = quantize(torch.randn(16, 32))
    scales = stored.scales.view(torch.uint8).clone()
    scales[3, 1] = 0x7F  # NaN
    scales[4, 0] |= 0x80  # negative
    with pytest.raises(ValueError, match="2 of 32 block scales"):
        check_stored(NVFP4Tensor(stored.codes, scales.view(torch.float8_e4m3fn), stored.amax, "mse"))
    with pytest.raises(ValueError, match="amax"):
        check_stored(NVFP4Tensor(stored.codes, stored.scales, torch.tensor([math.nan]), "mse"))


# ----------------------------------------------------------------------------------------------------------- products
def test_products_are_as_accurate_as_the_format_allows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 1024, generator=generator).bfloat16().float()
    weight = (0.02 * torch.randn(256, 1024, generator=generator)).bfloat16().float()
    exact = F.linear(x, weight)
    for rule, gate in (("mse", 0.126), ("static_6", 0.138)):
        stored = [quantize(states, rule) for states in (x, weight)]
        assert relative(multiply(*stored, torch.float32), exact) < gate
    assert relative(F.linear(x, quantize(weight, "mse").dequantize(torch.float32)), exact) < 0.089


@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_as_an_operator_it_is_what_it_says_it_is(block):
    x, seed = torch.randn(32, 48), torch.tensor([7, 2**32 - 1])
    for noise in (None, seed):
        torch.library.opcheck(
            torch.ops.longlive_diffusers.nvfp4_encode, (x, x.abs().amax().reshape(1), "mse", block, noise)
        )
