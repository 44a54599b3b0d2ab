import argparse
import datetime
import os
import pickle
import random
import traceback
import warnings

import pytest
import torch
from safetensors.torch import save_file

from longlive_diffusers.loaders.checkpoint_file import check_finite, named_tensors, read_checkpoint_file


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


class Call:
    """Pickles as a call of a function, which an unrestricted unpickler makes."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ALLOWED_ADVICE = "ask for its state dict alone"
FORBIDDEN = ("weights_only", "add_safe_globals", "will likely succeed", "TORCH_FORCE")
HOSTILE = {
    "system": Call(os.system, "touch hostile"),
    "eval": Call(eval, "open('hostile', 'w')"),
    "import": Call(__import__, "os"),
    "open": Call(open, "hostile", "w"),
    "module": torch.nn.Linear(2, 2),
    "namespace": argparse.Namespace(rank=3),
    "date": datetime.date(2026, 1, 1),
}


def assert_refused_without_advice(path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as raised:
            read_checkpoint_file(path)
    shown = "".join(traceback.format_exception(raised.value))
    assert not any(word in shown.replace("weights_only=True, mmap", "") for word in FORBIDDEN), shown
    return str(raised.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_objects_are_called_what_they_are(tmp_path, monkeypatch, content, zipped):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    torch.save({"generator": content}, path, _use_new_zipfile_serialization=zipped)
    message = assert_refused_without_advice(path)
    assert "holds Python objects (" in message and ALLOWED_ADVICE in message
    assert "truncated" not in message and not (tmp_path / "hostile").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_that_torch_did_not_write(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"generator": HOSTILE["system"]}, protocol))
    message = assert_refused_without_advice(path)
    assert "Python objects (posix.system)" in message or "a Python pickle" in message
    assert not (tmp_path / "hostile").exists()


@pytest.mark.parametrize("part", [0.6, 0.9])
def test_damage_is_told_without_advice_either(tmp_path, part):
    whole = save(tmp_path / "model.pt", zipped=False).read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[: int(part * len(whole))])
    assert "truncated, damaged" in assert_refused_without_advice(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({3: torch.zeros(2)}, r"1 of its 1 tensors have a key that is not a name, such as 3 \(int\)"),
        ({"a": torch.zeros(2), ("b", 1): torch.zeros(2)}, r"1 of its 2 tensors .* such as \('b', 1\) \(tuple\)"),
        ({"a": torch.eye(2).to_sparse()}, r"a is stored as torch\.sparse_coo"),
    ],
)
def test_state_dicts_of_another_kind(content, message):
    with pytest.raises(ValueError, match=message):
        named_tensors(content, "model.pt")


def test_entries_that_are_no_tensors_are_left_out():
    assert list(named_tensors({"step": 3, 7: "x", "a": torch.zeros(2)}, "model.pt")) == ["a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_that_are_none(dtype):
    tensor = torch.ones(3, 4).to(dtype)
    check_finite(tensor, "w")
    for value in (torch.nan, -torch.inf):
        broken = tensor.clone()
        broken[1, :2] = value
        with pytest.raises(ValueError, match="w has 2 infinities or NaN among its 12 numbers"):
            check_finite(broken, "w")
