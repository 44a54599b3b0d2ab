"""`longlive generate`: text, shots, an image or a video in; a video file out, written while it is made."""

import argparse
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from ..assets import toy_pipeline_path
from ..benchmark.measure import as_size, peak_memory, reset_peak_memory
from ..dtypes import DTYPES
from ..pipelines.pipeline_output import VideoChunk
from ..video.writer import VideoWriter
from .arguments import add_cache_options, add_device_option, count, non_negative, positive, seed
from .generation_request import DEFAULT_SECONDS, FPS, GenerationRequest, check_request
from .shots_file import FORMAT
from .typed_prompts import HELP, TypedPrompts, readable_descriptor


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
        "prompts", nargs="*", metavar="PROMPT", help="What the video shows; several prompts are one for each shot."
    )
    parser.add_argument("--shots-file", metavar="FILE", help="A file of shots in place of PROMPT; see below.")
    parser.add_argument("--image", metavar="FILE", help="An image that becomes the first frame.")
    parser.add_argument("--video", metavar="FILE", help="A video to continue; the result begins with it.")
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="What the video should not show; needs a guidance scale that is not 1.",
    )
    parser.add_argument(
        "--output",
        default="video.mp4",
        metavar="FILE",
        help="The file to write, a .mp4, .mov or .mkv (default: %(default)s).",
    )
    _add_size_options(parser)
    _add_sampling_options(parser)
    _add_model_options(parser)


def _add_size_options(parser: argparse.ArgumentParser) -> None:
    length = parser.add_argument_group("size and length").add_mutually_exclusive_group()
    length.add_argument(
        "--seconds",
        type=positive,
        help="The length of the video in seconds, rounded up to whole chunks (default: the durations of the shots "
        f"file, else {DEFAULT_SECONDS:g}; with --stream, endless).",
    )
    length.add_argument(
        "--num-frames", type=count, help="The length of the whole video in frames, in place of --seconds."
    )
    parser.add_argument("--height", type=count, help="The height of the video in pixels (default: the model's).")
    parser.add_argument("--width", type=count, help="The width of the video in pixels (default: the model's).")


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--steps", type=count, default=4, help="The number of solver steps of each chunk (default: %(default)s)."
    )
    sampling.add_argument(
        "--guidance-scale",
        type=non_negative,
        default=1.0,
        help="The scale of classifier-free guidance: 1 for distilled models (default), 3 for others.",
    )
    sampling.add_argument(
        "--seed", type=seed, help="The same seed gives the same video (default: one is drawn, and printed)."
    )
    add_cache_options(sampling)
    sampling.add_argument(
        "--relative-rope",
        action="store_true",
        help="Count time positions from the frames in the cache, as endless videos do.",
    )
    sampling.add_argument(
        "--stream",
        action="store_true",
        help="Decode while the next chunk is made, and print a line for each chunk; without a length, go on until "
        f"Ctrl-C, and read from a terminal or a pipe: {HELP}.",
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        default=str(toy_pipeline_path()),
        help="A pipeline: folder or Hub repository (default: the small one that comes with the package).",
    )
    models.add_argument("--lora", metavar="FILE", help="A LoRA to load: file, folder or Hub repository.")
    add_device_option(models)
    models.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="The dtype of the models; auto is bfloat16 on cuda, and on a CPU what is stored (but not float16).",
    )
    models.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="Keep on the GPU only the model, or the layer, that is at work (default: %(default)s).",
    )
    models.add_argument("--no-progress", action="store_true", help="Show no progress bars.")


@dataclass
class Progress:
    """What has been written so far, and when; times are in seconds since the beginning."""

    began: float = field(default_factory=time.perf_counter)
    chunks: int = 0
    frames: int = 0
    first_frame: float | None = None
    last_frame: float = 0.0

    def add(self, num_frames: int) -> None:
        """Count a chunk of frames."""
        self.last_frame = time.perf_counter() - self.began
        if self.first_frame is None:
            self.first_frame = self.last_frame
        self.chunks += 1
        self.frames += num_frames


def run(args: argparse.Namespace) -> int:
    """Make the video; return 130 if Ctrl-C ended it (the file is then valid, only shorter)."""
    request, folder = check_request(args)
    began = time.perf_counter()
    pipe = folder.load(
        device=request.device,
        dtype=args.dtype,
        offload=args.offload,
        lora=args.lora,
        show_progress=not args.no_progress,
    )
    if args.stream or args.no_progress:  # a status line says more, and bars would break it
        pipe.set_progress_bar_config(disable=True)
    loading = time.perf_counter() - began
    endless = request.num_frames is None
    descriptor = readable_descriptor(sys.stdin) if endless else None
    typed = None if descriptor is None else TypedPrompts(descriptor)
    if endless:
        print(f"Endless: Ctrl-C ends it{'' if typed is None else '; ' + HELP}.", flush=True)

    reset_peak_memory(request.device)
    progress, interrupted = Progress(), False
    with VideoWriter(args.output, FPS) as writer:
        try:
            with pipe.stream(**request.stream_arguments(args)) as session:
                for chunk in session:
                    frames = chunk.frames[0]
                    assert isinstance(frames, np.ndarray)  # the stream's output type is "np"
                    writer.write(frames)
                    progress.add(len(frames))
                    if args.stream:
                        print(status_line(chunk, progress), flush=True)
                    if typed is not None and not typed.apply_next(session, chunk):
                        break
        except KeyboardInterrupt:
            interrupted = True
    progress.frames = writer.frames_written  # the last chunk may have been interrupted while it was written
    print_summary(request, progress, loading, args.output)
    return 130 if interrupted else 0


def status_line(chunk: VideoChunk, progress: Progress) -> str:
    """Describe a chunk that has just been written."""
    speed = progress.frames / progress.last_frame
    return (
        f"chunk {chunk.index}, shot {chunk.shot_index}: {progress.frames / FPS:.1f} s of video after "
        f"{progress.last_frame:.1f} s ({speed:.1f} frames/s), {chunk.prompt!r}"
    )


def print_summary(request: GenerationRequest, progress: Progress, loading: float, output: str) -> None:
    """Print what was made, how fast, and what these numbers count."""
    if progress.first_frame is None:
        print("interrupted before the first chunk was written")
        return
    made = max(0, progress.frames - request.condition_frames)
    continued = f", {progress.frames - made} of them continued" if request.condition_frames else ""
    memory, what = peak_memory(request.device)
    print(f"frames:              {progress.frames}{continued} ({progress.chunks} chunks)")
    print(f"duration:            {progress.frames / FPS:.2f} s at {FPS} frames per second, seed {request.seed}")
    print(
        f"time to first frame: {progress.first_frame:.2f} s (to encode the inputs, denoise, decode and write the "
        f"first chunk; after {loading:.1f} s of loading)"
    )
    print(
        f"frames per second:   {made / progress.last_frame:.2f} (new frames; encoding, denoising, decoding and "
        f"writing in the timer, {progress.last_frame:.2f} s; loading not)"
    )
    print(f"peak memory:         {as_size(memory)} ({what})")
    print(f"output:              {output}")
