"""The types of command-line arguments, and the options that several commands share.

Nothing here imports torch: arguments are parsed before anything heavy is imported, so that help and errors come at
once.
"""

import argparse
import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn

from ..limits import MAX_GUIDANCE_SCALE
from .choices import (
    CLEAN_PASSES,
    DTYPES,
    KV_CACHE_DTYPES,
    MAX_CACHED_FRAMES,
    MAX_DEVICES,
    MAX_LORA_SCALE,
    MAX_STEPS,
    NVFP4_BACKENDS,
    SPEEDS,
)


def integer(least: int, most: int) -> Callable[[str], int]:
    """Return the type of an integer from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # also for thousands of digits
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, not {_quoted(text)}")
        return value

    return parse


def number(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """Return the type of a number from `least` to `most`, or `above` the former."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most:
            limits = f"above {least} and at most {most}" if above else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a number {limits}, not {_quoted(text)}")
        return value

    return parse


def text(argument: str) -> str:
    """Read an argument as UTF-8, whatever the locale: bytes that this does not know, in the locale C all but ASCII,
    arrive as lone surrogates (PEP 383), which no tokenizer takes."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError as error:  # of a lone surrogate that stands for no byte, too
        raise argparse.ArgumentTypeError(f"is not UTF-8 text: {_quoted(argument)}") from error


def with_values_joined(words: Sequence[str], options: Collection[str]) -> list[str]:
    """Join some options and their values by "=", because argparse takes a value that begins with a dash for an
    option."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in options:
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined


def add_device_option(parser: argparse._ActionsContainer, what: str = "The device to run on") -> None:
    """Add `--device`, whose value `device.choose_device` resolves."""
    parser.add_argument("--device", help=f"{what}: cuda, cuda:1, cpu (default: cuda if there is one).")


def add_devices_option(parser: argparse._ActionsContainer) -> None:
    """Add `--devices`, whose value `devices.check_devices` checks."""
    parser.add_argument(
        "--devices",
        type=integer(1, MAX_DEVICES),
        default=1,
        metavar="N",
        help="The number of devices that make the video together, with a process for each: it divides the number of "
        "attention heads (default: %(default)s).",
    )


def add_decoder_option(parser: argparse._ActionsContainer) -> None:
    """Add `--decoder`, whose value `decoders.choose_decoder` loads."""
    parser.add_argument(
        "--decoder",
        default="vae",
        metavar="DECODER",
        help="What makes the frames: vae; tiny, the small decoder of the default model, which is faster and less "
        "exact; or, for another model, such a decoder: file (taew2_2.pth), folder or Hub repository (default: "
        "%(default)s).",
    )


def add_attention_backend_option(parser: argparse._ActionsContainer) -> None:
    """Add `--attention-backend`, whose value `backends.check_attention_backend` checks."""
    parser.add_argument(
        "--attention-backend", metavar="NAME", help="One of diffusers' attention backends, such as flash or sage."
    )


def add_nvfp4_option(parser: argparse._ActionsContainer) -> None:
    """Add `--nvfp4`, whose value `backends.check_nvfp4_backend` checks; without a value, it is "auto"."""
    parser.add_argument(
        "--nvfp4",
        choices=("auto", *NVFP4_BACKENDS),
        nargs="?",
        const="auto",
        metavar="BACKEND",
        help="Store the blocks' weights in 4 bits, and multiply by this backend: auto, "
        f"{', '.join(NVFP4_BACKENDS)} (default: weights stay as they are).",
    )


def add_compile_option(parser: argparse._ActionsContainer) -> None:
    """Add `--compile`."""
    parser.add_argument("--compile", action="store_true", help="Compile the transformer's blocks.")


def add_speed_option(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Add `--speed`, which every command calls alike."""
    parser.add_argument(
        "--speed",
        choices=SPEEDS,
        default=default,
        help="Change the models to what is fastest here. exact: the same video, to within rounding. fast: fewer bits, "
        "where the device is faster in them. fastest: also less work, which can be seen (default: "
        f"{default or 'the models stay as they are, and videos the same to the bit'}).",
    )


def add_cache_options(parser: argparse._ActionsContainer) -> None:
    """Add `--window-size`, `--sink-size` and `--kv-cache-dtype`, which every command calls alike."""
    parser.add_argument(
        "--window-size",
        type=integer(1, MAX_CACHED_FRAMES),
        help="The number of latent frames that the KV cache holds (default: the model's).",
    )
    parser.add_argument(
        "--sink-size",
        type=integer(0, MAX_CACHED_FRAMES),
        help="How many of the video's first latent frames are never forgotten (default: the model's).",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("auto", *KV_CACHE_DTYPES),
        default="auto",
        help="What keys and values are stored as: nvfp4 takes 4 bits, fp8 takes 8, and so does fp8_attention, from "
        "which attention is computed in FP8 (default: the network's dtype, or what --speed chooses).",
    )


def add_shortcut_options(parser: argparse._ActionsContainer) -> None:
    """Add `--clean-pass` and `--attention-density`: what is faster and not exact, and called alike everywhere."""
    parser.add_argument(
        "--clean-pass",
        choices=CLEAN_PASSES,
        help="What the history remembers a chunk by: full, a forward on its clean latents; text_free, one without the "
        "prompt, so that a new prompt leaves no history to be rewritten; last, the last solver step (default: full).",
    )
    parser.add_argument(
        "--attention-density",
        type=number(0, 1, above=True),
        metavar="PART",
        help="The part of the history, besides sinks and the beginning of the shot, that is attended to: what matters "
        "most to each head (default: 1, everything, or on a CPU what --speed fastest chooses).",
    )


def add_split_option(parser: argparse._ActionsContainer) -> None:
    """Add `--split-first-chunk`."""
    parser.add_argument(
        "--split-first-chunk",
        action="store_true",
        help="Hand over the first chunk's frames while they are decoded, not all at once: the first comes sooner.",
    )


def add_solver_options(parser: argparse._ActionsContainer) -> None:
    """Add `--steps` and `--guidance-scale`."""
    parser.add_argument(
        "--steps",
        type=integer(1, MAX_STEPS),
        default=4,
        help="The number of solver steps of each chunk (default: %(default)s).",
    )
    parser.add_argument(
        "--guidance-scale",
        type=number(0, MAX_GUIDANCE_SCALE),
        default=1.0,
        help="The scale of classifier-free guidance: 1 for distilled models (default), 3 for others.",
    )


def add_model_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of which models are used, and how they run."""
    parser.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="A pipeline: folder or Hub repository (default: the small one that comes with the package, with the LoRA "
        "that is made for 4 or for 2 --steps without guidance, where these are asked for).",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE",
        help="A LoRA to load: file, folder or Hub repository. Several --lora are added up.",
    )
    parser.add_argument("--no-lora", action="store_true", help="Use the default model without a LoRA of its own.")
    parser.add_argument(
        "--lora-scale",
        action="append",
        type=number(-MAX_LORA_SCALE, MAX_LORA_SCALE),
        metavar="SCALE",
        help="How much of the LoRA is added; for several, one for all or one for each, in order (default: 1).",
    )
    add_device_option(parser)
    add_devices_option(parser)
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="The dtype of the models; auto is bfloat16 on cuda, and on a CPU what is stored (but not float16).",
    )
    add_attention_backend_option(parser)
    add_nvfp4_option(parser)
    add_compile_option(parser)
    add_speed_option(parser)


def add_renamed(parser: argparse._ActionsContainer, old: str, new: str) -> None:
    """Accept an option's former name only to say what it is called now."""
    parser.add_argument(
        old, nargs="*", action=_Renamed, new_name=new, help=argparse.SUPPRESS, default=argparse.SUPPRESS
    )


class _Renamed(argparse.Action):
    def __init__(self, *args, new_name: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.new_name = new_name

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"{option_string} is now called {self.new_name}")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
