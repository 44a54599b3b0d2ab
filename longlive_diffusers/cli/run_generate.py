"""Make the video that `longlive generate` was asked for, and write it while it is made."""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from diffusers.utils import logging as diffusers_logging

from ..benchmark.measure import as_size, peak_memory, reset_peak_memory
from ..latency import Latency
from ..pipelines.pipeline_longlive import LongLivePipeline
from ..pipelines.pipeline_output import VideoChunk
from ..pipelines.session import StreamingSession
from ..signal_handling import handled
from ..video.writer import VideoWriter
from ..wording import counted
from .choices import FPS
from .decoders import place_decoder
from .devices import device_of, start_ranks
from .generation_request import GenerationRequest, check_request
from .launched import Rank, own_rank
from .model_request import ModelRequest, load_model
from .status_line import StatusLine
from .termination import ends_cleanly
from .typed_prompts import HELP, TypedPrompts, readable_descriptor


SHOWN_PROMPT = 100  # characters; prompts have up to thousands


@dataclass
class Progress:
    """
    What has been written so far, and when; times are in seconds since the beginning.

    Args:
        continued: How many frames come first that are not made: those of a video that is continued. They are no part
            of `latency`.
    """

    continued: int = 0
    began: float = field(default_factory=time.perf_counter)
    chunks: int = 0
    frames: int = 0
    last_frame: float = 0.0
    latency: Latency = field(default_factory=lambda: Latency(FPS))

    def add(self, num_frames: int) -> None:
        """Count frames: those of a chunk, or of a part of one."""
        made_before = self.made
        self.last_frame = time.perf_counter() - self.began
        self.frames += num_frames
        if self.made > made_before:
            self.latency.add(self.last_frame, self.made - made_before)

    @property
    def made(self) -> int:
        """How many frames are new."""
        return max(0, self.frames - self.continued)


def generate(args: argparse.Namespace) -> int:
    """Make the video; return 130 if Ctrl-C ended it (the file is then valid, only shorter)."""
    request, models = check_request(args)
    rank = own_rank()
    if rank.count < args.devices:
        command, *options = args.argv
        return start_ranks([command, "--seed", str(request.seed), *options], args.devices)
    if not rank.leads:
        return follow(request, models, args, rank)
    for note in request.notes:
        print(f"longlive: {note}", file=sys.stderr)
    shows_bars = not args.no_progress and sys.stderr is not None and sys.stderr.isatty()
    began = time.perf_counter()
    pipe = load(request, models, args, rank, show_progress=shows_bars)
    if args.stream:  # the status line says more, and bars would break it
        pipe.set_progress_bar_config(disable=True)
    loading = time.perf_counter() - began

    reset_peak_memory(request.device)
    writer, progress, interrupted = VideoWriter(args.output, FPS), Progress(request.condition_frames), False
    replaces = writer.path.is_file()
    try:
        # The launcher ends this process when another one has failed, and says so.
        with ends_cleanly(None) if rank.count > 1 else nullcontext(), writer:
            try:
                if write_video(pipe, request, args, writer, progress):
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                interrupted = True
                if request.num_frames is not None:  # the video is unfinished: it does not replace another
                    raise
    except KeyboardInterrupt:
        interrupted = True
    finally:  # after an error, too, what was made is there
        progress.frames = writer.frames_written  # the last chunk may have been interrupted while it was written
        if interrupted:
            print_interruption(request, progress)
        if progress.frames:
            print_summary(request, progress, loading, split=args.split_first_chunk)
            print(f"output:              {writer.written_to}{fate_of_the_old(writer, replaces)}")
    return 130 if interrupted else 0


def load(
    request: GenerationRequest, models: ModelRequest, args: argparse.Namespace, rank: Rank, *, show_progress: bool
) -> LongLivePipeline:
    """Load the models that were asked for."""
    fused_lora, offload = request.embedded_lora, args.offload
    pipe = load_model(
        models, args, rank, fused_lora=fused_lora, offload=offload, show_progress=show_progress, announces=rank.leads
    )
    if request.decoder is not None:
        place_decoder(request.decoder, device_of(rank, models.device))
    return pipe


def follow(request: GenerationRequest, models: ModelRequest, args: argparse.Namespace, rank: Rank) -> int:
    """Make the video together with the process that writes it, for as long as that one goes on."""
    pipe = load(request, models, args, rank, show_progress=False)
    diffusers_logging.set_verbosity_error()  # the first process warns
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # from now on, Ctrl-C is the first process's to act on
    with pipe.stream(**request.stream_arguments(args)) as session:
        for _ in session:
            pass
    return 0


def write_video(
    pipe: LongLivePipeline,
    request: GenerationRequest,
    args: argparse.Namespace,
    writer: VideoWriter,
    progress: Progress,
) -> bool:
    """Write chunk by chunk, until the video is complete or its user ends it; return whether Ctrl-C ended it, which is
    how an endless one ends. With one device, it may also raise KeyboardInterrupt."""
    endless = request.num_frames is None
    descriptor = readable_descriptor(sys.stdin) if endless else None
    typed = None if descriptor is None else TypedPrompts(descriptor)
    if endless:
        print(f"Endless: Ctrl-C ends it{'' if typed is None else '; ' + HELP}.", flush=True)
    with (
        pipe.stream(**request.stream_arguments(args)) as session,
        interrupts(session, is_shared=pipe.stream_ranks is not None) as interrupted,
        StatusLine() as status,
    ):
        for chunk in session:
            frames = chunk.frames[0]
            assert isinstance(frames, np.ndarray) and isinstance(chunk.prompt, str)  # as a single video in NumPy has
            writer.write(frames)
            progress.chunks += chunk.is_complete
            progress.add(len(frames))
            if args.stream:
                status.show(describe_chunk(chunk, progress), repr(shortened(chunk.prompt)))
            if typed is not None and chunk.is_complete and not typed.apply_next(session, chunk):
                break
    return bool(interrupted)


@contextmanager
def interrupts(session: StreamingSession, *, is_shared: bool) -> Iterator[list[int]]:
    """Where other processes share the session, let Ctrl-C end it with the chunk in progress, which all make together,
    and not at any time. What is yielded is empty until then."""
    received: list[int] = []
    if not is_shared:
        yield received
        return

    def end(number: int, frame: object) -> None:
        received.append(number)
        session.interrupt()

    with handled([signal.SIGINT], end):
        yield received


def describe_chunk(chunk: VideoChunk, progress: Progress) -> str:
    """Describe a chunk that has just been written."""
    speed = f"{progress.made / progress.last_frame:.1f} {'new ' if progress.continued else ''}frames/s"
    return (
        f"chunk {chunk.index}, shot {chunk.shot_index}: {progress.frames / FPS:.1f} s of video after "
        f"{progress.last_frame:.1f} s ({speed if progress.made else 'continued'})"
    )


def shortened(prompt: str) -> str:
    """Return the beginning of a long prompt."""
    return prompt if len(prompt) <= SHOWN_PROMPT else f"{prompt[: SHOWN_PROMPT - 3]}..."


def fate_of_the_old(writer: VideoWriter, replaces: bool) -> str:
    """Say what became of a file that had the video's name, or has it now."""
    if writer.was_moved:
        return " (moved away from there by another program)"
    if writer.written_to == writer.path:
        return " (in place of the file that was there)" if replaces else ""
    if writer.path_is_taken:
        return f" ('{writer.path}' was written by another program meanwhile)"
    return f" (unfinished; '{writer.path}' is what it was)" if replaces else " (unfinished)"


def print_interruption(request: GenerationRequest, progress: Progress) -> None:
    """Print how much there is of what was asked for."""
    if sys.stdout is not None and sys.stdout.isatty():
        print()  # after the "^C" that terminals show
    asked = "" if request.num_frames is None else f" of the {request.num_frames} that were asked for"
    print(f"interrupted:         after {counted(progress.frames, 'frame')}{asked}")


def print_summary(request: GenerationRequest, progress: Progress, loading: float, *, split: bool) -> None:
    """Print what was made, how fast, and what these numbers count."""
    continued = f", {progress.frames - progress.made} of them continued" if progress.continued else ""
    memory, what = peak_memory(request.device)
    print(f"frames:              {progress.frames}{continued} ({counted(progress.chunks, 'chunk')})")
    print(f"duration:            {progress.frames / FPS:.2f} s at {FPS} frames per second, seed {request.seed}")
    if progress.latency.first_frame is not None:
        print_speed(progress, progress.latency.first_frame, loading, split=split)
    print(f"peak memory:         {as_size(memory)} ({what})")


def print_speed(progress: Progress, first_frame: float, loading: float, *, split: bool) -> None:
    """Print how fast the new frames were made."""
    new = "new " if progress.continued else ""
    before = "of the new ones: to encode the inputs, write what is continued," if new else "to encode the inputs,"
    print(
        f"time to first frame: {first_frame:.2f} s ({before} denoise the first {new}chunk, decode and write "
        f"{'its first frame' if split and not new else 'it'}; after {loading:.1f} s of loading)"
    )
    print(
        f"frames per second:   {progress.made / progress.last_frame:.2f} (new frames; encoding, denoising, decoding "
        f"and writing in the timer, {progress.last_frame:.2f} s; loading not)"
    )
    latency = progress.latency
    if latency.real_time_factor is not None:
        stalls = f"{counted(latency.stalls, 'stall')}, {latency.stalled_seconds:.2f} s in all"
        print(
            f"watched meanwhile:   {stalls if latency.stalls else 'no stall'} ({latency.real_time_factor:.2f} s of "
            f"video were made in a second, after the first {new}chunk)"
        )
