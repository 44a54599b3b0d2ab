"""A Wan pipeline on disk, such as checkpoints are converted on."""

from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tests.support.tiny_tokenizer import VOCABULARY_SIZE, tiny_tokenizer
from tests.support.tiny_vae import tiny_vae


HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}  # of the golden network, which is 128 wide


def text_encoder_of_width(width: int) -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=VOCABULARY_SIZE, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return UMT5EncoderModel(config).eval()


def save_wan_base(folder: Path, *, channels: int = 8, width: int = 32) -> Path:
    """A Wan pipeline folder without transformer weights: of its transformer only config.json is left."""
    transformer = WanTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, text_dim=32, freq_dim=64, ffn_dim=64, num_layers=1
    )
    WanPipeline(
        tokenizer=tiny_tokenizer(model_max_length=16),
        text_encoder=text_encoder_of_width(width).to(torch.bfloat16),
        vae=tiny_vae(channels),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformer,
        expand_timesteps=True,
    ).save_pretrained(folder)
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    return folder
