"""Memory and time of a teacher-forcing step:

    python training/benchmarks/bench_training.py [--size tiny|block-5b] [--dtype DTYPE] [--json FILE]

Each row of the table is one step, forward and backward, with random weights and random latents, but without an
optimizer, whose cost does not depend on the clip. *Kept* is the memory that autograd holds between forward and
backward, with every storage counted once, and that by the number of tokens and layers; on a GPU, *peak* is the most
memory allocated at any time, weights and gradients included. Time is the median of the repeats, which alternate
between the rows of one length, so that other load on the machine affects them alike.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from tqdm import tqdm

from json_option import add_json_option
from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.atomic_write import write_text
from longlive_diffusers.benchmark.markdown import markdown_table
from longlive_diffusers.benchmark.measure import peak_memory, reset_peak_memory, synchronize


COLUMNS = (
    "latent frames",
    "tokens",
    "attention",
    "checkpointing",
    "kept",
    "by token and layer",
    "peak",
    "step",
    "of dense, same memory",
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}  # of the weights


@dataclass(frozen=True)
class Size:
    """The sizes of the network and its latents; `frames` are the clip lengths, in latent frames."""

    config: dict
    height: int
    width: int
    text_tokens: int
    frames: tuple[int, ...]


SIZES = {
    "tiny": Size(
        dict(num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=64, freq_dim=64,
             ffn_dim=512, num_layers=4, chunk_size=2),
        8, 8, 32, (8, 16, 32, 64),
    ),
    "block-5b": Size(dict(num_layers=1), 44, 80, 512, (32, 64, 96)),  # two would need more than 80 GB
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measured combination, in bytes and seconds."""

    frames: int
    tokens: int
    layers: int
    backend: str
    checkpointing: bool
    kept_bytes: int
    peak_bytes: int | None
    seconds: float


def make_step(
    model: LongLiveTransformer3DModel, size: Size, frames: int, *, autocasts: bool = False
) -> Callable[[], torch.Tensor]:
    """Return a function that runs one forward, on request under autocast to bfloat16, and returns the loss to call
    `backward` on."""
    device, dtype = model.device, model.dtype
    shape = (1, model.config.in_channels, frames, size.height, size.width)
    noisy, clean = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    t = torch.rand(1, frames, device=device) * 1000
    chunks = frames // model.config.chunk_size
    embeds = torch.randn(1, chunks, size.text_tokens, model.config.text_dim, device=device, dtype=dtype)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocasts):
            velocity = model(noisy, t, embeds, clean_hidden_states=clean, return_dict=False)[0]
        return velocity.float().square().mean()

    return step


def kept_bytes(step: Callable[[], torch.Tensor], model: torch.nn.Module) -> int:
    """Return the bytes held for the backward besides the weights. Tensors that are recomputed do not count."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive = []  # so that no address is reused; storages, as tensors would keep the graph and this list in a circle

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def timed(step: Callable[[], torch.Tensor], model: torch.nn.Module) -> float:
    """Return the seconds that a forward and a backward take."""
    synchronize(model.device)
    start = time.perf_counter()
    step().backward()
    synchronize(model.device)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def measure(size: Size, device: torch.device, dtype: str, backends: list[str], repeats: int) -> list[Row]:
    """Measure every combination; `dtype` is one of `DTYPES`."""
    torch.manual_seed(0)
    model = LongLiveTransformer3DModel(**size.config).to(device, DTYPES[dtype]).train()
    rows = []
    for frames in tqdm(size.frames, desc="Lengths"):
        cases = [(backend, checkpointing) for backend in backends for checkpointing in (False, True)]
        step = make_step(model, size, frames, autocasts=dtype == "autocast")
        seconds: dict[tuple[str, bool], list[float]] = {case: [] for case in cases}
        kept, peaks = {}, {}
        for repeat in range(repeats + 1):  # the first one is a warm-up
            for case in cases:
                choose(model, *case)
                if repeat == 0:
                    kept[case] = kept_bytes(step, model)
                reset_peak_memory(device)
                took = timed(step, model)
                if device.type == "cuda":  # elsewhere it would be the peak of the whole process so far
                    peaks[case], _ = peak_memory(device)
                if repeat > 0:
                    seconds[case].append(took)
        tokens = 2 * frames * size.height * size.width // 4
        rows += [
            Row(
                frames, tokens, len(model.blocks), *case, kept[case], peaks.get(case), statistics.median(seconds[case])
            )
            for case in cases
        ]
    return rows


def choose(model: LongLiveTransformer3DModel, backend: str, checkpointing: bool) -> None:
    name = AttentionBackendName.FLEX if backend == "flex" else AttentionBackendName.NATIVE
    model.set_attention_backend(name.value)
    if checkpointing:
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()


def print_table(rows: list[Row]) -> None:
    dense = {(row.frames, row.checkpointing): row.seconds for row in rows if row.backend == "dense"}
    cells = []
    for row in rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
        ratio = row.seconds / dense[row.frames, row.checkpointing]
        cells.append(
            [
                str(row.frames),
                str(row.tokens),
                row.backend,
                "yes" if row.checkpointing else "no",
                f"{row.kept_bytes / 2**20:.1f} MiB",
                f"{row.kept_bytes / row.tokens / row.layers / 2**10:.2f} KiB",
                peak,
                f"{1000 * row.seconds:.0f} ms",
                f"{ratio:.2f}",
            ]
        )
    print(markdown_table(COLUMNS, cells))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of a teacher-forcing step.")
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="The sizes of network and latents (default: %(default)s)."
    )
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=("dense", "flex"),
        default=["dense"],
        help="The ways to compute attention (default: dense).",
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="The number of steps that are timed (default: %(default)s)."
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where to run (default: %(default)s)."
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="The dtype of the network; autocast is float32 under autocast to bfloat16 (default: bfloat16 on a GPU, "
        "float32 on a CPU).",
    )
    add_json_option(parser)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    if "dense" not in arguments.backends:
        parser.error("ratios are to dense attention: --backends must have it")
    if "flex" in arguments.backends and device.type != "cuda":
        parser.error("FlexAttention has no backward on a CPU: --backends flex needs a GPU")
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    rows = measure(SIZES[arguments.size], device, dtype, arguments.backends, arguments.repeats)
    threads = torch.get_num_threads()
    print(f"{arguments.size}, {dtype}, batch 1, on {device} ({threads} threads), torch {torch.__version__}")
    print_table(rows)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
