"""The own forward of the VAE's decoder: its parts against diffusers' modules, and which decoders it is for."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D, WanDecoder3d, WanResample, WanRMS_norm
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from longlive_diffusers import StreamingDecoder
from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.models import streaming_vae
from longlive_diffusers.models.compiled import compiled_for
from longlive_diffusers.models.wan_decoder import cached_convolutions, decode_frames, operators
from longlive_diffusers.models.wan_decoder.history import from_feature_cache, into_feature_cache
from longlive_diffusers.models.wan_decoder.norm_silu import norm_silu_after
from longlive_diffusers.models.wan_decoder.pending_sum import PendingSum
from longlive_diffusers.models.wan_decoder.published_modules import is_as_published
from longlive_diffusers.models.wan_decoder.upsample import add_repeated, double_and_convolve
from longlive_diffusers.parallel.columns import HEIGHT, WIDTH, ColumnSplit
from tests.support.fake_cuda import as_cudnn_returns
from tests.support.storage_watch import StorageWatch
from tests.support.tiny_vae import tiny_vae, wan_2_1_vae
from tests.support.traffic import Traffic


def toy_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(toy_pipeline_path() / "vae").eval()


VAES = {"wan 2.2": tiny_vae, "wan 2.1": wan_2_1_vae, "embedded": toy_vae}
every_vae = pytest.mark.parametrize("make_vae", VAES.values(), ids=VAES)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_for(vae: AutoencoderKLWan, frames: int, height: int = 2, width: int = 3, batch: int = 1) -> torch.Tensor:
    return random(batch, vae.config.z_dim, frames, height, width).to(vae.dtype)


def stream(vae: AutoencoderKLWan, latents: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    decoder = StreamingDecoder(vae)
    return torch.cat([decoder.decode(chunk) for chunk in latents.split(lengths, dim=2)], dim=2)


@torch.no_grad()
def whole(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents).sample


assert_close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


def rms(errors: torch.Tensor) -> float:
    return errors.double().square().mean().sqrt().item()


# -- the whole -------------------------------------------------------------------------------------------------------


@every_vae
@pytest.mark.parametrize("height, width, batch", [(1, 1, 1), (3, 5, 2), (7, 2, 1)])
def test_chunks_of_five_frames_are_decoded_in_several_calls(make_vae, height, width, batch):
    vae = make_vae()
    latents = latents_for(vae, 9, height, width, batch)
    assert_close(stream(vae, latents, (5, 1, 3)), whole(vae, latents))


@every_vae
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_pixels_are_no_further_from_those_of_float32_than_those_of_the_modules(make_vae, dtype):
    vae = make_vae()
    latents = latents_for(vae, 4, 4, 4)
    exact = whole(vae, latents)
    vae.to(dtype)
    latents = latents.to(dtype)
    of_modules, found = (rms(pixels.float() - exact) for pixels in (whole(vae, latents), stream(vae, latents, (1, 3))))
    assert found < 1.1 * of_modules


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
    "frames first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a larger tensor": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, dim=-2)[..., ::2, :],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_latents_may_have_any_memory_layout(layout):
    vae = tiny_vae()
    latents = latents_for(vae, 5, batch=2)
    assert_close(stream(vae, LAYOUTS[layout](latents), (2, 3)), whole(vae, latents))


def test_it_takes_a_fraction_of_the_operators_and_bytes_of_the_modules():
    vae, counts = tiny_vae(), []
    latents = latents_for(vae, 4, 4, 4)
    hook = vae.decoder.register_forward_hook(lambda *arguments: None)
    for prepare in (lambda: None, hook.remove):
        prepare()
        decoder = StreamingDecoder(vae)
        decoder.decode(latents)
        with Traffic("cpu") as traffic:
            decoder.decode(latents)
        counts.append((traffic.totals.kernels, traffic.totals.num_bytes))
    (kernels, num_bytes), (own_kernels, own_bytes) = counts
    assert own_kernels < 0.25 * kernels
    assert own_bytes < 0.6 * num_bytes


# -- on a GPU: as far as it can be seen on tensors without numbers ----------------------------------------------------


@pytest.fixture
def on_meta(monkeypatch):
    """Returns a VAE without numbers and latents for it, for which the operators of a GPU are called."""
    monkeypatch.setattr(operators, "runs_kernels", lambda frames: True)

    def prepare(make_vae: Callable[[], AutoencoderKLWan], frames: int) -> tuple[AutoencoderKLWan, torch.Tensor]:
        vae = make_vae().to("meta").requires_grad_(False)
        return vae, torch.empty(1, vae.config.z_dim, frames, 4, 4, device="meta")

    return prepare


class Biases(TorchDispatchMode):
    """Counts the convolutions, those that add a bias, and the kernels that do."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        place = {"convolution": 2, "wan_norm_silu_after": 3, "wan_add_": 1}.get(func.overloadpacket.__name__)
        if place is not None:
            name = func.overloadpacket.__name__
            self.counts[name == "convolution", args[place] is not None] += 1
        return func(*args, **(kwargs or {}))


@every_vae
def test_on_a_gpu_kernels_add_the_biases_of_convolutions(on_meta, make_vae):
    """Each once, and no convolution its own, which would take another pass; but that of `post_quant_conv`, which is
    small."""
    vae, latents = on_meta(make_vae, 3)
    decoder = StreamingDecoder(vae)
    decoder.decode(latents)
    with Biases() as biases:
        decoder.decode(latents)
    by_convolutions, without, by_kernels = (biases.counts[key] for key in ((True, True), (True, False), (False, True)))
    assert by_convolutions == 1
    assert by_kernels == without > 10


class Peak(StorageWatch):
    """The most bytes that are held at once."""

    peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket.__name__ == "convolution":
            result = as_cudnn_returns(result, args[0])
        self.peak = max(self.peak, self.alive_bytes())
        return result


def test_features_are_freed_when_the_next_ones_are_there(on_meta):
    """Four are held at most: a sum, its two terms, and what is normalized of it, with two more frames. What a
    convolution keeps of the frames before is freed as soon as there is what it keeps of these."""
    vae, latents = on_meta(tiny_vae, 4)
    cache = [None] * vae._cached_conv_counts["decoder"]
    with Peak([*vae.parameters(), latents]) as watch:
        into_feature_cache(from_feature_cache(vae.decoder, cache, latents), cache)
        kept = from_feature_cache(vae.decoder, cache, latents)
        size = sum(frames.nbytes for frames in kept)
        decode_frames.decode_frames(vae.decoder, latents, kept, False)
    largest = latents.new_empty(1, 16, 32, 32, 8).nbytes
    assert kept == [] and set(cache) == {None}
    assert watch.peak <= (4 + 4 / 16) * largest + size


# -- several frames at once ------------------------------------------------------------------------------------------

WAN_2_2 = {
    "dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "temperal_upsample": [True, True, False],
    "out_channels": 12,
    "is_residual": True,
}


@pytest.mark.parametrize(
    "batch, height, width, expected", [(1, 44, 80, 4), (2, 44, 80, 1), (1, 22, 40, 4), (1, 68, 120, 1), (1, 50, 90, 3)]
)
def test_a_convolution_gets_fewer_numbers_than_cudnn_counts(batch, height, width, expected):
    """A frame of Wan2.2's decoder has at most 64 h w pixels of 512 channels, four for each latent frame."""
    with torch.device("meta"):
        decoder = WanDecoder3d(**WAN_2_2)
    assert cached_convolutions.frames_at_once(decoder, batch, height, width, 4) == expected
    numbers = [batch * (4 * frames + 2) * 64 * height * width * 512 for frames in (expected, expected + 1)]
    assert numbers[0] < 2**31
    assert expected == 4 or numbers[1] >= 2**31


@every_vae
def test_the_convolutions_are_those_of_the_feature_cache(make_vae):
    """Their order, and the sizes of their inputs."""
    vae = make_vae()
    cache, latents = [None] * vae._cached_conv_counts["decoder"], latents_for(vae, 2)
    with torch.no_grad():
        for index, frame in enumerate(latents.split(1, dim=2)):
            vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=index == 0)
    shapes = [tuple(entry.shape[1:2] + entry.shape[3:]) for entry in cache if entry is not None]
    assert shapes == [
        (convolution.module.in_channels, 2 * convolution.scale, 3 * convolution.scale)
        for convolution in cached_convolutions.cached_convolutions(vae.decoder)
    ]


@pytest.mark.parametrize("most, calls", [(4, [1, 4, 1, 3]), (2, [1, 2, 2, 1, 2, 1]), (1, [1] * 9)])
def test_frames_are_decoded_together_as_memory_allows(monkeypatch, most, calls):
    vae, counts = tiny_vae(), []

    def counting(decoder, latents, *arguments):
        counts.append(latents.shape[2])
        return decode_frames.decode_frames(decoder, latents, *arguments)

    monkeypatch.setattr("longlive_diffusers.models.streaming_vae.decode_frames", counting)
    monkeypatch.setattr(cached_convolutions, "MOST_ELEMENTS", (4 * most + 2) * 64 * 2 * 3 * 8)
    latents = latents_for(vae, 9)
    assert_close(stream(vae, latents, (6, 3)), whole(vae, latents))
    assert counts == calls


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (7, 4)])
def test_a_transposed_convolution_doubles_and_convolves(height, width, dtype):
    torch.manual_seed(0)
    module = WanResample(12, "upsample2d").to(dtype)
    frames = random(2, 3, height, width, 12).to(dtype)
    with torch.no_grad():
        found = double_and_convolve(module.resample[1], frames, None).add_up()
        expected = module(frames.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(found, expected, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("channels", [(8, 8), (16, 8), (8, 16), (12, 6), (32, 8)], ids=str)
@pytest.mark.parametrize("factor_t", [1, 2])
def test_repetitions_are_those_of_the_module(channels, factor_t, first):
    module = DupUp3D(*channels, factor_t, factor_s=2)
    frames = random(2, 1 if first else 3, 2, 5, channels[0])
    expected = module(frames.movedim(-1, 1), first_chunk=first).movedim(1, -1)
    before = random(*expected.shape, seed=1)
    found = add_repeated(PendingSum(before.clone()), module, frames, first).add_up()
    assert torch.equal(found, before + expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e3])
def test_norm_and_activation_are_those_of_the_modules(dtype, size):
    norm = WanRMS_norm(12, images=False)
    norm.gamma.data = random(12, 1, 1, 1, seed=1)
    norm.to(dtype)
    kept, frames = random(2, 2, 3, 2, 12, seed=2).to(dtype), (size * random(2, 3, 3, 2, 12)).to(dtype)
    frames[0, 1, 2, 1] = 0
    with torch.no_grad():
        joined, after = norm_silu_after(kept, PendingSum(frames), norm.gamma)
        expected = F.silu(norm(frames.movedim(-1, 1))).movedim(1, -1)
    assert torch.equal(joined[:, :2], kept)
    assert torch.equal(after, joined[:, -2:])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(joined[:, 2:], expected, atol=tolerance, rtol=tolerance)


# -- whose parameters, and when --------------------------------------------------------------------------------------


def double_in_place(vae: AutoencoderKLWan) -> None:
    for parameter in vae.decoder.parameters():
        parameter.data.mul_(1.5)


def load_others(vae: AutoencoderKLWan) -> None:
    vae.load_state_dict(tiny_vae(seed=1).state_dict())


def replace_weights(vae: AutoencoderKLWan) -> None:
    upsampler = vae.decoder.up_blocks[0].upsampler.resample[1]
    upsampler.weight = nn.Parameter(upsampler.weight.flip(0))


def in_double(vae: AutoencoderKLWan) -> None:
    vae.to(torch.float64)


@pytest.mark.parametrize("change", [double_in_place, load_others, replace_weights, in_double])
def test_parameters_are_those_at_the_time_of_the_call(change):
    vae = tiny_vae()
    decoder = StreamingDecoder(vae)
    decoder.decode(latents_for(vae, 2))
    change(vae)
    decoder.reset()
    latents = latents_for(vae, 3)
    assert_close(decoder.decode(latents), whole(vae, latents))


class OtherBlock(type(tiny_vae().decoder.mid_block.attentions[0])):
    def forward(self, x):
        return 2 * super().forward(x)


def with_a_subclass(decoder: WanDecoder3d) -> None:
    decoder.mid_block.attentions[0].__class__ = OtherBlock


def with_a_hook(decoder: WanDecoder3d) -> None:
    decoder.up_blocks[1].resnets[0].norm1.register_forward_hook(lambda module, args, output: output * 1.5)


def with_a_hook_before(decoder: WanDecoder3d) -> None:
    decoder.conv_out.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))


def with_another_forward(decoder: WanDecoder3d) -> None:
    convolution = decoder.mid_block.resnets[0].conv2
    forward = convolution.forward
    convolution.forward = lambda *args: forward(*args) * 1.5


def with_another_activation(decoder: WanDecoder3d) -> None:
    decoder.up_blocks[0].resnets[0].nonlinearity = nn.GELU()


def with_a_layer_around_one(decoder: WanDecoder3d) -> None:
    decoder.mid_block.attentions[0].proj = nn.Sequential(decoder.mid_block.attentions[0].proj, nn.Tanh())


CHANGED = [
    with_a_subclass,
    with_a_hook,
    with_a_hook_before,
    with_another_forward,
    with_another_activation,
    with_a_layer_around_one,
]


@pytest.mark.parametrize("change", CHANGED)
def test_a_decoder_that_was_changed_is_called(change):
    vae = tiny_vae()
    latents = latents_for(vae, 4)
    before = whole(vae, latents)
    change(vae.decoder)
    changed = whole(vae, latents)
    assert (changed - before).abs().max() > 1e-3
    assert_close(stream(vae, latents, (1, 2, 1)), changed)


def test_a_decoder_that_the_user_compiled_is_called():
    vae, counter = tiny_vae(), CompileCounter()
    latents = latents_for(vae, 1)
    expected = whole(vae, latents)
    vae.decoder = torch.compile(vae.decoder, backend=counter)
    assert_close(StreamingDecoder(vae).decode(latents), expected)
    assert counter.frame_count > 0


def offload_leaves(vae: AutoencoderKLWan) -> None:
    vae.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )


def cast_by_layer(vae: AutoencoderKLWan) -> None:
    vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def drop_out(vae: AutoencoderKLWan) -> None:
    vae.decoder.mid_block.resnets[0].dropout.p = 0.5
    vae.decoder.train()


def compile_a_part(vae: AutoencoderKLWan) -> None:
    vae.decoder.mid_block.compile()


@pytest.mark.parametrize("prepare", [offload_leaves, cast_by_layer, drop_out, compile_a_part])
def test_modules_that_do_more_than_their_class_are_called(prepare):
    vae = tiny_vae()
    assert is_as_published(vae.decoder)
    prepare(vae)
    assert not is_as_published(vae.decoder)


@every_vae
@pytest.mark.parametrize(
    "calls", [(True, False, True), (False, True, False)], ids=["own second", "own first and last"]
)
def test_one_may_go_on_where_the_other_left_off(make_vae, calls):
    """Hooks may come and go within a video."""
    vae = make_vae()
    latents = latents_for(vae, 4)
    expected, decoder, pixels = whole(vae, latents), StreamingDecoder(vae), []
    for called, chunk in zip(calls, latents.split((1, 1, 2), dim=2), strict=True):
        handle = vae.decoder.register_forward_hook(lambda *arguments: None) if called else None
        assert is_as_published(vae.decoder) != called
        pixels.append(decoder.decode(chunk))
        if handle is not None:
            handle.remove()
    assert_close(torch.cat(pixels, dim=2), expected)


def test_a_video_may_go_on_outside_of_inference_mode():
    vae = tiny_vae()
    latents = latents_for(vae, 4)
    decoder = StreamingDecoder(vae)
    with torch.inference_mode():
        first = decoder.decode(latents[:, :, :2]).clone()
    assert_close(torch.cat([first, decoder.decode(latents[:, :, 2:])], dim=2), whole(vae, latents))


# -- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def counter(monkeypatch):
    """Counts the graphs."""
    torch._dynamo.reset()
    compiled_for.cache_clear()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    yield counter
    compiled_for.cache_clear()


def smallest_vae() -> tuple[AutoencoderKLWan, AutoencoderKLWan]:
    """A VAE, and the same one compiled."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=0, temperal_downsample=[True], is_residual=True
    ).eval()
    compiled = copy.deepcopy(vae)
    compiled.decoder.compile()
    return vae, compiled


@torch._dynamo.config.patch(recompile_limit=2)  # 8 by itself, which four sizes would reach
def test_a_compiled_decoder_has_graphs_for_every_size(counter):
    vae, compiled = smallest_vae()
    sizes = [(2, 2), (2, 3)]
    for _ in range(2):
        for height, width in sizes:
            latents = latents_for(vae, 3, height, width)
            assert_close(stream(compiled, latents, (1, 2)), stream(vae, latents, (1, 2)))
        assert counter.frame_count == 2 * len(sizes)


def test_a_compiled_decoder_has_a_graph_for_the_first_frame_and_one_for_each_number_of_frames(counter):
    vae, compiled = smallest_vae()
    lengths = (1, 4, 3, 4, 2, 1, 1, 6, 4)
    for _ in range(2):  # another video has the graphs already
        latents = latents_for(vae, sum(lengths))
        assert_close(stream(compiled, latents, lengths), stream(vae, latents, lengths))
        assert counter.frame_count == 1 + 4


@pytest.mark.parametrize("axis", [WIDTH, HEIGHT])
@pytest.mark.parametrize("columns", [(3, 2), (2, 3), (4, 4, 3), (1, 1)])
def test_ranks_decode_the_same_numbers_of_frames_at_once(monkeypatch, axis, columns):
    """Also where only the widest part allows fewer: they exchange columns in each call."""
    called = []

    def note(decoder, frames, kept, first, split):
        called.append(frames.shape[2])
        return frames, kept

    monkeypatch.setattr(streaming_vae, "decode_frames", note)
    decoder, numbers = StreamingDecoder(tiny_vae()), []
    for most in (2**30, *range(2_000, 80_000, 1_000)):
        monkeypatch.setattr(cached_convolutions, "MOST_ELEMENTS", most)
        for rank, own in enumerate(columns):
            called.clear()
            size = [4, 4]
            size[axis] = own
            split = ColumnSplit(columns, rank, axis)
            cache = [None] * decoder.vae._cached_conv_counts["decoder"]
            decoder._compute(torch.zeros(1, 8, 9, *size), cache, True, split)
            numbers.append(tuple(called))
        assert len(set(numbers)) == 1
        numbers.clear()
