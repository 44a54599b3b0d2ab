"""Compares the Triton kernels with the reference: TRITON_INTERPRET=1 python -m tests.programs.compare_kernels"""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from longlive_diffusers.fp8.operators import quantize_rows
from longlive_diffusers.fp8.rows import rows_to_fp8
from longlive_diffusers.models.frame_store import FP8Frames, FrameStore, NVFP4Frames, Shape
from longlive_diffusers.models.layer_kv_cache import allocate_slots
from longlive_diffusers.nvfp4 import e2m1, operators
from longlive_diffusers.nvfp4.format import NVFP4Tensor, encode_matrix, quantize_unchecked
from longlive_diffusers.nvfp4.hadamard import random_hadamard
from longlive_diffusers.nvfp4.noise import uniform_noise
from longlive_diffusers.nvfp4.rules import RULES


def sample(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of all sizes, zeros of both signs, ties: in rows of their own, and all in the first where they fit."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp(3 * torch.randn(rows, columns, generator=generator))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    x[0, 16:32] = 0
    x[0, 32:64:2] = -0.0
    x[0, 64:80] = ties.repeat(len(x[0, 64:80]) // 8)
    x[2] = 0
    x[3, ::2] = -0.0
    x[4] = ties.repeat(columns // 8)
    return x.to(dtype)


def equal(codes: torch.Tensor, scales: torch.Tensor, expected: NVFP4Tensor) -> bool:
    return torch.equal(codes.cpu(), expected.codes) and torch.equal(
        scales.cpu().view(torch.uint8), expected.scales.view(torch.uint8)
    )


def compare(device: torch.device, large: bool = False) -> tuple[list[str], int]:
    """Names of the cases that differ, and the number of all."""
    differing, total = [], 0

    def check(name: str, same: bool | torch.Tensor) -> None:
        nonlocal total
        total += 1
        if not same:
            differing.append(name)

    shapes = [((16, 160), torch.float32), ((16, 1040), torch.bfloat16)]  # an interpreted program takes a while
    if large:
        shapes += [((256, 2048), torch.float32), ((7040, 3072), torch.bfloat16)]
    seed = torch.tensor([3_000_000_001, 987_654_321])
    for shape, dtype in shapes:
        x = sample(*shape, dtype)
        amax = x.abs().amax().float().reshape(1)
        # How a number is loaded has nothing to do with the rule, of which an interpreted kernel takes two in bfloat16.
        rules = list(RULES.values()) if large or dtype == torch.float32 else [RULES["mse"], RULES["static_6"]]
        for rule, block, noise_seed in itertools.product(rules, ((1, 16), (16, 16)), (None, seed)):
            matrix = x if large else x[:2] if block[0] == 1 else x[:, :160]  # few rows and tiles, thus programs
            noise = None if noise_seed is None else uniform_noise(noise_seed, matrix.shape)
            expected = encode_matrix(matrix, amax, rule, block, noise)
            found = operators.quantize_matrix(
                matrix.to(device),
                amax.to(device),
                rule.name,
                block,
                None if noise_seed is None else noise_seed.to(device),
            )
            name = f"{rule.name} {block} {shape} {dtype} {'nearest' if noise_seed is None else 'stochastic'}"
            check(name, equal(*found, expected))
        for dtype_out in (torch.float32, torch.bfloat16):
            back = operators.dequantize_matrix(*found, amax.to(device), rule.name, dtype_out).cpu()
            values = e2m1.unpack_values(expected.codes).unflatten(-1, (-1, 16))
            values = (values * expected.scales.float().unsqueeze(-1)).flatten(-2) * amax / rule.span
            check(f"dequantize {shape} {dtype_out}", torch.equal(back, values.to(dtype_out)))

        several = sample(8, 32, dtype)[:6].reshape(3, 2, 32)  # matrices with scales of their own
        amax = several.abs().amax(dim=(1, 2), keepdim=True).float()
        expected = encode_matrix(several, amax, RULES["mse"])
        codes, scales = operators.quantize_matrix(
            several.flatten(0, 1).to(device), amax.flatten().to(device), "mse", (1, 16), None
        )
        check(f"several matrices {dtype}", equal(codes.reshape(3, 2, 16), scales.reshape(3, 2, 2), expected))

        rows, columns = (x[:, :32], x[:, :32]) if large else (x[:2, :32], x[:, :2])
        transposed = columns.T  # of other strides
        for name, matrix in (("Hadamard", rows), ("transposed", transposed), ("transposed, Hadamard", transposed)):
            hadamard = "Hadamard" in name
            plain = random_hadamard(matrix.contiguous()) if hadamard else matrix.contiguous()
            amax = plain.abs().amax().float().reshape(1)
            on_device = matrix.to(device) if name == "Hadamard" else columns.to(device).T
            for rule, noise_seed in ((RULES["static_6"], seed), (RULES["mse"], None)):  # all pairs are compared above
                noise = None if noise_seed is None else uniform_noise(noise_seed, plain.shape)
                expected = encode_matrix(plain, amax, rule, (1, 16), noise)
                found = operators.quantize_matrix(
                    on_device,
                    amax.to(device),
                    rule.name,
                    (1, 16),
                    None if noise_seed is None else noise_seed.to(device),
                    hadamard,
                )
                check(f"{name}, {rule.name} {shape} {dtype} {noise_seed is not None}", equal(*found, expected))
            if hadamard:
                check(f"{name}, amax {shape} {dtype}", torch.equal(operators.hadamard_amax(on_device).cpu(), amax))
        for name, matrix in (("rows", x if large else x[1:4]), ("transposed rows", (x if large else x[:, :2]).T)):
            codes, scales = quantize_rows(matrix.to(device))
            expected_codes, expected_scales = rows_to_fp8(matrix.cpu())
            same = torch.equal(codes.cpu().view(torch.uint8), expected_codes.view(torch.uint8))
            check(f"FP8, {name} {shape} {dtype}", same and torch.equal(scales.cpu(), expected_scales))
        odd = torch.ones(2, 16, dtype=dtype)
        odd[0, 3], odd[1, 5] = torch.nan, torch.inf
        codes, scales = (part.cpu() for part in quantize_rows(odd.to(device)))
        lost = codes.float().isnan()
        check(f"FP8, NaN and infinity {dtype}", lost[0].all() and lost[1, 5] and not scales.isfinite().any())
    written = (1, 3, 4, 880, 128) if large else (2, 2, 3, 40, 256)
    for name, same in itertools.chain(compare_frames(device), compare_written_frames(device, written)):
        check(name, same)
    return differing, total


def compare_frames(device: torch.device) -> Iterator[tuple[str, bool]]:
    """Read two of the three slots of the KV cache's stores: the name of each case, and whether it is as on a CPU.
    The dtype decides only how a number is rounded at last, so that not every store is read as both."""
    shape, cpu = (2, 2, 3, 20, 32), torch.device("cpu")
    stores = {
        ("nvfp4", torch.float32): NVFP4Frames(shape, cpu, for_keys=False),
        ("nvfp4, centered", torch.bfloat16): NVFP4Frames(shape, cpu, for_keys=True),
        ("fp8", torch.float32): FP8Frames(shape, cpu, for_keys=True),
        ("fp8", torch.bfloat16): FP8Frames(shape, cpu, for_keys=True),
    }
    for (name, dtype), store in stores.items():
        for slot in range(3):
            frames = torch.randn(2, 1, 2, 20, 32, generator=torch.Generator().manual_seed(slot))
            store.write(torch.arange(2)[:, None], torch.full((2, 1), slot), frames)
        expected = torch.zeros(shape, dtype=dtype)
        store.read_into(expected[:, :, :2])
        found = allocate_slots(shape, dtype, device)
        if isinstance(store, FP8Frames):
            operators.read_fp8_frames(store.codes.to(device), store.scale.to(device), found[:, :, :2])
        else:
            mean = None if store.mean is None else store.mean.to(device)
            stored = (store.codes.to(device), store.scales.to(device), store.amax.to(device), mean)
            operators.read_nvfp4_frames(*stored, store.scale_rule, found[:, :, :2])
        yield f"frames, {name} {dtype}", torch.equal(found.cpu(), expected)


WRITTEN = {
    "nvfp4": (partial(NVFP4Frames, for_keys=False), torch.float32),
    "nvfp4, absolute errors": (partial(NVFP4Frames, for_keys=False, scale_rule="mae"), torch.bfloat16),
    "nvfp4, centered": (partial(NVFP4Frames, for_keys=True), torch.bfloat16),
    "nvfp4, centered, without a choice": (partial(NVFP4Frames, for_keys=True, scale_rule="static_6"), torch.float32),
    "fp8, float32": (partial(FP8Frames, for_keys=True), torch.float32),
    "fp8, bfloat16": (partial(FP8Frames, for_keys=True), torch.bfloat16),
}


def compare_written_frames(device: torch.device, shape: Shape) -> Iterator[tuple[str, bool]]:
    """Write two of the slots of a window: the name of each case, and whether all bits are as on a CPU. The numbers are
    such that their sums are exact, and so are means in any order. Where a frame has a NaN, all of it is NaN."""
    cpu = torch.device("cpu")
    chosen = torch.tensor([[2, 0], [1, 2]])[: shape[0]]
    for name, (make, dtype) in WRITTEN.items():
        window = allocate_slots(shape, dtype, cpu)
        window.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(64).round() / 64)
        window[0, 0, 2], window[-1, 1, 2], window[0, 1, 0] = 0.0, -0.0, 1.5
        window[0, 0, 0, 33, 5] = torch.nan
        expected, found = make(shape, cpu), make(shape, cpu)
        expected.write_from(window, chosen)
        write_by_kernels(found, window, chosen, device)
        read, found_read = torch.zeros(shape), torch.zeros(shape)
        expected.read_into(read)
        found.read_into(found_read)
        numbers = ~read.isnan().any(-1).any(-1)
        same = all(
            torch.equal(own[numbers], part[numbers]) for own, part in zip(found.parts, expected.parts, strict=True)
        )
        yield (
            f"written frames, {name}",
            same and torch.equal(read.isnan(), found_read.isnan()) and not numbers[0, 0, 0],
        )
    yield "written frames, a mean that is rounded", mean_is_near(device, shape)


def mean_is_near(device: torch.device, shape: Shape) -> bool:
    """Whether the mean that the kernel takes from keys is right but for rounding, and all else is right given it."""
    cpu = torch.device("cpu")
    window, chosen = allocate_slots(shape, torch.float32, cpu), torch.zeros(shape[0], 1, dtype=torch.long)
    window.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3)
    found = NVFP4Frames(shape, cpu, for_keys=True)
    write_by_kernels(found, window, chosen, device)
    codes, scales, amax, mean = (part[:, :, 0] for part in found.parts)
    centered = window[:, :, 0] - mean
    expected = quantize_unchecked(centered, found.scale_rule, amax=amax)
    return (
        (window[:, :, 0].double().mean(-2, keepdim=True) - mean).abs().max().item() < 1e-6
        and torch.equal(amax, centered.abs().amax((-2, -1), keepdim=True))
        and equal(codes, scales, expected)
    )


def write_by_kernels(store: FrameStore, window: torch.Tensor, chosen: torch.Tensor, device: torch.device) -> None:
    """Write to a store on the CPU what kernels make on the device; the window is laid out there as it is here."""
    on_device = allocate_slots(tuple(window.shape), window.dtype, device)
    on_device.copy_(window)
    parts = [part.to(device) for part in store.parts]
    if isinstance(store, FP8Frames):
        operators.write_fp8_frames(on_device, chosen.to(device), *parts)
    else:
        mean = None if store.mean is None else parts[3]
        operators.write_nvfp4_frames(on_device, chosen.to(device), *parts[:3], mean, store.scale_rule)
    for own, part in zip(store.parts, parts, strict=True):
        own.copy_(part)


if __name__ == "__main__":
    differing, total = compare(torch.device("cpu"))
    print(f"{len(differing)} of {total} cases differ", *differing, sep="\n")
    raise SystemExit(bool(differing))
