"""`longlive convert`: a checkpoint of the reference implementation in; a pipeline folder out."""

import argparse

from .choices import DTYPES
from .termination import ends_cleanly


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "convert",
        help="turn an original checkpoint into a pipeline folder",
        description="Turn a checkpoint of the reference implementation (NVlabs/LongLive) into a folder that "
        "DiffusionPipeline.from_pretrained opens.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="The transformer: a .pt, .pth or .safetensors file.")
    parser.add_argument(
        "--base",
        required=True,
        metavar="DIR_OR_REPO",
        help="A Wan or LongLive pipeline that gives tokenizer, text encoder and VAE; for the published 5B "
        "checkpoints, Wan-AI/Wan2.2-TI2V-5B-Diffusers.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="The folder to write; new or empty.")
    parser.add_argument("--lora", metavar="FILE_OR_REPO", help="A LoRA to add to the transformer for good.")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="The dtype of transformer and text encoder (default: %(default)s).",
    )
    parser.add_argument("--use-ema", action="store_true", help="Take the checkpoint's averaged weights.")


def run(args: argparse.Namespace) -> int:
    """Convert the checkpoint."""
    from .. import dtypes
    from ..conversion.convert import convert_checkpoint

    with ends_cleanly():
        convert_checkpoint(
            args.checkpoint,
            args.base,
            args.output,
            lora=args.lora,
            use_ema=args.use_ema,
            dtype=dtypes.DTYPES[args.dtype],
            report=print,
        )
    return 0
