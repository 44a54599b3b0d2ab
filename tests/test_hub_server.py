"""The stand-in Hub serves a stock diffusers pipeline; what our own pipelines do with it is tested elsewhere."""

import hashlib
import json
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from tests.support.hub import Hub


PUSH_TWICE = """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

for seed in (0, 1):
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).push_to_hub("someone/tiny")
    print(next(unet.parameters()).flatten()[0].item())
"""

LOAD = """
import sys
from diffusers import DiffusionPipeline

for revision in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained("someone/tiny", revision=revision)
    print(next(pipe.unet.parameters()).flatten()[0].item())
"""


def test_a_pipeline_is_pushed_replaced_and_loaded(hub: "Hub"):
    first, second = hub.run_python(PUSH_TWICE, cache="pusher").split()
    assert first != second
    files = hub.files("someone/tiny")
    assert {"README.md", "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"} <= set(files)
    assert json.loads(files["model_index.json"])["_class_name"] == "DDPMPipeline"

    # The weights went through LFS, all else in the commits themselves.
    _, first_commit, second_commit = commits = list(hub.repositories["someone/tiny"].commits)
    weights = [hub.files("someone/tiny", commit)["unet/diffusion_pytorch_model.safetensors"] for commit in commits[1:]]
    assert hub.lfs_objects == {hashlib.sha256(content).hexdigest(): content for content in weights}

    assert hub.run_python(LOAD, "main", first_commit, second_commit, cache="loader").split() == [second, first, second]


def test_what_is_not_there_is_not_found(hub: "Hub"):
    hub.commit("someone/other", {"README.md": b"hello", "weights.bin": b"\0" * 1000})
    code = """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

for repo, file, revision, error in [
    ("someone/missing", "README.md", "main", RepositoryNotFoundError),
    ("someone/other", "missing.md", "main", EntryNotFoundError),
    ("someone/other", "README.md", "missing", RevisionNotFoundError),
]:
    try:
        hf_hub_download(repo, file, revision=revision)
    except error:
        print(error.__name__)
api = HfApi()
print(api.list_repo_files("someone/other"))
print(open(hf_hub_download("someone/other", "README.md")).read())
api.delete_file("weights.bin", "someone/other")
"""
    assert hub.run_python(code).splitlines() == [
        "RepositoryNotFoundError",
        "EntryNotFoundError",
        "RevisionNotFoundError",
        "['.gitattributes', 'README.md', 'weights.bin']",
        "hello",
    ]
    assert set(hub.files("someone/other")) == {".gitattributes", "README.md"}


def test_a_program_that_fails_is_shown(hub: "Hub"):
    assert "ZeroDivisionError" in hub.run_python("print('before')\n1 / 0", check=False)
