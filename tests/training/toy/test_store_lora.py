"""The distilled LoRA of a run, stored in half precision."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from store_lora import LORA, store
from tests.support.toy_loras import save_toy_lora


def test_a_lora_is_stored_in_half_precision_with_its_settings(tmp_path):
    file = save_toy_lora(tmp_path / "run", seed=1, alpha=8)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    trained = {name: tensor.float() + 1e-7 for name, tensor in load_file(file).items()}
    save_file(trained, file, metadata)
    stored = store(tmp_path / "run", tmp_path / "stored")
    assert stored == tmp_path / "stored" / LORA
    weights = load_file(stored)
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], tensor.half()) for name, tensor in trained.items())
    with safe_open(stored, "pt") as opened:
        assert opened.metadata() == metadata
    assert stored.stat().st_size < 0.75 * 2**20


def test_a_folder_without_a_lora_is_refused(tmp_path):
    with pytest.raises(ValueError, match=LORA):
        store(tmp_path, tmp_path / "stored")
    assert not (tmp_path / "stored").exists()
