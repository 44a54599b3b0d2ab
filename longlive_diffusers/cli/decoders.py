"""What makes the frames for `longlive generate` and `longlive serve`: the VAE, or a tiny decoder in its place."""

import argparse

import torch
from torch import nn

from ..assets import toy_decoder_path
from ..conversion.tiny_decoder import load_tiny_decoder
from ..models.tiny_decoder import TinyVideoDecoder
from ..pipelines.inputs import ModelSizes, check_decoder


def choose_decoder(args: argparse.Namespace, sizes: ModelSizes) -> TinyVideoDecoder | None:
    """
    Load the decoder that `--decoder` names, on the CPU; None for the VAE.

    Args:
        args: The arguments of the command, `decoder` and `model` among them.
        sizes: The sizes of the model whose latents it is to decode.

    Raises:
        ValueError: If there is no such decoder, or it is for other latents.
    """
    if args.decoder == "vae":
        return None
    if args.decoder == "tiny" and args.model is not None:
        raise ValueError(
            "--decoder tiny is that of the embedded model; for another --model, give a file (taew2_2.pth, for the 5B "
            "model), a folder or a Hub repository"
        )
    decoder = load_tiny_decoder(toy_decoder_path() if args.decoder == "tiny" else args.decoder)
    check_decoder(decoder, sizes)
    return decoder


def place_decoder(decoder: TinyVideoDecoder, device: torch.device) -> None:
    """Bring a decoder to the device that it is to run on, in the dtype that suits it there: in bfloat16, a step of its
    output, which is in [0, 1], would be a whole level of 8 bits."""
    nn.Module.to(decoder, device, torch.float16 if device.type == "cuda" else torch.float32)
