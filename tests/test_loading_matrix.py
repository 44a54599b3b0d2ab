"""With the package imported, stock diffusers loads and shares our pipelines, from a folder and from the Hub, without
`trust_remote_code`; without it, a saved pipeline says what is missing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline

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
    assert "longlive_diffusers" in hub.run_python(code, check=False)


def test_an_owners_own_card_is_kept(hub: "Hub", saved):
    hub.commit("someone/pushed", {"README.md": b"---\nlicense: mit\n---\n# My own words\n"})
    hub.run_python(PUSH, str(Path(__file__).parents[1]), str(saved), cache="pusher")
    assert b"My own words" in hub.files("someone/pushed")["README.md"]
