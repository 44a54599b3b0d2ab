"""The sizes that `longlive bench` knows by name, and how much work a forward of each is.

Only sizes matter to time, not what the weights have learned; so the networks here have random weights, and can be
built anywhere without a download.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..assets import toy_decoder_path, toy_pipeline_path
from ..conversion.config_file import read_config
from ..conversion.pipeline_folder import PipelineFolder
from ..frame_counts import pixel_frames


# Wan2.2's VAE, 16 times smaller in space and 4 times in time.
_WAN22_VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}
_SMALL_VAE = {**_WAN22_VAE, "base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@dataclass(frozen=True)
class BenchSize:
    """
    The networks and the video that are measured. Sizes are in latents and latent frames.

    Args:
        transformer, vae, tiny_decoder: The configurations of networks with random weights.
        height, width: The size of the latents.
        window_size, sink_size: How many latent frames the KV cache holds, and how many it never forgets.
        num_chunks: The length of the video that is made.
        num_inference_steps: The solver steps of a chunk; the clean pass comes on top.
        text_tokens: The number of tokens of the (random) prompt embeddings.
        threads: The number of CPU threads; None for as many as torch uses.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    tiny_decoder: Mapping[str, Any]
    height: int
    width: int
    window_size: int
    sink_size: int
    num_chunks: int
    num_inference_steps: int = 4
    text_tokens: int = 512
    threads: int | None = None

    @property
    def chunk_size(self) -> int:
        return self.transformer["chunk_size"]

    @property
    def patch_size(self) -> tuple[int, int]:
        """The height and width of a token, in latents."""
        return tuple(self.transformer["patch_size"][1:])

    def num_frames(self, num_chunks: int) -> int:
        """Return the number of pixel frames of the first `num_chunks` chunks of a video."""
        return pixel_frames(num_chunks * self.chunk_size, temporal_scale=self.vae["scale_factor_temporal"])

    @property
    def chunks_to_fill(self) -> int:
        """The number of chunks until attention is over the full window."""
        return self.window_size // self.chunk_size


def _with_latent_statistics(vae: Mapping[str, Any], channels: int) -> dict[str, Any]:
    return {**vae, "z_dim": channels, "latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}


def _toy() -> BenchSize:
    folder = PipelineFolder.find(toy_pipeline_path())
    window_size, transformer = folder.settings["window_size"], folder.transformer
    return BenchSize(
        transformer,
        folder.vae,
        read_config(toy_decoder_path(), "config.json", toy_decoder_path()),
        height=transformer["sample_height"],
        width=transformer["sample_width"],
        window_size=window_size,
        sink_size=folder.settings["sink_size"],
        num_chunks=window_size // transformer["chunk_size"] + 4,
    )


def _five_b() -> BenchSize:
    """LongLive-2.0 at 704x1280 pixels."""
    transformer = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 14336,
        "num_layers": 30,
        "chunk_size": 8,
    }
    vae = _with_latent_statistics(_WAN22_VAE, 48)
    decoder = {"latent_channels": 48}
    return BenchSize(transformer, vae, decoder, height=44, width=80, window_size=32, sink_size=8, num_chunks=8)


def _cpu_reference() -> BenchSize:
    """A fixed, middling size for comparing CPUs and revisions; 256x384 pixels, two threads."""
    transformer = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 512,
        "freq_dim": 256,
        "ffn_dim": 2048,
        "num_layers": 8,
        "chunk_size": 4,
    }
    vae = _with_latent_statistics(_SMALL_VAE, 16)
    decoder = {"latent_channels": 16}
    return BenchSize(
        transformer, vae, decoder, height=16, width=24, window_size=16, sink_size=4, num_chunks=10, threads=2
    )


SIZES = {"toy": _toy, "cpu-reference": _cpu_reference, "5b": _five_b}


def forward_flops(size: BenchSize, num_devices: int = 1, num_keys: int | None = None) -> dict[str, int]:
    """Count the floating point operations of one forward of the transformer on a chunk, at the full window, for each
    of the devices that share it.

    Only matrix products count, with a multiplication and an addition as two operations. The text's keys and values are
    not included: they are cached, and computed once for each prompt.

    Args:
        size: The network and the video.
        num_devices: How many devices share the forward.
        num_keys: How many cached tokens each head attends to, where these are not all of the window.

    Returns:
        The operations of `attention`, self and cross, and of the `linear` layers.
    """
    config = size.transformer
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    patch_height, patch_width = size.patch_size
    frame_tokens = (size.height // patch_height) * (size.width // patch_width)
    tokens, keys = size.chunk_size * frame_tokens, num_keys or size.window_size * frame_tokens
    patch = patch_height * patch_width

    projections = 2 * tokens * dim * dim * (4 + 2)  # query, key, value, output; query and output of cross-attention
    feed_forward = 2 * tokens * dim * config["ffn_dim"] * 2
    self_attention = config["num_layers"] * 4 * tokens * dim * keys
    cross_attention = config["num_layers"] * 4 * tokens * dim * size.text_tokens
    ends = 2 * tokens * dim * patch * (config["in_channels"] + config["out_channels"])
    time_embedding = 2 * size.chunk_size * dim * (config["freq_dim"] + dim + 6 * dim)
    linear = config["num_layers"] * (projections + feed_forward) + ends + time_embedding
    # By whole frames; if these cannot be divided, every device computes all. Self-attention is divided by heads.
    frame_devices = num_devices if size.chunk_size % num_devices == 0 else 1
    return {
        "attention": self_attention // num_devices + cross_attention // frame_devices,
        "linear": linear // frame_devices,
    }


def check_bench_size(size: BenchSize) -> None:
    """Check that the window is filled, so that there is a steady state to measure.

    Raises:
        ValueError: If there are too few chunks, or the window is no whole number of them; it states the numbers.
    """
    if size.window_size % size.chunk_size:
        raise ValueError(
            f"the window of {size.window_size} latent frames is not filled by whole chunks of {size.chunk_size}, so "
            "there is no steady state to measure"
        )
    needed = max(size.chunks_to_fill, 2)
    if size.num_chunks < needed:
        raise ValueError(
            f"--chunks {size.num_chunks} is too few: at least {needed} are needed, to fill the window of "
            f"{size.window_size} latent frames by chunks of {size.chunk_size}, and to see the time between two"
        )
