"""Components on devices of their own, without offloading. The meta device stands in for another GPU."""

import torch

from tests.support.tiny_pipeline import TEXT_DIM, TEXT_LENGTH, tiny_arguments, tiny_pipeline


def test_latents_and_caches_are_where_the_transformer_is():
    """diffusers would say that a pipeline is where its first component is, which is the text encoder."""
    pipe = tiny_pipeline()
    pipe.transformer.to("meta")
    assert pipe.device.type == "cpu"
    assert pipe._execution_device.type == "meta"
    assert pipe.vae_device.type == "cpu"


def test_prompts_are_encoded_where_the_text_encoder_is():
    pipe = tiny_pipeline()
    pipe.transformer.to("meta")
    seen = []
    pipe.text_encoder.register_forward_pre_hook(lambda module, arguments: seen.extend(arguments))
    embeds, _ = pipe.encode_prompt("a cat", max_sequence_length=TEXT_LENGTH, do_classifier_free_guidance=False)
    assert embeds.device.type == "meta" and embeds.shape == (1, TEXT_LENGTH, TEXT_DIM)
    assert {tensor.device.type for tensor in seen} == {"cpu"}


def test_pixels_are_finer_than_the_precision_of_the_vae():
    """bfloat16 has steps of 1/256 between 0.5 and 1; half a level of 8 bits is less."""
    pipe = tiny_pipeline()
    pipe.vae.to(torch.bfloat16)
    frames = pipe(**tiny_arguments(output_type="pt")).frames
    assert frames.dtype == torch.float32
    upper = frames[frames > 0.5]
    assert (upper * 256 % 1 != 0).any()
