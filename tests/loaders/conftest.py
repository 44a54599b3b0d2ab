import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel


GOLDEN = Path(__file__).parents[1] / "golden"
HEADS = {"num_attention_heads": 4, "attention_head_dim": 32}  # of the golden network, which is 128 wide


@pytest.fixture(scope="session")
def heads() -> dict[str, int]:
    return HEADS


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def reference_config() -> dict:
    return json.loads((GOLDEN / "reference_config.json").read_text())


@pytest.fixture(scope="session")
def original() -> dict[str, torch.Tensor]:
    """The golden network under the reference's names, float32."""
    return load_file(GOLDEN / "reference_model.safetensors")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "runs", "sleeps", "on", "the", "grass"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def tiny_text_encoder(width: int = 32) -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=16, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return UMT5EncoderModel(config).eval()


def tiny_vae(channels: int = 8) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=16,
    ).eval()


def save_wan_base(folder: Path, *, channels: int = 8, width: int = 32) -> Path:
    """A Wan pipeline folder without transformer weights: of its transformer only config.json is left."""
    transformer = WanTransformer3DModel(
        **HEADS, in_channels=8, out_channels=8, text_dim=32, freq_dim=64, ffn_dim=64, num_layers=1
    )
    WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(width).to(torch.bfloat16),
        vae=tiny_vae(channels),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformer,
        expand_timesteps=True,
    ).save_pretrained(folder)
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()
    return folder


@pytest.fixture(scope="session")
def make_wan_base() -> Callable[..., Path]:
    return save_wan_base


@pytest.fixture(scope="session")
def wan_base(tmp_path_factory) -> Path:
    return save_wan_base(tmp_path_factory.mktemp("base") / "wan")
