"""From the published checkpoint to a video: converted, opened by stock diffusers, and making the latents that the
original weights make."""

import torch
from diffusers import DiffusionPipeline
from transformers import UMT5Config, UMT5EncoderModel

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, convert_checkpoint
from tests.support.golden_models import golden_transformer, pipeline_for, rollout_arguments
from tests.support.paths import GOLDEN
from tests.support.tiny_tokenizer import WORDS, tiny_tokenizer
from tests.support.tiny_vae import tiny_vae


def test_a_converted_checkpoint_makes_the_latents_of_its_weights(tmp_path):
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    base = LongLivePipeline(
        tiny_tokenizer(),
        text_encoder,
        tiny_vae(),
        golden_transformer(),
        LongLiveScheduler(),
        window_size=6,
        sink_size=2,
    )
    base.save_pretrained(tmp_path / "base")
    convert_checkpoint(GOLDEN / "model_bf16.pt", tmp_path / "base", tmp_path / "converted", dtype=torch.bfloat16)
    opened = DiffusionPipeline.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert type(opened) is LongLivePipeline

    rounded = golden_transformer()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    latents = []
    for transformer in (opened.transformer, rounded):
        pipe = pipeline_for("multi_shot")
        pipe.transformer = transformer
        latents.append(pipe(**rollout_arguments("multi_shot")).frames)
    torch.testing.assert_close(*latents, atol=0, rtol=0)


def test_the_references_lora_loads_fuses_and_unloads():
    pipe = pipeline_for("multi_shot")
    make = lambda: pipe(**rollout_arguments("multi_shot")).frames  # noqa: E731
    plain = make()
    pipe.load_lora_weights(GOLDEN / "lora.pt")
    adapted = make()
    assert (adapted - plain).abs().max() > 0.01
    pipe.fuse_lora()
    torch.testing.assert_close(make(), adapted, atol=2e-5, rtol=0)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(make(), plain, atol=2e-5, rtol=0)
