import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from longlive_diffusers import convert_checkpoint
from longlive_diffusers.conversion import pipeline_folder
from longlive_diffusers.loaders import read_original_lora, read_original_state_dict
from longlive_diffusers.models.transformer_longlive import LongLiveTransformer3DModel
from longlive_diffusers.pipelines.pipeline_longlive import LongLivePipeline
from longlive_diffusers.schedulers.scheduling_longlive import LongLiveScheduler


@pytest.fixture
def checkpoint(golden) -> Path:
    return golden / "model_bf16.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden, wan_base) -> Path:
    parent = tmp_path_factory.mktemp("converted")
    return convert_checkpoint(golden / "model_bf16.pt", wan_base, parent / "pipeline", window_size=16, chunk_size=4)


@pytest.fixture
def base(tmp_path, wan_base) -> Path:
    """A copy of the base that a test may damage, in a folder of its own."""
    return Path(shutil.copytree(wan_base, tmp_path / "bases" / "wan"))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_folder_opens_as_a_pipeline(folder, original):
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert type(pipeline) is LongLivePipeline
    assert type(pipeline.transformer) is LongLiveTransformer3DModel
    assert type(pipeline.scheduler) is LongLiveScheduler
    assert dict(LongLiveScheduler().config).items() <= dict(pipeline.scheduler.config).items()
    assert pipeline.config.window_size == 16 and pipeline.config.sink_size == 8
    assert pipeline.transformer.config.chunk_size == 4
    assert pipeline.transformer.config.attention_head_dim == 32  # from the base: shapes do not show it
    assert pipeline.tokenizer("a cat").input_ids
    expected = read_original_state_dict(original)
    found = pipeline.transformer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), expected[name].bfloat16().float()) for name in expected)


def test_what_the_base_gave_is_unchanged(folder, wan_base):
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    source = load_file(wan_base / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert stored.keys() == source.keys() and all(torch.equal(stored[name], source[name]) for name in source)
    stored = load_file(folder / "text_encoder" / "model.safetensors")
    source = load_file(wan_base / "text_encoder" / "model.safetensors")
    # Releases of transformers differ in whether they keep T5's `wo` in float32 beside bfloat16, too.
    assert {tensor.dtype for name, tensor in stored.items() if ".wo." not in name} == {torch.bfloat16}
    assert stored.keys() == source.keys()
    assert all(torch.equal(stored[name].float(), source[name].float()) for name in source)


def test_index_names_the_package(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "LongLivePipeline"
    assert index["transformer"] == ["longlive_diffusers", "LongLiveTransformer3DModel"]
    assert index["scheduler"] == ["longlive_diffusers", "LongLiveScheduler"]


def test_nothing_but_the_folder_is_left(folder):
    assert [path.name for path in folder.parent.iterdir()] == ["pipeline"]


def test_longlive_base_keeps_its_settings(tmp_path, checkpoint, folder):
    (tmp_path / "out").mkdir()  # an empty folder may be there
    again = convert_checkpoint(checkpoint, folder, tmp_path / "out", sink_size=4)
    pipeline = DiffusionPipeline.from_pretrained(again)
    assert (pipeline.config.window_size, pipeline.config.sink_size) == (16, 4)
    assert pipeline.transformer.config.chunk_size == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes(tmp_path, original, wan_base, dtype):
    out = convert_checkpoint(original, wan_base, tmp_path / "out", dtype=dtype)
    transformer = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert transformer["blocks.0.attn1.to_q.weight"].dtype == dtype
    assert transformer["blocks.0.scale_shift_table"].dtype == torch.float32
    text_encoder = load_file(out / "text_encoder" / "model.safetensors")
    assert text_encoder["encoder.block.0.layer.0.SelfAttention.q.weight"].dtype == dtype


def test_vae_keeps_its_own_dtype(tmp_path, checkpoint, base):
    AutoencoderKLWan.from_pretrained(base / "vae", dtype=torch.bfloat16).save_pretrained(base / "vae")
    out = convert_checkpoint(checkpoint, base, tmp_path / "out", dtype=torch.float32)
    vae = load_file(out / "vae" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in vae.values()} == {torch.bfloat16}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_lora_is_fused_before_rounding(tmp_path, golden, original, wan_base, layout):
    lora = golden / "lora.pt"
    if layout == "diffusers":
        lora = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(read_original_lora(golden / "lora.pt"), lora)
    out = convert_checkpoint(original, wan_base, tmp_path / "out", lora=lora)
    found = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    layers = read_original_lora(golden / "lora.pt")
    expected = read_original_state_dict(original)
    assert found.keys() == expected.keys()
    name = "blocks.1.ffn.net.0.proj"
    up, down = (layers[f"transformer.{name}.lora_{half}.weight"] for half in "BA")
    torch.testing.assert_close(
        found[f"{name}.weight"].float(), expected[f"{name}.weight"] + up @ down, atol=1e-6, rtol=2**-8
    )
    assert torch.equal(found["proj_out.weight"], expected["proj_out.weight"].bfloat16())


def test_report(tmp_path, golden, checkpoint, wan_base):
    lines = []
    convert_checkpoint(checkpoint, wan_base, tmp_path / "out", lora=golden / "lora.pt", report=lines.append)
    assert len(lines) == 4 and lines[0].startswith("transformer: ") and "2 layers" in lines[0]
    assert lines[-1].startswith(str(tmp_path / "out")) and "GiB" in lines[-1]


def test_hub_base_is_fetched_without_its_transformer(monkeypatch, tmp_path, checkpoint, base):
    (base / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(100))
    (base / "text_encoder" / "pytorch_model.bin").write_bytes(bytes(100))
    cache = tmp_path / "cache"

    def download(repo, allow_patterns, ignore_patterns):
        assert repo == "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
        for name in files(base):
            wanted = any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            if wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(base / name, cache / name)
        fetched.append(files(cache))
        return str(cache)

    fetched = []
    monkeypatch.setattr(pipeline_folder, "snapshot_download", download)
    out = convert_checkpoint(checkpoint, "Wan-AI/Wan2.2-TI2V-5B-Diffusers", tmp_path / "out")
    assert not any(name.endswith((".safetensors", ".bin")) for name in fetched[0])  # sizes are checked first
    weights = {name for name in fetched[-1] if name.endswith((".safetensors", ".bin"))}
    assert weights == {"text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    assert DiffusionPipeline.from_pretrained(out).transformer.config.attention_head_dim == 32


# Refusals: every one before anything is written


@pytest.fixture
def refused(tmp_path, checkpoint):
    """Call with what is wrong; checks that the error is a ValueError and that the disk is as before."""

    def run(message, base, checkpoint=checkpoint, output=None, **options):
        parent = tmp_path / "refused"
        parent.mkdir(exist_ok=True)
        before = files(tmp_path)
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(checkpoint, base, output or parent / "new" / "out", **options)
        assert files(tmp_path) == before

    return run


def test_bad_checkpoints(refused, tmp_path, golden, original, wan_base):
    refused("no checkpoint file", wan_base, tmp_path / "nothing.pt")
    packed = torch.load(golden / "model_4o6.pt", weights_only=True)["generator"]
    refused("does not say by which rule", wan_base, packed)
    refused("is a LoRA", wan_base, golden / "lora.pt")
    query = "blocks.0.self_attn.q.weight"
    refused("infinities or NaN", wan_base, {**original, query: original[query] * torch.nan})
    refused("infinities or NaN", wan_base, {**original, query: original[query] * 1e8}, dtype=torch.float16)
    refused("is stored as torch.sparse_coo", wan_base, {**original, query: original[query].to_sparse()})
    refused(r"a key that is not a name, such as 3 \(int\)", wan_base, {**original, 3: original[query]})
    refused("a key that is not a name", wan_base, {("generator", 0): original[query]})
    refused("1 missing", wan_base, {k: t for k, t in original.items() if k != "blocks.1.modulation"})
    (tmp_path / "cut.pt").write_bytes((golden / "model_bf16.pt").read_bytes()[:-100])
    refused("truncated", wan_base, tmp_path / "cut.pt")


def test_bad_output(refused, tmp_path, wan_base):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("the only copy")
    refused("already holds 1 files", wan_base, output=tmp_path / "full")
    refused("is a file", wan_base, output=tmp_path / "full" / "thesis.txt")


def test_bad_settings(refused, wan_base):
    refused("no setting windowsize. The pipeline has .*window_size", wan_base, windowsize=8)
    refused(r"dtype has to be one of float32, bfloat16, float16, not torch\.int8", wan_base, dtype=torch.int8)
    refused("in_channels=48 was given", wan_base, in_channels=48)
    refused("128 wide, which is not 2 heads of 48", wan_base, attention_head_dim=48)
    refused("`window_size` 1 is too small", wan_base, window_size=1)
    refused("`sink_size` at least 0, got 8, 32 and -1", wan_base, sink_size=-1)
    refused("^LongLivePipeline: multi_shot_sink has to be true or false, got 'no'", wan_base, multi_shot_sink="no")
    refused("^LongLiveTransformer3DModel: chunk_size has to be a whole number, got '2'", wan_base, chunk_size="2")
    refused("eps has to be a number, got 'tiny'", wan_base, eps="tiny")
    refused("`sample_height` must be at least 1, got 0", wan_base, sample_height=0)


def test_bad_lora(refused, tmp_path, golden, wan_base):
    refused("no weights|not a LoRA", wan_base, lora={"a": torch.zeros(2)})
    torch.save({"generator_lora": {}}, tmp_path / "empty.pt")
    refused("empty LoRA", wan_base, lora=tmp_path / "empty.pt")
    stored = torch.load(golden / "lora.pt", weights_only=True)["generator_lora"]
    torch.save({k.replace("blocks.1.", "blocks.7."): t for k, t in stored.items()}, tmp_path / "deep.pt")
    refused("does not fit in 10 layers", wan_base, lora=tmp_path / "deep.pt")
    refused("no LoRA file", wan_base, lora=tmp_path / "missing.pt")
    refused("not a LoRA", wan_base, lora=golden / "model_bf16.pt")
    foreign = {f"transformer.double_blocks.0.q.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    refused("does not fit in 1 layer: double_blocks.0.q does not exist", wan_base, lora=foreign)
    foreign = {key.replace("transformer.", "text_encoder."): tensor for key, tensor in foreign.items()}
    refused("Nothing of this LoRA is for the transformer", wan_base, lora=foreign)
    refused("has no weight file", wan_base, lora=wan_base)
    deep = {k.replace("blocks.1.", "blocks.7."): t for k, t in read_original_lora(golden / "lora.pt").items()}
    save_file(deep, tmp_path / "deep.safetensors")
    refused("does not fit in 10 layers", wan_base, lora=tmp_path / "deep.safetensors")


def test_base_that_is_not_there(refused, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    refused("no folder, and no Hub repo", tmp_path / "nowhere")
    monkeypatch.setattr(pipeline_folder, "snapshot_download", unreachable)
    refused("'someone/model' is no folder, and no Hub repository that can be reached: .*offline", "someone/model")


def test_base_of_another_size(refused, make_wan_base, tmp_path):
    refused("VAE has 16 latent channels, the checkpoint 8", make_wan_base(tmp_path / "a", channels=16))
    refused("text encoder is 64 wide, the checkpoint takes 32", make_wan_base(tmp_path / "b", width=64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model_index.json", "has no model_index.json"),
        ("vae/config.json", "has no vae/config.json"),
        ("text_encoder/config.json", "has no text_encoder/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "vae has no weights"),
        ("text_encoder/model.safetensors", "text_encoder has no weights"),
    ],
)
def test_base_with_a_file_missing_or_broken(refused, base, name, message):
    whole = (base / name).read_bytes()
    (base / name).unlink()
    refused(message, base)
    (base / name).write_bytes(whole[: len(whole) // 2])
    refused("is not JSON" if name.endswith(".json") else "is cut off, damaged", base)


def test_base_of_another_kind(refused, base):
    edit_json(base / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    refused("has AutoencoderKL as vae, not AutoencoderKLWan", base)
    edit_json(base / "model_index.json", vae=[None, None])
    refused("has None as vae", base)


def test_bases_of_another_kind_or_with_settings_that_cannot_be(refused, base, folder, tmp_path):
    edit_json(base / "model_index.json", _class_name="FluxPipeline")
    refused("is a FluxPipeline; it has to be one of LongLivePipeline, WanPipeline", base)
    edit_json(base / "model_index.json", _class_name="WanPipeline")
    edit_json(base / "vae" / "config.json", dim_mult=4)
    refused(r"dim_mult has to be a list of \(a whole number\), got 4", base)
    longlive = Path(shutil.copytree(folder, tmp_path / "bases" / "longlive"))
    edit_json(longlive / "model_index.json", window_size="32")
    refused("'.*longlive' cannot be opened: .*window_size has to be a whole number, got '32'", longlive)
    edit_json(longlive / "model_index.json", window_size=1)
    refused("`window_size` 1 is too small", longlive)
    edit_json(longlive / "model_index.json", window_size=16)
    edit_json(longlive / "scheduler" / "scheduler_config.json", flow_shift="5")
    refused("flow_shift has to be a number, got '5'", longlive)


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "text_encoder/config.json"])
def test_a_base_whose_json_is_nested_without_end(refused, base, name):
    (base / name).write_text('{"a":' * 100_000)
    refused(f"{name} of .* is nested too deeply", base)


def test_base_without_a_tokenizer(refused, base):
    shutil.rmtree(base / "tokenizer")
    refused("tokenizer", base)


def test_base_without_a_transformer_config(tmp_path, checkpoint, base):
    shutil.rmtree(base / "transformer")
    out = convert_checkpoint(checkpoint, base, tmp_path / "out", num_attention_heads=4)
    assert json.loads((out / "transformer" / "config.json").read_text())["attention_head_dim"] == 32


@pytest.mark.parametrize("interruption", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_nothing(monkeypatch, tmp_path, checkpoint, wan_base, interruption):
    def fail(self, folder, **kwargs):
        (Path(folder) / "half.safetensors").write_bytes(bytes(10))
        raise interruption

    monkeypatch.setattr(LongLivePipeline, "save_pretrained", fail)
    with pytest.raises(type(interruption)):
        convert_checkpoint(checkpoint, wan_base, tmp_path / "out")
    assert files(tmp_path) == []
