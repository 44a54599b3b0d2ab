"""`longlive convert`: a checkpoint of the reference implementation in; a pipeline folder out. Or, the other way, a
LoRA in; a file of the reference implementation out."""

import argparse

from .choices import DTYPES
from .termination import ends_cleanly


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "convert",
        help="turn an original checkpoint into a pipeline folder, or a LoRA into an original one",
        description="Turn a checkpoint of the reference implementation (NVlabs/LongLive) into a folder that "
        "DiffusionPipeline.from_pretrained opens. With --to original, turn a LoRA of any layout into a file that the "
        "reference implementation opens.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="The transformer: a .pt, .pth or .safetensors file; with --to original, a LoRA: file, folder or Hub "
        "repository.",
    )
    parser.add_argument(
        "--to",
        choices=("diffusers", "original"),
        default="diffusers",
        help="The layout to write (default: %(default)s).",
    )
    parser.add_argument(
        "--base",
        metavar="DIR_OR_REPO",
        help="A Wan or LongLive pipeline that gives tokenizer, text encoder and VAE; for the published 5B "
        "checkpoints, Wan-AI/Wan2.2-TI2V-5B-Diffusers. Needed unless a LoRA is converted.",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR_OR_FILE",
        help="The folder to write, new or empty; with --to original, the file, a new .pt.",
    )
    parser.add_argument("--lora", metavar="FILE_OR_REPO", help="A LoRA to add to the transformer for good.")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="The dtype of transformer and text encoder (default: bfloat16); with --to original, that of the LoRA "
        "(default: as stored).",
    )
    parser.add_argument("--use-ema", action="store_true", help="Take the checkpoint's averaged weights.")


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint or the LoRA."""
    with ends_cleanly():
        return to_original(args) if args.to == "original" else to_diffusers(args)


def to_diffusers(args: argparse.Namespace) -> int:
    """Make a pipeline folder of a checkpoint."""
    from .. import dtypes
    from ..conversion.convert import convert_checkpoint

    if args.base is None:
        raise ValueError("--base is needed: a pipeline that gives tokenizer, text encoder and VAE")
    convert_checkpoint(
        args.checkpoint,
        args.base,
        args.output,
        lora=args.lora,
        use_ema=args.use_ema,
        dtype=dtypes.DTYPES[args.dtype or "bfloat16"],
        report=print,
    )
    return 0


def to_original(args: argparse.Namespace) -> int:
    """Make a file of the reference implementation of a LoRA."""
    from .. import dtypes
    from ..conversion.convert_lora import convert_lora

    idle = [f"--{name.replace('_', '-')}" for name in ("base", "lora", "use_ema") if vars(args)[name]]
    if idle:
        raise ValueError(f"--to original converts a LoRA alone; {', '.join(idle)} would do nothing")
    convert_lora(
        args.checkpoint,
        args.output,
        dtype=None if args.dtype is None else dtypes.DTYPES[args.dtype],
        report=print,
    )
    return 0
