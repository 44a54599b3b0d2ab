"""A complete pipeline that is tiny: real tokenizer, text encoder, VAE and network, with random weights.

Videos are 64x64 pixels (4x4 latents, 4 tokens a frame) unless asked for otherwise; a chunk is 2 latent frames.
"""

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_model
from transformers import UMT5Config, UMT5EncoderModel

from longlive_diffusers import KVCache, LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from tests.support.paths import WEIGHTS
from tests.support.tiny_tokenizer import VOCABULARY_SIZE, tiny_tokenizer
from tests.support.tiny_vae import tiny_vae


TEXT_DIM, TEXT_LENGTH, CHANNELS, CHUNK_SIZE, SIDE = 16, 8, 8, 2, 4
WAN_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
}
CONFIG = {**WAN_CONFIG, "chunk_size": CHUNK_SIZE, "sample_height": SIDE, "sample_width": SIDE}


def tiny_transformer(seed: int = 0, **overrides) -> LongLiveTransformer3DModel:
    torch.manual_seed(seed)
    return LongLiveTransformer3DModel(**{**CONFIG, **overrides}).eval()


def tiny_wan_transformer(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(**WAN_CONFIG).eval()


def tiny_text_encoder() -> UMT5EncoderModel:
    """Random weights that were drawn once: every release of transformers draws them in an order of its own."""
    config = UMT5Config(vocab_size=VOCABULARY_SIZE, d_model=TEXT_DIM, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    encoder = UMT5EncoderModel(config)
    load_model(encoder, WEIGHTS / "tiny_text_encoder.safetensors")
    return encoder.eval()


def tiny_components() -> dict:
    return {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "vae": tiny_vae(CHANNELS),
        "transformer": tiny_transformer(),
        "scheduler": LongLiveScheduler(),
    }


def tiny_pipeline(**components) -> LongLivePipeline:
    """Any of the components may be replaced, also by None."""
    pipe = LongLivePipeline(**{**tiny_components(), **components}, window_size=6, sink_size=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_arguments(**overrides) -> dict:
    """Of a call that makes 13 frames (2 chunks, 2 steps each), deterministically."""
    defaults = {
        "prompt": "a cat runs on the grass",
        "num_frames": 13,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "latent",
    }
    return {**defaults, **overrides}


def random_inputs(frames: int = 4, batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of a block-causal forward of [`tiny_transformer`]."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, CHANNELS, frames, SIDE, SIDE, generator=generator),
        "timestep": torch.randint(1, 1000, (batch, frames), generator=generator).float(),
        "encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, TEXT_DIM, generator=generator),
    }


def teacher_forcing_inputs(frames: int = 4, batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1000)
    clean = torch.randn(batch, CHANNELS, frames, SIDE, SIDE, generator=generator)
    return {**random_inputs(frames, batch, seed), "clean_hidden_states": clean}


def tiny_cache(model: LongLiveTransformer3DModel, batch: int = 1, **settings) -> KVCache:
    settings = {"window_size": 6, "sink_size": 2, "multi_shot_sink": True, **settings}
    return model.create_kv_cache(batch, SIDE, SIDE, **settings)


def stream_chunks(model, num_chunks: int = 4, seed: int = 0, cache: KVCache | None = None) -> torch.Tensor:
    """The outputs of a streamed video, one forward for each chunk, `[B, C, F, h, w]`; `model` may be compiled."""
    inputs = like(model, random_inputs(num_chunks * CHUNK_SIZE, seed=seed))
    cache = tiny_cache(model) if cache is None else cache
    text, outputs = inputs["encoder_hidden_states"], []
    for start in range(0, num_chunks * CHUNK_SIZE, CHUNK_SIZE):
        own = slice(start, start + CHUNK_SIZE)
        cache.begin_chunk(CHUNK_SIZE)
        latents, timestep = inputs["hidden_states"][:, :, own], inputs["timestep"][:, own]
        latents, timestep = (x.clone(memory_format=torch.contiguous_format) for x in (latents, timestep))
        outputs.append(model(latents, timestep, text, kv_cache=cache).sample)
    return torch.cat(outputs, dim=2)


def like(model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`inputs` where `model` runs and, but for the timesteps, in its dtype."""
    return {
        name: tensor.to(model.device, torch.float32 if "timestep" in name else model.dtype)
        for name, tensor in inputs.items()
    }


FORWARDS = {
    "block causal": lambda model: model(**like(model, random_inputs())).sample,
    "teacher forcing": lambda model: model(**like(model, teacher_forcing_inputs())).sample,
    "streaming": stream_chunks,
}
"""What the network computes on fixed inputs, in each of the ways it is used."""


every_forward = pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS)
