"""Balanced sequence parallelism: one clip of teacher-forcing training on several devices (arXiv 2605.18739).

A training clip is long twice over: attention sees the clean latents of all frames and, behind them, a noisy copy of
all frames. A plain split over N ranks separates the two halves of that sequence (here four chunks and N = 4):

    [ c0 c1 | c2 c3 | n0 n1 | n2 n3 ]        c: clean chunk, n: noisy chunk, |: border between ranks
       r0      r1      r2      r3

Only noisy tokens bear a loss, so half of the ranks have none; a frame's two copies live on different ranks, so each
frame is read and encoded by the VAE twice, and noise, timesteps, text embeddings and targets are needed where the
frame's latents are not. Balanced SP splits the *frames* instead. A rank keeps both copies of its own F/N frames:

    [ c0 n0 | c1 n1 | c2 n2 | c3 n3 ]
       r0      r1      r2      r3

Every rank then has as many tokens, as many loss-bearing tokens and as many frames to encode as any other, and all that
belongs to a frame is made where the frame is. What a rank holds is simply a shorter clip, which is why the network
only needs to be told of the other ranks (`sp_mesh=`). The ranks meet in self-attention only, through the all-to-all of
Ulysses (arXiv 2309.14509): before it, a rank has all heads of its own tokens; after it, all tokens for its own heads.

    [B, tokens / N, heads, head_dim]  --- scatter heads, gather tokens -->  [B, tokens, heads / N, head_dim]

The gathered tokens come in *natural order*, `[r0 clean, r0 noisy, r1 clean, r1 noisy, ...]`. Nothing is permuted into
`[clean; noisy]`: the rule of who sees whom is evaluated in natural order (`ChunkMask(num_ranks=N)`). Each rank has
every query and every key of its heads, so attention itself is balanced exactly, despite the causal rule.

A data loader does not need the whole clip on every rank either: `raw_window` says which frames of the video a rank has
to read, and `encode_shard` encodes just these. DDP and FSDP average gradients over ranks, so what a rank
back-propagates is its part of the summed loss, times N, over the loss-bearing frames of all ranks (`update` in
`training/train_ar.py`).

The VAE is split in another way, along the width: to decode or encode one video together, each rank has some columns of
every picture and is handed its neighbors' at the borders (`columns.py`; `halo.py`, where modules are called). This is
what a group given to `StreamingDecoder`, `StreamingEncoder` or `encode_video` does.
"""

from .all_to_all import gather_heads, scatter_heads
from .layout import FrameLayout, check_heads
from .stream_config import StreamParallelConfig
from .stream_ranks import RanksParted
from .vae_encode import RawWindow, encode_shard, raw_window


__all__ = [
    "FrameLayout",
    "RanksParted",
    "RawWindow",
    "StreamParallelConfig",
    "check_heads",
    "encode_shard",
    "gather_heads",
    "raw_window",
    "scatter_heads",
]
