"""The Triton kernels as operators of torch.

`torch.compile` leaves an operator that it does not know as it is. Given a kernel itself, it would compile the kernel
again with options of its own, under which products and sums are fused and the last bits differ.

The operators exist without Triton, which is imported when one is first run.
"""

from collections.abc import Sequence
from functools import partial

import torch

from ..triton_launch import launch_from
from .rules import MAX_SCALE, scale_rule_named


ERRORS = {"mse": 1, "mae": 2, "abs_max": 3}  # four-over-six's measures of error; 0: there is only one candidate
TILE = {False: 1024, True: 128}  # columns of a program's tile, which has 1 row (False) or 16 (True)

FRAME_TILE = 4096  # where blocks do not matter

Shape = tuple[int, int, int, int, int]  # of a cache's frames: batch, heads, slots, tokens of a frame, head_dim

launch = partial(launch_from, f"{__package__}.kernels")


def has_fp4_instructions(device: torch.device) -> bool:
    """Whether the device has instructions that convert to and from E2M1."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def parts(total: int, size: int) -> int:
    """How many parts of `size` it takes to hold `total`."""
    return -(-total // size)


@torch.library.custom_op("longlive_diffusers::nvfp4_quantize_matrix", mutates_args=())
def quantize_matrix(
    x: torch.Tensor,
    amax: torch.Tensor,
    scale_rule: str,
    block: Sequence[int],
    seed: torch.Tensor | None,
    hadamard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix, as `format.encode_matrix` does.

    Args:
        x: float32, bfloat16 or float16 `[rows, cols]`, with any strides: a transposed view is not copied.
        amax: float32 `[1]`, or `[n]` if each of n equal parts of the rows has its own (1x16 blocks only). With
            `hadamard`, it is that of the transformed numbers.
        scale_rule: The name of the scale rule.
        block: As in `format.quantize`.
        seed: The seed for stochastic rounding, int64 `[2]`; None: round to nearest.
        hadamard: Whether to transform each group of 16 columns first.

    Returns:
        Codes `[rows, cols / 2]` and scales `[rows, cols / 16]` (float8_e4m3fn).
    """
    rows, columns = x.shape
    rule, tall = scale_rule_named(scale_rule), block[0] > 1
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, columns // 16, dtype=torch.uint8, device=x.device)
    grid = (parts(rows, 16 if tall else 1), parts(columns, TILE[tall]))
    launch(
        "quantize_kernel", grid, x,
        x, amax, amax if seed is None else seed, codes, scales, rows, columns, *x.stride(), rows // amax.numel(),
        LARGEST_VALUE=rule.largest_value, SPAN=rule.span, ERROR=0 if rule.error is None else ERRORS[rule.name],
        HADAMARD=hadamard, STOCHASTIC=seed is not None, TALL=tall, TILE=TILE[tall],
        PTX=has_fp4_instructions(x.device),
    )  # fmt: skip
    return codes, scales.view(torch.float8_e4m3fn)


@quantize_matrix.register_fake
def _(x, amax, scale_rule, block, seed, hadamard=False) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    codes = x.new_empty((rows, columns // 2), dtype=torch.uint8)
    return codes, x.new_empty((rows, columns // 16), dtype=torch.float8_e4m3fn)


@torch.library.custom_op("longlive_diffusers::hadamard_amax", mutates_args=())
def hadamard_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest absolute number of `random_hadamard(x)`, float32 `[1]`, for [`quantize_matrix`] with `hadamard`.

    Args:
        x: float32 or bfloat16 `[rows, cols]`, with any strides.
    """
    rows, columns = x.shape
    grid = (rows, parts(columns, TILE[False]))
    amax = torch.empty(grid, dtype=torch.float32, device=x.device)
    launch("hadamard_amax_kernel", grid, x, x, amax, rows, columns, *x.stride(), TILE=TILE[False])
    return amax.amax().reshape(1)


@hadamard_amax.register_fake
def _(x) -> torch.Tensor:
    return x.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("longlive_diffusers::nvfp4_dequantize_matrix", mutates_args=())
def dequantize_matrix(
    codes: torch.Tensor, scales: torch.Tensor, amax: torch.Tensor, scale_rule: str, dtype: torch.dtype
) -> torch.Tensor:
    """Dequantize a matrix: `[rows, cols]` in float32 or bfloat16."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    num_blocks = rows * columns // 16
    launch(
        "dequantize_kernel", (parts(num_blocks, 64),), codes,
        codes.contiguous(), scales.contiguous().view(torch.uint8), amax, as_bits(out), num_blocks,
        SPAN=scale_rule_named(scale_rule).span, BF16=dtype == torch.bfloat16, BLOCKS=64,
        PTX=has_fp4_instructions(codes.device),
    )  # fmt: skip
    return out


@dequantize_matrix.register_fake
def _(codes, scales, amax, scale_rule, dtype) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], 2 * codes.shape[1]), dtype=dtype)


@torch.library.custom_op("longlive_diffusers::nvfp4_read_frames", mutates_args=("target",))
def read_nvfp4_frames(
    codes: torch.Tensor,
    scales: torch.Tensor,
    amax: torch.Tensor,
    mean: torch.Tensor | None,
    scale_rule: str,
    target: torch.Tensor,
) -> None:
    """
    Dequantize the first slots of a cache in NVFP4, as many as `target` has, in one launch.

    Args:
        codes, scales: uint8 `[B, heads, slots, tokens, head_dim / 2]` and `[..., head_dim / 16]`; head_dim a power of
            two.
        amax, mean: float32 `[B, heads, slots, 1, 1]` and `[B, heads, slots, 1, head_dim]`, which is added, or None.
        scale_rule: The name of the cache's scale rule.
        target: float32 or bfloat16 `[B, heads, length, tokens, head_dim]`, at most as many slots as there are. What
            one head has is contiguous, but there may be a gap between heads. All others are contiguous.

    Raises:
        ValueError: If a shape is another one, or a tensor is not contiguous.
    """
    shape = check_nvfp4_frames(codes, scales, amax, mean)
    batch, heads, slots, tokens, head_dim = shape
    length, head_stride = check_window(target, shape)
    launch(
        "read_nvfp4_frames_kernel", (batch * heads * length, parts(tokens, 16)), codes,
        codes, scales, amax, amax if mean is None else mean, as_bits(target), head_stride, length, slots, tokens,
        SPAN=scale_rule_named(scale_rule).span, DIM=head_dim, TOKENS=16, HAS_MEAN=mean is not None,
        BF16=target.dtype == torch.bfloat16, PTX=has_fp4_instructions(codes.device),
    )  # fmt: skip


@read_nvfp4_frames.register_fake
def _(codes, scales, amax, mean, scale_rule, target) -> None:
    return None


@torch.library.custom_op("longlive_diffusers::fp8_read_frames", mutates_args=("target",))
def read_fp8_frames(codes: torch.Tensor, scale: torch.Tensor, target: torch.Tensor) -> None:
    """
    Dequantize the first slots of a cache in FP8, as many as `target` has, like [`read_nvfp4_frames`].

    Args:
        codes: uint8 (the bits of float8_e4m3fn) `[B, heads, slots, tokens, head_dim]`.
        scale: float32 `[B, heads, slots, 1, 1]`.
        target: float32 or bfloat16 `[B, heads, length, tokens, head_dim]`, as for [`read_nvfp4_frames`].

    Raises:
        ValueError: If a shape is another one, or a tensor is not contiguous.
    """
    shape = check_fp8_frames(codes, scale)
    batch, heads, slots, tokens, head_dim = shape
    length, head_stride = check_window(target, shape)
    size = tokens * head_dim
    launch(
        "read_fp8_frames_kernel", (batch * heads * length, parts(size, FRAME_TILE)), codes,
        codes, scale, as_bits(target), head_stride, length, slots, size,
        TILE=FRAME_TILE, BF16=target.dtype == torch.bfloat16,
    )  # fmt: skip


@read_fp8_frames.register_fake
def _(codes, scale, target) -> None:
    return None


@torch.library.custom_op("longlive_diffusers::nvfp4_write_frames", mutates_args=("codes", "scales", "amax", "mean"))
def write_nvfp4_frames(
    window: torch.Tensor,
    chosen: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    amax: torch.Tensor,
    mean: torch.Tensor | None,
    scale_rule: str,
) -> None:
    """
    Quantize frames of a window into the same slots of a cache in NVFP4, in two launches: what all numbers of a frame
    have in common, then their codes.

    Args:
        window: float `[B, heads, length, tokens, head_dim]`, laid out like the target of [`read_nvfp4_frames`].
        chosen: The slots of each sample, int64 `[B, n]`.
        codes, scales, amax, mean, scale_rule: As in [`read_nvfp4_frames`].

    Raises:
        ValueError: If a shape is another one, or a tensor is not contiguous.
    """
    shape = check_nvfp4_frames(codes, scales, amax, mean)
    programs, place = chosen_frames(window, chosen, shape)
    tokens, head_dim = shape[3:]
    size, rule = tokens * head_dim, scale_rule_named(scale_rule)
    if mean is None:
        launch_frame_amax(window, chosen, amax, shape, divisor=1.0)
    else:
        launch(
            "center_frames_kernel", (programs,), window,
            window, chosen, mean, amax, *place, tokens, DIM=head_dim, TOKENS=32, num_warps=8,
        )  # fmt: skip
    launch(
        "write_nvfp4_frames_kernel", (programs, parts(size, 16 * 128)), window,
        window, chosen, codes, scales, amax, amax if mean is None else mean, *place, size,
        LARGEST_VALUE=rule.largest_value, SPAN=rule.span, ERROR=0 if rule.error is None else ERRORS[rule.name],
        DIM=head_dim, BLOCKS=128, HAS_MEAN=mean is not None, PTX=has_fp4_instructions(window.device),
    )  # fmt: skip


@write_nvfp4_frames.register_fake
def _(window, chosen, codes, scales, amax, mean, scale_rule) -> None:
    return None


@torch.library.custom_op("longlive_diffusers::fp8_write_frames", mutates_args=("codes", "scale"))
def write_fp8_frames(window: torch.Tensor, chosen: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """
    Quantize frames of a window into the same slots of a cache in FP8, like [`write_nvfp4_frames`].

    Args:
        window, chosen: As in [`write_nvfp4_frames`].
        codes, scale: As in [`read_fp8_frames`].

    Raises:
        ValueError: If a shape is another one, or a tensor is not contiguous.
    """
    shape = check_fp8_frames(codes, scale)
    programs, place = chosen_frames(window, chosen, shape)
    size = shape[3] * shape[4]
    launch_frame_amax(window, chosen, scale, shape, divisor=MAX_SCALE)
    launch(
        "write_fp8_frames_kernel", (programs, parts(size, FRAME_TILE)), window,
        window, chosen, codes, scale, *place, size, TILE=FRAME_TILE,
    )  # fmt: skip


@write_fp8_frames.register_fake
def _(window, chosen, codes, scale) -> None:
    return None


def launch_frame_amax(
    window: torch.Tensor, chosen: torch.Tensor, amax: torch.Tensor, shape: Shape, *, divisor: float
) -> None:
    """Write the largest absolute number of each chosen frame of each head, divided, to its slot of `amax`."""
    programs, place = chosen_frames(window, chosen, shape)
    launch(
        "frame_amax_kernel", (programs,), window,
        window, chosen, amax, *place, shape[3] * shape[4], DIVISOR=divisor, TILE=2 * FRAME_TILE, num_warps=8,
    )  # fmt: skip


def chosen_frames(window: torch.Tensor, chosen: torch.Tensor, shape: Shape) -> tuple[int, tuple[int, int, int, int]]:
    """Return how many frames of heads are chosen, and what tells a kernel where each of them is: how far heads are
    from each other, and the numbers of heads, of chosen frames and of slots. Raise a ValueError if shapes do not
    fit."""
    batch, heads, slots, *_ = shape
    _, head_stride = check_window(window, shape)
    if chosen.ndim != 2 or chosen.shape[0] != batch or chosen.dtype != torch.int64 or not chosen.is_contiguous():
        raise ValueError(
            f"The chosen slots are int64 [{batch}, n], contiguous; got {chosen.dtype} {tuple(chosen.shape)} with "
            f"strides {chosen.stride()}."
        )
    return chosen.numel() * heads, (head_stride, heads, chosen.shape[1], slots)


def check_nvfp4_frames(
    codes: torch.Tensor, scales: torch.Tensor, amax: torch.Tensor, mean: torch.Tensor | None
) -> Shape:
    """Return the shape of the frames of a cache in NVFP4; raise a ValueError if a part does not fit."""
    batch, heads, slots, tokens, packed = codes.shape
    frames, head_dim = (batch, heads, slots), 2 * packed
    check_part("codes", codes, (*frames, tokens, packed))
    check_part("scales", scales, (*frames, tokens, head_dim // 16))
    check_part("amax", amax, (*frames, 1, 1))
    if mean is not None:
        check_part("mean", mean, (*frames, 1, head_dim))
    return (*frames, tokens, head_dim)


def check_fp8_frames(codes: torch.Tensor, scale: torch.Tensor) -> Shape:
    """Return the shape of the frames of a cache in FP8; raise a ValueError if a part does not fit."""
    batch, heads, slots, tokens, head_dim = codes.shape
    check_part("codes", codes, (batch, heads, slots, tokens, head_dim))
    check_part("scale", scale, (batch, heads, slots, 1, 1))
    return batch, heads, slots, tokens, head_dim


def check_part(name: str, part: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless a part of a cache is contiguous and of this shape."""
    if tuple(part.shape) != shape or not part.is_contiguous():
        found = f"{tuple(part.shape)}{'' if part.is_contiguous() else ', not contiguous'}"
        raise ValueError(f"A cache's `{name}` are {shape}, contiguous; got {found}.")


def check_window(window: torch.Tensor, shape: Shape) -> tuple[int, int]:
    """Return how many slots a window has, and how far one head of a sample, or of the next, is from the one before;
    raise a ValueError unless frames of a cache of this shape can be read into it."""
    batch, heads, slots, tokens, head_dim = shape
    # The stride of a dimension of size 1 is any number: a view of an only head need not keep what it was.
    apart = 1 if heads > 1 else 0
    length, head_stride = (window.shape[2], window.stride(apart)) if window.ndim == 5 else (0, 0)
    strides = (heads * head_stride, head_stride, tokens * head_dim, head_dim, 1)
    fits = 0 < length <= slots and tuple(window.shape) == (batch, heads, length, tokens, head_dim)
    sizes = zip(window.stride(), strides, window.shape, strict=False)
    if not fits or any(own != other for own, other, size in sizes if size > 1):
        raise ValueError(
            f"A window on a cache {shape} has 1 to {slots} of its slots, contiguous for each head; got "
            f"{tuple(window.shape)} with strides {window.stride()}."
        )
    return length, head_stride


def as_bits(out: torch.Tensor) -> torch.Tensor:
    """Return bfloat16 as uint16, because the kernels round to bfloat16 on the bits; float32 as it is."""
    return out.view(torch.uint16) if out.dtype == torch.bfloat16 else out
