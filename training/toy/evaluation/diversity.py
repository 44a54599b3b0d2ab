"""How much videos of one prompt differ from seed to seed: a distilled model that makes the same video every time would
still be right in every chunk.
"""

import numpy as np
import torch

from evaluation.scenarios import single_shots
from evaluation.sections import Evaluation
from evaluation.tables import Table
from judge import read_chunk
from longlive_diffusers import pixel_frames


NUM_PROMPTS, NUM_SEEDS = 8, 12


def diversity(evaluation: Evaluation) -> list[Table]:
    """
    Make the first chunk of a few prompts with several seeds each.

    Pixels: the standard deviation of a pixel over the seeds, mean over pixels and prompts, in percent of the range.
    Position: the standard deviation of where the thing begins, over the seeds, in pixels.
    """
    settings = evaluation.settings
    stories = single_shots(f"diversity {settings.seed}", NUM_PROMPTS, 1, num_things=1, held_out=False)
    captions = [story.segments[0].caption for story in stories]
    asked = {"captions": captions, "seeds": NUM_SEEDS, "steps": settings.num_inference_steps}
    asked |= {"guidance": settings.guidance_scale, "kv_cache_dtype": settings.kv_cache_dtype, "seed": settings.seed}
    asked |= {"max_sequence_length": settings.max_sequence_length}
    found = evaluation.store.get(
        "diversity/first chunks", asked, lambda: [_spread(evaluation, caption) for caption in captions]
    )
    pixels, positions = (np.mean([spread[index] for spread in found]) for index in (0, 1))
    return [
        Table(
            "Diversity over seeds",
            ("", "pixels, %", "position, pixels"),
            [[f"{NUM_PROMPTS} prompts of {NUM_SEEDS} seeds", float(pixels), float(positions)]],
            "Standard deviations over the seeds of one prompt, of the first chunk.",
        )
    ]


def _spread(evaluation: Evaluation, caption: str) -> tuple[float, float]:
    """Return the spread of pixels, in percent, and of positions, in pixels, for one prompt."""
    settings, chunk_size = evaluation.settings, evaluation.pipe.transformer.config.chunk_size
    with evaluation.pipe.stream(
        prompt=[caption] * NUM_SEEDS,
        num_frames=pixel_frames(chunk_size),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        kv_cache_dtype=settings.kv_cache_dtype,
        max_sequence_length=settings.max_sequence_length,
        generator=[torch.Generator().manual_seed(settings.seed + seed) for seed in range(NUM_SEEDS)],
        output_type="np",
        **({} if evaluation.decoder is None else {"decoder": evaluation.decoder}),
    ) as session:
        frames = np.stack(list(next(session).frames))
    things = [read_chunk(video).things for video in frames]
    places = np.array([(found[0].x, found[0].y) for found in things if found])
    position = float(places.std(axis=0).mean()) if len(places) > 1 else 0.0
    return float(frames.std(axis=0).mean()) * 100, position
