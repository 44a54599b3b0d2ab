"""The published weights of TAEHV: every name and shape of the public architecture has its place, pixels are the same,
and what is another file is refused with its names."""

import re

import pytest
import torch
from safetensors.torch import save_file

from longlive_diffusers import LongLiveTransformer3DModel, TinyVideoDecoder
from longlive_diffusers.loaders.tiny_decoder import LAYERS, rename_decoder
from tests.support.taehv import (
    LATENT_CHANNELS,
    WIDTHS,
    decode_all_at_once,
    taew2_2_decoder,
    taew2_2_state_dict,
)


SMALL = (16, 12, 8, 8)  # channels; all else as published


@pytest.fixture(scope="module")
def public():
    torch.manual_seed(0)
    return taew2_2_decoder(SMALL).eval()


@pytest.fixture
def weights(public) -> dict[str, torch.Tensor]:
    return taew2_2_state_dict(public)


def test_every_weight_of_the_published_architecture_has_a_place_of_its_shape():
    with torch.device("meta"):
        published, own = taew2_2_decoder(), TinyVideoDecoder()
    renamed = rename_decoder({f"decoder.{name}": x for name, x in published.state_dict().items()}, "a file")
    assert {name: x.shape for name, x in renamed.items()} == {name: x.shape for name, x in own.state_dict().items()}
    assert len(renamed) == 64
    assert sum(parameter.numel() for parameter in own.parameters()) == 9_923_532
    assert sorted(LAYERS) == sorted({int(name.split(".")[0]) for name in published.state_dict()})


def test_the_defaults_are_the_published_architecture():
    with torch.device("meta"):
        decoder = TinyVideoDecoder()
    assert (decoder.config.latent_channels, decoder.config.block_out_channels) == (LATENT_CHANNELS, WIDTHS)
    assert (decoder.spatial_scale, decoder.temporal_scale) == (16, 4)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_pixels_are_those_of_the_public_network(public, weights, frames):
    own = TinyVideoDecoder.from_original(weights)
    assert own.config.block_out_channels == SMALL
    latents = 2 * torch.randn(2, LATENT_CHANNELS, frames, 3, 4, generator=torch.Generator().manual_seed(1))
    expected = decode_all_at_once(public, latents)
    with torch.no_grad():
        pixels = own(latents)[0].clamp(-1, 1)
    assert pixels.shape == expected.shape == (2, 3, 1 + 4 * (frames - 1), 48, 64)
    assert expected.std() > 0.01
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_file_is_read_in_the_dtype_that_it_is_stored_in(tmp_path, weights, suffix, dtype):
    path, stored = tmp_path / f"taew2_2{suffix}", {name: x.to(dtype) for name, x in weights.items()}
    torch.save(stored, path) if suffix == ".pth" else save_file(stored, path)
    decoder = TinyVideoDecoder.from_original(path)
    assert {x.dtype for x in decoder.state_dict().values()} == {dtype} and not decoder.training
    assert torch.equal(decoder.conv_in.weight, stored["decoder.1.weight"])
    converted = TinyVideoDecoder.from_original(path, torch_dtype=torch.bfloat16)
    assert converted.dtype == torch.bfloat16
    path.unlink()  # nothing is mapped from it any more
    assert torch.equal(decoder.stages[2].blocks[1].conv3.bias, stored["decoder.16.conv.4.bias"])


def test_of_a_layer_that_makes_two_frames_where_one_is_wanted_the_second_is_kept(weights):
    first, second = weights["decoder.7.conv.weight"] + 1, weights["decoder.7.conv.weight"]
    decoder = TinyVideoDecoder.from_original({**weights, "decoder.7.conv.weight": torch.cat([first, second])})
    assert torch.equal(decoder.stages[0].time_conv.weight, second)


def test_other_networks_of_the_family_are_read_by_their_shapes():
    """Of patches of one pixel, for instance, and that double the frames three times."""
    public = taew2_2_decoder((8, 8, 8, 8), latent_channels=16, counts=(2, 2, 2))
    public[-1] = torch.nn.Conv2d(8, 3, 3, padding=1)
    weights = taew2_2_state_dict(public)
    decoder = TinyVideoDecoder.from_original(weights, time_upscale=(True, True, True))
    assert (decoder.config.latent_channels, decoder.spatial_scale, decoder.temporal_scale) == (16, 8, 8)
    assert decoder(torch.zeros(1, 16, 2, 2, 2))[0].shape == (1, 3, 9, 16, 16)


def without(name: str):
    return lambda weights: {key: x for key, x in weights.items() if key != name}


def plus(name: str, tensor: torch.Tensor):
    return lambda weights: {**weights, name: tensor}


NAN = torch.full((16, 48, 3, 3), float("nan"))
REFUSED = {
    "a missing weight": (without("decoder.9.conv.2.bias"), ["1 missing: stages.1.blocks.0.conv2.bias"]),
    "no first layer": (without("decoder.1.weight"), ["conv_in.weight is missing"]),
    "no last layer": (without("decoder.22.weight"), ["conv_out.weight is missing"]),
    "an unknown layer": (plus("decoder.23.weight", torch.ones(3)), ["1 unexpected: decoder.23.weight"]),
    "an unknown part of a block": (plus("decoder.3.skip.weight", torch.ones(3)), ["stages.0.blocks.0.skip.weight"]),
    "another network beside it": (plus("upsampler.0.weight", torch.ones(3)), ["unexpected: upsampler.0.weight"]),
    "a wider block": (
        plus("decoder.15.conv.0.weight", torch.ones(9, 16, 3, 3)),
        ["stages.2.blocks.0.conv1.weight (9, 16, 3, 3) instead of (8, 16, 3, 3)"],
    ),
    "three frames of one": (plus("decoder.13.conv.weight", torch.ones(36, 12, 1, 1)), ["(36, 12, 1, 1)"]),
    "a layer of vectors": (plus("decoder.1.weight", torch.ones(16, 48)), ["conv_in.weight is (16, 48)"]),
    "a patch that is no square": (
        lambda weights: {**weights, "decoder.22.weight": torch.ones(15, 8, 3, 3), "decoder.22.bias": torch.ones(15)},
        ["conv_out.weight (15, 8, 3, 3) instead of (12, 8, 3, 3)"],
    ),
    "integers": (plus("decoder.1.weight", torch.ones(16, 48, 3, 3, dtype=torch.int8)), ["decoder.1.weight", "int8"]),
    "numbers that are none": (plus("decoder.1.weight", NAN), ["conv_in.weight", "6912 infinities or NaN"]),
    "the encoder alone": (
        lambda weights: {"encoder.0.weight": torch.ones(3)},
        ["no tiny decoder", "encoder.0.weight"],
    ),
    "nothing": (lambda weights: {}, ["no tiny decoder", "0 tensors"]),
    "another model": (lambda weights: {"blocks.0.attn1.to_q.weight": torch.ones(3)}, ["blocks.0.attn1.to_q.weight"]),
}


@pytest.mark.parametrize(("change", "named"), REFUSED.values(), ids=REFUSED)
def test_what_is_another_file_is_refused_with_its_names(weights, change, named):
    with pytest.raises(ValueError) as caught:
        TinyVideoDecoder.from_original(change(weights))
    assert all(words in str(caught.value) for words in named), caught.value


def test_settings_that_contradict_the_weights_are_refused(weights):
    with pytest.raises(ValueError, match=re.escape("stages.0.time_conv.weight (16, 16, 1, 1) instead of (32,")):
        TinyVideoDecoder.from_original(weights, time_upscale=(True, True, True))
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        TinyVideoDecoder.from_original(weights, latent_channels=16)
    with pytest.raises(ValueError, match="float8"):
        TinyVideoDecoder.from_original(weights, torch_dtype=torch.float8_e4m3fn)


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint file"):
        TinyVideoDecoder.from_original(tmp_path / "taew2_2.pth")
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match="an HTML page"):
        TinyVideoDecoder.from_original(tmp_path / "page.pth")


def test_a_transformer_is_not_taken_for_a_decoder_nor_a_decoder_for_a_transformer(weights):
    with pytest.raises(ValueError, match="holds no weights of a Wan transformer"):
        LongLiveTransformer3DModel.from_original(weights)
