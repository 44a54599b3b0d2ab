"""The sections of the evaluation that are about prompts: each makes videos, has them judged, and returns tables."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from evaluation import plots as evaluate_plots
from evaluation.scenarios import Story, cuts, image_starts, multi_shots, single_shots, switches
from evaluation.store import Store, digest_of
from evaluation.tables import COLUMNS, Cell, Table, Videos, chunk_shares, is_right, percent, shot_shares
from evaluation.videos import JudgedChunk, Sampling, judge_stories
from longlive_diffusers import LongLivePipeline, TinyVideoDecoder


@dataclass(frozen=True)
class Settings:
    """
    Args:
        num_prompts: The number of prompts of each kind; half as many for the long videos.
        num_inference_steps: The number of solver steps, except in sections that vary it.
        step_counts: The numbers of solver steps that the section `steps` compares.
        long_steps: The number of solver steps of the long videos, which have many chunks.
        num_chunks: The number of chunks of the videos, as in the training videos.
        long_factor: How many times as long the long videos are.
        guidance_scale: The scale of classifier-free guidance; 1 is none.
        dtype: The name of the dtype that the model is loaded in.
        kv_cache_dtype: How keys and values are stored, "nvfp4" or "fp8"; None for the dtype of the network.
        max_sequence_length: The number of tokens that prompts are padded to; must be as in training.
        batch_size: The number of videos that are made at a time.
        seed: The seed of prompts and noise.
    """

    num_prompts: int = 24
    num_inference_steps: int = 30
    step_counts: tuple[int, ...] = (4, 8, 16, 30, 50)
    long_steps: int = 8
    num_chunks: int = 8
    long_factor: int = 8
    guidance_scale: float = 1.0
    dtype: str = "float32"
    kv_cache_dtype: str | None = None
    max_sequence_length: int = 512
    batch_size: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise a ValueError for anything that cannot be evaluated."""
        counts = asdict(self)
        guidance, steps = counts.pop("guidance_scale"), counts.pop("step_counts")
        for named_elsewhere in ("seed", "dtype", "kv_cache_dtype"):
            del counts[named_elsewhere]
        low = [f"{name} {value}" for name, value in counts.items() if value < 1]
        if low or guidance < 0 or not steps or min(steps) < 1:
            raise ValueError(
                f"All counts are at least 1 and guidance at least 0, got {', '.join(low) or 'no other'}, steps "
                f"{list(steps)}, guidance {guidance}."
            )
        if self.num_chunks < 4:
            raise ValueError(f"num_chunks must be at least 4, for a prompt switch on the way, got {self.num_chunks}.")

    @property
    def num_long_prompts(self) -> int:
        return (self.num_prompts + 1) // 2

    def sampling(self, num_inference_steps: int | None = None, **overrides) -> Sampling:
        return Sampling(
            num_inference_steps or self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            kv_cache_dtype=self.kv_cache_dtype,
            max_sequence_length=self.max_sequence_length,
            batch_size=self.batch_size,
            seed=self.seed,
            **overrides,
        )


@dataclass(frozen=True)
class Evaluation:
    pipe: LongLivePipeline
    settings: Settings
    store: Store
    decoder: TinyVideoDecoder | None = None  # what makes the frames, if it is not the pipeline's VAE

    def judge(self, name: str, stories: Sequence[Story], sampling: Sampling) -> Videos:
        """Return the judged chunks of these stories, made now or read from the folder."""
        settings = asdict(sampling) | {"stories": digest_of(stories)}
        settings.pop("batch_size")  # it only changes the speed
        kept = self.store.get(
            name,
            settings,
            lambda: [
                [asdict(chunk) for chunk in video]
                for video in judge_stories(self.pipe, stories, sampling, description=name, decoder=self.decoder)
            ],
        )
        return [[JudgedChunk(**chunk) for chunk in video] for video in kept]

    @property
    def chunk_size(self) -> int:
        return self.pipe.transformer.config.chunk_size


def accuracy(evaluation: Evaluation) -> list[Table]:
    """Evaluate seen and held-out combinations of one thing and of two."""
    settings = evaluation.settings
    per_chunk = _table("Accuracy, chunk by chunk", f"Percent of chunks, {settings.num_inference_steps} steps.")
    per_shot = _table("Accuracy, whole shots", "Percent of videos that are right in every chunk.")
    for group, held_out in (("seen", False), ("held out", True)):
        for things, num_things in (("one thing", 1), ("two things", 2)):
            name = f"{group}, {things}"
            seed = f"accuracy {settings.seed} {name}"
            stories = single_shots(
                seed, settings.num_prompts, settings.num_chunks, num_things=num_things, held_out=held_out
            )
            videos = evaluation.judge(f"accuracy/{name}", stories, settings.sampling())
            per_chunk.rows.append([name, len(videos), *chunk_shares(videos)])
            per_shot.rows.append([name, len(videos), *shot_shares(videos)])
    return [per_chunk, per_shot]


def steps(evaluation: Evaluation) -> list[Table]:
    """Evaluate the same prompts with more and more solver steps."""
    settings = evaluation.settings
    stories = single_shots(
        f"steps {settings.seed}", settings.num_prompts, settings.num_chunks, num_things=None, held_out=False
    )
    table = _table("Accuracy by number of steps", "Percent of chunks; `whole shot`: of videos right throughout.")
    table = Table(table.title, ("steps", *table.columns[1:], "whole shot"), [], table.note)
    for count in settings.step_counts:
        videos = evaluation.judge(f"steps/{count}", stories, settings.sampling(count))
        table.rows.append([str(count), len(videos), *chunk_shares(videos), shot_shares(videos)[0]])
    evaluate_plots.plot_curves(
        evaluation.store.folder / "steps.png",
        {"all attributes": (list(settings.step_counts), [row[2] for row in table.rows])},
        x_label="solver steps",
        y_label="chunks right, %",
    )
    return [table]


def time(evaluation: Evaluation) -> list[Table]:
    """Evaluate up to several times the training length, with and without sinks, with absolute and relative RoPE."""
    settings = evaluation.settings
    length, total = settings.num_chunks, settings.num_chunks * settings.long_factor
    stories = single_shots(f"time {settings.seed}", settings.num_long_prompts, total, num_things=None, held_out=False)
    last = max(length // 2, 1)
    stretches = {"first chunk": range(1), "training length": range(length - last, length)}
    stretches[f"{settings.long_factor}x"] = range(total - last, total)
    table = _table(
        "Accuracy over time",
        f"Percent of chunks, {settings.long_steps} steps: the first one, the last {last} of the training length "
        f"({length} chunks), and the last {last} of {total} chunks.",
    )
    curves = {}
    for sinks in (True, False):
        for relative in (False, True):
            name = f"{'sinks' if sinks else 'no sinks'}, {'relative' if relative else 'absolute'} RoPE"
            sampling = settings.sampling(settings.long_steps, sinks=sinks, relative_rope=relative)
            videos = evaluation.judge(f"time/{name}", stories, sampling)
            for label, stretch in stretches.items():
                shares = chunk_shares(videos, lambda index, stretch=stretch: index in stretch)
                table.rows.append([f"{name}: {label}", len(videos), *shares])
            right = [percent([is_right(video[index].marks) for video in videos]) for index in range(total)]
            curves[name] = (list(range(1, total + 1)), right)
    evaluate_plots.plot_curves(
        evaluation.store.folder / "time.png",
        curves,
        x_label="chunk",
        y_label="all attributes right, % of videos",
        marker=(length, "training length"),
    )
    return [table]


def events(evaluation: Evaluation) -> list[Table]:
    """Evaluate several shots, prompt switches, cuts, and videos that begin with an image."""
    settings = evaluation.settings
    count, length, half = settings.num_prompts, settings.num_chunks, settings.num_chunks // 2
    seed = f"events {settings.seed}"
    shot_length = max(2, round(length / 3))
    kinds = {
        "multi-shot": multi_shots(f"{seed} shots", count, shot_length),
        "prompt switch": switches(f"{seed} switch", count, length, evaluation.chunk_size),
        "cut": cuts(f"{seed} cut", count, half),
        "image to video": image_starts(f"{seed} image", count, length),
    }
    parts = {
        "multi-shot": ["shot 1", "shot 2", "shot 3"],
        "prompt switch": ["before", "after"],
        "cut": ["before", "after"],
        "image to video": ["whole video"],
    }
    per_chunk = _table("Shots, switches, cuts and images, chunk by chunk", "Percent of chunks.")
    per_shot = _table(
        "Shots, switches, cuts and images, whole segments",
        "Percent of segments that are right in every chunk. After a prompt switch, and of an image, what the prompt "
        "does not say has to stay as it was on the screen.",
    )
    for kind, stories in kinds.items():
        videos = evaluation.judge(f"events/{kind}", stories, settings.sampling())
        for segment, label in enumerate(parts[kind]):
            name = f"{kind}: {label}"
            chosen = [[chunk for chunk in video if chunk.segment == segment] for video in videos]
            if label == "after" or label == "shot 2":
                first: list[Cell] = chunk_shares(chosen, lambda index: index == 0)
                per_chunk.rows.append([f"{name}, first chunk", len(videos), *first])
            per_chunk.rows.append([name, len(videos), *chunk_shares(chosen)])
            per_shot.rows.append([name, len(videos), *shot_shares(videos, segment)])
    return [per_chunk, per_shot]


def _table(title: str, note: str) -> Table:
    return Table(title, ("", "videos", *COLUMNS), [], note)
