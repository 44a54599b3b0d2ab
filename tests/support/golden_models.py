"""The golden network, and a pipeline around it that is fed golden text embeddings."""

import json
from types import SimpleNamespace

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file
from torch import nn

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from tests.support.paths import GOLDEN
from tests.support.tiny_vae import tiny_vae


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

    def __call__(self, prompts: list[str], max_length: int = 1, **_) -> SimpleNamespace:
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


def shots_of(prompts: list[str], prefix: str) -> tuple[list[str], list[int]]:
    """The golden prompts of each chunk, as shot prompts and durations."""
    shots, durations = [], []
    for prompt in prompts:
        if not shots or prompt.startswith(prefix):
            shots.append(prompt.removeprefix(prefix))
            durations.append(0)
        durations[-1] += 1
    return shots, durations


def rollout_arguments(name: str) -> dict:
    """The arguments of a pipeline's call that makes a golden rollout."""
    settings, tensors = golden_rollouts()[name], load_rollout(name)
    shots, durations = zip(
        *(shots_of(p, settings["scene_cut_prefix"]) for p in settings["prompts_per_chunk"]), strict=True
    )
    arguments = {
        "shot_prompts": list(shots),
        "chunks_per_shot": list(durations),
        "latents": tensors["noise"],
        "window_size": settings["window_frames"],
        "sink_size": settings["sink_frames"],
        "multi_shot_sink": settings["multi_shot_sink"],
        "multi_shot_rope_offset": settings["multi_shot_rope_offset"],
        "num_inference_steps": settings["num_inference_steps"],
        "guidance_scale": settings["guidance_scale"],
        "relative_rope": settings["relative_rope"],
        "max_sequence_length": TEXT_LENGTH,
        "output_type": "latent",
    }
    if settings["image_conditioned"]:
        arguments["image_latents"] = tensors["initial_latents"]
    if settings["context_latent_frames"]:
        arguments["video_latents"] = tensors["initial_latents"]
    return arguments


def pipeline_for(name: str) -> LongLivePipeline:
    """The pipeline of a golden rollout."""
    return golden_pipeline(golden_rollouts()[name]["embed_keys"], load_rollout(name)["embeds"])
