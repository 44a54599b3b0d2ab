"""The golden network, and a pipeline around it that is fed golden text embeddings."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import nn

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel


GOLDEN = Path(__file__).parent / "golden"
CHUNK_SIZE = 2
TEXT_LENGTH = 16
CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 2,
    "chunk_size": CHUNK_SIZE,
    "sample_height": 4,
    "sample_width": 6,
}


def golden_transformer() -> LongLiveTransformer3DModel:
    model = LongLiveTransformer3DModel(**CONFIG)
    weights = convert_wan_transformer_to_diffusers(load_file(GOLDEN / "reference_model.safetensors"))
    model.load_state_dict(weights)
    return model.eval()


class KeyTokenizer:
    """Turns a prompt into its number among the golden keys."""

    model_max_length = 512

    def __init__(self, keys: list[str]):
        self.keys = keys

    def __call__(self, prompts: list[str], max_length: int, **_) -> SimpleNamespace:
        ids = torch.tensor([[self.keys.index(prompt or "<negative>")] * max_length for prompt in prompts])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


class KeyTextEncoder(nn.Module):
    """Returns the golden embedding of a prompt's number; counts the prompts it encodes."""

    def __init__(self, embeds: torch.Tensor):
        super().__init__()
        self.embeds = nn.Parameter(embeds)  # [keys, L, D]
        self.num_encoded = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.embeds.dtype

    @property
    def device(self) -> torch.device:
        return self.embeds.device

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> SimpleNamespace:
        self.num_encoded += len(ids)
        return SimpleNamespace(last_hidden_state=self.embeds[ids[:, 0]])


def tiny_vae(z_dim: int = 8, seed: int = 0) -> AutoencoderKLWan:
    """A Wan2.2 VAE (16x in space, 4x in time) that is tiny."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        latents_mean=[0.1 * i for i in range(z_dim)],
        latents_std=[1.0 + 0.05 * i for i in range(z_dim)],
    )
    return vae.eval()


def golden_pipeline(keys: list[str], embeds: torch.Tensor) -> LongLivePipeline:
    pipe = LongLivePipeline(
        KeyTokenizer(keys),
        KeyTextEncoder(embeds),
        tiny_vae(),
        golden_transformer(),
        LongLiveScheduler(),
        window_size=6,
        sink_size=2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def golden_rollouts() -> dict[str, dict]:
    return json.loads((GOLDEN / "rollouts.json").read_text())


def load_rollout(name: str) -> dict[str, torch.Tensor]:
    """Tensors of a rollout; latents as here, `[B, C, F, h, w]`."""
    tensors = load_file(GOLDEN / f"rollout_{name}.safetensors")
    return {key: value if key == "embeds" else value.transpose(1, 2).contiguous() for key, value in tensors.items()}
