"""A trained pipeline on the Hub (a local stand-in): what is uploaded, what is not, and that it loads from there."""

import json

from tests.support import distillation_run
from tests.support.training_run import SCRIPT


TRAIN = """
import os, runpy, sys
os.environ["ACCELERATE_USE_CPU"] = "true"
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""

PUSH = """
import sys
from longlive_diffusers import LongLivePipeline

LongLivePipeline.from_pretrained(sys.argv[1]).push_to_hub("someone/start")
"""

LOOK = """
import longlive_diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard

print(sorted(HfApi().list_repo_files("someone/tiny")))
card = ModelCard.load("someone/tiny")
print("| updates | 2 |" in card.text, card.data.pipeline_tag, "longlive" in card.data.tags)
print(type(DiffusionPipeline.from_pretrained("someone/tiny")).__name__)
"""


LOOK_AT_LORA = """
import sys
import longlive_diffusers
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard

print(sorted(HfApi().list_repo_files("someone/steps")))
card = ModelCard.load("someone/steps")
print("| solver steps | 2 |" in card.text, "lora" in card.data.tags, 'load_lora_weights("someone/steps"' in card.text)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights("someone/steps")
print(pipe.get_list_adapters())
"""


def test_the_result_is_pushed_with_its_card_and_loads_from_there(workshop, hub, tmp_path):
    options = {
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "push_to_hub": True,
        "hub_model_id": "someone/tiny",
        "hub_token": "t",
    }
    hub.run_python(TRAIN, str(SCRIPT), *workshop.options(tmp_path / "run", **options), cache="trainer")
    files, card, loaded = hub.run_python(LOOK, cache="reader").splitlines()[-3:]
    assert "model_index.json" in files and "transformer/diffusion_pytorch_model.safetensors" in files
    assert "checkpoint" not in files and "training_log" not in files and "cache" not in files
    assert card == "True text-to-video True"
    assert loaded == "LongLivePipeline"


def test_a_repository_is_a_start_and_its_text_encoder_is_known_by_its_commit(workshop, hub, tmp_path):
    hub.run_python(PUSH, str(workshop.folder / "pipeline"), cache="trainer")
    options = {"pretrained_model_name_or_path": "someone/start", "data_cache_dir": tmp_path / "cache"}
    hub.run_python(
        TRAIN, str(SCRIPT), *workshop.options(tmp_path / "run", **options, max_train_steps=1), cache="trainer"
    )
    known = json.loads((tmp_path / "cache" / "text" / "known_encoders.json").read_text())
    assert len(known) == 1


def test_a_distilled_lora_is_pushed_with_its_card_and_loads_from_there(studio, hub, tmp_path):
    options = {"max_train_steps": 1, "push_to_hub": True, "hub_model_id": "someone/steps", "hub_token": "t"}
    words = studio.options(tmp_path / "run", **options)
    hub.run_python(TRAIN, str(distillation_run.SCRIPT), *words, cache="trainer")
    pipeline = str(studio.folder / "pipeline")
    files, card, adapters = hub.run_python(LOOK_AT_LORA, pipeline, cache="reader").splitlines()[-3:]
    assert "pytorch_lora_weights.safetensors" in files and "README.md" in files
    assert "checkpoint" not in files and "training_log" not in files
    assert card == "True True True"
    assert adapters == "{'transformer': ['default_0']}"
