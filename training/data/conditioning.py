"""What conditions each chunk of a training video, and which chunks bear loss.

Chunks follow generation. The first chunk of every shot but the first has the scene-cut prefix before its prompt. A
prompt switch within a shot is trained as it is generated: a streaming session rewrites the cached history under the
new prompt, so a chunk after the switch never sees history under an old one. Therefore all chunks of that shot before
its last switch take the prompt of its last segment; they are that history, and bear no loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.samples import Clip


@dataclass(frozen=True)
class Layout:
    """
    Args:
        prompts: The text to encode for each chunk.
        shot_index: The number of each chunk's shot, from 0.
        bears_loss: Of each chunk.
    """

    prompts: tuple[str, ...]
    shot_index: tuple[int, ...]
    bears_loss: tuple[bool, ...]


def lay_out(
    clips: Sequence[Clip],
    chunks_per_clip: Sequence[int],
    num_chunks: int,
    *,
    scene_cut_prefix: str,
    recache_switches: bool,
) -> Layout:
    """
    Args:
        clips: Those that are used; the first opens the video whatever its `cut` says.
        chunks_per_clip: Of each, at least 1; `num_chunks` in all or fewer. Chunks that are left go on with the last
            clip's prompt and bear no loss.
        recache_switches: Treat prompt switches within a shot as told above. Otherwise each chunk keeps its own prompt
            and bears loss.
    """
    shot_of_clip: list[int] = []
    for clip in clips:
        shot_of_clip.append(shot_of_clip[-1] + clip.cut if shot_of_clip else 0)
    last_of_shot = {shot: number for number, shot in enumerate(shot_of_clip)}

    prompts: list[str] = []
    shots: list[int] = []
    loss: list[bool] = []
    for number, (clip, count) in enumerate(zip(clips, chunks_per_clip, strict=True)):
        shot = shot_of_clip[number]
        shown = last_of_shot[shot] if recache_switches else number
        own = [clips[shown].caption] * count
        if clip.cut and number > 0:
            own[0] = scene_cut_prefix + own[0]
        prompts += own
        shots += [shot] * count
        loss += [shown == number] * count
    padding = num_chunks - len(prompts)
    prompts += [clips[-1].caption] * padding
    shots += [shots[-1]] * padding
    loss += [False] * padding
    return Layout(tuple(prompts), tuple(shots), tuple(loss))


def whole_chunks(num_frames: int, chunk_size: int, *, opens_video: bool) -> int:
    """Chunks of `chunk_size` latent frames in `num_frames` pixel frames: the video's first latent frame takes one
    pixel frame, every other four."""
    if opens_video:
        return (num_frames + 3) // (4 * chunk_size)
    return num_frames // (4 * chunk_size)


def frames_of_chunks(num_chunks: int, chunk_size: int, *, opens_video: bool) -> int:
    """Pixel frames that `num_chunks` chunks take."""
    return 4 * chunk_size * num_chunks - 3 * opens_video
