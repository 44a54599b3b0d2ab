"""Evaluate a model of the toy world: python training/toy/evaluate.py --model FOLDER --output DIR

The model makes videos from captions, and a judge that does not know the captions (`judge.py`) reads what the videos
show. Tables are printed, and written to DIR/report.md and DIR/results.json; next to them are curves and a strip of
frames, as PNG.

Sections: `accuracy` (seen and held-out combinations), `steps` (by number of solver steps), `time` (up to 8 times the
training length, with and without sinks, with absolute and relative RoPE), `events` (shots, prompt switches, cuts,
images), `diversity` (over the seeds of one prompt), `vae` (what the VAE loses), `strip` (frames to look at).

Finished parts are kept in DIR/parts: an interrupted evaluation is resumed, and one with other settings needs another
folder. It takes about 15 minutes on two CPU cores, or two minutes with --quick. The same seed gives the same videos.
"""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

import longlive_diffusers  # noqa: F401  (registers the pipeline's classes with diffusers)
from evaluation.diversity import diversity
from evaluation.sections import Evaluation, Settings, accuracy, events, steps, time
from evaluation.store import Store, fingerprint, fingerprint_of_file
from evaluation.strip import strip
from evaluation.tables import Table
from evaluation.vae import vae
from longlive_diffusers import LongLivePipeline, TinyVideoDecoder
from longlive_diffusers.atomic_write import write_text
from longlive_diffusers.cli.backends import check_nvfp4_backend
from longlive_diffusers.cli.device import choose_device
from longlive_diffusers.dtypes import DTYPES
from longlive_diffusers.models.layer_kv_cache import KV_CACHE_DTYPES
from longlive_diffusers.nvfp4 import NVFP4Config, quantize_model
from longlive_diffusers.nvfp4.backends import BACKENDS
from longlive_diffusers.user_path import user_path
from one_line import run
from outputs import check_is_folder
from world import SIDE


SECTIONS = {
    "accuracy": accuracy,
    "steps": steps,
    "time": time,
    "events": events,
    "diversity": diversity,
    "vae": vae,
    "strip": strip,
}
FULL = Settings()
QUICK = Settings(num_prompts=6, num_inference_steps=8, step_counts=(4, 8), long_steps=4, long_factor=2)


def load(
    folder: Path,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    lora: Path | None = None,
    nvfp4_backend: str | None = None,
) -> LongLivePipeline:
    """
    Load the pipeline in a folder, without its progress bars.

    Args:
        folder: The folder of the pipeline.
        device: The device to run on.
        dtype: The dtype to load it in.
        lora: The file or folder of a LoRA to load and fuse, or None.
        nvfp4_backend: The backend to compute the linear layers of the blocks in 4 bits with, or None.

    Raises:
        ValueError: If the folder holds no pipeline, or one that does not make videos of the toy world's size; or the
            LoRA does not fit.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"'{folder}' holds no pipeline: there is no model_index.json in it.")
    pipe = LongLivePipeline.from_pretrained(folder, dtype=dtype).to(device)
    if lora is not None:
        pipe.load_lora_weights(lora)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    if nvfp4_backend is not None:
        quantize_model(pipe.transformer, NVFP4Config(backend=nvfp4_backend))
    pipe.set_progress_bar_config(disable=True)
    check_pipeline(pipe)
    return pipe


def check_pipeline(pipe: LongLivePipeline) -> None:
    config, scale = pipe.transformer.config, pipe.vae_scale_factor_spatial
    size = config.sample_height * scale, config.sample_width * scale
    if size != (SIDE, SIDE):
        raise ValueError(f"The model makes videos of {size[0]}x{size[1]} pixels, the toy world's are {SIDE}x{SIDE}.")


def evaluate(
    pipe: LongLivePipeline,
    output: Path,
    settings: Settings,
    sections: list[str],
    *,
    model: str,
    decoder: TinyVideoDecoder | None = None,
) -> dict[str, list[Table]]:
    """Run sections, except for parts that are finished in `output`, print their tables and write the reports.

    Args:
        pipe: The pipeline of the model.
        output: The folder for the results.
        settings: The settings of the evaluation.
        sections: The names of the sections, among `SECTIONS`.
        model: A string that tells the model from others, for instance its `fingerprint`.
        decoder: What makes the frames; None for the pipeline's VAE.

    Raises:
        ValueError: If a section is unknown, or the folder has results of another model or other settings.
    """
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise ValueError(f"There is no section {', '.join(unknown)}, only {', '.join(SECTIONS)}.")
    evaluation = Evaluation(pipe, settings, Store(output, model, dtype=settings.dtype), decoder)
    tables: dict[str, list[Table]] = {}
    for name in sections:
        tables[name] = SECTIONS[name](evaluation)
        for table in tables[name]:
            print("\n" + table.as_text(), flush=True)
        write_reports(output, settings, tables, model)
    return tables


def write_reports(output: Path, settings: Settings, tables: dict[str, list[Table]], model: str) -> None:
    """Write `results.json` and `report.md`, with the sections of this call."""
    results = {name: [asdict(table) for table in of_section] for name, of_section in tables.items()}
    content = {"model": model, "settings": asdict(settings), "sections": results}
    write_text(output / "results.json", json.dumps(content, indent=1) + "\n")
    lines = ["# The toy world: what the judge saw", "", f"Model `{model}`, seed {settings.seed}."]
    pictures = {"steps": "steps.png", "time": "time.png", "strip": "strip.png"}
    for name, of_section in tables.items():
        lines += ["", f"## {name.capitalize()}"]
        for table in of_section:
            lines += ["", table.as_markdown()]
        if name in pictures:
            lines += ["", f"![{name}]({pictures[name]})"]
    write_text(output / "report.md", "\n".join(lines) + "\n")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. An option that is not given is taken from the preset, or from the model."""
    parser = argparse.ArgumentParser(description="Evaluate a model of the toy world.")
    parser.add_argument("--model", type=user_path, required=True, help="The folder of a pipeline.")
    parser.add_argument(
        "--output", type=user_path, required=True, help="The folder for results; finished parts in it are kept."
    )
    parser.add_argument("--lora", type=user_path, help="The file of a LoRA to evaluate the model with.")
    parser.add_argument("--decoder", type=user_path, help="The folder of a tiny decoder to make the frames with.")
    parser.add_argument(
        "--nvfp4_backend", choices=BACKENDS, help="Compute the linear layers in 4 bits, with this backend."
    )
    parser.add_argument("--device", help="Where to run (default: a GPU if there is one, else the CPU).")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(SECTIONS),
        metavar="SECTION",
        default=list(SECTIONS),
        help=f"The sections to run (default: all): {', '.join(SECTIONS)}.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="Take few prompts, few steps, and long videos of twice the length."
    )
    for name, kind, text in (
        ("num_prompts", int, "Prompts of each kind; half as many for long videos (default: 24)."),
        ("num_inference_steps", int, "Solver steps of each chunk (default: 30)."),
        ("long_steps", int, "Solver steps of each chunk of long videos (default: 8)."),
        ("num_chunks", int, "Length of the training videos in chunks (default: 8)."),
        ("long_factor", int, "How many times as long the long videos are (default: 8)."),
        ("guidance_scale", float, "Scale of classifier-free guidance; 1 is none (default: 1)."),
        (
            "max_sequence_length",
            int,
            "Tokens that prompts are padded to, as in training (default: the tokenizer's limit).",
        ),
        ("batch_size", int, "Videos made at a time (default: 24)."),
        ("seed", int, "Seed of prompts and noise (default: 0)."),
    ):
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--dtype", choices=DTYPES, help="The dtype to load the model in (default: float32).")
    parser.add_argument(
        "--kv_cache_dtype",
        choices=KV_CACHE_DTYPES,
        help="What keys and values are stored as (default: the network's dtype).",
    )
    parser.add_argument(
        "--step_counts",
        type=int,
        nargs="+",
        help="The numbers of solver steps that `steps` compares (default: 4 8 16 30 50).",
    )
    parsed = parser.parse_args(arguments)
    preset = asdict(QUICK if parsed.quick else FULL)
    given = {field.name: vars(parsed)[field.name] for field in fields(Settings)}
    if given["step_counts"] is not None:
        given["step_counts"] = tuple(given["step_counts"])
    parsed.takes_tokenizers_length = given["max_sequence_length"] is None
    try:
        parsed.settings = Settings(**{name: preset[name] if given[name] is None else given[name] for name in given})
        parsed.device = choose_device(parsed.device)
    except ValueError as error:
        parser.error(str(error))
    if parsed.lora is not None and not parsed.lora.is_file():
        parser.error(f"there is no file '{parsed.lora}'")
    if parsed.decoder is not None and not (parsed.decoder / "config.json").is_file():
        parser.error(f"'{parsed.decoder}' holds no decoder: there is no config.json in it")
    if not (parsed.model / "model_index.json").is_file():
        parser.error(f"'{parsed.model}' holds no pipeline: there is no model_index.json in it")
    check_is_folder(parsed.output)
    if parsed.nvfp4_backend is not None:
        transformer = json.loads((parsed.model / "transformer" / "config.json").read_text())
        check_nvfp4_backend("--nvfp4_backend", parsed.nvfp4_backend, transformer, parsed.device)
    return parsed


def main() -> None:
    arguments = parse_arguments()
    settings = arguments.settings
    pipe = load(
        arguments.model,
        arguments.device,
        DTYPES[settings.dtype],
        lora=arguments.lora,
        nvfp4_backend=arguments.nvfp4_backend,
    )
    if arguments.takes_tokenizers_length:
        # Padding is attended to: prompts have to be padded as they were in training.
        settings = Settings(**(asdict(settings) | {"max_sequence_length": pipe.tokenizer.model_max_length}))
    model = fingerprint(arguments.model)
    if arguments.lora is not None:
        model += f" + {fingerprint_of_file(arguments.lora)}"
    if arguments.nvfp4_backend is not None:
        model += f" in NVFP4, {arguments.nvfp4_backend}"
    decoder = None
    if arguments.decoder is not None:
        model += f", decoded by {fingerprint(arguments.decoder)}"
        decoder = TinyVideoDecoder.from_pretrained(arguments.decoder, torch_dtype=pipe.vae.dtype).to(arguments.device)
    print(f"{arguments.model}, {model}: {settings}", flush=True)
    evaluate(pipe, arguments.output, settings, arguments.only, model=model, decoder=decoder)
    print(f"\n{arguments.output / 'report.md'}")


if __name__ == "__main__":
    sys.exit(run(main))
