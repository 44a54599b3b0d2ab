"""A pipeline that is not all there is named as such, before anything of it is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from longlive_diffusers.conversion.complete_folder import check_complete, stored_shapes
from longlive_diffusers.conversion.config_file import read_config
from longlive_diffusers.conversion.pipeline_folder import PipelineFolder, stored_dtype
from tests.support.tiny_pipeline import tiny_pipeline


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


@pytest.fixture
def in_parts(tmp_path) -> Path:
    """A pipeline whose transformer is stored in parts."""
    tiny_pipeline().save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    return tmp_path / "parts"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_complete_is_found(folder, in_parts):
    assert PipelineFolder.find(folder).transformer["num_layers"] == 2
    assert len(list(in_parts.glob("transformer/*.safetensors"))) > 2
    assert PipelineFolder.find(in_parts).transformer["num_layers"] == 2


def test_a_component_that_the_index_does_without_is_not_missed(tmp_path):
    tiny_pipeline(tokenizer=None, text_encoder=None).save_pretrained(tmp_path)
    PipelineFolder.find(tmp_path)


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component(folder, name):
    shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=rf"is incomplete: its model_index\.json names {name}|has no {name}/"):
        PipelineFolder.find(folder)


@pytest.mark.parametrize(
    "name", [TRANSFORMER, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
@pytest.mark.parametrize("part", [None, 0.0, 0.01, 0.5, 0.999])
def test_weights_that_are_missing_or_cut_off(folder, name, part):
    path = folder / name
    whole = path.read_bytes()
    path.unlink()
    message = f"is incomplete: {name.split('/')[0]} has no weights"
    if part is not None:
        path.write_bytes(whole[: int(part * len(whole))])
        message = rf"{path.name} \({int(part * len(whole))} bytes\) is cut off, damaged"
    with pytest.raises(ValueError, match=message):
        PipelineFolder.find(folder)


def test_a_missing_part_is_named(in_parts):
    first = sorted(in_parts.glob("transformer/*.safetensors"))[0]
    count = len(list(in_parts.glob("transformer/*.safetensors")))
    first.unlink()
    with pytest.raises(
        ValueError, match=rf"1 of the {count} weight files of transformer are missing \({first.name}\)"
    ):
        PipelineFolder.find(in_parts)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.fp16.bin"])
def test_an_index_of_parts_in_another_format_is_passed_over(folder, name):
    """As repositories have it whose pickles are not downloaded, which the index of their parts is."""
    index = folder / "text_encoder" / f"{name}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}))
    PipelineFolder.find(folder)
    (folder / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of the 1 weight files of text_encoder are missing \(pytorch_model-0"):
        PipelineFolder.find(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}])
def test_an_index_of_parts_that_is_none(in_parts, weight_map):
    edit(next(in_parts.glob("transformer/*.index.json")), weight_map=weight_map)
    with pytest.raises(ValueError, match="has no weight_map"):
        PipelineFolder.find(in_parts)


@pytest.mark.parametrize(
    "name", ["model_index.json", "vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{", "is not JSON"),
        ("[]", "holds a list"),
    ],
)
def test_configurations_that_are_none(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        PipelineFolder.find(folder)


@pytest.mark.parametrize("num_layers", [1, 3, 10**9])
def test_another_number_of_blocks_than_the_weights_have(folder, num_layers):
    edit(folder / "transformer" / "config.json", num_layers=num_layers)
    with pytest.raises(ValueError, match=f"says num_layers={num_layers}, its weights have 2 blocks"):
        PipelineFolder.find(folder)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("transformer/config.json", {"num_layers": "2"}, "num_layers has to be a whole number, got '2'"),
        ("transformer/config.json", {"ffn_dim": 0}, "`ffn_dim` must be at least 1, got 0"),
        ("transformer/config.json", {"quantization_config": "nvfp4"}, "its quantization_config is 'nvfp4'"),
        ("transformer/config.json", {"quantization_config": {}}, "its quantization_config is {}"),
        ("vae/config.json", {"scale_factor_spatial": "16"}, "scale_factor_spatial has to be a whole number or null"),
        ("model_index.json", {"window_size": None}, "window_size has to be a whole number, got None"),
    ],
)
def test_values_of_wrong_types(folder, file, changes, message):
    edit(folder / file, **changes)
    with pytest.raises(ValueError, match=message):
        PipelineFolder.find(folder)


@pytest.mark.parametrize("changes", [{"num_layers": "x"}, {"d_ff": 7}, {"d_kv": None}])
def test_a_text_encoder_whose_configuration_does_not_fit(folder, changes):
    edit(folder / "text_encoder" / "config.json", **changes)
    with pytest.raises(ValueError, match=r"component of '.*' (cannot be loaded|do not fit)"):
        PipelineFolder.find(folder).load(device=torch.device("cpu"), show_progress=False)


def test_pickled_weights_are_read_as_carefully(folder):
    weights = folder / TRANSFORMER
    weights.unlink()
    torch.save({"blocks.0.weight": torch.nn.Linear(1, 1)}, weights.with_suffix(".bin"))
    index = read_config(folder, "model_index.json", folder)
    with pytest.raises(ValueError, match="holds Python objects"):
        check_complete(folder, index, folder)
    check_complete(folder, index, folder, without_weights=("transformer",))


def test_a_damaged_file_has_no_dtype(folder):
    path = folder / TRANSFORMER
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"\(1000 bytes\) is cut off"):
        stored_dtype(folder / "transformer")
    with pytest.raises(ValueError, match=r"\(1000 bytes\) is cut off"):
        stored_shapes(path)
