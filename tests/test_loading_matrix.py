"""With the package imported, stock diffusers loads and shares our pipelines, from a folder and from the Hub, without
`trust_remote_code`; without it, a saved pipeline says what is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline
from safetensors.torch import load, save

from longlive_diffusers import LongLivePipeline, LongLiveScheduler, LongLiveTransformer3DModel
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline, tiny_wan_transformer


if TYPE_CHECKING:
    from tests.support.hub import Hub


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(folder)
    return folder


def latents_of(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**tiny_arguments(output_type="latent")).frames


def test_a_saved_pipeline_names_the_package_and_carries_a_card(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "LongLivePipeline"
    assert index["transformer"] == ["longlive_diffusers", "LongLiveTransformer3DModel"]
    assert index["scheduler"] == ["longlive_diffusers", "LongLiveScheduler"]
    card = (saved / "README.md").read_text()
    assert "pip install longlive-diffusers" in card
    assert "library_name: diffusers" in card


def test_a_card_names_the_folder_that_is_saved_to_from_within(tmp_path, monkeypatch):
    folder = tmp_path / "foxes"
    (folder / "parts").mkdir(parents=True)
    for here, saved_to in ((folder, "."), (folder / "parts", "..")):
        monkeypatch.chdir(here)
        tiny_pipeline().save_pretrained(saved_to)
        card = (folder / "README.md").read_text()
        assert "# foxes\n" in card and 'from_pretrained("foxes", ' in card
        (folder / "README.md").unlink()


def test_from_pretrained_gives_the_pipeline_back(saved):
    pipe = DiffusionPipeline.from_pretrained(saved)
    assert type(pipe) is LongLivePipeline
    assert pipe.config.window_size == 6
    torch.testing.assert_close(latents_of(pipe), latents_of(tiny_pipeline()), atol=0, rtol=0)


def test_auto_model_loads_the_transformer(saved):
    assert type(AutoModel.from_pretrained(str(saved), subfolder="transformer")) is LongLiveTransformer3DModel


def test_a_component_can_be_replaced(saved):
    other = LongLiveTransformer3DModel.from_pretrained(saved, subfolder="transformer")
    scheduler = LongLiveScheduler.from_pretrained(saved, subfolder="scheduler", flow_shift=3.0)
    pipe = DiffusionPipeline.from_pretrained(saved, transformer=other, scheduler=scheduler)
    assert pipe.transformer is other
    assert pipe.scheduler.config.flow_shift == 3.0


def test_a_component_of_the_wrong_kind_is_refused(saved):
    with pytest.raises(ValueError, match="should be"):
        DiffusionPipeline.from_pretrained(saved, transformer=LongLiveScheduler())


def test_from_pipe_shares_the_components():
    pipe = tiny_pipeline()
    again = LongLivePipeline.from_pipe(pipe, window_size=10)
    assert again.transformer is pipe.transformer
    assert again.config.window_size == 10


def test_other_peoples_conversions_load(tmp_path):
    """They have the layout of a Wan pipeline: a `WanTransformer3DModel` and a UniPC scheduler."""
    tiny, wan_transformer = tiny_pipeline(), tiny_wan_transformer()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=4.0)
    WanPipeline(
        tokenizer=tiny.tokenizer,
        text_encoder=tiny.text_encoder,
        vae=tiny.vae,
        scheduler=scheduler,
        transformer=wan_transformer,
        expand_timesteps=True,
    ).save_pretrained(tmp_path)
    pipe = LongLivePipeline.from_pretrained(tmp_path)
    assert type(pipe.transformer) is LongLiveTransformer3DModel
    assert type(pipe.scheduler) is LongLiveScheduler
    assert pipe.scheduler.config.flow_shift == 4.0
    assert pipe.transformer.config.chunk_size == 8
    for name, tensor in wan_transformer.state_dict().items():
        torch.testing.assert_close(pipe.transformer.state_dict()[name], tensor, atol=0, rtol=0)
    pipe.set_progress_bar_config(disable=True)
    video = pipe("a cat", height=64, width=64, num_frames=29, num_inference_steps=1, max_sequence_length=8).frames
    assert video.shape == (1, 29, 64, 64, 3)


PUSH = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import longlive_diffusers
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[2])
pipe.push_to_hub("someone/pushed")
pipe.save_pretrained("saved-and-pushed", push_to_hub=True, repo_id="someone/saved")
pipe.transformer.push_to_hub("someone/transformer")
"""

PULL = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import longlive_diffusers
from diffusers import AutoModel, DiffusionPipeline
from longlive_diffusers import LongLiveScheduler, LongLiveTransformer3DModel
from tests.support.tiny_pipeline import tiny_arguments
for repo in ("someone/pushed", "someone/saved"):
    pipe = DiffusionPipeline.from_pretrained(repo)
    pipe.set_progress_bar_config(disable=True)
    torch.save(pipe(**tiny_arguments(output_type="latent")).frames, repo.split("/")[1] + ".pt")
transformer = AutoModel.from_pretrained("someone/pushed", subfolder="transformer")
assert type(transformer) is LongLiveTransformer3DModel
assert type(AutoModel.from_pretrained("someone/transformer")) is LongLiveTransformer3DModel
assert DiffusionPipeline.from_pretrained("someone/pushed", transformer=transformer).transformer is transformer
assert type(LongLiveScheduler.from_pretrained("someone/pushed", subfolder="scheduler")) is LongLiveScheduler
"""


def test_a_pipeline_goes_to_the_hub_and_comes_back(hub: "Hub", saved, tmp_path):
    root = str(Path(__file__).parents[1])
    hub.run_python(PUSH, root, str(saved), cache="pusher")
    card = hub.files("someone/pushed")["README.md"].decode()
    assert "pip install longlive-diffusers" in card
    assert "someone/pushed" in card
    assert "automatically generated" not in card

    hub.run_python(PULL, root, cache="puller")
    expected = latents_of(tiny_pipeline())
    for name in ("pushed", "saved"):
        torch.testing.assert_close(torch.load(hub.folder / f"{name}.pt"), expected, atol=0, rtol=0)


def test_without_the_package_loading_from_the_hub_names_it(hub: "Hub", saved):
    files = {str(path.relative_to(saved)): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    hub.commit("someone/tiny", files)
    code = "from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained('someone/tiny')"
    command = [sys.executable, "-c", code]  # not forked from a process that has imported it
    run = subprocess.run(command, env=hub.environment(), cwd=hub.folder, capture_output=True, text=True, timeout=300)
    assert run.returncode != 0 and "longlive_diffusers" in run.stderr


def test_an_owners_own_card_is_kept(hub: "Hub", saved):
    hub.commit("someone/pushed", {"README.md": b"---\nlicense: mit\n---\n# My own words\n"})
    hub.run_python(PUSH, str(Path(__file__).parents[1]), str(saved), cache="pusher")
    assert b"My own words" in hub.files("someone/pushed")["README.md"]


HALF = """
from huggingface_hub import snapshot_download
snapshot_download("someone/tiny", ignore_patterns=["vae/*.safetensors"])
snapshot_download("someone/lora", allow_patterns=["adapter_config.json"])
"""

OFFLINE = """
import os, sys
os.environ["HTTP_PROXY"] = os.environ["http_proxy"] = "http://127.0.0.1:9"  # where nobody answers
from longlive_diffusers.assets import toy_pipeline_path
from longlive_diffusers.cli import main
toy, output = str(toy_pipeline_path()), ["--output", "out"]
commands = {
    "generate": ["generate", "a cat", "--model", "someone/tiny", "--output", "video.mp4"],
    "quantize": ["quantize", "someone/tiny", *output],
    "convert": ["convert", sys.argv[1], "--base", "someone/tiny", *output],
    "model": ["quantize", "someone/nothing", *output],
    "name": ["generate", "a cat", "--lora", "nope", "--output", "video.mp4"],
    "half a LoRA": ["quantize", toy, "--lora", "someone/lora", *output],
}
for name, command in commands.items():
    print(f"= {name}", file=sys.stderr, flush=True)
    print(name, main(command))
"""


def peft_lora(rank: int = 4, alpha: int = 8) -> dict[str, bytes]:
    """The files of a repository in which PEFT saved a LoRA of the tiny transformer."""
    torch.manual_seed(0)
    name = "base_model.model.blocks.0.attn1.to_q"
    weights = {f"{name}.lora_A.weight": torch.randn(rank, 24), f"{name}.lora_B.weight": torch.randn(24, rank)}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    return {"adapter_model.safetensors": save(weights), "adapter_config.json": json.dumps(config).encode()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_half_a_download_and_what_is_not_there_are_told_in_a_line(hub: "Hub", saved):
    hub.commit("someone/tiny", files_of(saved))
    hub.commit("someone/lora", peft_lora())
    hub.run_python(HALF)
    output = hub.run_python(OFFLINE, str(saved / "transformer" / "diffusion_pytorch_model.safetensors"), check=False)
    statuses, errors = output.split("= generate\n")
    assert "Traceback" not in output
    told = {}
    for part in f"generate\n{errors}".split("\n= "):
        name, *lines = part.strip().splitlines()
        (told[name],) = [line for line in lines if line.startswith("longlive: error: ")]
    assert all(f"{name} 2" in statuses for name in told) and len(told) == 6, statuses
    for name in ("generate", "quantize"):
        assert "'someone/tiny'" in told[name] and ("incomplete" in told[name] or "download" in told[name])
    for name in ("model", "convert"):
        assert "no Hub repository that can be reached" in told[name]
    assert "The LoRA 'nope' is no file, no folder, and no Hub repository that can be reached" in told["name"]
    assert "The LoRA 'someone/lora'" in told["half a LoRA"]
    assert not (hub.folder / "out").exists() and not (hub.folder / "video.mp4").exists()


LORA = """
import sys, torch
import longlive_diffusers
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], vae=None, text_encoder=None, tokenizer=None)
weight = pipe.transformer.blocks[0].attn1.to_q.weight.detach().clone()
changes = []
for options in ({}, {"local_files_only": True}):  # the second is as without a network
    pipe.load_lora_weights("someone/lora", **options)
    pipe.fuse_lora(components=["transformer"])
    changes.append(pipe.transformer.blocks[0].attn1.to_q.weight.detach() - weight)
    pipe.unfuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
torch.save(torch.stack(changes), "changes.pt")
"""


def test_a_lora_of_peft_comes_from_the_hub_or_its_cache_with_its_alpha(hub: "Hub", saved):
    files = peft_lora(rank=4, alpha=8)
    hub.commit("someone/lora", {**files, "checkpoint-10/adapter_model.safetensors": b"not this one"})
    hub.run_python(LORA, str(saved))
    weights = load(files["adapter_model.safetensors"])
    down, up = (next(tensor for name, tensor in weights.items() if f"lora_{half}" in name) for half in "AB")
    changes = torch.load(hub.folder / "changes.pt")
    torch.testing.assert_close(changes, (2 * up @ down).expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    assert not any("checkpoint-10" in path for method, path in hub.requests if method == "GET")
