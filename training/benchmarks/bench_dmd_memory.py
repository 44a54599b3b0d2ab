"""Peak memory of the two updates of distillation, with one shared base against three networks:

    PYTHONPATH=training python training/benchmarks/bench_dmd_memory.py [--size 5b|middling|tiny] [--frames 32 64]

Each row of the table is an update of the generator or of the fake score by the `Trainer` of `train_dmd.py` itself: its
roll-out, the scores, the backward and the optimizer, under autocast to bfloat16, on one device. Every storage is
counted once, at the moment when there are the most (`memory_ledger.py`), and by what it is for:

- *weights*: frozen weights, also in 4 bits;
- *trained*: weights that are trained, with their gradients and the states of AdamW, of generator and fake score;
- *cache*: the KV cache of the roll-out;
- *kept*: what else is there when the backward begins, for the backward: activations, or the inputs of checkpoints;
- *transient*: what comes and goes besides.

What kernels allocate inside of themselves is not seen, nor are the gaps between the blocks of an allocator. By default
nothing is computed: tensors have shapes and no numbers, and the 5B model fits any machine. Networks of two and three
layers are measured then, and continued to all layers, which are alike. With `--computed`, everything is computed.

Checkpoints wait on the device or, as with the trainer's `--activation_offloading`, on the host, whose memory is not
counted. Ratios are to three networks in bfloat16, two of them with a LoRA, in the same update, with checkpoints on the
device.
"""

import argparse
import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal

import torch
from accelerate import Accelerator
from tqdm import tqdm

from json_option import add_json_option
from longlive_diffusers import KVCache, LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.atomic_write import write_text
from longlive_diffusers.benchmark.markdown import markdown_table
from longlive_diffusers.benchmark.measure import as_size
from longlive_diffusers.host_copies import HostCopy
from longlive_diffusers.models.activation_offloading import checkpoint_on_host
from longlive_diffusers.nvfp4 import NVFP4Config
from longlive_diffusers.nvfp4.quantizer import layers_to_convert
from longlive_diffusers.parallel import FrameLayout
from memory_ledger import TRANSIENT, MemoryLedger, Simulated
from objectives.distillation import Distillation, DistillationSettings, RolloutShape
from objectives.distillation_networks import DistillationNetworks, Role
from objectives.rollout import RolloutCaches
from run.arguments import OptimizationArguments
from run.distillation_arguments import NetworkArguments
from run.distillation_start import ADAPTERS, build_networks
from run.network import add_lora, set_computation
from run.optimizers import build_optimizers
from run.process_mesh import build_process_mesh
from train_dmd import Trainer


WEIGHTS, TRAINED, CACHE, KEPT = "weights", "trained", "cache", "kept"
PARTS = (WEIGHTS, TRAINED, CACHE, KEPT, TRANSIENT)
COLUMNS = ("update of", "networks", "checkpoints", "latent frames", "peak", *PARTS, "ratio")


@dataclass(frozen=True)
class Size:
    """The sizes of the network, its latents, its LoRAs and the window of its KV cache."""

    config: dict
    height: int
    width: int
    text_tokens: int
    rank: int
    window_size: int
    sink_size: int


SIZES = {
    "tiny": Size(
        dict(num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=64, freq_dim=64,
             ffn_dim=512, num_layers=2, chunk_size=2),
        8, 8, 32, 8, 8, 2,
    ),
    "middling": Size(
        dict(num_attention_heads=8, attention_head_dim=64, in_channels=16, out_channels=16, text_dim=512,
             ffn_dim=2400, num_layers=8, chunk_size=8),
        16, 16, 64, 22, 32, 8,
    ),
    "5b": Size(
        dict(in_channels=48, out_channels=48, text_dim=4096, num_layers=30, chunk_size=8),
        44, 80, 512, 128, 32, 8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """How the three networks are held: one base or three networks, LoRAs or all weights trained, 4 bits or 16."""

    name: str
    is_shared: bool
    trains_lora: bool = True
    precision: str = "auto"
    kv_cache_dtype: str = "auto"


THREE = Setup("three networks", is_shared=False)
SETUPS = (
    Setup("three networks, all weights trained", is_shared=False, trains_lora=False),
    THREE,
    Setup("shared base", is_shared=True),
    Setup("shared base, NVFP4", is_shared=True, precision="nvfp4"),
    Setup("the same, cache in NVFP4", is_shared=True, precision="nvfp4", kv_cache_dtype="nvfp4"),
)


@dataclass(frozen=True)
class Case:
    """
    What is measured.

    Args:
        setup: How the networks are held.
        checkpointing: Whether blocks are computed again in the backward.
        frames: The length of a roll-out, in latent frames.
        scored_frames: How many of the last ones the scores see; all of these carry a gradient.
        score_context: The history that the scores see.
        offloading: Whether the inputs of checkpoints wait on the host, whose memory is not counted.
    """

    setup: Setup
    checkpointing: bool
    frames: int
    scored_frames: int
    score_context: Literal["clean", "noisy"]
    offloading: bool = False


@dataclass(frozen=True)
class Row:
    """The peak of one update, in bytes, by part."""

    case: Case
    role: str
    parts: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class LedgerCaches(RolloutCaches):
    """KV caches that are entered in a ledger as what they are."""

    ledger: MemoryLedger

    def create(self, network: LongLiveTransformer3DModel, noise: torch.Tensor) -> KVCache:
        with self.ledger.labelled(CACHE):
            kv_cache = super().create(network, noise)
        if (scratch := kv_cache[0].scratch) is not None:
            self.ledger.leave_out(scratch)  # only a CPU has one
        return kv_cache


class LedgerAccelerator(Accelerator):
    """An accelerator that enters what is there when a backward begins as what is kept for it."""

    ledger: MemoryLedger

    def backward(self, loss: torch.Tensor, **options) -> None:
        self.ledger.label_the_rest(KEPT)
        super().backward(loss, **options)


def make_networks(
    size: Size, setup: Setup, optimization: OptimizationArguments, device: torch.device
) -> DistillationNetworks:
    """Build the three networks, with weights that are all 0."""
    with torch.device("meta"):
        networks = arrange(LongLiveTransformer3DModel(**size.config), size, setup, optimization)
    weights = {
        name: torch.zeros(weight.shape, dtype=weight.dtype, device=device)
        for name, weight in networks.state_dict().items()
    }
    networks.load_state_dict(weights, assign=True)
    return networks


def arrange(
    base: LongLiveTransformer3DModel, size: Size, setup: Setup, optimization: OptimizationArguments
) -> DistillationNetworks:
    """Make the three networks of one."""
    model = NetworkArguments(pretrained_model_name_or_path="", rank=size.rank if setup.trains_lora else None)
    if setup.precision == "nvfp4":
        config = NVFP4Config(backend="w4a16")  # what a GPU of before Blackwell would choose
        for name in layers_to_convert(base, config):
            base.set_submodule(name, config.empty_layer(base.get_submodule(name)))
    if setup.is_shared:
        return build_networks(in_bfloat16(base), model, optimization, frozen_dtype=torch.bfloat16)
    networks = {}
    for role in ADAPTERS:
        networks[role] = copy.deepcopy(base)
        if setup.trains_lora:
            add_lora(in_bfloat16(networks[role]), model, (ADAPTERS[role],))
            for parameter in networks[role].parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    networks[Role.REAL_SCORE] = in_bfloat16(base).requires_grad_(False)
    for network in networks.values():
        set_computation(network.eval(), optimization)
    return DistillationNetworks(networks, ADAPTERS if setup.trains_lora else {})


def in_bfloat16(network: LongLiveTransformer3DModel) -> LongLiveTransformer3DModel:
    """Convert weights to bfloat16, but for those that are loaded in float32."""
    kept = set(network._keep_in_fp32_modules)
    for name, parameter in network.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return network


def measure(size: Size, case: Case, accelerator: LedgerAccelerator, simulation: Simulated | None) -> list[Row]:
    """Make one update of each role, under a simulation or computed, and return their peaks."""
    with simulation or nullcontext(), MemoryLedger() as ledger:
        accelerator.ledger = ledger
        optimization = OptimizationArguments(
            gradient_checkpointing=case.checkpointing,
            precision=case.setup.precision,
            attention_backend="native",  # what a GPU takes; by itself, a CPU would take matrix products
        )
        networks = make_networks(size, case.setup, optimization, accelerator.device)
        if case.offloading:
            for role in Role:
                networks.network(role).enable_gradient_checkpointing(offloading_beside(ledger))
        optimizers = {role: filled_optimizers(networks, role, accelerator, optimization) for role in ADAPTERS}
        ledger.label([*networks.parameters(), *networks.buffers()], WEIGHTS)
        for role in ADAPTERS:
            states = [state.values() for optimizer in optimizers[role] for state in optimizer.state.values()]
            ledger.label(chain(networks.parameters_of(role).values(), *states), TRAINED)
        trainer, fetched = make_trainer(size, case, networks, accelerator), [make_batch(size, case)]
        rows = []
        for role in ADAPTERS:
            ledger.begin()
            differentiate = {
                Role.GENERATOR: trainer.differentiate_generator,
                Role.FAKE_SCORE: trainer.differentiate_critic,
            }
            differentiate[role](fetched, 0)
            gradients = (parameter.grad for parameter in networks.parameters_of(role).values())
            ledger.label([gradient for gradient in gradients if gradient is not None], TRAINED)
            trainer.apply(role, optimizers[role], max_grad_norm=10.0)
            peak = ledger.peak()
            rows.append(Row(case, str(role), {part: peak[part] for part in PARTS}))
    return rows


def offloading_beside(ledger: MemoryLedger) -> Callable[..., torch.Tensor]:
    """Return the checkpointing whose copies on the host the ledger leaves out, though the host may be all there is."""

    def left_out(tensor: torch.Tensor) -> HostCopy:
        made = HostCopy(tensor)
        ledger.leave_out(made.copy)
        return made

    return partial(checkpoint_on_host, copy=left_out)


def filled_optimizers(
    networks: DistillationNetworks, role: Role, accelerator: Accelerator, optimization: OptimizationArguments
) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a role, and give them their states by an update without gradients."""
    parameters = list(networks.parameters_of(role).values())
    optimizers = build_optimizers(parameters, accelerator, optimization)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return optimizers


def make_trainer(size: Size, case: Case, networks: DistillationNetworks, accelerator: LedgerAccelerator) -> Trainer:
    """Return the trainer of a run of two solver steps, which exits at the second."""
    settings = DistillationSettings(
        num_inference_steps=2,
        last_step_only=True,
        score_context=case.score_context,
        score_latent_frames=case.scored_frames,
    )
    config = networks.network(Role.GENERATOR).config
    objective = Distillation(
        LongLiveScheduler(),
        settings,
        RolloutShape.of(settings, case.frames, config.chunk_size),
        multi_shot_rope_offset=0.0,
        seed=0,
        layout=FrameLayout(case.scored_frames, 1, config.chunk_size),
        rank=0,
        frame_shape=(config.in_channels, size.height, size.width),
    )
    caches = LedgerCaches(
        size.window_size,
        size.sink_size,
        multi_shot_sink=True,
        dtype=torch.bfloat16 if case.setup.kv_cache_dtype == "auto" else case.setup.kv_cache_dtype,
        ledger=accelerator.ledger,
    )
    negative = torch.zeros(size.text_tokens, config.text_dim)
    return Trainer(accelerator, networks, objective, build_process_mesh(accelerator, None), caches, negative)


def make_batch(size: Size, case: Case) -> dict[str, torch.Tensor]:
    """Return a batch as the loader gives it: one video of one shot."""
    chunks = case.frames // size.config["chunk_size"]
    shots = torch.zeros(1, chunks, dtype=torch.long)
    return {
        "prompt_embeds": torch.zeros(1, 1, size.text_tokens, size.config["text_dim"]).expand(-1, chunks, -1, -1),
        "shot_index": shots,
        "cuts": shots.bool(),
        "switches": shots.bool(),
        "sample_id": torch.zeros(1, dtype=torch.long),
    }


def simulate(size: Size, case: Case, accelerator: LedgerAccelerator) -> list[Row]:
    """Return the peaks of a network of any number of layers, from two small ones: a moment's bytes grow by the same
    with each layer."""
    num_layers = size.config["num_layers"]
    if num_layers <= 3:
        return measure(size, case, accelerator, Simulated())
    two, three = (
        measure(replace(size, config=size.config | {"num_layers": layers}), case, accelerator, Simulated())
        for layers in (2, 3)
    )
    return [
        replace(
            low,
            parts={part: low.parts[part] + (num_layers - 2) * (high.parts[part] - low.parts[part]) for part in PARTS},
        )
        for low, high in zip(two, three, strict=True)
    ]


def cases(size: Size, lengths: list[int], score_context: Literal["clean", "noisy"]) -> list[Case]:
    """Return what is measured: roll-outs that are longer than the window also with scores of a window only."""
    scored = [(frames, seen) for frames in lengths for seen in sorted({min(frames, size.window_size), frames})]
    return [
        Case(setup, checkpointing, frames, seen, score_context, offloading)
        for checkpointing, offloading in ((True, True), (True, False), (False, False))
        for frames, seen in scored
        for setup in SETUPS
    ]


def print_table(rows: list[Row]) -> None:
    baseline = {(replace(row.case, setup=THREE), row.role): row.num_bytes for row in rows if row.case.setup == THREE}
    cells = []
    for row in rows:
        case = row.case
        numbers = [row.num_bytes, *(row.parts[part] for part in PARTS)]
        cells.append(
            [
                row.role,
                case.setup.name,
                ("on the host" if case.offloading else "yes") if case.checkpointing else "no",
                f"{case.frames}"
                if case.scored_frames == case.frames
                else f"{case.frames}, {case.scored_frames} scored",
                *(as_size(number) for number in numbers),
                f"{row.num_bytes / baseline[replace(case, setup=THREE, offloading=False), row.role]:.2f}",
            ]
        )
    print(markdown_table(COLUMNS, cells))


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of the two updates of distillation.")
    parser.add_argument("--size", choices=SIZES, default="5b", help="The sizes of everything (default: %(default)s).")
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[32, 64], help="The lengths of roll-outs in latent frames."
    )
    parser.add_argument(
        "--score_context",
        choices=("clean", "noisy"),
        default="clean",
        help="The history that the scores see (default: %(default)s).",
    )
    parser.add_argument("--computed", action="store_true", help="Compute everything, with all layers.")
    add_json_option(parser)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    chunk_size = size.config["chunk_size"]
    for frames in arguments.frames:
        if frames < 1 or frames % chunk_size:
            parser.error(f"--frames {frames} is no multiple of {chunk_size} (chunks)")
    accelerator = LedgerAccelerator(mixed_precision="bf16", cpu=not arguments.computed)
    rows: list[Row] = []
    for case in tqdm(cases(size, arguments.frames, arguments.score_context), desc="Cases"):
        rows += measure(size, case, accelerator, None) if arguments.computed else simulate(size, case, accelerator)
    how = f"computed on {accelerator.device}" if arguments.computed else "simulated"
    print(
        f"{arguments.size}, {how}, batch 1, history of the scores {arguments.score_context}, torch {torch.__version__}"
    )
    print_table(rows)
    if arguments.json is not None:
        write_text(arguments.json, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
