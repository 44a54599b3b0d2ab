"""Videos to look at: a strip of frames for the README, and the same videos as mp4 files."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from evaluation.plots import draw_strip
from evaluation.scenarios import Story, multi_shots, single_shots, switches
from evaluation.sections import Evaluation
from evaluation.store import digest_of
from evaluation.tables import Table
from evaluation.videos import make_videos
from longlive_diffusers.video.writer import VideoWriter
from world import FPS


COLUMNS = 8  # frames of each row


def strip(evaluation: Evaluation) -> list[Table]:
    """Draw rows of frames: single prompts, seen and held out; a video of several shots; a prompt switch."""
    settings = evaluation.settings
    seed, length = f"strip {settings.seed}", settings.num_chunks
    groups = {
        "seen": single_shots(f"{seed} seen", 2, length, num_things=1, held_out=False),
        "seen, two things": single_shots(f"{seed} pair", 1, length, num_things=2, held_out=False),
        "held out": single_shots(f"{seed} held out", 2, length, num_things=1, held_out=True),
        "held out, two things": single_shots(f"{seed} held-out pair", 1, length, num_things=2, held_out=True),
        "three shots": multi_shots(f"{seed} shots", 1, max(2, round(length / 3))),
        "prompt switch": switches(f"{seed} switch", 1, length, evaluation.chunk_size),
    }
    sampling = settings.sampling()
    keyed = {"steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale, "seed": settings.seed}
    keyed |= {"kv_cache_dtype": sampling.kv_cache_dtype}
    keyed |= {"max_sequence_length": sampling.max_sequence_length, "stories": digest_of(groups)}
    captions = evaluation.store.get("strip/strip", keyed, lambda: _make(evaluation, groups))
    return [
        Table("Videos of the strip", ("kind", "caption"), captions, note="Frames in strip.png, videos in videos/.")
    ]


def _make(evaluation: Evaluation, groups: dict[str, Sequence[Story]]) -> list[list[str]]:
    folder = evaluation.store.folder
    (folder / "videos").mkdir(exist_ok=True)
    rows, described = [], []
    with tqdm(total=sum(len(stories) for stories in groups.values()), desc="strip", unit="video") as bar:
        for kind, stories in groups.items():
            # Each row has noise of its own, so that not all of them begin at the same place.
            videos = make_videos(
                evaluation.pipe,
                stories,
                evaluation.settings.sampling(),
                first_index=len(rows),
                decoder=evaluation.decoder,
            )
            chunks = list(videos)
            for index, frames in enumerate(np.concatenate(chunks, axis=1)):
                arrow = " \N{RIGHTWARDS ARROW} "
                caption = arrow.join(segment.caption for segment in stories[index].segments)
                rows.append((f"{kind}: {caption}", frames))
                described.append([kind, caption])
                with VideoWriter(folder / "videos" / f"{len(rows):02d}.mp4", fps=FPS, crf=8) as writer:
                    writer.write(frames)
                bar.update()
    draw_strip(folder / "strip.png", rows, COLUMNS)
    return described
