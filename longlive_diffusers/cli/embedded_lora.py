"""Which LoRA of the embedded model `longlive generate` uses: the one that is distilled to the requested steps."""

import argparse
from pathlib import Path

from ..assets import TOY_LORA_STEPS, toy_lora_path
from ..pipelines.chunk_step import is_guided


def uses_embedded_lora(args: argparse.Namespace) -> bool:
    """Whether the user has left it to the command which LoRA of the embedded model is used."""
    return args.model is None and not args.lora and not args.no_lora


def choose_embedded_lora(args: argparse.Namespace) -> tuple[Path | None, str | None]:
    """
    Choose the LoRA that is used although nobody named it.

    Args:
        args: The arguments of `longlive generate`.

    Returns:
        Its file, or None for none; and a line that says which one is used, or why none is. Nothing is to be said where
        the user chose: another model, a LoRA, or no LoRA.
    """
    if not uses_embedded_lora(args):
        return None, None
    there_are = " and ".join(map(str, TOY_LORA_STEPS))
    if is_guided(args.guidance_scale):
        reason = f"the embedded model's are for no guidance (--guidance-scale 1), not for {args.guidance_scale:g}"
    elif args.steps not in TOY_LORA_STEPS:
        reason = f"the embedded model's are for {there_are} steps, not for {args.steps}"
    else:
        path = toy_lora_path(args.steps)
        if path.is_file():
            return path, f"using the LoRA for {args.steps} steps of the embedded model"
        reason = f"the embedded model's for {args.steps} steps is missing: there is no file '{path}'"
    return None, f"no LoRA is used: {reason}"
