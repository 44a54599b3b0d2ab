"""NVFP4 on a GPU: what tensor cores and kernels make against what a CPU does."""

import pytest
import torch

from longlive_diffusers import NVFP4Config
from longlive_diffusers.nvfp4 import NVFP4Linear, nvfp4_layers, quantize_model
from longlive_diffusers.nvfp4.backends import BACKENDS
from tests.nvfp4.test_linear import inputs, plain_linear, relative
from tests.support.nvfp4_models import small_pipeline, small_transformer
from tests.support.tiny_pipeline import tiny_arguments


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_layer_gives_what_it_gives_on_a_cpu(backend):
    layer = NVFP4Linear.from_linear(plain_linear(), backend=backend if backend not in ("scaled_mm", "te") else "auto")
    reference = {"scaled_mm": "emulate", "te": "emulate"}.get(backend, backend)
    expected = NVFP4Linear.from_linear(plain_linear(), backend=reference)(inputs())
    layer.set_backend(backend)
    layer = layer.to("cuda", torch.bfloat16)
    if layer.backend.name != backend:
        pytest.skip(f"this GPU has no '{backend}': '{layer.backend.name}' is used")
    gate = 0.1 if backend == "te" else 8e-3  # TransformerEngine rounds in its own way
    assert relative(layer(inputs().to("cuda", torch.bfloat16)).cpu(), expected) < gate


def test_gradients_reach_the_input():
    layer = NVFP4Linear.from_linear(plain_linear()).to("cuda", torch.bfloat16)
    x = inputs().to("cuda", torch.bfloat16).requires_grad_()
    layer(x).float().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["nvfp4", "fp8"])
def test_a_video_with_a_packed_cache_is_that_of_a_cpu(kind):
    arguments = {"num_frames": 45, "kv_cache_dtype": kind}
    noise = torch.randn(1, 8, 12, 4, 4, generator=torch.Generator().manual_seed(1))
    pipe = small_pipeline().to("cuda")
    on_gpu = pipe(**tiny_arguments(**arguments, latents=noise)).frames.cpu()
    on_cpu = small_pipeline()(**tiny_arguments(**arguments, latents=noise)).frames
    assert relative(on_gpu, on_cpu) < 5e-3


def test_a_quantised_pipeline_runs_and_names_its_backend():
    pipe = small_pipeline(transformer=quantize_model(small_transformer(), NVFP4Config())).to("cuda")
    frames = pipe(**tiny_arguments(kv_cache_dtype="nvfp4")).frames
    assert torch.isfinite(frames).all()
    assert {layer.backend.name for layer in nvfp4_layers(pipe.transformer).values()} <= {"scaled_mm", "fp8", "w4a16"}
