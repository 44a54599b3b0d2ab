"""NVFP4 on a GPU: what tensor cores and kernels make against what a CPU does."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import nn

from longlive_diffusers import NVFP4Config
from longlive_diffusers.fp8.rows import rows_to_fp8
from longlive_diffusers.models.frame_store import FP8Frames, NVFP4Frames
from longlive_diffusers.models.layer_kv_cache import allocate_slots
from longlive_diffusers.nvfp4 import NVFP4Linear, nvfp4_layers, quantize, quantize_model
from longlive_diffusers.nvfp4.backends import BACKENDS
from tests.nvfp4.test_linear import inputs, plain_linear, relative
from tests.support.checks import NEEDS_GPU, needs_two_gpus
from tests.support.nvfp4_models import small_pipeline, small_transformer
from tests.support.tiny_pipeline import tiny_arguments


pytestmark = [*NEEDS_GPU]


@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_a_layer_gives_what_it_gives_on_a_cpu(backend):
    layer = NVFP4Linear.from_linear(plain_linear(), backend=backend).to("cuda", torch.bfloat16)
    if layer.backend.name != backend:
        pytest.skip(f"this GPU has no '{backend}': '{layer.backend.name}' is used")
    x = inputs().to(torch.bfloat16)  # both round the same numbers to few bits
    gate = 0.1 if backend == "te" else 8e-3  # TransformerEngine rounds in its own way
    assert relative(layer(x.to("cuda")).cpu(), product_on_a_cpu(layer.cpu(), x.float(), backend)) < gate


def product_on_a_cpu(layer, x, backend):
    """What a backend computes, in float32."""
    weight, rows = layer.dequantize(torch.float32), x
    if backend == "fp8":
        weight, rows = (codes.float() * scale for codes, scale in (rows_to_fp8(weight), rows_to_fp8(rows)))
    elif backend != "w4a16":
        rows = quantize(rows).dequantize(torch.float32)
    return rows @ weight.T + layer.bias.float()


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


def test_a_quantized_pipeline_runs_and_names_its_backend():
    pipe = small_pipeline(transformer=quantize_model(small_transformer(), NVFP4Config())).to("cuda")
    frames = pipe(**tiny_arguments(kv_cache_dtype="nvfp4")).frames
    assert torch.isfinite(frames).all()
    assert {layer.backend.name for layer in nvfp4_layers(pipe.transformer).values()} <= {"scaled_mm", "w4a16"}


# ---------------------------------------------------------------------------------------------- kernels and offloading
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FP8Frames, NVFP4Frames])
def test_a_cache_is_unpacked_as_on_a_cpu(kind, dtype):
    """Bit for bit, and nothing beyond the slots that are read; the tokens are no multiple of a program's."""
    shape = (2, 3, 8, 880, 128)
    on_cpu, on_gpu = (kind(shape, torch.device(device), for_keys=True) for device in ("cpu", "cuda"))
    for slot in range(8):
        states = torch.randn(2, 1, *shape[1:2], *shape[3:], generator=torch.Generator().manual_seed(slot))
        on_cpu.write(torch.arange(2)[:, None], torch.full((2, 1), slot), states)
    for name, stored in vars(on_cpu).items():
        if isinstance(stored, torch.Tensor):
            setattr(on_gpu, name, stored.to("cuda"))
    expected, found = torch.zeros(shape, dtype=dtype), allocate_slots(shape, dtype, torch.device("cuda"))
    on_cpu.read_into(expected[:, :, :5])
    on_gpu.read_into(found[:, :, :5])
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("kind", [FP8Frames, NVFP4Frames])
def test_a_finished_chunk_is_stored_as_on_a_cpu(kind):
    """Values, which have no mean, bit for bit."""
    shape, chosen = (2, 3, 8, 880, 128), torch.tensor([[6, 1, 7], [2, 0, 5]])
    window = allocate_slots(shape, torch.bfloat16, torch.device("cuda"))
    window.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    on_cpu, on_gpu = (kind(shape, torch.device(device), for_keys=False) for device in ("cpu", "cuda"))
    on_cpu.write_from(window.cpu(), chosen)
    on_gpu.write_from(window, chosen.cuda())
    assert all(torch.equal(part.cpu(), own) for part, own in zip(on_gpu.parts, on_cpu.parts, strict=True))


@needs_two_gpus
def test_kernels_run_where_their_tensors_are():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    expected = quantize(x)
    with torch.cuda.device(0):
        found = quantize(x.to("cuda:1"))
        assert torch.equal(found.codes.cpu(), expected.codes)
        assert torch.equal(found.dequantize(torch.float32).cpu(), expected.dequantize(torch.float32))
        codes, scales = rows_to_fp8(x.to("cuda:1"))
        assert codes.device == scales.device == torch.device("cuda", 1)
        expected_codes, expected_scales = rows_to_fp8(x)
        assert torch.equal(codes.cpu().view(torch.uint8), expected_codes.view(torch.uint8))
        assert torch.equal(scales.cpu(), expected_scales)


@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("backend", ["auto", "fp8"])
def test_offloaded_layers_compute_on_the_gpu(backend, use_stream):
    # In a network of several layers: diffusers never waits for the copy of a layer that is the whole network.
    model = nn.Sequential(*(NVFP4Linear.from_linear(plain_linear(), backend=backend) for _ in range(2)))
    direct = copy.deepcopy(model).to("cuda")
    expected = [layer(inputs().to("cuda")) for layer in direct]
    model.forward = lambda x: [layer(x) for layer in model]
    apply_group_offloading(model, onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=use_stream)
    for _ in range(3):
        assert all(map(torch.equal, model(inputs().to("cuda")), expected))
    if use_stream:  # without, the layer has been selected anew for the CPU
        assert model[0].backend is direct[0].backend


def test_sequentially_offloaded_layers_compute_on_the_gpu():
    layer = NVFP4Linear.from_linear(plain_linear())
    direct = copy.deepcopy(layer).to("cuda")
    cpu_offload(layer, torch.device("cuda"), offload_buffers=True)
    for _ in range(3):
        assert torch.equal(layer(inputs().to("cuda")), direct(inputs().to("cuda")))
    assert layer.backend is direct.backend
