"""Offloading a whole pipeline: the video is the same, every model is brought back when it runs, and goes afterwards.

The VAE deserves the attention that it gets here: streaming calls its encoder and decoder directly, not its `forward`,
which is where hooks sit. Without an accelerator, diffusers offloads to and from the CPU if it is told to: hooks run,
but only with parameters on the meta device (sequential offloading) or on disk (group offloading) does a missing hook
show.
"""

import accelerate
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.hooks import apply_group_offloading

from longlive_diffusers import LongLivePipeline
from tests.support.checks import needs_gpu
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


CPU = torch.device("cpu")
IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
VIDEO = [IMAGE] * 5
CALLS = {
    "text": {},
    "guided": {"guidance_scale": 3.0},
    "image": {"image": IMAGE},
    "video": {"video": VIDEO},
}
every_call = pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)


def run(pipe, **overrides) -> np.ndarray:
    return pipe(**tiny_arguments(output_type="np", **overrides)).frames


def streamed(pipe, **overrides) -> np.ndarray:
    with pipe.stream(**tiny_arguments(output_type="np", **overrides)) as session:
        return np.concatenate([chunk.frames for chunk in session], axis=1)


def test_what_is_decoded_at_the_end_has_what_decodes_it(monkeypatch):
    pipe = tiny_pipeline(vae=None)
    pipe.enable_model_cpu_offload(device=CPU)
    monkeypatch.setattr(pipe.transformer, "forward", None)
    for call in (run, streamed):
        with pytest.raises(ValueError, match="Pixels need an AutoencoderKLWan, this pipeline's VAE is NoneType"):
            call(pipe)


def models_of(pipe) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipe, name) for name in ("text_encoder", "transformer", "vae")}


def devices_of(pipe) -> set[str]:
    return {parameter.device.type for model in models_of(pipe).values() for parameter in model.parameters()}


@pytest.fixture
def brought(monkeypatch) -> list[str]:
    """The models in the order in which model offloading brings them; diffusers renews its hooks often."""
    order = []
    pre_forward = accelerate.hooks.CpuOffload.pre_forward

    def recording(hook, module, *args, **kwargs):
        order.append(type(module).__name__)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", recording)
    return order


def sequential_offload(pipe) -> LongLivePipeline:
    """What `pipe.enable_sequential_cpu_offload()` does; with "cpu:0", as it says, accelerate trips over the CPU."""
    for model in models_of(pipe).values():
        accelerate.cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)
    return pipe


def group_offload(pipe, folder, **grouping) -> LongLivePipeline:
    """To disk, a folder for each model: diffusers names the files by layer alone. The text encoder stays: on a CPU,
    diffusers does not bring transformers' UMT5 back from disk."""
    for name, model in (("transformer", pipe.transformer), ("vae", pipe.vae)):
        apply_group_offloading(model, CPU, CPU, offload_to_disk_path=str(folder / name), **grouping)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))  # what is not brought back from the disk shows
    return pipe


# -- model offload ---------------------------------------------------------------------------------------------------


@every_call
def test_model_offload_makes_the_same_video(arguments):
    expected = run(tiny_pipeline(), **arguments)
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        np.testing.assert_allclose(run(pipe, **arguments), expected, atol=1e-5)


@every_call
def test_model_offload_brings_every_model_to_the_device(arguments, brought):
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    run(pipe, **arguments)
    assert set(brought) == {"UMT5EncoderModel", "LongLiveTransformer3DModel", "AutoencoderKLWan"}


def test_model_offload_brings_each_model_once_though_there_are_many_chunks(brought):
    """The whole video is decoded at the end: otherwise transformer and VAE would change places for every chunk."""
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    run(pipe, num_frames=29)
    changes = [name for name, before in zip(brought, [None, *brought], strict=False) if name != before]
    assert changes == ["UMT5EncoderModel", "LongLiveTransformer3DModel", "AutoencoderKLWan"]


def test_model_offload_serves_streams():
    expected = run(tiny_pipeline())
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(streamed(pipe), expected, atol=1e-5)


def test_the_hooks_are_renewed_when_a_stream_is_closed_early():
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    before = list(pipe._all_hooks)
    with pipe.stream(**tiny_arguments(num_frames=None)) as session:
        next(session)
    assert len(pipe._all_hooks) == len(before) and not set(map(id, before)) & set(map(id, pipe._all_hooks))


def test_hooks_can_be_removed():
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.remove_all_hooks()
    assert not pipe.is_offloaded
    np.testing.assert_array_equal(run(pipe), run(tiny_pipeline()))


def test_offloading_and_asynchronous_decoding_exclude_each_other():
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="async_decode"):
        pipe.stream(**tiny_arguments(), async_decode=True)


# -- sequential offload ----------------------------------------------------------------------------------------------


@every_call
def test_sequential_offload_makes_the_same_video(arguments):
    expected = run(tiny_pipeline(), **arguments)
    pipe = sequential_offload(tiny_pipeline())
    for _ in range(2):
        assert devices_of(pipe) == {"meta"}
        np.testing.assert_allclose(run(pipe, **arguments), expected, atol=1e-5)
    assert devices_of(pipe) == {"meta"}


def test_sequential_offload_serves_streams():
    pipe = sequential_offload(tiny_pipeline())
    np.testing.assert_allclose(streamed(pipe), run(tiny_pipeline()), atol=1e-5)


# -- group offload ---------------------------------------------------------------------------------------------------

GROUPS = {
    "leaf level": {"offload_type": "leaf_level"},
    "block level": {"offload_type": "block_level", "num_blocks_per_group": 1},
}


@pytest.mark.parametrize("grouping", GROUPS.values(), ids=GROUPS)
@every_call
def test_group_offload_to_disk_makes_the_same_video(arguments, grouping, tmp_path):
    expected = run(tiny_pipeline(), **arguments)
    pipe = group_offload(tiny_pipeline(), tmp_path, **grouping)
    for _ in range(2):
        np.testing.assert_allclose(run(pipe, **arguments), expected, atol=1e-5)


@pytest.mark.parametrize("grouping", GROUPS.values(), ids=GROUPS)
def test_group_offload_serves_streams(grouping, tmp_path):
    pipe = group_offload(tiny_pipeline(), tmp_path, **grouping)
    np.testing.assert_allclose(streamed(pipe), run(tiny_pipeline()), atol=1e-5)


# -- layerwise casting -----------------------------------------------------------------------------------------------


@every_call
def test_layerwise_casting_makes_nearly_the_same_latents(arguments):
    arguments = tiny_arguments(**arguments)
    expected = tiny_pipeline()(**arguments).frames
    pipe = tiny_pipeline()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = pipe(**(arguments | {"generator": torch.Generator().manual_seed(0)})).frames
    assert found.dtype == torch.float32
    assert (found - expected).square().mean().sqrt() < 0.1 * expected.square().mean().sqrt()


# -- on a GPU --------------------------------------------------------------------------------------------------------

ON_GPU = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "group": lambda pipe: pipe.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=True
    ),
}


@needs_gpu
@pytest.mark.parametrize("offload", ON_GPU.values(), ids=ON_GPU)
@every_call
def test_offloading_on_a_gpu_makes_the_same_video(arguments, offload, request):
    pipe: LongLivePipeline = tiny_pipeline()
    expected = run(pipe.to("cuda"), **arguments)
    pipe = tiny_pipeline()
    offload(pipe)
    for _ in range(2):
        np.testing.assert_allclose(run(pipe, **arguments), expected, atol=1e-3)
    # With streams a layer brings the next one, which stays where a later forward does not run it.
    weights = [weight for model in models_of(pipe).values() for weight in model.parameters()]
    left = sum(weight.nbytes for weight in weights if weight.is_cuda)
    assert left <= (sum(weight.nbytes for weight in weights) / 5 if "group" in request.node.callspec.id else 0)
