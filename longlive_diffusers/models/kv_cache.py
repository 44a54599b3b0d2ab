"""The rolling key/value cache of a streamed video.

A video is made chunk by chunk; every chunk attends over the keys and values of the frames before it. Keeping them all
would cost more with every second, so the cache has room for `window_size` frames and, when it is full, forgets the
oldest. Two kinds of frames are never forgotten: the first `sink_size` frames of the video (*attention sinks*: models
lean on them, and drift when they vanish) and, with `multi_shot_sink`, the frames that opened the current shot (the
*pin*: what this shot looks like). LongLive-2.0, section on multi-shot attention sinks.

Frames have slots and are never moved. A new frame takes the slot of the frame that it replaces, so the slots are in no
particular order; attention does not care, since each key was rotated to its own time position before it was stored.
What attention reads is therefore always one contiguous prefix of a preallocated buffer: a view, never a copy.

    frame   0 1 | 2 3 | 4 5 | 6 7         window 6, sink 2, chunk 2
    slot    0 1   2 3   4 5   2 3         frames 6, 7 take the slots of 2, 3; frames 0, 1 are sinks

`KVCache` decides (slots, eviction, sinks, pins, positions); a `LayerKVCache` for each layer stores
(`layer_kv_cache.py`). Both are plain objects that the caller creates, owns and passes along: nothing is kept on a
module.

*Relative RoPE* counts time positions from the frames that are cached, not from the start of the video. Only distances
matter to attention, and eviction changes few of them: frames younger than the gap keep their distances to the new
chunk, frames older than it - sinks and pins, nothing else can be there - move closer. So keys are rotated when they
are stored, as always, and once per chunk the sinks and pins are rotated again, from a copy of theirs that was kept
unrotated (so that rounding does not pile up in an endless stream). No forward pays for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from ..host_copies import to_device
from ..number_checks import check_booleans, check_counts, is_count
from ..wording import counted
from .attend import allocate_scratch
from .cache_journal import CacheJournal, Overwritten, Place
from .chunk_history import ChunkHistory
from .fp8_layer_cache import FP8LayerKVCache
from .frame_store import KEYS, VALUES, Shape
from .layer_kv_cache import (
    FP8_ATTENTION,
    ChunkSlots,
    DequantBuffers,
    LayerCacheBase,
    LayerKVCache,
    PackedLayerKVCache,
    resolve_kv_cache_dtype,
)
from .rotary import rotary_embedding
from .sparse_attention import AttendedBlocks, check_density, plan_blocks


@dataclass(frozen=True)
class CachedFrame:
    """A latent frame in the cache: its index in the video and the time position that its keys are rotated to."""

    index: int
    position: float


@dataclass
class _Sample:
    """The bookkeeping of one sample of the batch. Lists by slot; frames by index in the video."""

    slots: list[CachedFrame] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    opening: list[int] = field(default_factory=list)  # frames of an unfinished chunk that opened a shot
    raw_slots: dict[int, int] = field(default_factory=dict)  # frame index -> slot of its unrotated key


class KVCache:
    """Sliding-window cache with attention sinks and shot pins; `cache[i]` is the `LayerKVCache` of layer i.

    Usage: `begin_chunk(...)`, then any number of forwards with `kv_cache=cache` (each overwrites the chunk's own
    keys and values), then `finish_chunk()` and a last forward, which is the one that stays, usually on the finished
    chunk at timestep 0; then the next `begin_chunk`.

    Args:
        num_layers, num_heads, head_dim: The sizes of the network.
        batch_size: The number of videos that are streamed together.
        grid_height, grid_width: The number of tokens of a frame along each axis.
        window_size: The number of latent frames that the cache holds.
        num_frames: The length of the video in latent frames; None if it has no end. A shorter video than the window
            takes memory for its own frames only.
        sink_size: How many of the video's first frames are never evicted.
        chunk_size: The number of latent frames in a chunk.
        multi_shot_sink: Whether the first `min(sink_size, chunk_size)` frames of the current shot are kept as well.
        relative_rope: Whether time positions are counted from the cached frames (endless video) instead of from the
            video's start.
        dtype: What keys and values are stored as: float32, bfloat16, float16, "nvfp4" (3.5 times smaller than
            bfloat16), "fp8" or "fp8_attention"; see `resolve_kv_cache_dtype`.
        compute_dtype: The dtype that the network computes in: where `dtype` is packed, that of the buffers it is
            unpacked to, and of the unrotated keys of sinks and pins that relative RoPE keeps.
        device: The device that keys and values are stored on.
        theta: The base of the rotary frequencies.
        attention_density: The part of the history, besides sinks and pins, that a forward without gradients attends
            to; see `sparse_attention.py`.

    Raises:
        ValueError: For sizes that leave no room for a chunk, or a `sink_size` that is not a multiple of `chunk_size`
            with `multi_shot_sink`.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        grid_height: int,
        grid_width: int,
        *,
        window_size: int,
        sink_size: int,
        chunk_size: int,
        multi_shot_sink: bool,
        relative_rope: bool = False,
        num_frames: int | None = None,
        dtype: torch.dtype | str = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        theta: float = 10000.0,
        attention_density: float = 1.0,
    ):
        dtype = resolve_kv_cache_dtype(dtype, head_dim)
        check_window(window_size, sink_size, chunk_size, multi_shot_sink)
        check_booleans(relative_rope=relative_rope)
        check_counts(batch_size=batch_size)
        check_density(attention_density)
        if num_frames is not None:
            check_counts(num_frames=num_frames)
        self.batch_size, self.grid_height, self.grid_width = batch_size, grid_height, grid_width
        self.num_heads, self.head_dim = num_heads, head_dim
        self.window_size, self.sink_size, self.chunk_size = window_size, sink_size, chunk_size
        self.pin_size = min(sink_size, chunk_size) if multi_shot_sink else 0
        self.relative_rope = relative_rope
        self.device, self.theta = torch.device(device), theta
        self.num_frames = num_frames
        self.attention_density = attention_density
        num_slots = window_size if num_frames is None else min(window_size, num_frames)
        is_evicting = num_frames is None or num_frames > window_size
        # Unrotated keys are kept for sinks, the current pin, and the frames that are about to become the next one;
        # none is rotated again where no frame is ever evicted.
        self._num_raw_slots = sink_size + 2 * self.pin_size if relative_rope and is_evicting else 0
        shape = (batch_size, num_heads, num_slots, grid_height * grid_width, head_dim)
        self._has_scales = dtype == FP8_ATTENTION
        self.is_packed = isinstance(dtype, str) and not self._has_scales
        self._dequant_buffers: DequantBuffers | None = None
        with torch.inference_mode(False):  # what is made within, a video that goes on outside could not write to
            self._layers = self._make_layers(num_layers, shape, dtype, compute_dtype)
        self._journal = CacheJournal()
        self._samples: list[_Sample] = []
        self.reset()

    def _make_layers(
        self, num_layers: int, shape: Shape, dtype: torch.dtype | str, compute_dtype: torch.dtype
    ) -> Sequence[LayerCacheBase]:
        """Allocate the memory of all layers."""
        raw_slots, device, layers = self._num_raw_slots, self.device, range(num_layers)
        if isinstance(dtype, torch.dtype):
            made = [LayerKVCache(shape, raw_slots, dtype, device) for _ in layers]
        elif self._has_scales:
            made = [FP8LayerKVCache(shape, raw_slots, compute_dtype, device) for _ in layers]
        else:
            buffers = self._dequant_buffers = DequantBuffers(shape, compute_dtype, device)
            made = [PackedLayerKVCache(shape, raw_slots, dtype, compute_dtype, device, buffers) for _ in layers]
        scratch = allocate_scratch(compute_dtype, device)
        for layer in made:
            layer.scratch = scratch
        return made

    def __getitem__(self, layer: int) -> LayerCacheBase:
        return self._layers[layer]

    def __len__(self) -> int:
        return len(self._layers)

    def reset(self) -> None:
        """Forget every frame and the cached text; the memory is kept for the next video."""
        if self._has_scales:  # without which frames could not be read any more
            places = [(index, slot) for index, sample in enumerate(self._samples) for slot in range(len(sample.slots))]
            for part in (KEYS, VALUES):
                self._record(part, places)
        self.num_frames_seen = 0
        self._samples = [_Sample() for _ in range(self.batch_size)]
        self._chunk: ChunkSlots | None = None
        self._chunk_slots: list[list[int]] = []
        for layer in self._layers:
            layer.forget()
        self.clear_text()

    @property
    def num_cached_frames(self) -> int:
        """The number of latent frames currently held for each sample."""
        return len(self._samples[0].slots)

    @property
    def num_bytes(self) -> int:
        """The memory of the stored keys and values, in bytes; with the buffers that packed ones are unpacked to."""
        buffers = 0 if self._dequant_buffers is None else self._dequant_buffers.num_bytes
        return sum(layer.num_bytes for layer in self._layers) + buffers

    @property
    def chunk(self) -> ChunkSlots:
        """Where the chunk in progress is written and read.

        Raises:
            ValueError: If no chunk was begun yet.
        """
        if self._chunk is None:
            raise ValueError("No chunk is open in this KV cache: call `begin_chunk(num_frames)` before the forward.")
        return self._chunk

    def cached_frames(self, sample: int = 0) -> list[CachedFrame]:
        """The frames held for one sample, oldest first."""
        return sorted(self._samples[sample].slots, key=lambda frame: frame.index)

    @property
    def cached_chunks(self) -> set[int]:
        """The indices of the chunks of which a frame is held, for any sample."""
        return {frame.index // self.chunk_size for sample in self._samples for frame in sample.slots}

    @property
    def num_attended_tokens(self) -> int:
        """The number of cached tokens that each head attends to in the open chunk."""
        blocks = self.chunk.blocks
        if blocks is not None:
            return blocks.count * blocks.size
        return self.chunk.length * self.grid_height * self.grid_width

    def begin_chunk(
        self,
        num_frames: int,
        *,
        opens_shot: bool | Sequence[bool] = False,
        rope_offset: float | Sequence[float] = 0.0,
    ) -> ChunkSlots:
        """Finish the previous chunk and make room for the next `num_frames` latent frames.

        Args:
            num_frames: The number of latent frames in the chunk.
            opens_shot: Whether the chunk opens a new shot; one value, or one for each sample. The first chunk of a
                video always does.
            rope_offset: Added to the frame index to give the time position; one value, or one for each sample.
                Ignored with relative RoPE.

        Raises:
            ValueError: If `num_frames` is not between 1 and `chunk_size`, or goes beyond the length that the cache was
                made for; or, in a packed cache, if the previous chunk was not finished, so that nothing of it was
                stored.
        """
        if self.is_packed and self._chunk is not None and not self._chunk.finished:
            raise ValueError(
                "The chunk before was never finished: a packed KV cache stores a chunk in the forward on its clean "
                "latents, after `finish_chunk()`."
            )
        if not is_count(num_frames) or not 0 < num_frames <= self.chunk_size:
            raise ValueError(f"`num_frames` must be an integer from 1 to {self.chunk_size}, got {num_frames!r}.")
        if self.num_frames is not None and self.num_frames_seen + num_frames > self.num_frames:
            raise ValueError(
                f"This KV cache is for a video of {self.num_frames} latent frames; after {self.num_frames_seen}, there"
                f" is no room for {num_frames} more."
            )
        opens_shot = self._for_each_sample(opens_shot, "opens_shot")
        for opens in opens_shot:
            check_booleans(opens_shot=opens)
        rope_offset = (
            [0.0] * self.batch_size if self.relative_rope else self._for_each_sample(rope_offset, "rope_offset")
        )
        indices = range(self.num_frames_seen, self.num_frames_seen + num_frames)
        self.num_frames_seen += num_frames

        slots = []
        for sample, opens, offset in zip(self._samples, opens_shot, rope_offset, strict=True):
            self._pin(sample, indices, opens or indices.start == 0)
            frames = [CachedFrame(index, index + offset) for index in indices]
            slots.append(self._place(sample, frames))
        if self.relative_rope:
            self._close_gaps()
        self._chunk = self._slots_of_chunk(slots)
        return self._chunk

    def finish_chunk(self) -> None:
        """Mark the chunk as finished, so that the next forward computes what is remembered."""
        self._chunk = replace(self.chunk, finished=True)

    def reopen_chunk(self) -> None:
        """Mark the chunk as not finished: what was to be remembered is not true any more."""
        self._chunk = replace(self.chunk, finished=False)

    def histories(self) -> list[ChunkHistory]:
        """What the layers' caches hold now, for a forward with gradients of the open chunk: each stands in for the
        cache of its layer, and can be read in the backward, whatever was overwritten meanwhile."""
        chunk = self.chunk
        own = {(sample, slot) for sample, slots in enumerate(self._chunk_slots) for slot in slots}
        filled = {(sample, slot) for sample in range(self.batch_size) for slot in range(chunk.length)}
        places = frozenset(filled - own)
        moment = self._journal.remember(places)
        return [ChunkHistory(layer, index, moment, places, chunk) for index, layer in enumerate(self._layers)]

    def recache(self, rewritten: Sequence[bool] | None = None) -> Iterator[list[list[int]]]:
        """Rewrite every cached frame, oldest first, at its old position.

        For each chunk of cached frames, yields the frame indices `[B][n]` whose clean latents the caller must run
        through the network at timestep 0; meanwhile, only frames that were already rewritten can be attended to. This
        is for a prompt switch: afterwards, the history no longer carries the old prompt. The cached text is forgotten.

        Args:
            rewritten: Which samples are rewritten; None for all. The others take part in the forwards, whose number
                does not depend on them, but what they hold stays as it is, bit for bit.

        Raises:
            ValueError: If `rewritten` has not one value for each sample.
        """
        chosen = self._for_each_sample(True if rewritten is None else rewritten, "rewritten")
        self.clear_text()
        samples, kept = self._samples, [index for index, is_chosen in enumerate(chosen) if not is_chosen]
        # What is kept is put back slot by slot, so it is gone through in the order of its slots.
        order = [samples[index].slots if index in kept else self.cached_frames(index) for index in range(len(samples))]
        self._samples = [
            _Sample() if index in kept else replace(sample, slots=[]) for index, sample in enumerate(samples)
        ]
        # Samples may hold different shots, and parts of chunks: a group ends where a chunk of any sample does.
        grouped = [own for index, own in enumerate(order) if index not in kept] or order
        chunks_of_age = [[frame.index // self.chunk_size for frame in frames] for frames in zip(*grouped, strict=True)]
        for _, group in groupby(range(len(chunks_of_age)), key=chunks_of_age.__getitem__):
            ages = list(group)
            frames = [[own[age] for age in ages] for own in order]
            for sample, own in zip(self._samples, frames, strict=True):
                sample.slots += own
            self._chunk = self._slots_of_chunk([ages] * self.batch_size, kept=kept)
            self.finish_chunk()
            with self._kept([(sample, slot) for sample in kept for slot in ages]):
                yield [[frame.index for frame in own] for own in frames]
        for index in kept:
            self._samples[index] = samples[index]

    @contextmanager
    def _kept(self, places: list[Place]) -> Iterator[None]:
        """When the block ends, put back the keys and values that are at these places now."""
        if not places:
            yield
            return
        samples, slots = (self._indices(values) for values in zip(*places, strict=True))
        frames = [[layer.take(part, samples, slots) for part in (KEYS, VALUES)] for layer in self._layers]
        yield
        for layer, own in zip(self._layers, frames, strict=True):
            for part in (KEYS, VALUES):
                layer.put_back(part, samples, slots, own[part])

    def has_text(self, encoder_hidden_states: torch.Tensor, lora_scale: float = 1.0) -> bool:
        """Whether the cached text keys and values were computed from this very tensor, which is unchanged since, with
        LoRAs of this scale."""
        if self._text_source is None:
            return False
        source, version, scale = self._text_source
        return source is encoder_hidden_states and version == version_of(source) and scale == lora_scale

    def cache_text(self, encoder_hidden_states: torch.Tensor, lora_scale: float = 1.0) -> None:
        """Register what the text keys and values of the layers were made of, when all have computed them."""
        self._text_source = (encoder_hidden_states, version_of(encoder_hidden_states), lora_scale)

    def clear_text(self) -> None:
        """Make the layers compute their text keys and values again in the next forward."""
        self._text_source: tuple[torch.Tensor, int | None, float] | None = None
        for layer in self._layers:
            layer.reset()

    def _pin(self, sample: _Sample, indices: range, opens_shot: bool) -> None:
        """Pin the frames that opened a shot, now that their chunk is finished, and note those that open the next."""
        if sample.opening:
            for index in sample.pinned:
                if index >= self.sink_size:
                    sample.raw_slots.pop(index, None)
            sample.pinned, sample.opening = sample.opening, []
        if opens_shot and self.pin_size:
            sample.opening = list(indices[: self.pin_size])
        if self._num_raw_slots:
            free = iter(sorted(set(range(self._num_raw_slots)) - set(sample.raw_slots.values())))
            for index in indices:
                if index < self.sink_size or index in sample.opening:
                    sample.raw_slots[index] = next(free)

    def _place(self, sample: _Sample, frames: list[CachedFrame]) -> list[int]:
        """Give each new frame a slot: the next free one or, once the window is full, that of the oldest evictable
        frame. No more frames are evicted than there is no room for, as in the reference, so that a window that is no
        multiple of a chunk is filled too: of the oldest chunk, the last frames then stay for longer."""
        first_free = len(sample.slots)
        num_free = min(len(frames), self.window_size - first_free)
        evictable = sorted(
            (frame.index, slot)
            for slot, frame in enumerate(sample.slots)
            if frame.index >= self.sink_size and frame.index not in sample.pinned
        )
        slots = [slot for _, slot in evictable[: len(frames) - num_free]]
        for slot, frame in zip(slots, frames, strict=False):
            sample.slots[slot] = frame
        sample.slots += frames[len(slots) :]
        return [*slots, *range(first_free, first_free + num_free)]

    def _close_gaps(self) -> None:
        """For relative RoPE, move the frames before an evicted stretch to their new distance from the newest frame."""
        moves = []  # (sample, slot, slot of the unrotated key, position)
        newest = self.num_frames_seen - 1
        for index, sample in enumerate(self._samples):
            by_age = sorted(range(len(sample.slots)), key=lambda slot: sample.slots[slot].index, reverse=True)
            for age, slot in enumerate(by_age):
                frame, position = sample.slots[slot], float(newest - age)
                if frame.position != position:
                    sample.slots[slot] = CachedFrame(frame.index, position)
                    moves.append((index, slot, sample.raw_slots[frame.index], position))
        if not moves:
            return
        samples, slots, raw_slots, positions = zip(*moves, strict=True)
        places = list(zip(samples, slots, strict=True))
        rotary = self._rotary([[position] for position in positions])
        samples, slots, raw_slots = (self._indices(values) for values in (samples, slots, raw_slots))
        self._record(KEYS, places)
        for layer in self._layers:
            layer.rotate_again(samples, slots, raw_slots, rotary)

    def _record(self, part: int, places: list[Place]) -> None:
        """Enter into the journal what is about to be overwritten, if a backward may ask for it."""
        if asked_for := self._journal.asked_for(part, places):
            samples, slots = (self._indices(values) for values in zip(*asked_for, strict=True))
            frames = [layer.take(part, samples, slots) for layer in self._layers]
            self._journal.record(Overwritten(part, asked_for, samples, slots, frames))

    def _slots_of_chunk(self, slots: list[list[int]], *, kept: Sequence[int] = ()) -> ChunkSlots:
        """Return where a chunk is written. What the samples `kept` have there is put back by the caller."""
        self._chunk_slots = slots
        places = [(sample, slot) for sample, chosen in enumerate(slots) if sample not in kept for slot in chosen]
        for part in (KEYS, VALUES):
            self._record(part, places)
        positions = [
            [sample.slots[slot].position for slot in chosen]
            for sample, chosen in zip(self._samples, slots, strict=True)
        ]
        raw_slots = None
        if self._num_raw_slots:  # the keys of frames that are neither sinks nor open a shot go to a slot nobody reads
            raw_slots = self._indices(
                [
                    [sample.raw_slots.get(sample.slots[slot].index, self._num_raw_slots) for slot in chosen]
                    for sample, chosen in zip(self._samples, slots, strict=True)
                ]
            )
        for layer in self._layers:
            layer.begin_chunk(self.num_cached_frames)
        tokens = self.grid_height * self.grid_width
        token_slots = torch.tensor(slots)[..., None] * tokens + torch.arange(tokens)
        same_positions = all(own == positions[0] for own in positions)
        return ChunkSlots(
            len(slots[0]),
            self._indices(range(self.batch_size))[:, None],
            self._indices(slots),
            to_device(token_slots.flatten(1), self.device),
            self.num_cached_frames,
            self._rotary(positions[:1] if same_positions else positions),
            raw_slots,
            blocks=self._attended_blocks(slots),
        )

    def _attended_blocks(self, own_slots: list[list[int]]) -> AttendedBlocks | None:
        """Plan what a chunk in `own_slots` attends to; None for everything."""
        if self.attention_density == 1:
            return None
        always_seen = [
            [slot in own or self._is_anchor(sample, frame) for slot, frame in enumerate(sample.slots)]
            for sample, own in zip(self._samples, own_slots, strict=True)
        ]
        blocks = plan_blocks(always_seen, self.grid_height * self.grid_width, self.attention_density)
        return blocks and replace(blocks, is_always_seen=to_device(blocks.is_always_seen, self.device))

    def _is_anchor(self, sample: _Sample, frame: CachedFrame) -> bool:
        """Whether a frame is a sink, or one of those that opened the current shot."""
        return frame.index < self.sink_size or (not sample.opening and frame.index in sample.pinned)

    def _rotary(self, positions: list[list[float]]) -> torch.Tensor:
        time = torch.tensor(positions, dtype=torch.float64)
        rotary = rotary_embedding(time, self.grid_height, self.grid_width, self.head_dim, theta=self.theta)
        return to_device(rotary, self.device)

    def _indices(self, values) -> torch.Tensor:
        return to_device(torch.tensor(list(values), dtype=torch.long), self.device)

    def _for_each_sample(self, value, name: str) -> list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return [value] * self.batch_size
        if len(value) != self.batch_size:
            raise ValueError(f"`{name}` has {counted(len(value), 'value')} for a batch of {self.batch_size}.")
        return list(value)


def version_of(tensor: torch.Tensor) -> int | None:
    """How often `tensor` was changed in place; None where PyTorch does not count (in inference mode) or cannot tell
    (while compiling). There, only a different tensor is recognized as a different text."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def check_window(window_size: int, sink_size: int, chunk_size: int, multi_shot_sink: bool) -> None:
    """Raise a ValueError that states the numbers, unless a chunk always fits beside the protected frames."""
    check_booleans(multi_shot_sink=multi_shot_sink)
    if not all(is_count(size) for size in (window_size, sink_size, chunk_size)):
        raise ValueError(
            f"`window_size`, `sink_size` and `chunk_size` are integers, numbers of latent frames, got "
            f"{window_size!r}, {sink_size!r} and {chunk_size!r}."
        )
    if chunk_size < 1 or window_size < 1 or sink_size < 0:
        raise ValueError(
            f"`chunk_size` and `window_size` must be at least 1 and `sink_size` at least 0, got {chunk_size}, "
            f"{window_size} and {sink_size}."
        )
    if multi_shot_sink and sink_size % chunk_size:
        raise ValueError(
            f"With `multi_shot_sink`, `sink_size` must be a multiple of `chunk_size` ({chunk_size}), got {sink_size}."
        )
    pinned = min(sink_size, chunk_size) if multi_shot_sink else 0
    if window_size < sink_size + pinned + chunk_size:
        raise ValueError(
            f"`window_size` {window_size} is too small: {sink_size} sink frames, {pinned} frames that open a shot and "
            f"a chunk of {chunk_size} need {sink_size + pinned + chunk_size}."
        )
