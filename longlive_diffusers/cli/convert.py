"""`longlive convert`: a checkpoint of the reference implementation in; a pipeline folder out."""

import argparse

from ..loaders.convert import DTYPES, convert_checkpoint


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "convert",
        help="turn an original checkpoint into a pipeline folder",
        description="Turn a checkpoint of the reference implementation (NVlabs/LongLive) into a folder that "
        "DiffusionPipeline.from_pretrained opens.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the transformer: .pt, .pth or .safetensors")
    parser.add_argument(
        "--base",
        required=True,
        metavar="DIR_OR_REPO",
        help="a Wan or LongLive pipeline, for tokenizer, text encoder and VAE: Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; new or empty")
    parser.add_argument("--lora", metavar="FILE", help="a LoRA to add to the transformer for good")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of transformer and text encoder (default: %(default)s)"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the checkpoint's averaged weights")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    convert_checkpoint(
        args.checkpoint,
        args.base,
        args.output,
        lora=args.lora,
        use_ema=args.use_ema,
        dtype=DTYPES[args.dtype],
        report=print,
    )
    return 0
