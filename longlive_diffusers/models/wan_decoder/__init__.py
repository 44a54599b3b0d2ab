"""The decoder of diffusers' `AutoencoderKLWan`, computed with fewer and faster operations.

`decode_frames.py` walks the modules and reads their parameters, at every call anew: nothing is prepared, hence nothing
can be out of date. Features are `[B, T, H, W, C]`, with the channels of a pixel next to each other, as convolutions
want them on CPUs and GPUs, and as norms and 1x1 convolutions do:

- A causal convolution's input is normalized straight into the place where the convolution reads it, behind the two
  frames that are kept of the frames before (`history.py`, `norm_silu.py`). The convolution adds zeros around it.
- Doubling the resolution and the 3x3 convolution that follows are one transposed convolution (`upsample.py`), which
  has 16 products for every 36.
- On a GPU a convolution's bias and a shortcut are added by the kernel that reads the features next (`pending_sum.py`).
- Several latent frames are decoded in one call, as many as convolutions take (`cached_convolutions.py`).

`published_modules.py` says for which decoders this is done.
"""
