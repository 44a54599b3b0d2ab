"""What runs on a fake GPU to find tensors of different devices: pipelines, training steps, layers in few bits.

Everything has the width of the 5B model, its videos and clips their true size; there are fewer layers, which are all
alike, and a VAE of fewer channels.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.benchmark.sizes import SIZES
from longlive_diffusers.nvfp4.format import encode_matrix
from longlive_diffusers.nvfp4.linear import NVFP4Linear
from longlive_diffusers.nvfp4.recipes import RECIPES
from longlive_diffusers.nvfp4.rules import scale_rule_named
from longlive_diffusers.nvfp4.training import NVFP4TrainingLinear
from tests.support.fake_backward import backward
from tests.support.fake_cuda import DeviceMismatch, on_gpu
from tests.support.tiny_tokenizer import tiny_tokenizer


SIZE = SIZES["5b"]()
CHUNKS = 6  # two more than the window holds
SMALL_VAE = {**SIZE.vae, "base_dim": 16, "decoder_base_dim": 16, "num_res_blocks": 1}
TEXT_ENCODER = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 256384}
ROWS, IN_FEATURES, OUT_FEATURES = 7040, 3072, 14336  # the first linear layer of a feed-forward, for a chunk

Check = tuple[str, tuple[int, int], Callable[[], object]]
"""A name, the compute capability of the GPU it is for, and what to run there."""


def fake_transformer(dtype: torch.dtype = torch.bfloat16, **config) -> LongLiveTransformer3DModel:
    kept = LongLiveTransformer3DModel._keep_in_fp32_modules if dtype != torch.float32 else ()
    model = on_gpu(lambda: LongLiveTransformer3DModel(**{**SIZE.transformer, **config}), dtype, kept)
    # By its name: to choose between its kernels, PyTorch would ask the GPU what it is.
    model.set_attention_backend("_native_flash")
    return model


def fake_text_encoder(**config) -> UMT5EncoderModel:
    return on_gpu(lambda: UMT5EncoderModel(UMT5Config(**{**TEXT_ENCODER, **config})), torch.bfloat16)


def fake_vae(config: dict) -> AutoencoderKLWan:
    return on_gpu(lambda: AutoencoderKLWan(**config), torch.bfloat16)


def fake_pipeline(num_layers: int, vae: dict) -> LongLivePipeline:
    pipe = LongLivePipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=fake_text_encoder(num_layers=min(num_layers, TEXT_ENCODER["num_layers"])),
        vae=fake_vae(vae),
        transformer=fake_transformer(num_layers=num_layers),
        scheduler=LongLiveScheduler(),
        window_size=SIZE.window_size,
        sink_size=SIZE.sink_size,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(frames: int) -> torch.Tensor:
    return torch.zeros(1, SIZE.transformer["in_channels"], frames, SIZE.height, SIZE.width)


def stream(switches: bool = False, **options) -> None:
    """Make six chunks; with `switches`, under another prompt from the fifth on, and a cut before the sixth."""
    pipe = fake_pipeline(2, SMALL_VAE)
    if "shot_prompts" not in options:
        options = {"prompt": "a cat runs", **options}
    if "latents" not in options:
        options = {"num_frames": SIZE.num_frames(CHUNKS), **options}
    with pipe.stream(generator=torch.Generator(), **{"output_type": "pt", **options}) as session:
        for chunk in range(CHUNKS):
            if switches and chunk == 4:
                session.prompt = "a dog runs"
            if switches and chunk == 5:
                session.cut("a fox sleeps")
            made = next(session)
            if {made.frames.device.type, made.latents.device.type} != {"cuda"}:
                raise DeviceMismatch(f"frames and latents on different devices than the GPU, of chunk {chunk}")


def training_step(
    model: LongLiveTransformer3DModel, frames: int, *, has_clean: bool = True
) -> Callable[[], torch.Tensor]:
    """Return a function that runs one forward of a clip under autocast, and returns the loss."""
    shape = (1, SIZE.transformer["in_channels"], frames, SIZE.height, SIZE.width)
    noisy, clean = (torch.zeros(shape, device="cuda") for _ in range(2))
    timestep = torch.zeros(1, frames, device="cuda")
    text_shape = (1, frames // SIZE.chunk_size, SIZE.text_tokens, SIZE.transformer["text_dim"])
    text, positions = torch.zeros(text_shape, device="cuda"), torch.arange(frames)

    def loss() -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            velocity = model(
                noisy,
                timestep,
                text,
                clean_hidden_states=clean if has_clean else None,
                frame_positions=positions,
                return_dict=False,
            )[0]
        return velocity.float().square().mean()

    return loss


def train(*, checkpointing: bool, has_clean: bool = True) -> None:
    model = fake_transformer(torch.float32, num_layers=2).train().requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    gradients = backward(training_step(model, 4 * SIZE.chunk_size, has_clean=has_clean)())
    assert all(gradients.get(parameter) is not None for parameter in model.parameters())


def layer(backend: str) -> Callable[[], torch.Tensor]:
    """Return a forward of a layer whose weight is in NVFP4."""
    linear = NVFP4Linear(IN_FEATURES, OUT_FEATURES, backend=backend, device="cuda", dtype=torch.bfloat16)
    assert linear.backend is not None and linear.backend.name == backend
    states = torch.zeros(ROWS, IN_FEATURES, device="cuda", dtype=torch.bfloat16)
    return lambda: linear(states)


def training_layer(recipe: str) -> Callable[[], object]:
    """Return a forward and backward of a layer that is trained in NVFP4."""
    plain = on_gpu(lambda: torch.nn.Linear(IN_FEATURES, OUT_FEATURES), torch.float32).requires_grad_(True)
    linear = NVFP4TrainingLinear.from_linear(plain, RECIPES[recipe])
    states = torch.zeros(ROWS, IN_FEATURES, device="cuda", requires_grad=True)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = linear(states).float().sum()
        return backward(loss)

    return step


def without_triton() -> None:
    """Quantize and dequantize in plain PyTorch, as is done where Triton does not load."""
    for block in ((1, 16), (16, 16)):
        states = torch.zeros(ROWS, IN_FEATURES, device="cuda", dtype=torch.bfloat16)
        rounded = encode_matrix(states, torch.zeros(1, device="cuda"), scale_rule_named("mse"), block)
        assert rounded.codes.device.type == rounded.scales.device.type == "cuda"


HOPPER, BLACKWELL = (9, 0), (10, 0)


def all_checks() -> Iterator[Check]:
    streams = {
        "text": {},
        "guidance": {"guidance_scale": 3.0, "negative_prompt": "a dog"},
        "image latents": {"image_latents": latents(1)},
        "image latents, guidance": {"image_latents": latents(1), "guidance_scale": 3.0},
        "video latents": {"video_latents": latents(2 * SIZE.chunk_size)},
        "given noise": {"latents": latents(CHUNKS * SIZE.chunk_size)},
        "image": {"image": torch.zeros(3, 704, 1280)},
        "shots": {"shot_prompts": ["a cat runs", "a dog sleeps"]},
        "relative RoPE": {"num_frames": None},
        "cache in float32": {"kv_cache_dtype": torch.float32},
        "cache in FP8": {"kv_cache_dtype": "fp8"},
        "cache in FP8, relative RoPE": {"kv_cache_dtype": "fp8", "num_frames": None},
        "cache in NVFP4": {"kv_cache_dtype": "nvfp4"},
        "cache in NVFP4, relative RoPE": {"kv_cache_dtype": "nvfp4", "num_frames": None},
        "two videos": {"prompt": ["a cat runs", "a dog sleeps"]},
        "latent output": {"output_type": "latent"},
        "prompt switch, recache, cut": {"switches": True},
        "the same, relative RoPE, guidance": {"switches": True, "num_frames": None, "guidance_scale": 3.0},
        "the same, FP8, two videos": {"switches": True, "kv_cache_dtype": "fp8", "prompt": ["a cat", "a dog"]},
    }
    for name, options in streams.items():
        yield f"stream: {name}", HOPPER, partial(stream, **options)
    yield "training: teacher forcing", HOPPER, partial(train, checkpointing=False)
    yield "training: teacher forcing, checkpointing", HOPPER, partial(train, checkpointing=True)
    yield "training: block causal", HOPPER, partial(train, checkpointing=False, has_clean=False)
    yield "NVFP4: quantized without Triton", HOPPER, without_triton
    for backend in ("fp8", "w4a16", "emulate"):
        yield f"NVFP4: layer by {backend}", HOPPER, lambda backend=backend: layer(backend)()
    yield "NVFP4: layer by scaled_mm", BLACKWELL, lambda: layer("scaled_mm")()
    for recipe in RECIPES:
        yield f"NVFP4: training by {recipe}", HOPPER, lambda recipe=recipe: training_layer(recipe)()
