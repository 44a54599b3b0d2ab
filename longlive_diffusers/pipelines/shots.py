"""Shots: what the video shows, and for how long; turned into one prompt for every chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..number_checks import check_booleans, is_count
from ..wording import counted


@dataclass(frozen=True)
class Shot:
    """
    A stretch of video with one prompt.

    Args:
        prompt: What it shows.
        num_chunks: How long it lasts; None for as long as the video goes on.
        index: The index of the shot in the video, from 0.
        opens: Whether it begins with a cut; False for a new prompt in the middle of a shot.
    """

    prompt: str
    num_chunks: int | None
    index: int = 0
    opens: bool = True

    def __post_init__(self):
        check_booleans(opens=self.opens)
        if not isinstance(self.prompt, str):
            raise ValueError(f"The prompt of a shot must be a string, got {type(self.prompt).__name__}.")
        if self.num_chunks is not None and (not is_count(self.num_chunks) or self.num_chunks < 1):
            raise ValueError(f"A shot lasts an integer number of chunks, at least 1, got {self.num_chunks!r}.")


@dataclass(frozen=True)
class ChunkPrompt:
    """What conditions one chunk of one video: its shot's prompt (None where embeddings were passed instead of prompts)
    and index, and whether this chunk opens the shot."""

    prompt: str | None
    shot_index: int
    opens_shot: bool

    @property
    def cuts(self) -> bool:
        """Whether the scene changes here; the first chunk of a video opens a shot, but nothing came before it."""
        return self.opens_shot and self.shot_index > 0

    def conditioning(self, scene_cut_prefix: str) -> str:
        """Return the text to encode."""
        prompt = self.prompt or ""
        return scene_cut_prefix + prompt if self.cuts else prompt


class ShotPlan:
    """The shots of one video from chunk `start` on, in order. The last goes on for as long as chunks are asked for."""

    def __init__(self, shots: Sequence[Shot], start: int = 0):
        if not shots:
            raise ValueError("A video needs at least one shot, got none.")
        for shot in shots[:-1]:
            if shot.num_chunks is None:
                raise ValueError(f"Only the last of {len(shots)} shots may have no duration, not shot {shot.index}.")
        self.shots, self.start = tuple(shots), start

    @classmethod
    def from_prompts(
        cls, prompts: Sequence[str], chunks_per_shot: int | Sequence[int] | None, num_chunks: int | None
    ) -> "ShotPlan":
        """
        Plan one shot for each prompt.

        Args:
            prompts: The prompt of each shot.
            chunks_per_shot: One duration for all shots, or one for each. Without it, `num_chunks` are spread evenly
                and the first shots take the remainder; shots for which none is left are dropped.
            num_chunks: The length of the video in chunks; None for an endless one.

        Raises:
            ValueError: For durations that do not match the prompts, are below 1, or are missing for an endless video.
        """
        if chunks_per_shot is None and num_chunks is None and len(prompts) > 1:
            raise ValueError(f"An endless video of {len(prompts)} shots needs `chunks_per_shot`.")
        durations: Sequence[int | None]
        if chunks_per_shot is None:
            durations = [None] if num_chunks is None else _spread(num_chunks, len(prompts))
        elif is_count(chunks_per_shot):
            durations = [chunks_per_shot] * len(prompts)
        elif isinstance(chunks_per_shot, Sequence) and len(chunks_per_shot) == len(prompts):
            durations = chunks_per_shot
        else:
            raise ValueError(
                f"`chunks_per_shot` must be an integer, or a list of them for {counted(len(prompts), 'shot')}, got "
                f"{chunks_per_shot!r}."
            )
        return cls([Shot(prompt, count, i) for i, (prompt, count) in enumerate(zip(prompts, durations, strict=False))])

    def chunk(self, index: int) -> ChunkPrompt:
        """Return what conditions chunk `index`; beyond the last shot's duration, that shot goes on."""
        begin = self.start
        for shot in self.shots:
            if shot is self.shots[-1] or shot.num_chunks is None or index < begin + shot.num_chunks:
                break
            begin += shot.num_chunks
        return ChunkPrompt(shot.prompt, shot.index, shot.opens and index == begin)

    def redirected(self, index: int, prompt: str, *, cut: bool, continues: bool = False) -> "ShotPlan":
        """Return this plan with `prompt` from chunk `index` on, as a new shot (`cut`) or within the current one. At
        chunk 0, there is something to cut from only if the video `continues` another one."""
        check_booleans(cut=cut, continues=continues)
        shot_index = self.chunk(index - 1).shot_index if index > self.start else self.shots[0].index
        new_shot = cut and (index > 0 or continues)
        return ShotPlan([Shot(prompt, None, shot_index + new_shot, opens=new_shot or index == 0)], start=index)

    def conditionings(self, scene_cut_prefix: str, num_chunks: int | None) -> Iterator[str]:
        """Yield every text that the chunks from `start` up to `num_chunks` (None: all) are conditioned on: of each
        shot that is reached, the text of its first chunk and, where it has more, that of the others."""
        for begin, end in self._spans(num_chunks):
            for index in (begin, begin + 1):
                if end is None or index < end:
                    yield self.chunk(index).conditioning(scene_cut_prefix)

    def num_reached(self, num_chunks: int | None) -> int:
        """The number of shots that begin in a video of `num_chunks` (None: endless)."""
        return len(list(self._spans(num_chunks)))

    def _spans(self, num_chunks: int | None) -> Iterator[tuple[int, int | None]]:
        """Yield the first chunk, and the one after the last (None: endless), of every shot that is reached."""
        begin = self.start
        for shot in self.shots:
            if num_chunks is not None and begin >= num_chunks:
                return
            if shot is self.shots[-1] or shot.num_chunks is None:  # it goes on for as long as the video
                yield begin, num_chunks
                return
            end = begin + shot.num_chunks
            yield begin, end if num_chunks is None else min(end, num_chunks)
            begin = end


def _spread(num_chunks: int, num_shots: int) -> list[int]:
    base, remainder = divmod(num_chunks, num_shots)
    durations = [base + (index < remainder) for index in range(num_shots)]
    return [duration for duration in durations if duration]
