"""Decode and encode with a VAE that is split over gloo ranks, and with one that is not, and write for each case how
far apart the results are. Four processes, in groups of 2, 3 and 4; for tests/parallel/test_parallel_vae.py."""

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.models.streaming_vae import StreamingDecoder, StreamingEncoder, encode_video
from longlive_diffusers.parallel.columns import HEIGHT, WIDTH, ColumnSplit
from longlive_diffusers.parallel.halo import HaloExchange
from longlive_diffusers.pipelines.decoder import ChunkDecoder
from tests.support.tiny_vae import tiny_vae, wan_2_1_vae


NUM_RANKS = 4


def toy_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(toy_pipeline_path() / "vae").eval()


VAES: dict[str, Callable[[], AutoencoderKLWan]] = {"wan 2.2": tiny_vae, "wan 2.1": wan_2_1_vae, "toy": toy_vae}


@dataclass(frozen=True)
class Case:
    """
    Args:
        ranks: How many share the work.
        size: Height and width of the latents.
        vae: Which of `VAES`.
        lengths: The latent frames of each chunk.
        prepare: What is done to the VAE first.
    """

    ranks: int
    size: tuple[int, int]
    vae: str = "wan 2.2"
    batch: int = 1
    lengths: tuple[int, ...] = (1, 2)
    dtype: torch.dtype = torch.float32
    prepare: Callable[[AutoencoderKLWan], object] | None = None

    def make_vae(self) -> AutoencoderKLWan:
        vae = VAES[self.vae]().to(self.dtype)
        if self.prepare is not None:
            self.prepare(vae)
        return vae

    def latents(self, vae: AutoencoderKLWan) -> list[torch.Tensor]:
        shape = (self.batch, vae.config.z_dim, sum(self.lengths), *self.size)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.dtype)
        return list(latents.split(self.lengths, dim=2))

    def pixels(self, vae: AutoencoderKLWan) -> list[torch.Tensor]:
        """One frame for the first latent frame, and four for every other."""
        lengths = [4 * length for length in self.lengths]
        lengths[0] -= 3
        height, width = (vae.spatial_compression_ratio * size for size in self.size)
        shape = (self.batch, 3, sum(lengths), height, width)
        pixels = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
        return list(pixels.to(self.dtype).split(lengths, dim=2))


def enable_small_tiles(vae: AutoencoderKLWan) -> None:
    scale = vae.spatial_compression_ratio
    vae.enable_tiling(3 * scale, 3 * scale, 2 * scale, 2 * scale)


def offload_leaves(vae: AutoencoderKLWan) -> None:
    cpu = torch.device("cpu")
    vae.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def cast_by_layer(vae: AutoencoderKLWan) -> None:
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


SPLIT = {
    "2 ranks, even": Case(2, (2, 4), lengths=(1, 2, 1)),
    "2 ranks, 3 + 2 columns, batch of 2": Case(2, (1, 5), batch=2),
    "2 ranks, 3 + 2 rows": Case(2, (5, 1), lengths=(2, 1)),
    "3 ranks, even": Case(3, (1, 3)),
    "3 ranks, 2 + 2 + 1 columns": Case(3, (2, 5), lengths=(3,)),
    "3 ranks, 2 + 1 + 1 rows": Case(3, (4, 2), lengths=(1, 1)),
    "4 ranks, even": Case(4, (1, 4)),
    "4 ranks, 2 + 2 + 1 + 1 columns": Case(4, (1, 6), lengths=(2,)),
    "4 ranks, 2 + 1 + 1 + 1 rows, batch of 2": Case(4, (5, 1), batch=2),
    "wan 2.1, 2 ranks, even": Case(2, (2, 4), "wan 2.1"),
    "wan 2.1, 3 ranks, 2 + 2 + 1 columns, batch of 2": Case(3, (1, 5), "wan 2.1", batch=2),
    "wan 2.1, 4 ranks, 2 + 1 + 1 + 1 rows": Case(4, (5, 2), "wan 2.1"),
    "toy, 2 ranks, 3 + 2 columns": Case(2, (3, 5), "toy"),
    "toy, 3 ranks, 2 + 2 + 1 rows": Case(3, (5, 2), "toy", lengths=(2, 1)),
    "toy, 4 ranks, even": Case(4, (2, 4), "toy", lengths=(1, 1)),
    "one frame": Case(2, (1, 3), lengths=(1,)),
    "weights brought for each layer": Case(2, (1, 3), lengths=(1,), prepare=offload_leaves),
    "weights cast for each layer": Case(2, (1, 3), lengths=(1,), prepare=cast_by_layer),
}
BFLOAT16 = {
    f"bfloat16, {name}": replace(SPLIT[name], dtype=torch.bfloat16, lengths=(1, 1))
    for name in ("2 ranks, even", "wan 2.1, 2 ranks, even", "toy, 2 ranks, 3 + 2 columns")
}
# What only decoding does.
SLICES = {
    "slicing": Case(2, (1, 3), batch=2, lengths=(1, 1), prepare=lambda vae: vae.enable_slicing()),
    "tiles that are as large as the picture": Case(2, (3, 3), lengths=(1, 1), prepare=enable_small_tiles),
}
# Every rank does everything.
WHOLE = {
    "2 ranks, 1 column and 1 row": Case(2, (1, 1)),
    "4 ranks, 3 columns and 3 rows": Case(4, (3, 3), lengths=(1,)),
}
TILES = {"tiles": Case(2, (1, 5), lengths=(1, 1), prepare=enable_small_tiles)}


def stream(case: Case, what: str, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, int]:
    """All frames, and the bytes of the features that are kept."""
    vae = case.make_vae()
    if what == "decode":
        decoder = StreamingDecoder(vae, group)
        return torch.cat([decoder.decode(chunk) for chunk in case.latents(vae)], dim=2), decoder.num_bytes
    encoder = StreamingEncoder(vae, group)
    return torch.cat([encoder.encode(chunk) for chunk in case.pixels(vae)], dim=2), encoder.num_bytes


def all_cases() -> dict[str, tuple[Case, str]]:
    both = SPLIT | BFLOAT16 | WHOLE
    return {f"decode: {name}": (case, "decode") for name, case in (both | SLICES | TILES).items()} | {
        f"encode: {name}": (case, "encode") for name, case in both.items()
    }


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference; in 16 bits, where convolutions of other sizes round otherwise on some CPUs, and a layer
    that rounds more widely another time moves single pixels further, the root mean square."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, (found.shape, expected.shape)
    difference = (found.double() - expected.double()).abs()
    return (difference.max() if found.dtype == torch.float32 else difference.square().mean().sqrt()).item()


# -- single operators ------------------------------------------------------------------------------------------------

WEIGHTS_3, WEIGHTS_5 = (torch.randn(4, 4, k, k, generator=torch.Generator().manual_seed(k)) for k in (3, 5))
VOLUME_WEIGHTS = torch.randn(4, 4, 3, 3, 3, generator=torch.Generator().manual_seed(7))


def volume(pictures: torch.Tensor, function: Callable) -> torch.Tensor:
    """Apply a function of [B, C, frames, h, w] to pictures [frames, C, h, w]."""
    return function(pictures.permute(1, 0, 2, 3).unsqueeze(0)).squeeze(0).permute(1, 0, 2, 3)


def attention(pictures: torch.Tensor) -> torch.Tensor:
    tokens = pictures.reshape(pictures.shape[0], 1, pictures.shape[1], -1).permute(0, 1, 3, 2)
    attended = F.scaled_dot_product_attention(tokens, tokens, tokens, scale=0.3)
    return attended.permute(0, 1, 3, 2).reshape(pictures.shape)


# Of pictures [3, 4, h, w].
OPERATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "3x3": lambda x: F.conv2d(x, WEIGHTS_3, padding=1),
    "3x3 padded apart": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), WEIGHTS_3),
    "3x3 padded in each axis as needed": lambda x: F.conv2d(F.pad(x, (1, 1)), WEIGHTS_3, padding=(1, 0)),
    "3x3, stride 2": lambda x: F.conv2d(x, WEIGHTS_3, stride=2, padding=1),
    "3x3, stride 2, padded at the end": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), WEIGHTS_3, stride=(2, 2)),
    "3x3, stride 2, padded at the beginning": lambda x: F.conv2d(F.pad(x, (1, 0, 1, 0)), WEIGHTS_3, stride=2),
    "3x3, dilation 2": lambda x: F.conv2d(x, WEIGHTS_3, padding=2, dilation=2),
    "3x3, causal in both axes": lambda x: F.conv2d(F.pad(x, (2, 0, 2, 0)), WEIGHTS_3),
    "5x5": lambda x: F.conv2d(x, WEIGHTS_5, padding=(2, 2)),
    "5x5, groups": lambda x: F.conv2d(x, WEIGHTS_5[:, :2], padding=2, groups=2),
    "3x3x3": lambda x: volume(x, lambda v: F.conv3d(v, VOLUME_WEIGHTS, padding=1)),
    "3x3x3, causal in time": lambda x: volume(x, lambda v: F.conv3d(F.pad(v, (1, 1, 1, 1, 2, 0)), VOLUME_WEIGHTS)),
    "upsampled by repetition": lambda x: F.interpolate(x, scale_factor=(2.0, 2.0), mode="nearest-exact"),
    "attention": attention,
}


def compare_operator(name: str, axis: int, columns: tuple[int, ...], group: dist.ProcessGroup) -> float:
    """Of pictures at four times the resolution of latents with so many columns."""
    sizes = {WIDTH: 8, HEIGHT: 8} | {axis: 4 * sum(columns)}
    shape = (3, 4, sizes[HEIGHT], sizes[WIDTH])
    pictures = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    split = ColumnSplit(columns, dist.get_rank(group), axis, group)
    own = split.part(pictures)
    with HaloExchange(split):
        result = OPERATORS[name](own)
    return error(split.gather(result), OPERATORS[name](pictures))


# -- the rest --------------------------------------------------------------------------------------------------------


@contextmanager
def counting_parts() -> Iterator[list[ColumnSplit]]:
    """Note each time that a part of a picture is taken which others have the rest of."""
    parts, take = [], ColumnSplit.part

    def noting(split: ColumnSplit, picture: torch.Tensor) -> torch.Tensor:
        if not split.is_whole:
            parts.append(split)
        return take(split, picture)

    with mock.patch.object(ColumnSplit, "part", noting):
        yield parts


def be_busy_together() -> None:
    """All ranks meet again and again, with a little time between."""
    for _ in range(50):
        dist.all_reduce(torch.ones(1))
        time.sleep(0.005)


def compare_thread(pair: dist.ProcessGroup) -> float:
    """Another thread decodes, on a group of its own, while this one is busy with all ranks."""
    found = []
    thread = threading.Thread(target=lambda: found.append(stream(SPLIT["2 ranks, even"], "decode", pair)[0]))
    thread.start()
    be_busy_together()
    thread.join()
    return error(found[0], expected_results()["decode: 2 ranks, even"][0])


def compare_turns(pair: dist.ProcessGroup) -> float:
    """Two videos, one split along its width and one along its height, are decoded in turns."""
    cases = [SPLIT["2 ranks, 3 + 2 columns, batch of 2"], Case(2, (3, 1))]
    vae = tiny_vae()
    together, alone = [StreamingDecoder(vae, pair) for _ in cases], [StreamingDecoder(vae) for _ in cases]
    errors = []
    for chunks in zip(*(case.latents(vae) for case in cases), strict=True):
        for shared, own, chunk in zip(together, alone, chunks, strict=True):
            errors.append(error(shared.decode(chunk), own.decode(chunk)))
    together[0].reset()
    alone[0].reset()
    another = cases[1].latents(vae)[0]
    return max(*errors, error(together[0].decode(another), alone[0].decode(another)))


def compare_chunk_decoder(pair: dist.ProcessGroup) -> float:
    case, vae = SPLIT["one frame"], tiny_vae()
    decoders = [
        ChunkDecoder(vae, VideoProcessor(vae_scale_factor=16), "pt", vae.device, group=group) for group in (pair, None)
    ]
    return max(error(*(decoder.decode(chunk) for decoder in decoders)) for chunk in case.latents(vae))


def compare_encode_video(pair: dist.ProcessGroup) -> float:
    case, vae = SPLIT["2 ranks, 3 + 2 rows"], tiny_vae()
    pixels = torch.cat(case.pixels(vae), dim=2)
    return error(encode_video(vae, pixels, group=pair), encode_video(vae, pixels))


def compare_odd_pixels(pair: dist.ProcessGroup) -> float:
    """Pictures that are no whole number of latents wide, but high: they are split along the height."""
    vae = wan_2_1_vae()
    pixels = torch.rand(1, 3, 5, 32, 20, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return error(StreamingEncoder(vae, pair).encode(pixels), StreamingEncoder(vae).encode(pixels))


# On two ranks; the largest error of each.
COMPARISONS: dict[str, Callable[[dist.ProcessGroup], float]] = {
    "thread": compare_thread,
    "turns": compare_turns,
    "chunk decoder": compare_chunk_decoder,
    "encode_video": compare_encode_video,
    "odd pixels": compare_odd_pixels,
}


def message_for_outsiders(pair: dist.ProcessGroup) -> str | None:
    try:
        StreamingDecoder(tiny_vae(), pair)
    except ValueError as raised:
        return str(raised)
    return None


# -- running it ------------------------------------------------------------------------------------------------------


@functools.cache
def expected_results() -> dict[str, tuple[torch.Tensor, int]]:
    """Of one process, computed before the others are forked from it."""
    return {name: stream(case, what, None) for name, (case, what) in all_cases().items()}


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=NUM_RANKS)
    groups = {size: dist.new_group(list(range(size))) for size in (2, 3, 4)}
    results: dict[str, dict[str, float | str | None]] = {}
    for name, (case, what) in all_cases().items():
        if rank < case.ranks:
            expected, num_bytes = expected_results()[name]
            found, own_bytes = stream(case, what, groups[case.ranks])
            results[name] = {"error": error(found, expected), "bytes": own_bytes / num_bytes}
    for name in OPERATORS:
        for axis, words in ((WIDTH, "width"), (HEIGHT, "height")):
            if rank < 2:
                results[f"{words}, 2 ranks: {name}"] = {"error": compare_operator(name, axis, (2, 1), groups[2])}
            results[f"{words}, 4 ranks: {name}"] = {"error": compare_operator(name, axis, (1, 2, 1, 1), groups[4])}
    pair = dist.new_group([0, 1])
    if rank < 2:
        for name, compare in COMPARISONS.items():
            with counting_parts() as parts:
                results[name] = {"error": compare(pair), "times shared": len(parts)}
    else:
        results["outsider"] = {"message": message_for_outsiders(pair)}
        be_busy_together()

    everyones: list[dict] = [{} for _ in range(NUM_RANKS)]
    dist.all_gather_object(everyones, results)
    if rank == 0:
        by_case = {
            name: [ranks[name] for ranks in everyones if name in ranks] for ranks in everyones for name in ranks
        }
        (folder / "results.json").write_text(json.dumps(by_case, indent=1))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # taking gloo's groups down ends in an abort now and then, after all that is tested here


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    expected_results()
    multiprocessing.start_processes(run_rank, (folder,), NUM_RANKS, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
