"""`longlive generate`: text, shots, an image or a video in; a video file out, written while it is made."""

import argparse

from ..limits import MAX_SIDE
from .arguments import (
    add_cache_options,
    add_decoder_option,
    add_model_options,
    add_shortcut_options,
    add_solver_options,
    add_split_option,
    integer,
    number,
    text,
)
from .choices import (
    DEFAULT_SECONDS,
    MAX_FRAMES,
    MAX_SECONDS,
    MAX_SEED,
)
from .shots_file import FORMAT
from .typed_prompts import HELP


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command to `longlive`."""
    parser = commands.add_parser(
        "generate",
        help="make a video",
        description="Make a video. Several prompts are the shots of one video.",
        epilog=FORMAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "prompts",
        nargs="*",
        type=text,
        metavar="PROMPT",
        help="What the video shows; several prompts are one for each shot.",
    )
    parser.add_argument("--shots-file", metavar="FILE", help="A file of shots in place of PROMPT; see below.")
    parser.add_argument(
        "--image", metavar="FILE", help="An image that becomes the first frame; its shape decides the default size."
    )
    parser.add_argument(
        "--video", metavar="FILE", help="A video to continue; the result begins with it, and takes its shape."
    )
    parser.add_argument(
        "--negative-prompt",
        type=text,
        metavar="TEXT",
        help="What the video should not show; needs a guidance scale that is not 1.",
    )
    parser.add_argument(
        "--output",
        default="video.mp4",
        metavar="FILE",
        help="The file to write, a .mp4, .mov or .mkv (default: %(default)s). A file that is there is replaced when "
        "the new one is finished, unless another program has written it meanwhile: then both are kept.",
    )
    _add_size_options(parser)
    _add_sampling_options(parser)
    _add_model_options(parser)


def _add_size_options(parser: argparse.ArgumentParser) -> None:
    length = parser.add_argument_group("size and length").add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=number(0, MAX_SECONDS, above=True),
        help="The length of the video in seconds, rounded up to whole chunks (default: the durations of the shots "
        f"file, else {DEFAULT_SECONDS:g}; with --stream, endless).",
    )
    length.add_argument(
        "--num-frames",
        type=integer(1, MAX_FRAMES),
        help="The length of the whole video in frames, in place of --seconds.",
    )
    shape = "(default: the model's; with --image or --video, of about as many pixels in their shape)"
    parser.add_argument("--height", type=integer(1, MAX_SIDE), help=f"The height of the video in pixels {shape}.")
    parser.add_argument(
        "--width", type=integer(1, MAX_SIDE), help="The width of the video in pixels (default: as for --height)."
    )


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    add_solver_options(sampling)
    sampling.add_argument(
        "--seed",
        type=integer(0, MAX_SEED),
        help="The same seed gives the same video (default: one is drawn, and printed).",
    )
    add_cache_options(sampling)
    add_shortcut_options(sampling)
    add_split_option(sampling)
    sampling.add_argument(
        "--relative-rope",
        action="store_true",
        help="Count time positions from the frames in the cache, as endless videos do.",
    )
    sampling.add_argument(
        "--stream",
        action="store_true",
        help="Decode while the next chunk is made, and say how far it is; without a length, go on until "
        f"Ctrl-C, and read from a terminal or a pipe: {HELP}.",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    add_model_options(models)
    add_decoder_option(models)
    models.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="Keep on the GPU only the model, or the layer, that is at work (default: %(default)s).",
    )
    models.add_argument("--no-progress", action="store_true", help="Show no progress bars.")


def run(args: argparse.Namespace) -> int:
    """Make the video."""
    from .run_generate import generate

    return generate(args)
