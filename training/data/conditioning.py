"""What conditions each chunk of a training video, and which chunks bear loss.

Chunks are conditioned as in generation. The first chunk of every shot but the first has the scene-cut prefix before
its prompt. A prompt switch within a shot is trained as it is generated: a streaming session rewrites the cached
history under the new prompt, so a chunk after the switch never sees its shot under an old one. Therefore all chunks of
that shot before its last switch take the prompt of its last segment; they are that history, and bear no loss. In two
things a session does more: it leaves out the prefix of what it rewrites, and rewrites what is cached of earlier shots,
which here keep their prompts, since they bear loss themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.samples import Clip


@dataclass(frozen=True)
class ChunkConditioning:
    """
    Args:
        prompts: The prompt of each chunk.
        shot_index: The index of each chunk's shot, from 0.
        loss_mask: Whether each chunk bears loss.
    """

    prompts: tuple[str, ...]
    shot_index: tuple[int, ...]
    loss_mask: tuple[bool, ...]


def condition_chunks(
    clips: Sequence[Clip],
    chunks_per_clip: Sequence[int],
    num_chunks: int,
    *,
    scene_cut_prefix: str,
    recache_switches: bool,
) -> ChunkConditioning:
    """
    Return the conditioning of the chunks of a video.

    Args:
        clips: The clips that are used; the first opens the video whatever its `cut` says.
        chunks_per_clip: The number of chunks of each clip, at least 1; in all, `num_chunks` or fewer. The remaining
            chunks continue with the last clip's prompt and bear no loss.
        num_chunks: The number of chunks of the video.
        scene_cut_prefix: The text put before the prompt of the first chunk of every shot but the first.
        recache_switches: Whether prompt switches within a shot are treated as described above. Otherwise each chunk
            keeps its own prompt and bears loss.
    """
    shot_of_clip: list[int] = []
    for clip in clips:
        shot_of_clip.append(shot_of_clip[-1] + clip.cut if shot_of_clip else 0)
    last_of_shot = {shot: index for index, shot in enumerate(shot_of_clip)}

    prompts: list[str] = []
    shots: list[int] = []
    loss: list[bool] = []
    for index, (clip, count) in enumerate(zip(clips, chunks_per_clip, strict=True)):
        shot = shot_of_clip[index]
        shown = last_of_shot[shot] if recache_switches else index
        own = [clips[shown].caption] * count
        if clip.cut and index > 0:
            own[0] = scene_cut_prefix + own[0]
        prompts += own
        shots += [shot] * count
        loss += [shown == index] * count
    padding = num_chunks - len(prompts)
    prompts += [clips[-1].caption] * padding
    shots += [shots[-1]] * padding
    loss += [False] * padding
    return ChunkConditioning(tuple(prompts), tuple(shots), tuple(loss))
