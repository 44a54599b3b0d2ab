"""NVFP4: tensors of 4-bit numbers that share scales.

A 4-bit float (E2M1: a sign, two bits of exponent, one of mantissa) is one of sixteen numbers:

    code   0    1    2    3    4    5    6    7        8 to 15: the same, negative
    value  0   0.5   1   1.5   2    3    4    6

That is a coarse ruler, so it is fitted anew to every block of 16 neighbors: each block has a scale of its own, an
8-bit float (E4M3, positive, at most 448), and all blocks share one float32, the tensor's:

    x  =  value of its code  *  scale of its block  *  global scale

16 numbers of 4 bits plus a scale of 8 bits make 4.5 bits per number, where bfloat16 takes 16. The blocks lie along the
last axis, which is the one that a matrix product sums over: hardware multiplies whole blocks and applies the scales in
between.

**How the scales are chosen** is the *rule*. The largest number of a block is made the value 6 ("static_6"), or 4
("static_4"): 4 has closer neighbors (3, then 2), 6 a longer reach. "Four over six" tries both for every block and
keeps the one that loses less, measured by the squared errors ("mse"), the absolute errors ("mae") or the largest
absolute error ("abs_max").
The global scale is such that the block with the tensor's largest number gets the largest scale that the rule allows:
448, or 256 where a scale may still have to grow by 6/4. So what is stored - codes, scales, and `amax`, the tensor's
largest absolute number - means nothing without the rule, and the rule stays with the tensor.

**Rounding** is to the nearest value, ties to the even code; or *stochastic*, up or down with the probabilities that
make the result right on average, which gradients need: a small gradient that is always rounded to zero teaches
nothing. The average is right only if nothing is cut off at 6, so the rule "unbiased" leaves room above the largest
number for what rounding the block's scale may take away (16/17, as E4M3 keeps four significant bits).

**Weights in training** have one scale for 16 x 16 numbers (`block=(16, 16)`), stored sixteen times: the transpose,
which the backward pass multiplies by, then has the same codes.

Everything here is exact arithmetic in float32, in an order that is part of the format: other orders round differently
somewhere. The order is that of the quantizer that wrote LongLive-2.0's checkpoints (fouroversix; the training recipe
is that of arXiv 2509.25149); `kernels.py` does the same on a GPU, bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..triton_launch import uses_kernels
from .e2m1 import magnitudes_of, pack, round_magnitudes, unpack, unpack_values, with_signs
from .hadamard import random_hadamard
from .noise import draw_seed, uniform_noise
from .operators import dequantize_matrix, hadamard_amax, quantize_matrix
from .rules import MAX_SCALE, ScaleRule, scale_rule_named


BLOCK = 16
BLOCKS = ((1, BLOCK), (BLOCK, BLOCK))
ROUNDINGS = ("nearest", "stochastic")
# Below this, the encoding scale of a tensor would be infinite: such a tensor is stored as zeros.
_SMALLEST_AMAX = 1e-35


@dataclass(frozen=True)
class NVFP4Tensor:
    """A matrix (or a batch of them) in NVFP4, see the module docstring. Its tensors keep their dtypes: there is no
    `.to` for a dtype, only `dequantize`.

    Args:
        codes: uint8 `[..., rows, cols / 2]`, two codes per byte, the even column in the low half.
        scales: float8_e4m3fn `[..., rows, cols / 16]`.
        amax: float32 `[1]`, or one for each matrix of the batch, `[..., 1, 1]`.
        scale_rule: The name of the scale rule, without which `amax` has no meaning.
        block: The numbers of rows and columns that share a scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    amax: torch.Tensor
    scale_rule: str
    block: tuple[int, int] = (1, BLOCK)

    def __post_init__(self):
        scale_rule_named(self.scale_rule)
        check_buffers(self.codes, self.scales, self.amax)

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrix that the tensor stands for."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.amax.nbytes

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Return the numbers that the tensor stands for, `[..., rows, cols]`."""
        return dequantize(self, dtype)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "NVFP4Tensor":
        """Return the tensor on another device.

        Raises:
            TypeError: If a dtype is given.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(f"An NVFP4Tensor has no other dtype: `dequantize({device})` gives its numbers.")
        codes, scales, amax = (
            part.to(device, non_blocking=non_blocking) for part in (self.codes, self.scales, self.amax)
        )
        return NVFP4Tensor(codes, scales, amax, self.scale_rule, self.block)

    def transpose(self) -> "NVFP4Tensor":
        """Transpose a matrix in 16 x 16 blocks. The numbers stay the same: nothing is rounded again.

        Raises:
            ValueError: If the blocks are 1 x 16, which cannot lie along the other axis.
        """
        if self.block != (BLOCK, BLOCK):
            raise ValueError(f"Only 16x16 blocks can be transposed, these are {self.block[0]}x{self.block[1]}.")
        codes = unpack(self.codes).transpose(-1, -2)
        # Keep one scale per block, then repeat it sixteen times along the other axis.
        scales = self.scales[..., ::BLOCK, :].transpose(-1, -2).repeat_interleave(BLOCK, dim=-2)
        return replace(self, codes=pack(codes[..., ::2], codes[..., 1::2]), scales=scales.contiguous())


Weight = torch.Tensor | NVFP4Tensor
Weights = dict[str, Weight]
"""A state dict in which a layer that is stored in NVFP4 has a single `weight`."""


def quantize(
    x: torch.Tensor,
    scale_rule: str = "mse",
    block: tuple[int, int] = (1, BLOCK),
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> NVFP4Tensor:
    """Quantize a matrix to NVFP4.

    Args:
        x: float `[rows, cols]`; cols is a multiple of 16 and, with 16x16 blocks, so is rows.
        scale_rule: The rule by which the scales are chosen: "static_6", "static_4", "mse", "mae", "abs_max" or
            "unbiased" (for stochastic rounding).
        block: The numbers of rows and columns that share a scale: `(1, 16)` or `(16, 16)`.
        rounding: "nearest" or "stochastic".
        generator: The random generator for stochastic rounding, on the device of `x`; every element of `x` gets a
            random number of its own.

    Raises:
        ValueError: If the shape does not divide into blocks, a name is unknown, or there are infinities or NaN.
            (Looking for these waits for the GPU; `quantize_unchecked` does not look, and then gives NaN.)
    """
    check_quantizable(x, scale_rule, block, rounding)
    amax = x.detach().abs().amax() if x.numel() else x.new_zeros(())
    if not torch.isfinite(amax):
        bad = (~torch.isfinite(x)).sum().item()
        raise ValueError(f"{bad} of {x.numel()} numbers are infinite or NaN: NVFP4 has neither.")
    return quantize_unchecked(x, scale_rule, block, rounding, generator, amax=amax.float().reshape(1))


@torch.no_grad()
def quantize_unchecked(
    x: torch.Tensor,
    scale_rule: str = "mse",
    block: tuple[int, int] = (1, BLOCK),
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    *,
    amax: torch.Tensor | None = None,
    hadamard: bool = False,
) -> NVFP4Tensor:
    """[`quantize`] for arguments that are known to be valid, without waiting for the device.

    Args:
        x: float `[..., rows, cols]`.
        scale_rule, block, rounding, generator: As in [`quantize`].
        amax: The largest absolute number, float32 `[1]`, or `[..., 1, 1]` to give each matrix its own; None: that of
            the whole of `x`.
        hadamard: Whether `random_hadamard(x)` is quantized, whose largest number `amax` then is.
    """
    by_kernel = (x.ndim == 2 or block == (1, BLOCK)) and uses_kernels(x)
    if hadamard and (not by_kernel or x.ndim != 2 or x.dtype == torch.float16):  # kernels do not round to float16
        x, hadamard = random_hadamard(x), False
    if amax is None:
        largest: torch.Tensor = hadamard_amax(x) if hadamard else x.abs().amax().float().reshape(1)
        amax = largest
    seed = draw_seed(x.device, generator) if rounding == "stochastic" else None
    if by_kernel:
        rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        codes, scales = quantize_matrix(rows, amax.flatten(), scale_rule, block, seed, hadamard)
        codes, scales = (part.reshape(*x.shape[:-1], -1) for part in (codes, scales))
        return NVFP4Tensor(codes, scales, amax, scale_rule, block)
    codes, scales = _encode_operator(x, amax, scale_rule, block, seed)
    return NVFP4Tensor(codes, scales, amax, scale_rule, block)


@torch.library.custom_op("longlive_diffusers::nvfp4_encode", mutates_args=())
def _encode_operator(
    x: torch.Tensor, amax: torch.Tensor, scale_rule: str, block: Sequence[int], seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the reference as an operator that `torch.compile` leaves alone. The reference has hundreds of steps and runs
    many times in a transformer block, so that compiling it would take many minutes."""
    noise = None if seed is None else uniform_noise(seed, x.shape)
    rows, columns = block
    encoded = encode_matrix(x, amax, scale_rule_named(scale_rule), (rows, columns), noise)
    return encoded.codes, encoded.scales


@_encode_operator.register_fake
def _(x, amax, scale_rule, block, seed) -> tuple[torch.Tensor, torch.Tensor]:
    *rows, columns = x.shape
    codes = x.new_empty((*rows, columns // 2), dtype=torch.uint8)
    return codes, x.new_empty((*rows, columns // BLOCK), dtype=torch.float8_e4m3fn)


def encode_matrix(
    x: torch.Tensor,
    amax: torch.Tensor,
    rule: ScaleRule,
    block: tuple[int, int] = (1, BLOCK),
    noise: torch.Tensor | None = None,
) -> NVFP4Tensor:
    """
    Quantize in plain PyTorch, on any device: the reference that the kernels match bit for bit.

    Args:
        x, amax, block: As in `quantize_unchecked`.
        rule: The scale rule.
        noise: Uniform in [0, 1), in the shape of `x`, to round stochastically; None: round to nearest.
    """
    height, width = block

    def in_blocks(states: torch.Tensor) -> torch.Tensor:  # [height * width, ..., rows / height, cols / width]
        blocks = states.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
        return blocks.movedim((-3, -1), (0, 1)).flatten(0, 1)

    codes, scales = _encode(in_blocks(x.float()), amax, rule, None if noise is None else in_blocks(noise))
    pairs = pack(codes[::2], codes[1::2]).unflatten(0, (height, width // 2)).movedim((0, 1), (-3, -1))
    packed = pairs.reshape(*x.shape[:-1], x.shape[-1] // 2)
    return NVFP4Tensor(packed, scales.repeat_interleave(height, dim=-2), amax, rule.name, block)


def dequantize(tensor: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return the numbers that an `NVFP4Tensor` stands for, `[..., rows, cols]`: `value * scale * amax / span`,
    computed in float32 in this order, and rounded to `dtype` at the end."""
    if tensor.codes.ndim == 2 and dtype in (torch.float32, torch.bfloat16) and uses_kernels(tensor.codes):
        return dequantize_matrix(tensor.codes, tensor.scales, tensor.amax, tensor.scale_rule, dtype)
    scaled = in_block_scales(tensor.codes, tensor.scales.float())
    return scaled.mul_(tensor.amax).div_(scale_rule_named(tensor.scale_rule).span).to(dtype)


def in_block_scales(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply packed codes `[..., cols / 2]` by their scales, float32 `[..., cols / 16]`: float32 `[..., cols]`."""
    return unpack_values(codes).unflatten(-1, (-1, BLOCK)).mul_(scales.unsqueeze(-1)).flatten(-2)


def global_scale(amax: torch.Tensor, scale_rule: str) -> torch.Tensor:
    """Return the factor for values times block scales, float32, in the shape of `amax`."""
    return amax.float() / scale_rule_named(scale_rule).span


def check_quantizable(x: torch.Tensor, scale_rule: str, block: tuple[int, int], rounding: str) -> None:
    """Raise a ValueError that names what is wrong, unless `x` can be quantized with these arguments."""
    scale_rule_named(scale_rule)
    if tuple(block) not in BLOCKS:
        raise ValueError(f"`block` is (1, 16) or (16, 16), got {block}.")
    if rounding not in ROUNDINGS:
        raise ValueError(f"`rounding` is one of {', '.join(ROUNDINGS)}, got {rounding!r}.")
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"A floating-point matrix is quantized, got {x.dtype} of shape {tuple(x.shape)}.")
    if x.shape[0] % block[0] or x.shape[1] % block[1]:
        raise ValueError(
            f"{x.shape[0]} rows and {x.shape[1]} columns do not divide into blocks of {block[0]}x{block[1]}."
        )


def check_buffers(codes: torch.Tensor, scales: torch.Tensor, amax: torch.Tensor) -> None:
    """Raise a ValueError unless these can be the codes, scales and amax of one tensor."""
    expected = (("codes", codes, torch.uint8), ("scales", scales, torch.float8_e4m3fn), ("amax", amax, torch.float32))
    for name, part, dtype in expected:
        if part.dtype != dtype:
            raise ValueError(f"NVFP4 {name} are {dtype}, got {part.dtype}.")
    if codes.ndim < 2 or codes.shape[-1] % (BLOCK // 2):
        raise ValueError(f"NVFP4 codes are [..., rows, cols / 2] with whole blocks of 16, got {tuple(codes.shape)}.")
    shape = (*codes.shape[:-1], codes.shape[-1] // (BLOCK // 2))
    if tuple(scales.shape) != shape:
        raise ValueError(f"Codes {tuple(codes.shape)} need scales {shape}, got {tuple(scales.shape)}.")
    if tuple(amax.shape) not in ((1,), (*codes.shape[:-2], 1, 1)):
        raise ValueError(f"`amax` is [1] or one for each matrix, got {tuple(amax.shape)} for {tuple(codes.shape)}.")


def check_stored(tensor: NVFP4Tensor) -> None:
    """
    Check the values of a tensor that was read from a file. On a GPU this waits for the device.

    Raises:
        ValueError: If the scales or `amax` are not what a quantizer writes, or if they were written by another rule
            than the tensor's, which shows in the largest scale.
    """
    amax, scales = tensor.amax, tensor.scales.float()
    if not (torch.isfinite(amax).all() and (amax >= 0).all()):
        raise ValueError(f"`amax` is {amax.flatten()[:4].tolist()}, a largest absolute number was expected.")
    wrong = ~(scales >= 0)  # also true for NaN
    if wrong.any():
        raise ValueError(f"{wrong.sum().item()} of {scales.numel()} block scales are negative or NaN: damaged.")
    largest = scales.max().item() if scales.numel() else 0.0
    rule = scale_rule_named(tensor.scale_rule)
    # The block with the largest number has the rule's largest scale or, if two scales are tried, up to 1.5 times it.
    highest = rule.largest_scale if rule.error is None else 1.5 * rule.largest_scale
    if largest and not rule.largest_scale <= largest <= highest:
        raise ValueError(
            f"The largest block scale is {largest:g}; by the rule '{rule.name}' it would be {rule.largest_scale:g}"
            f"{'' if rule.error is None else f' to {highest:g}'}: written by another rule, or damaged."
        )


def _encode(
    blocks: torch.Tensor, amax: torch.Tensor, rule: ScaleRule, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Encode blocks of numbers.

    Args:
        blocks: float32 `[n, ...]`. The numbers that share a scale lie along the first axis, so that neighbors in
            memory undergo the same operations, which is what a CPU is fast at.
        amax: float32, broadcasts to the scales.
        rule: The scale rule.
        noise: Uniform in [0, 1), in the shape of `blocks`; None: round to nearest.

    Returns:
        Codes, uint8 in the shape of `blocks`, and scales, float8_e4m3fn `[...]`.
    """
    zero = amax < _SMALLEST_AMAX
    # Divide two tensors: torch divides a Python number by a tensor via the reciprocal, which rounds twice.
    encode = torch.where(zero, 0.0, torch.full_like(amax, rule.span) / amax)
    decode = torch.where(zero, 0.0, 1 / encode)
    magnitudes = blocks.abs()  # a number and its negative have the same code, except for the sign
    scale = magnitudes.amax(dim=0) / rule.largest_value * encode
    codes, scales = _encode_with(magnitudes, scale, decode, noise)
    if rule.error is not None:
        other_codes, other_scales = _encode_with(magnitudes, scale * 1.5, decode, noise)
        errors = [
            rule.error((magnitudes_of(c) * s.float() * amax / rule.span) - magnitudes)
            for c, s in ((codes, scales), (other_codes, other_scales))
        ]
        prefers_four = errors[1] < errors[0]  # a tie goes to six
        codes = torch.where(prefers_four, other_codes, codes)
        scales = torch.where(prefers_four, other_scales.float(), scales.float()).to(torch.float8_e4m3fn)
    return with_signs(codes, blocks), scales


def _encode_with(magnitudes: torch.Tensor, scale: torch.Tensor, decode: torch.Tensor, noise: torch.Tensor | None):
    """Return the codes (float32, 0 to 7) and the E4M3 scales of blocks, given the scales before rounding."""
    scales = scale.clamp(max=MAX_SCALE).to(torch.float8_e4m3fn)  # some versions of torch convert more than 448 to NaN
    rounded = scales.float()
    inverse = torch.where(rounded == 0, 0.0, 1 / (decode * rounded))
    return round_magnitudes(magnitudes * inverse, noise), scales
