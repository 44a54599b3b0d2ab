import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from longlive_diffusers.loaders.checkpoint_file import read_checkpoint_file


STATE = {"generator": {"weight": torch.arange(60.0).view(3, 20)}, "step": 3}


def save(path, *, zipped=True):
    torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_both_containers(tmp_path, zipped):
    content = read_checkpoint_file(save(tmp_path / "model.pt", zipped=zipped))
    assert content["step"] == 3
    assert torch.equal(content["generator"]["weight"], STATE["generator"]["weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_safetensors_under_any_name(tmp_path, name):
    save_file(STATE["generator"], tmp_path / name)
    assert torch.equal(read_checkpoint_file(tmp_path / name)["weight"], STATE["generator"]["weight"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part", [0.0, 0.002, 0.05, 0.3, 0.6, 0.9, 0.98, 0.999])
def test_truncated_torch_file(tmp_path, zipped, part):
    path = save(tmp_path / "model.pt", zipped=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=rf"model\.pt \({int(part * len(whole))} bytes\)"):
        read_checkpoint_file(path)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_truncated_safetensors(tmp_path, part):
    path = tmp_path / "model.safetensors"
    save_file(STATE["generator"], path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=rf"model\.safetensors \({int(part * len(whole))} bytes\)"):
        read_checkpoint_file(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_are_read_or_refused_with_a_value_error(tmp_path, zipped):
    whole = save(tmp_path / "whole.pt", zipped=zipped).read_bytes()
    path = tmp_path / "model.pt"
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint_file(path)
        except ValueError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "JPEG image"),
        (b"\0\0\0\x20ftypisom" + bytes(50), "MP4 video"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b'{"_class_name": "WanPipeline"}', "JSON file"),
        (b"just some text, nothing more", "no known kind"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_files_are_named(tmp_path, start, kind, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(start)
    with pytest.raises(ValueError) as error:
        read_checkpoint_file(path)
    assert str(path) in str(error.value)
    if suffix == ".pt" or kind != "no known kind":
        assert kind in str(error.value)


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint file"):
        read_checkpoint_file(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="is a directory"):
        read_checkpoint_file(tmp_path)


def test_not_a_dictionary(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds a Tensor"):
        read_checkpoint_file(tmp_path / "model.pt")


class Payload:
    executed = False

    def __reduce__(self):
        return setattr, (Payload, "executed", True)


@pytest.mark.parametrize("zipped", [True, False])
def test_python_objects_are_refused_and_nothing_runs(tmp_path, zipped):
    path = tmp_path / "model.pt"
    torch.save({"generator": Payload()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="could run code"):
        read_checkpoint_file(path)
    with path.open("wb") as file:
        pickle.dump({"generator": Payload()}, file, protocol=2)
    with pytest.raises(ValueError, match="could run code"):
        read_checkpoint_file(path)
    assert not Payload.executed
