"""Two LoRAs of the embedded model, both loaded: switched in a live stream with their numbers of steps, scaled, fused,
saved and unloaded, on plain weights and on weights in 4 bits."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.models.lora_scaling import scaled_loras
from longlive_diffusers.nvfp4.quantizer import NVFP4Config, quantize_model
from longlive_diffusers.pipelines.chunk_step import Conditioning, chunk_step
from tests.support.short_toy import copy_of, short_toy_pipeline
from tests.support.toy_loras import save_toy_lora


CHUNK_SIZE, SHAPE, NUM_BLOCKS = 2, (1, 16, 6, 4, 4), 2
PROMPT = "a red circle moves left"
STEPS = {"four": 4, "two": 2}
KINDS = ["plain", "nvfp4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {name: save_toy_lora(folder / name, seed=steps, num_blocks=NUM_BLOCKS) for name, steps in STEPS.items()}


@cache
def prepared(kind: str, *loras: tuple[str, Path]) -> LongLivePipeline:
    pipe = short_toy_pipeline(NUM_BLOCKS)
    if kind == "nvfp4":
        quantize_model(pipe.transformer, NVFP4Config(backend="w4a16"))
    for name, file in loras:
        pipe.load_lora_weights(file, adapter_name=name)
    return pipe


def pipeline(kind: str, **loras: Path) -> LongLivePipeline:
    """A pipeline of the test's own."""
    return copy_of(prepared(kind, *loras.items()))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def pipe(kind, files) -> LongLivePipeline:
    """With both LoRAs, of which "four" acts."""
    pipe = pipeline(kind, **files)
    pipe.set_adapters("four")
    return pipe


def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def options(**changes) -> dict:
    return {"latents": noise(), "num_frames": 21, "output_type": "latent", **changes}


def run(pipe: LongLivePipeline, **changes) -> torch.Tensor:
    """Make the latents of two chunks, in two steps each."""
    return pipe(PROMPT, **options(latents=noise()[:, :, :4], num_frames=13, num_inference_steps=2, **changes)).frames


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Products with weights in 4 bits are computed in bfloat16; the text of another LoRA makes a difference of 0.1."""
    return bool((found - expected).norm() < 2e-3 * expected.norm())


def by_hand(pipes: dict[str, LongLivePipeline], names: list[str]) -> torch.Tensor:
    """Make a video of which each chunk is another network's, each with the one LoRA that it was loaded with. They
    share the frames in the cache; the text's keys and values are those of the chunk's own network."""
    pipe = pipes[names[0]]
    embeds, _ = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    cache = pipe.transformer.create_kv_cache(
        *(SHAPE[0], *SHAPE[3:]),
        window_size=pipe.config.window_size,
        sink_size=pipe.config.sink_size,
        multi_shot_sink=True,
        num_frames=SHAPE[2],
    )
    chunks = []
    with torch.no_grad():
        for index, name in enumerate(names):
            cache.clear_text()
            cache.begin_chunk(CHUNK_SIZE)
            chunk_noise = noise()[:, :, index * CHUNK_SIZE : (index + 1) * CHUNK_SIZE].contiguous()
            transformer, steps = pipes[name].transformer, STEPS.get(name, 4)
            chunks.append(
                chunk_step(
                    transformer, pipe.scheduler, chunk_noise, [cache], Conditioning(embeds), num_inference_steps=steps
                )
            )
    return torch.cat(chunks, dim=2)


# -- in a live stream ------------------------------------------------------------------------------------------------


def test_they_are_switched_between_chunks_with_their_numbers_of_steps(kind, files, pipe):
    names = ["four", "two", "four"]
    chunks = []
    with pipe.stream(PROMPT, **options()) as session:
        for name in names:
            pipe.set_adapters(name)
            session.num_inference_steps = STEPS[name]
            chunks.append(next(session).latents)
    alone = {name: pipeline(kind, **{name: file}) for name, file in files.items()}
    expected = by_hand(alone, names)
    assert near(torch.cat(chunks, dim=2), expected)
    assert not near(by_hand(alone, ["four"] * 3), expected)


def test_one_is_switched_off_and_on_between_chunks(kind, files, pipe):
    chunks = []
    with pipe.stream(PROMPT, **options()) as session:
        for name in ("four", "none", "four"):
            pipe.enable_lora() if name == "four" else pipe.disable_lora()
            chunks.append(next(session).latents)
    alone = {"four": pipeline(kind, four=files["four"]), "none": pipeline(kind)}
    assert near(torch.cat(chunks, dim=2), by_hand(alone, ["four", "none", "four"]))


@pytest.mark.parametrize("change", ["set_adapters", "attention_kwargs"])
def test_a_callback_changes_them_between_steps(pipe, change):
    """Halfway through the second chunk, to nothing: nothing of the LoRA's is left from then on, nor in the text."""

    def on_step_end(pipe, step, timestep, tensors):
        if step == 2:
            if change == "set_adapters":
                pipe.set_adapters("four", 0.0)
            else:
                pipe._attention_kwargs = {"scale": 0.0}
        return {}

    found = run(pipe, callback_on_step_end=on_step_end)
    pipe.set_adapters("four")

    def forget_the_text(module, arguments, keywords):
        keywords["kv_cache"].clear_text()

    with_all_text_anew = pipe.transformer.register_forward_pre_hook(forget_the_text, with_kwargs=True)
    expected = run(pipe, callback_on_step_end=on_step_end)
    with_all_text_anew.remove()
    pipe.set_adapters("four")
    assert near(found, expected) and not near(run(pipe), expected)


def test_they_are_switched_by_a_callback_while_another_thread_decodes(pipe):
    """The callback runs where chunks are denoised, so that it finds their borders."""

    def on_step_end(pipe, step, timestep, tensors):
        if step == 7:
            pipe.set_adapters("two")
        return {}

    def drain(**changes) -> torch.Tensor:
        pipe.set_adapters("four")
        with pipe.stream(PROMPT, callback_on_step_end=on_step_end, **options(**changes)) as session:
            return torch.cat([chunk.latents for chunk in session], dim=2)

    assert torch.equal(drain(async_decode=True), drain())


# -- fuse, scale, save, unload ---------------------------------------------------------------------------------------


def test_each_acts_by_itself_and_none_after_they_are_unloaded(kind, files, pipe):
    without = run(pipeline(kind))
    videos = {}
    for name, file in files.items():
        pipe.set_adapters(name)
        videos[name] = run(pipe)
        assert near(videos[name], run(pipeline(kind, **{name: file}))) and not near(videos[name], without)
    assert not near(videos["four"], videos["two"])
    pipe.set_adapters(["four", "two"], [0.0, 1.0])
    assert near(run(pipe), videos["two"])
    pipe.delete_adapters("two")
    pipe.set_adapters("four")
    assert near(run(pipe), videos["four"])
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), without)


def test_each_is_scaled(pipe):
    full = run(pipe)
    pipe.set_adapters("four", 0.5)
    half = run(pipe)
    pipe.set_adapters("four")
    assert near(run(pipe, attention_kwargs={"scale": 0.5}), half) and not near(half, full)
    assert torch.equal(run(pipe), full)


CHANGES = {
    "set_adapters": lambda pipe: pipe.set_adapters("four", 0.2),
    "set_adapters of the network": lambda pipe: pipe.transformer.set_adapters("four", 0.2),
    "fuse": lambda pipe: pipe.fuse_lora(components=["transformer"], adapter_names=["four"]),
    "unload": lambda pipe: pipe.unload_lora_weights(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_another_thread_changes_during_a_scaled_forward_is_as_it_says(kind, pipe, change):
    """It is neither lost when the scales are put back, nor made of those of the forward."""
    expected_pipe = copy_of(pipe)
    change(expected_pipe)
    expected, threads = run(expected_pipe), []

    def change_meanwhile(*_):
        if not threads:
            threads.append(threading.Thread(target=change, args=(pipe,)))
            threads[0].start()
            threads[0].join(0.3)  # it waits for this forward

    hook = pipe.transformer.blocks[0].register_forward_pre_hook(change_meanwhile)
    run(pipe, attention_kwargs={"scale": 0.5})
    threads[0].join()
    hook.remove()
    assert torch.equal(run(pipe), expected)


def test_taking_a_fused_one_out_waits_for_a_scaled_forward(files):
    pipe = pipeline("plain", **files)
    pipe.set_adapters("four")
    expected = run(pipe)
    pipe.fuse_lora(components=["transformer"], adapter_names=["four"])
    with scaled_loras_in_another_thread(pipe) as ended:
        pipe.unfuse_lora(components=["transformer"])
        assert ended.is_set()
    pipe.set_adapters("four")
    assert near(run(pipe), expected)


@contextmanager
def scaled_loras_in_another_thread(pipe) -> Iterator[threading.Event]:
    """What a forward of another thread does to the LoRAs for 0.3 seconds; gives what is set at its end."""
    begun, ended = threading.Event(), threading.Event()

    def forward() -> None:
        with pipe.transformer.lora_turns, scaled_loras(pipe.transformer, 0.5):
            begun.set()
            time.sleep(0.3)
            ended.set()

    thread = threading.Thread(target=forward)
    thread.start()
    begun.wait()
    yield ended
    thread.join()


def test_one_of_both_is_fused(kind, pipe):
    expected = run(pipe)
    pipe.fuse_lora(components=["transformer"], adapter_names=["four"])
    assert pipe.fused_loras == {"four"}
    fused = run(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe), fused)
    if kind == "plain":
        assert near(fused, expected)
    else:  # the sum is rounded to 4 bits once more
        assert (fused - expected).norm() < 0.5 * expected.norm()


def test_a_fused_one_is_taken_out_of_plain_weights_again(pipe, kind):
    expected = run(pipe)
    pipe.fuse_lora(components=["transformer"], adapter_names=["four"])
    if kind == "nvfp4":
        with pytest.raises(ValueError, match="cannot be taken out again: the sum was rounded"):
            pipe.unfuse_lora(components=["transformer"])
        return
    pipe.unfuse_lora(components=["transformer"])
    pipe.set_adapters("four")
    assert near(run(pipe), expected)


def test_each_is_saved_as_it_was_loaded(pipe, files, tmp_path):
    for name, file in files.items():
        LongLivePipeline.save_lora_weights(
            tmp_path / name,
            transformer_lora_layers=get_peft_model_state_dict(pipe.transformer, adapter_name=name),
            transformer_lora_adapter_metadata=pipe.transformer.peft_config[name].to_dict(),
        )
        saved, expected = load_file(tmp_path / name / file.name), load_file(file)
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key].float()) for key in expected)


# -- another network's -----------------------------------------------------------------------------------------------


def of_another_width(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: t.repeat(1, 2) if ".lora_A." in k else t.repeat(2, 1) for k, t in lora.items()}


def of_more_blocks(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return lora | {k.replace("blocks.0.", "blocks.29."): t.clone() for k, t in lora.items() if "blocks.0." in k}


def with_other_names(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("attn1", "attn").replace("attn2", "attn"): tensor for key, tensor in lora.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_width, r"20 layers: blocks\.0\.\S+ is \(\d+, 192\), its LoRA \(\d+, 384\)"),
        (of_more_blocks, r"10 layers: blocks\.29\.\S+ does not exist"),
        (with_other_names, r"8 layers: blocks\.0\.attn\.to_\S+ does not exist"),
        (lambda lora: {k.replace("lora_A", "lora_C"): t for k, t in lora.items()}, "layers without lora_A or lora_B"),
    ],
    ids=["width", "blocks", "names", "halves"],
)
def test_one_of_another_network_is_refused_and_leaves_all_as_it_was(kind, files, tmp_path, change, message):
    pipe = pipeline(kind, four=files["four"])
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    save_file(change(load_file(files["two"])), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        pipe.load_lora_weights(str(tmp_path / "other.safetensors"), adapter_name="other")
    assert "\n" not in str(error.value)
    assert pipe.get_list_adapters() == {"transformer": ["four"]}
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
