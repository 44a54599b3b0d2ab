"""What distillation saves: a LoRA that computes elsewhere what it computed here."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from longlive_diffusers import LongLivePipeline
from run.distillation_arguments import parse_distillation_arguments
from run.distillation_result import ORIGINAL_LORA, DistilledNetwork, save_distilled
from run.distillation_start import build_networks
from run.history import SettingsHistory
from run.lora_settings import lora_settings
from run.saving import place_result
from tests.support.tiny_pipeline import FORWARDS, tiny_pipeline, tiny_transformer


LAYERS = ["to_q", "to_v", "net.2"]
FOLDED = {  # which the reference's layout takes when they are multiplied into lora_B
    "plain": {},
    "alpha": {"lora_alpha": 2},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"attn1.to_q": 16, "blocks.1.ffn.net.2": 1}},
}
OTHERS = {
    "rank_pattern": {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_q": 2}},
    "dora": {"use_dora": True},
    "some blocks": {"layers_to_transform": [1], "layers_pattern": "blocks"},
}


def lora(folder: Path, **settings) -> Path:
    """A LoRA of the tiny transformer that is not at its start, with all of PEFT's settings."""
    transformer = tiny_transformer()
    config = LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": LAYERS, **settings})
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    layers = get_peft_model_state_dict(transformer)
    LongLivePipeline.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors"


def distilled(start: Path, output: Path, **changed) -> Path:
    """The folder of a run that begins with a LoRA and trains nothing."""
    options = {"pretrained_model_name_or_path": "tiny", "generator_lora": start, "output_dir": output, **changed}
    arguments = parse_distillation_arguments([f"--{name}={value}" for name, value in options.items()])
    networks = build_networks(tiny_transformer(), arguments.model, arguments.optimization, frozen_dtype=torch.float32)
    result = DistilledNetwork(networks, None, arguments.model, torch.float32)
    save_distilled(result.weights(), result, arguments, SettingsHistory({}), "someone/lora")
    return output


@torch.no_grad()
def computed(file: Path) -> torch.Tensor:
    pipe = tiny_pipeline()
    pipe.load_lora_weights(file)
    return FORWARDS["block causal"](pipe.transformer)


@pytest.mark.parametrize("settings", [*FOLDED.values(), *OTHERS.values()], ids=[*FOLDED, *OTHERS])
def test_a_lora_that_the_generator_began_with_computes_the_same_where_it_is_saved(tmp_path, settings):
    start = lora(tmp_path, **settings)
    output = distilled(start, tmp_path / "run")
    expected = computed(start)
    assert (expected - FORWARDS["block causal"](tiny_transformer())).abs().max() > 1e-2
    torch.testing.assert_close(computed(output / start.name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", FOLDED.values(), ids=FOLDED)
def test_so_does_the_file_in_the_references_layout(tmp_path, settings):
    start = lora(tmp_path, **settings)
    output = distilled(start, tmp_path / "run", save_original_lora=True)
    torch.testing.assert_close(computed(output / "generator_lora.pt"), computed(start), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(OTHERS["rank_pattern"], "the layers' ranks disagree"), (OTHERS["dora"], "of no plain LoRA layer")],
    ids=["rank_pattern", "dora"],
)
def test_what_that_layout_cannot_hold_is_refused_at_the_start(tmp_path, settings, message):
    start = lora(tmp_path, **settings)
    with pytest.raises(ValueError, match=f"--save_original_lora true is not possible: .*{message}"):
        distilled(start, tmp_path / "run", save_original_lora=True)
    assert not (tmp_path / "run").exists()


def test_a_file_that_a_later_result_does_not_have_goes(tmp_path):
    start, output = lora(tmp_path), tmp_path / "run"
    distilled(start, output, save_original_lora=True)
    names = {path.name for path in output.iterdir()}
    distilled(start, output)
    assert names - {path.name for path in output.iterdir()} == {ORIGINAL_LORA}


def test_a_result_that_is_half_in_place_is_not_taken_for_a_pipeline(tmp_path, monkeypatch):
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")

    def write(folder: Path) -> None:
        for name in ("transformer", "vae"):
            (folder / name).mkdir()
        (folder / "model_index.json").write_text("{}")

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("run.saving.shutil.rmtree", interrupted)
        place_result(tmp_path, write)
    assert (tmp_path / "transformer").exists() and not (tmp_path / "model_index.json").exists()
    assert place_result(tmp_path, write) == ["transformer", "vae", "model_index.json"]


def test_the_settings_of_a_plain_lora_are_those_that_every_release_of_peft_knows():
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], lora_dropout=0.1, init_lora_weights="gaussian")
    assert lora_settings(config).keys() == {"r", "lora_alpha", "target_modules"}
    assert lora_settings(LoraConfig(init_lora_weights="pissa"))["init_lora_weights"] == "pissa"
