"""What the benchmark makes of a profile. The events of a GPU are written as torch's profiler gives them."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd.profiler_util import DeviceType, Interval, Kernel
from torch.nn import functional as F

from longlive_diffusers.benchmark.profiling import (
    PARTS,
    Work,
    kind_of,
    profile_forward,
    waits_in_chunk,
    work_on_gpu,
)
from longlive_diffusers.models.attend import MATMUL_ATTENTION, attend


CPU = torch.device("cpu")


def event(name, start=0, end=1, *, parent=None, kernels=(), device=DeviceType.CPU, annotates=False):
    return SimpleNamespace(
        name=name,
        time_range=Interval(start, end),
        cpu_parent=parent,
        kernels=list(kernels),
        device_type=device,
        is_user_annotation=annotates,
    )


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "linear"),
        ("aten::mm", "linear"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_flash_attention_forward", "attention"),
        ("flash_attn_3::fwd", "attention"),
        ("aten::bmm", "attention"),
        ("aten::_softmax", "attention"),
        ("longlive_diffusers::matmul_attention", "attention"),
        ("longlive_diffusers::fp8_matmul", "linear"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNN", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linear"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "rest"),
        ("aten::mul", "rest"),
        ("aten::mm_like", "rest"),
        ("aten::native_layer_norm", "rest"),
        ("aten::copy_", "rest"),
    ],
)
def test_operators_are_told_apart(operator, kind):
    assert kind_of(operator) == kind


@pytest.mark.parametrize(
    ("attention", "kernel"),
    [
        (lambda q: F.scaled_dot_product_attention(q, q, q), "aten::_scaled_dot_product_flash_attention_for_cpu"),
        (
            lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(256, 256, requires_grad=True)),
            "aten::_scaled_dot_product_attention_math",
        ),
        (lambda q: attend(q.bfloat16(), q.bfloat16(), q.bfloat16()), MATMUL_ATTENTION),
    ],
    ids=["flash", "math", "matrix products"],
)
def test_the_attention_that_ran_is_named(attention, kernel):
    query, weight = torch.randn(2, 64, 256, 32), torch.randn(64, 64)  # large: a kernel takes longer than its calls
    with torch.no_grad():
        profiled = profile_forward(lambda: (attention(query), F.linear(weight, weight), weight.exp()), CPU)
    kernels = profiled["attention_kernels"]
    assert next(iter(kernels)) == kernel and kernels[kernel] > 0.7
    assert sum(kernels.values()) == pytest.approx(1)
    assert all("attention" in name for name in kernels)  # also for the products and copies that they call
    shares = profiled["shares"]
    assert list(shares) == ["attention", "linear", "rest"] and min(shares.values()) > 0
    assert sum(shares.values()) == pytest.approx(1)
    assert profiled["kernels"] is None


def test_without_attention_no_kernel_is_named():
    profiled = profile_forward(lambda: torch.ones(4) + 1, CPU)
    assert profiled["attention_kernels"] == {} and profiled["shares"]["rest"] == 1


def test_what_the_profiler_does_not_see_has_no_shares():
    profiled = profile_forward(lambda: None, CPU)
    assert profiled == {"shares": dict.fromkeys(PARTS), "attention_kernels": {}, "kernels": None}


def test_kernels_belong_to_the_operator_that_launched_them():
    product, fill, copy = Kernel("nvjet_tst", 0, 5.0), Kernel("fill", 0, 1.0), Kernel("copy", 0, 2.0)
    attention = event("aten::scaled_dot_product_attention")
    flash = event("aten::_flash_attention_forward", parent=attention, kernels=[Kernel("pytorch_flash::fwd", 0, 7.0)])
    events = [
        attention,
        flash,
        event("aten::copy_", parent=flash, kernels=[copy]),
        event("aten::addmm", kernels=[product]),
        event("aten::copy_", kernels=[copy]),
        event("aten::zero_", kernels=[fill]),
        event("cudaLaunchKernel"),
        event("pytorch_flash::fwd", 0, 7, device=DeviceType.CUDA),
        event("copy", 7, 9, device=DeviceType.CUDA),
        event("nvjet_tst", 9, 14, device=DeviceType.CUDA),
        event("copy", 14, 16, device=DeviceType.CUDA),
        event("fill", 16, 17, device=DeviceType.CUDA),
        event("_attn_fwd", 17, 20, device=DeviceType.CUDA),  # Triton's, which no operator launches
        event("triton_norm", 20, 24, device=DeviceType.CUDA),
        event("forward", 0, 24, device=DeviceType.CUDA, annotates=True),
    ]
    assert list(work_on_gpu(events)) == [
        Work("pytorch_flash::fwd", "attention", 7),
        Work("copy", "attention", 2),
        Work("nvjet_tst", "linear", 5),
        Work("copy", "rest", 2),
        Work("fill", "rest", 1),
        Work("_attn_fwd", "attention", 3),
        Work("triton_norm", "rest", 4),
    ]


def test_only_waits_within_the_chunk_count():
    events = [
        event("cudaStreamSynchronize", 0, 1),
        event("longlive bench: a chunk", 2, 10),
        event("longlive bench: a chunk", 3, 12, device=DeviceType.CUDA, annotates=True),
        event("cudaLaunchKernel", 2, 3),
        event("cudaStreamSynchronize", 3, 4),
        event("cudaMemcpyAsync", 4, 5),
        event("cudaEventSynchronize", 5, 6),
        event("cudaStreamSynchronize", 9, 11),
        event("cudaDeviceSynchronize", 10, 20),  # the end of the measurement
    ]
    assert waits_in_chunk(events) == 3
