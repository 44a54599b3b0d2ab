"""The stand-in Hub serves a stock diffusers pipeline; what our own pipelines do with it is tested elsewhere."""

import hashlib
import json

from hub_fixture import Hub

PUSH = """
import sys
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

torch.manual_seed(int(sys.argv[1]))
unet = UNet2DModel(
    sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
)
pipe = DDPMPipeline(unet, DDPMScheduler())
pipe.push_to_hub("someone/tiny")
print(next(unet.parameters()).flatten()[0].item())
"""

LOAD = """
import sys
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("someone/tiny", revision=sys.argv[1])
print(next(pipe.unet.parameters()).flatten()[0].item())
"""


def test_a_pipeline_is_pushed_replaced_and_loaded(hub: Hub):
    first = hub.run_python(PUSH, "0")
    first_commit = hub.repositories["someone/tiny"].head
    files = hub.files("someone/tiny")
    assert {"README.md", "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"} <= set(
        files
    )
    assert json.loads(files["model_index.json"])["_class_name"] == "DDPMPipeline"
    weights = files["unet/diffusion_pytorch_model.safetensors"]
    assert hub.lfs_objects == {hashlib.sha256(weights).hexdigest(): weights}  # all else was in the commit itself

    assert hub.run_python(LOAD, "main") == first
    second = hub.run_python(PUSH, "1")
    assert second != first
    assert hub.run_python(LOAD, "main", cache="another") == second
    assert hub.run_python(LOAD, first_commit, cache="another") == first
    assert not [path for method, path in hub.requests if "xet" in path]


def test_what_is_not_there_is_not_found(hub: Hub):
    hub.commit("someone/other", {"README.md": b"hello", "weights.bin": b"\0" * 1000})
    code = """
import sys
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
print(sorted(HfApi().list_repo_files("someone/other")))
print(open(hf_hub_download("someone/other", "README.md")).read())
api = HfApi()
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


def test_the_program_that_fails_is_shown(hub: Hub):
    assert "ZeroDivisionError" in hub.run_python("print('before')\n1 / 0", check=False)
