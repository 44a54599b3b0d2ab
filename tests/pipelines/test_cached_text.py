"""The text's keys and values are computed once, and again whenever they would come out differently."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.models.text_fingerprint import text_fingerprint, text_layers
from tests.support.short_toy import copy_of, short_toy_pipeline
from tests.support.toy_loras import save_toy_lora


PROMPT = "a red circle moves left"
NUM_BLOCKS = 3


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {
        name: save_toy_lora(folder / name, seed=seed, num_blocks=NUM_BLOCKS)
        for seed, name in enumerate(("one", "two"))
    }


@cache
def prepared(*loras: tuple[str, Path]) -> LongLivePipeline:
    pipe = short_toy_pipeline(NUM_BLOCKS)
    for name, file in loras:
        pipe.load_lora_weights(file, adapter_name=name)
    if loras:
        pipe.set_adapters("one")
    return pipe


def pipeline(**loras: Path) -> LongLivePipeline:
    """A pipeline of the test's own."""
    return copy_of(prepared(*loras.items()))


def options(**changes) -> dict:
    noise = torch.randn(1, 16, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    return {"latents": noise, "num_frames": 21, "num_inference_steps": 2, "output_type": "latent", **changes}


def chunks(pipe: LongLivePipeline, change: Callable[[LongLivePipeline], object], **changes) -> torch.Tensor:
    """Make three chunks, with a change after the first."""
    with pipe.stream(PROMPT, **options(**changes)) as session:
        made = [next(session).latents]
        change(pipe)
        return torch.cat([*made, *(chunk.latents for chunk in session)], dim=2)


def forget_always(pipe: LongLivePipeline) -> None:
    pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, keywords: keywords["kv_cache"].clear_text(), with_kwargs=True
    )


def count_projections(pipe: LongLivePipeline, monkeypatch) -> list[int]:
    """What is appended to whenever a text is projected."""
    embedder, counted = type(pipe.transformer.condition_embedder.text_embedder), []
    forward = embedder.forward
    monkeypatch.setattr(embedder, "forward", lambda *arguments: counted.append(1) or forward(*arguments))
    return counted


def scaled_in_place(name: str, pipe: LongLivePipeline, *, through_data: bool = False) -> None:
    weight = pipe.transformer.get_parameter(name)
    with torch.no_grad():
        (weight.data if through_data else weight).mul_(1.5)


def replaced(name: str, pipe: LongLivePipeline) -> None:
    path, _, own = name.rpartition(".")
    old = pipe.transformer.get_parameter(name)
    setattr(pipe.transformer.get_submodule(path), own, nn.Parameter(1.5 * old.detach(), requires_grad=False))


def in_memory(name: str, pipe: LongLivePipeline) -> None:
    weight = pipe.transformer.get_parameter(name)
    weight.data = 1.5 * weight.data


def hooked(pipe: LongLivePipeline) -> None:
    pipe.transformer.blocks[1].attn2.to_k.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def fused_at(scale: float, pipe: LongLivePipeline) -> None:
    pipe.fuse_lora(lora_scale=scale)


def fused_and_gone(pipe: LongLivePipeline) -> None:
    pipe.fuse_lora()
    pipe.unload_lora_weights()


KEY, VALUE, NORM = (f"blocks.2.attn2.{name}.weight" for name in ("to_k", "to_v", "norm_k"))
EMBEDDER = "condition_embedder.text_embedder.linear_1.bias"
WITHOUT_LORA = {
    "a key's weight, in place": partial(scaled_in_place, KEY),
    "a value's weight, in place": partial(scaled_in_place, VALUE),
    "a norm's weight, in place": partial(scaled_in_place, NORM),
    "the embedder's bias, in place": partial(scaled_in_place, EMBEDDER),
    "a key's weight, through data": partial(scaled_in_place, KEY, through_data=True),
    "the embedder's bias, through data": partial(scaled_in_place, EMBEDDER, through_data=True),
    "another parameter": partial(replaced, VALUE),
    "another memory": partial(in_memory, NORM),
    "a hook": hooked,
}
WITH_LORA = {
    "switched": lambda pipe: pipe.set_adapters("two"),
    "both": lambda pipe: pipe.set_adapters(["one", "two"], [0.5, 0.5]),
    "scaled": lambda pipe: pipe.set_adapters("one", 0.3),
    "disabled": lambda pipe: pipe.disable_lora(),
    "fused": partial(fused_at, 1.0),
    "fused in part": partial(fused_at, 0.5),
    "fused and unloaded": fused_and_gone,
    "unloaded": lambda pipe: pipe.unload_lora_weights(),
    "deleted": lambda pipe: pipe.delete_adapters("one"),
    "a LoRA's weight, in place": partial(scaled_in_place, "blocks.0.attn2.to_k.lora_B.one.weight"),
    "a LoRA's weight, through data": partial(
        scaled_in_place, "blocks.0.attn2.to_v.lora_A.one.weight", through_data=True
    ),
}


def unchanged(make: Callable[[], LongLivePipeline]) -> torch.Tensor:
    return chunks(make(), lambda pipe: None)


@pytest.fixture(scope="module")
def without_lora() -> torch.Tensor:
    return unchanged(pipeline)


@pytest.fixture(scope="module")
def with_loras(files) -> torch.Tensor:
    return unchanged(lambda: pipeline(**files))


def check(
    make: Callable[[], LongLivePipeline], change: Callable[[LongLivePipeline], object], untouched: torch.Tensor
) -> None:
    """What is made after a change has nothing left of what was before it, and is not what is made without it."""
    pipe = make()
    forget_always(pipe)
    expected, found = chunks(pipe, change), chunks(make(), change)
    assert torch.equal(found, expected)
    assert not torch.equal(untouched[:, :, 2:], expected[:, :, 2:])


@pytest.mark.parametrize("change", WITHOUT_LORA.values(), ids=WITHOUT_LORA)
def test_weights_that_change_between_chunks_change_the_text(change, without_lora):
    check(pipeline, change, without_lora)


@pytest.mark.parametrize("change", WITH_LORA.values(), ids=WITH_LORA)
def test_loras_that_change_between_chunks_change_the_text(files, change, with_loras):
    check(lambda: pipeline(**files), change, with_loras)


def test_a_lora_that_is_loaded_changes_the_text(files, without_lora):
    check(pipeline, lambda pipe: pipe.load_lora_weights(files["two"]), without_lora)


def test_another_lora_of_the_same_name_changes_the_text(files):
    def load_again(pipe):
        pipe.delete_adapters("one")
        pipe.load_lora_weights(files["two"], adapter_name="one")
        pipe.set_adapters("one")

    def make() -> LongLivePipeline:
        return pipeline(one=files["one"])

    check(make, load_again, unchanged(make))


def test_a_lora_that_is_unfused_changes_the_text(files):
    def make() -> LongLivePipeline:
        pipe = pipeline(**files)
        pipe.fuse_lora()
        return pipe

    check(make, lambda pipe: pipe.unfuse_lora(), unchanged(make))


def test_one_that_is_fused_again_at_another_scale_changes_the_text(files):
    """Here no list of names and scales says so: only the weights do."""

    def make() -> LongLivePipeline:
        pipe = pipeline(one=files["one"])
        pipe.fuse_lora()
        return pipe

    def fuse_again(pipe):
        pipe.unfuse_lora()
        pipe.set_adapters("one", 0.3)
        pipe.fuse_lora()
        for layer in pipe.transformer.modules():
            if hasattr(layer, "scaling"):
                layer.scaling["one"] = 1.0

    check(make, fuse_again, unchanged(make))


@pytest.mark.parametrize("change", [lambda pipe: pipe.set_adapters("two"), partial(scaled_in_place, KEY)])
def test_a_callback_changes_them_between_steps(files, change):
    def on_step_end(pipe, step, timestep, tensors):
        if step == 2:
            change(pipe)
        return {}

    loras = {} if isinstance(change, partial) else files
    pipe = pipeline(**loras)
    forget_always(pipe)
    nothing: Callable = lambda pipe: None  # noqa: E731
    expected = chunks(pipe, nothing, callback_on_step_end=on_step_end)
    assert torch.equal(chunks(pipeline(**loras), nothing, callback_on_step_end=on_step_end), expected)
    assert not torch.equal(chunks(pipeline(**loras), nothing), expected)


@pytest.mark.parametrize(
    ("changed_after", "clean_pass"), [(0, "full"), (1, "full"), (2, "full"), (1, "text_free"), (1, "last")]
)
def test_attention_kwargs_that_a_callback_sets_change_the_text(files, changed_after, clean_pass):
    """Also those that it sets after the last step of a chunk, whose clean pass has the scale of before."""

    def on_step_end(pipe, step, timestep, tensors):
        if step == changed_after:
            pipe._attention_kwargs = {"scale": 0.3}
        return {}

    pipe, changes = pipeline(**files), {"callback_on_step_end": on_step_end, "clean_pass": clean_pass}
    forget_always(pipe)
    expected = chunks(pipe, lambda pipe: None, **changes)
    assert torch.equal(chunks(pipeline(**files), lambda pipe: None, **changes), expected)


def test_autocast_that_begins_or_ends_between_chunks_changes_the_text():
    pipe = pipeline()
    with pipe.stream(PROMPT, **options()) as session:
        with torch.autocast("cpu", torch.bfloat16):
            next(session)
        found = next(session).latents
        with torch.autocast("cpu", torch.bfloat16):
            rounded = next(session).latents
    assert torch.isfinite(found).all() and torch.isfinite(rounded).all()


# -- computed once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_callback", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_it_is_computed_once_where_nothing_changes(files, monkeypatch, with_callback, guidance_scale):
    pipe = pipeline(**files)
    counted = count_projections(pipe, monkeypatch)
    callback = {"callback_on_step_end": lambda *arguments: {}} if with_callback else {}
    chunks(pipe, lambda pipe: None, guidance_scale=guidance_scale, **callback)
    assert len(counted) == (1 if guidance_scale == 1 else 2)


def test_weights_that_make_no_text_may_change(files, monkeypatch):
    pipe = pipeline(**files)
    counted = count_projections(pipe, monkeypatch)
    chunks(pipe, partial(scaled_in_place, "blocks.2.attn1.to_k.base_layer.weight"))
    assert len(counted) == 1


def test_in_inference_mode_it_is_computed_for_every_chunk(monkeypatch):
    """There, PyTorch counts no changes of tensors that were made there."""
    with torch.inference_mode():
        pipe = pipeline()
        for parameter in pipe.transformer.parameters():
            parameter.data = parameter.data.clone()
        counted = count_projections(pipe, monkeypatch)
        pipe.transformer.blocks[0].attn2.to_k.weight = nn.Parameter(
            pipe.transformer.blocks[0].attn2.to_k.weight.clone(), requires_grad=False
        )
        chunks(pipe, lambda pipe: None)
    assert len(counted) == 3


def test_a_fingerprint_is_of_what_makes_the_text_alone():
    pipe = pipeline()
    transformer = pipe.transformer
    assert text_fingerprint(transformer) == text_fingerprint(transformer)
    assert len(list(text_layers(transformer))) == 1 + 3 * len(transformer.blocks)
    assert text_fingerprint(deepcopy(transformer)) != text_fingerprint(transformer)
    assert text_fingerprint(transformer.to("meta")) is None
