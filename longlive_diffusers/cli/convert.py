"""`longlive convert`: a checkpoint of the reference implementation in; a pipeline folder out. Or, the other way, a
LoRA in; a file of the reference implementation out. Or a tiny decoder's published weights in; its folder out."""

import argparse

from .choices import DTYPES
from .termination import ends_cleanly


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "convert",
        help="turn an original checkpoint into a pipeline folder, a LoRA into an original one, ...",
        description="Turn a checkpoint of the reference implementation (NVlabs/LongLive) into a folder that "
        "DiffusionPipeline.from_pretrained opens. With --to original, turn a LoRA of any layout into a file that the "
        "reference implementation opens. With --to tiny, turn a file of TAEHV (taew2_2.pth) into the folder of a "
        "tiny decoder.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="The transformer (with --to tiny, the tiny decoder): a .pt, .pth or .safetensors file; with --to "
        "original, a LoRA: file, folder or Hub repository.",
    )
    parser.add_argument(
        "--to",
        choices=("diffusers", "original", "tiny"),
        default="diffusers",
        help="What to write: a pipeline in diffusers' layout, a LoRA in the original one, or a tiny decoder (default: "
        "%(default)s).",
    )
    parser.add_argument(
        "--base",
        metavar="DIR_OR_REPO",
        help="A Wan or LongLive pipeline that gives tokenizer, text encoder and VAE; for the published 5B "
        "checkpoints, Wan-AI/Wan2.2-TI2V-5B-Diffusers. Needed for a pipeline.",
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
        help="The dtype of transformer and text encoder (default: bfloat16), of the LoRA or of the tiny decoder "
        "(default: as stored).",
    )
    parser.add_argument("--use-ema", action="store_true", help="Take the checkpoint's averaged weights.")


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint, the LoRA or the tiny decoder."""
    with ends_cleanly():
        return {"diffusers": to_diffusers, "original": to_original, "tiny": to_tiny}[args.to](args)


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

    check_alone(args, "a LoRA")
    convert_lora(
        args.checkpoint,
        args.output,
        dtype=None if args.dtype is None else dtypes.DTYPES[args.dtype],
        report=print,
    )
    return 0


def to_tiny(args: argparse.Namespace) -> int:
    """Make the folder of a tiny decoder of its published weights."""
    from .. import dtypes
    from ..conversion.tiny_decoder import convert_tiny_decoder

    check_alone(args, "a tiny decoder")
    dtype = None if args.dtype is None else dtypes.DTYPES[args.dtype]
    convert_tiny_decoder(args.checkpoint, args.output, dtype=dtype, report=print)
    return 0


def check_alone(args: argparse.Namespace, what: str) -> None:
    """Raise a ValueError for options that are of a pipeline, where something else is converted alone."""
    idle = [f"--{name.replace('_', '-')}" for name in ("base", "lora", "use_ema") if vars(args)[name]]
    if idle:
        raise ValueError(f"--to {args.to} converts {what} alone; {', '.join(idle)} would do nothing")
