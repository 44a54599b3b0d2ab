"""Where a LoRA's file is found, and the settings that are stored with it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.loaders import read_original_lora
from longlive_diffusers.loaders.lora_file import find_lora_file, read_lora_file
from tests.support.tiny_pipeline import tiny_pipeline


TARGET = "blocks.0.attn1.to_q"
RANK, WIDTH = 4, 24


def layers(prefix: str, name: str = TARGET, rank: int = RANK) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{prefix}{name}.lora_A.weight": torch.randn(rank, WIDTH, generator=generator),
        f"{prefix}{name}.lora_B.weight": torch.randn(WIDTH, rank, generator=generator),
    }


def change(lora: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a LoRA whose alpha is its rank adds to the weight."""
    down, up = (next(tensor for key, tensor in lora.items() if f"lora_{half}" in key) for half in "AB")
    return up @ down


def fused_change(source) -> torch.Tensor:
    """What a LoRA, loaded and fused, adds to the weight of its layer."""
    pipe = tiny_pipeline(vae=None, tokenizer=None, text_encoder=None)
    before = pipe.transformer.get_submodule(TARGET).weight.detach().clone()
    pipe.load_lora_weights(source)
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    return pipe.transformer.get_submodule(TARGET).weight.detach() - before


def peft_folder(folder: Path, prefix: str = "base_model.model.", name: str = TARGET, **settings) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(layers(prefix, name), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, **settings}))
    return folder


# -- alpha -----------------------------------------------------------------------------------------------------------

ALPHAS = [
    ({"lora_alpha": RANK}, 1.0),
    ({"lora_alpha": 16}, 4.0),
    ({"lora_alpha": 2.0}, 0.5),
    ({"lora_alpha": 8, "use_rslora": True}, 8 / RANK**0.5),
    ({"lora_alpha": 8, "alpha_pattern": {"to_q": 12}}, 3.0),
    ({"lora_alpha": 8, "alpha_pattern": {"to_k": 12}}, 2.0),
    ({"lora_alpha": 8, "alpha_pattern": {"to_q": 0}}, 0.0),
    ({}, 1.0),
]


@pytest.mark.parametrize(("settings", "scale"), ALPHAS)
def test_alpha_of_a_peft_folder(tmp_path, settings, scale):
    folder = peft_folder(tmp_path / "lora", **settings)
    expected = scale * change(layers(""))
    for source in (folder, str(folder), folder / "adapter_model.safetensors"):
        torch.testing.assert_close(fused_change(source), expected, atol=1e-5, rtol=1e-5)


def test_alpha_of_a_peft_folder_with_wans_names(tmp_path):
    folder = peft_folder(tmp_path / "lora", name="blocks.0.self_attn.q", lora_alpha=12)
    torch.testing.assert_close(fused_change(folder), 3 * change(layers("")), atol=1e-5, rtol=1e-5)


METADATA = {
    "lora_alpha": {"lora_alpha": "8"},
    "kohya": {"ss_network_alpha": "8.0", "ss_network_dim": "4"},
    "alpha": {"alpha": "8"},
    "peft": {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 8})},
    "diffusers": {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": RANK, "transformer.lora_alpha": 8, "transformer.target_modules": [TARGET]}
        )
    },
}


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [(kind, "transformer.") for kind in METADATA]  # only diffusers' own files have its settings
    + [
        (kind, prefix)
        for kind in METADATA
        if kind != "diffusers"
        for prefix in ("base_model.model.", "diffusion_model.")
    ],
)
def test_alpha_of_metadata(tmp_path, kind, prefix):
    name = "blocks.0.self_attn.q" if prefix == "diffusion_model." else TARGET
    save_file(layers(prefix, name), tmp_path / "lora.safetensors", METADATA[kind])
    torch.testing.assert_close(
        fused_change(tmp_path / "lora.safetensors"), 2 * change(layers("")), atol=1e-5, rtol=1e-5
    )


def test_an_alpha_of_a_layer_precedes_the_folders(tmp_path):
    folder = peft_folder(tmp_path / "lora", lora_alpha=16)
    lora = {**layers("base_model.model."), f"base_model.model.{TARGET}.alpha": torch.tensor(2.0)}
    save_file(lora, folder / "adapter_model.safetensors")
    torch.testing.assert_close(fused_change(folder), 0.5 * change(layers("")), atol=1e-5, rtol=1e-5)


def test_an_alpha_in_layers_and_metadata_is_applied_once(tmp_path):
    """As kohya's trainers write it."""
    path, name = tmp_path / "lora.safetensors", "blocks.0.self_attn.q"
    lora = {**layers("diffusion_model.", name), f"diffusion_model.{name}.alpha": torch.tensor(2.0)}
    save_file(lora, path, {"ss_network_alpha": "2.0"})
    torch.testing.assert_close(fused_change(path), 0.5 * change(layers("")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"r": 8, "lora_alpha": 8}, r"settings say rank 8 \(r\), its layers have rank 4"),
        ({"r": 4, "lora_alpha": "8"}, "alpha='8' for all layers"),
        ({"r": 4, "lora_alpha": 8, "invented": 3}, "does not know: invented"),
        ({"lora_alpha": 8}, r"rank None \(r\)"),
    ],
)
def test_settings_of_diffusers_that_cannot_be(tmp_path, metadata, message):
    path = tmp_path / "lora.safetensors"
    described = {f"transformer.{name}": value for name, value in metadata.items()}
    save_file(layers("transformer."), path, {"lora_adapter_metadata": json.dumps(described)})
    with pytest.raises(ValueError, match=message):
        LongLivePipeline.lora_state_dict(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern .* is not possible"),
        ({"alpha_pattern": [3]}, "alpha_pattern .* is not possible"),
        ({"lora_alpha": "16"}, "alpha='16' for .*; a finite number"),
        ({"lora_alpha": float("nan")}, "alpha=nan"),
        ({"lora_alpha": True}, "alpha=True"),
        ({"r": 8, "lora_alpha": 8}, "settings say rank 8 .* layers have rank 4"),
    ],
)
def test_settings_that_cannot_be(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        LongLivePipeline.lora_state_dict(peft_folder(tmp_path / "lora", **config))


@pytest.mark.parametrize("text", ["[", "[1]", '{"a":' * 100_000, "\ud800".encode("utf-8", "surrogatepass")])
def test_damaged_settings(tmp_path, text):
    folder = peft_folder(tmp_path / "lora")
    (folder / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"adapter_config\.json (is not JSON|holds a list)"):
        find_and_read = read_lora_file(find_lora_file(folder))
        pytest.fail(f"read: {find_and_read}")


def test_damaged_metadata(tmp_path):
    for number, (metadata, message) in enumerate(
        [({"lora_alpha": "eight"}, "'eight', which is no number"), ({"lora_adapter_metadata": "{"}, "is not JSON")]
    ):
        path = tmp_path / f"{number}.safetensors"
        save_file(layers("transformer."), path, metadata)
        with pytest.raises(ValueError, match=message):
            read_lora_file(path)


# -- where it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        (["adapter_model.safetensors", "optimizer.bin"], {}, "adapter_model.safetensors"),
        (["pytorch_lora_weights.safetensors", "adapter_model.safetensors"], {}, "pytorch_lora_weights.safetensors"),
        (["my_style.safetensors", "README.md"], {}, "my_style.safetensors"),
        (["lora.pt", "model.pt"], {}, "lora.pt"),
        (["a.safetensors", "b.safetensors"], {"weight_name": "b.safetensors"}, "b.safetensors"),
        (["a.safetensors", "step_10/lora.pt"], {}, "a.safetensors"),
        (["a.safetensors", "step_10/lora.pt"], {"subfolder": "step_10"}, "step_10/lora.pt"),
    ],
)
def test_the_file_of_a_folder(tmp_path, files, options, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_lora_file(tmp_path, **options) == tmp_path / expected


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([], {}, "has no weight file; it has nothing"),
        (["README.md", "notes/lora.pt"], {}, "has no weight file; it has README.md, notes/lora.pt"),
        (["a.safetensors", "b.safetensors"], {}, r"has 2 weight files \(a.safetensors, b.safetensors\)"),
        (["a.safetensors"], {"weight_name": "b.safetensors"}, "has no file b.safetensors; it has a.safetensors"),
        (["a.safetensors"], {"subfolder": "step_10"}, "has no weight file"),
    ],
)
def test_a_folder_without_its_file(tmp_path, files, options, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        find_lora_file(tmp_path, **options)


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt", "some:thing", "a/b/c", "../none"])
def test_what_is_nowhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"There is no LoRA file|is no file, no folder, and no Hub repository"):
        find_lora_file(name)


# -- layers ----------------------------------------------------------------------------------------------------------

PREFIXES = ["transformer.", "diffusion_model.", "base_model.model.", "lora_unet_"]


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_half_a_layer_is_refused_in_every_layout(prefix, half):
    lora = layers(prefix) | layers(prefix, "blocks.1.attn1.to_q")
    if prefix == "lora_unet_":
        names = {".lora_A.": ".lora_down.", ".lora_B.": ".lora_up."}
        lora = {
            key.split(".lora_")[0].replace(".", "_") + ".lora_" + key.split(".lora_")[1]: t for key, t in lora.items()
        }
        for old, new in names.items():
            lora = {key.replace(old, new): tensor for key, tensor in lora.items()}
        half = {"lora_A": "lora_down", "lora_B": "lora_up"}[half]
    gone = next(key for key in lora if half in key)
    with pytest.raises(ValueError, match="1 layer without lora_A or lora_B"):
        LongLivePipeline.lora_state_dict({key: tensor for key, tensor in lora.items() if key != gone})


A, B = f"transformer.{TARGET}.lora_A.weight", f"transformer.{TARGET}.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({A: torch.ones(3, WIDTH)}, r"lora_A \(3, 24\) and lora_B \(24, 4\), which disagree on the rank"),
        ({A: torch.ones(4, 16)}, r"to_q is \(24, 24\), its LoRA \(24, 16\)"),
        ({A: torch.ones(0, WIDTH), B: torch.ones(WIDTH, 0)}, r"has rank 0: lora_A \(0, 24\) and lora_B \(24, 0\)"),
        ({A: torch.ones(4, WIDTH, dtype=torch.int32)}, r"torch\.int32 and torch\.float32, not floats"),
        ({A: torch.full((4, WIDTH), torch.nan)}, "96 infinities or NaN"),
        ({f"transformer.{TARGET}.weight": torch.ones(4, 4)}, "is no part of a LoRA"),
        (layers("transformer.", "blocks.9.attn1.to_q"), r"blocks\.9\.attn1\.to_q does not exist"),
    ],
)
def test_layers_that_do_not_fit_are_refused_before_anything_is_loaded(changes, message):
    pipe = tiny_pipeline(vae=None, tokenizer=None, text_encoder=None)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora_weights({**layers("transformer."), **changes})
    assert not any("lora" in name for name in pipe.transformer.state_dict())


def test_a_second_lora_is_compared_with_the_weights_below_the_first():
    pipe = tiny_pipeline(vae=None, tokenizer=None, text_encoder=None)
    for name in ("one", "two"):
        pipe.load_lora_weights(layers("transformer."), adapter_name=name)
    assert pipe.get_list_adapters() == {"transformer": ["one", "two"]}


def test_the_settings_beside_the_file_are_read_with_it(tmp_path):
    folder = peft_folder(tmp_path / "lora", lora_alpha=8)
    found = read_original_lora(folder / "adapter_model.safetensors")
    torch.testing.assert_close(found[B], 2 * layers("transformer.")[B])
