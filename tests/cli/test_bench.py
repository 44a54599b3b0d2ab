"""`longlive bench`: the formula of its work, the sizes it builds, and a run on the toy. Times are never asserted."""

import inspect
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longlive_diffusers import LongLiveTransformer3DModel
from longlive_diffusers.benchmark.measure import as_time
from longlive_diffusers.benchmark.models import random_model, random_pipeline
from longlive_diffusers.benchmark.options import BenchOptions
from longlive_diffusers.benchmark.runs import full_window_forward, measure_denoise, measure_whole
from longlive_diffusers.benchmark.setup import build
from longlive_diffusers.benchmark.sizes import SIZES, BenchSize, forward_flops
from longlive_diffusers.benchmark.table import as_table
from longlive_diffusers.cli import main
from longlive_diffusers.cli.choices import BENCH_DECODERS
from longlive_diffusers.latency import Latency
from longlive_diffusers.models.tiny_decoder import TinyVideoDecoder


CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def random_embeds(size: BenchSize) -> torch.Tensor:
    return torch.randn(1, size.text_tokens, size.transformer["text_dim"])


@pytest.mark.parametrize("density", [1, 0.5, 0.1])
@pytest.mark.parametrize(
    "changes", [{}, {"height": 4, "width": 10, "window_size": 8, "text_tokens": 7}], ids=["toy", "another size"]
)
def test_the_formula_counts_what_pytorch_counts(changes, density):
    """All of it but the choice of blocks, where only some are attended to."""
    size = replace(SIZES["toy"](), **changes)
    transformer = random_model(LongLiveTransformer3DModel, size.transformer, CPU, torch.float32)
    cache = transformer.create_kv_cache(
        1,
        size.height,
        size.width,
        window_size=size.window_size,
        sink_size=2,
        multi_shot_sink=True,
        attention_density=density,
    )
    latents = torch.randn(1, size.transformer["in_channels"], size.chunk_size, size.height, size.width)
    embeds, timestep = random_embeds(size), torch.full((1, size.chunk_size), 500.0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention on a CPU is not counted
        for _ in range(size.chunks_to_fill):
            cache.begin_chunk(size.chunk_size)
        transformer(latents, timestep, embeds, kv_cache=cache)  # caches the text
        with FlopCounterMode(display=False) as counter:
            transformer(latents, timestep, embeds, kv_cache=cache)
    choice, blocks, config = 0, cache.chunk.blocks, size.transformer
    if blocks is not None:
        of_a_head = 2 * config["attention_head_dim"] * blocks.strips * blocks.is_always_seen.shape[1]
        choice = config["num_layers"] * config["num_attention_heads"] * of_a_head
    counted = sum(forward_flops(size, num_keys=cache.num_attended_tokens).values())
    assert counted + choice == counter.get_total_flops()
    assert (counted < sum(forward_flops(size).values())) == (density < 1)


def test_devices_divide_the_work_of_whole_frames_and_of_heads():
    size = SIZES["5b"]()  # chunks of 8 frames, 24 heads
    whole = forward_flops(size)
    for n in (2, 4, 8):
        assert forward_flops(size, n) == {part: flops // n for part, flops in whole.items()}
    attention = 4 * 7040 * 30 * 3072 * (4 * 7040)  # to the frames in the cache
    by_three = forward_flops(size, 3)  # which share no frames of eight
    assert by_three == {"attention": whole["attention"] - attention + attention // 3, "linear": whole["linear"]}


def test_the_5b_size_is_wan22s():
    size = SIZES["5b"]()
    with init_empty_weights():
        transformer, vae = LongLiveTransformer3DModel(**size.transformer), AutoencoderKLWan(**size.vae)
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 4_999_787_712  # as published
    assert sum(parameter.numel() for parameter in vae.parameters()) == pytest.approx(705e6, rel=1e-3)
    defaults = inspect.signature(LongLiveTransformer3DModel).parameters
    assert all(defaults[name].default == value for name, value in size.transformer.items())
    tokens = 8 * 22 * 40
    assert (size.height * 16, size.width * 16) == (704, 1280)
    # Twice the weights of the blocks for each token, less those of the text's keys and values; and attention.
    linear = 2 * tokens * 30 * (6 * 3072**2 + 2 * 3072 * 14336)
    attention = 4 * tokens * 30 * 3072 * (4 * tokens + 512)
    assert forward_flops(size) == pytest.approx({"linear": linear, "attention": attention}, rel=1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_every_named_size_fits_together(name):
    size = SIZES[name]()
    assert size.transformer["in_channels"] == size.vae["z_dim"] == size.tiny_decoder["latent_channels"]
    with init_empty_weights():
        decoder = TinyVideoDecoder(**{key: v for key, v in size.tiny_decoder.items() if not key.startswith("_")})
    assert decoder.spatial_scale == size.vae["scale_factor_spatial"]
    assert decoder.temporal_scale == size.vae["scale_factor_temporal"]
    assert size.window_size % size.chunk_size == 0
    assert size.num_chunks > size.chunks_to_fill
    assert size.vae["scale_factor_spatial"] == (8 if name == "toy" else 16)


def test_half_precision_is_that_of_from_pretrained():
    size = SIZES["toy"]()
    model = random_model(LongLiveTransformer3DModel, size.transformer, CPU, torch.bfloat16)
    weights = {name: weight.dtype for name, weight in model.named_parameters()}
    assert weights["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert weights["blocks.0.norm2.weight"] == weights["scale_shift_table"] == torch.float32
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("decoder", BENCH_DECODERS)
def test_runs_make_the_video_they_time(decoder):
    size = replace(SIZES["toy"](), height=8, width=8, window_size=8, sink_size=2, num_chunks=5, text_tokens=4)
    size = replace(size, num_inference_steps=1)
    setup = build(BenchOptions("toy", size, CPU, torch.float32, decoder=decoder))
    seconds, latents = measure_denoise(setup, 5)
    assert len(seconds) == 5 and min(seconds) > 0
    pipe = setup.pipe
    assert all(chunk.shape == (1, pipe.vae.config.z_dim, 2, 8, 8) for chunk in latents)
    assert all(torch.isfinite(chunk).all() for chunk in latents)
    for async_decode in (False, True):
        result = measure_whole(setup, async_decode=async_decode)
        assert result["frames_per_second"] == pytest.approx(37 / result["seconds"])
        latency = result["latency"]
        assert 0 < latency["first_frame"] < result["seconds"]
        assert 0 < latency["between_chunks_median"] <= latency["between_chunks_p95"]
        later = result["seconds"] - latency["first_frame"]  # and what ends the session
        assert latency["frames_per_second"] >= 32 / later and latency["stalls"] in range(5)
    with full_window_forward(setup) as forward:
        assert torch.equal(forward()[0], forward()[0])
    # float32 keys and values of 8 frames of 16 tokens in every layer
    config = pipe.transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    assert forward.kv_cache.num_bytes == 4 * 2 * 8 * 16 * config.num_layers * width


def test_the_table_and_the_file_say_the_same(tmp_path, capfd):
    path = tmp_path / "bench.json"
    options = ["--window", "6", "--sink", "2", "--chunks", "5", "--steps", "2", "--height", "64", "--width", "128"]
    assert main(["bench", *options, "--threads", "1", "--json", str(path)]) == 0
    table, progress = capfd.readouterr()
    report = json.loads(path.read_text())
    setting, results = report["setting"], report["results"]

    assert setting["pixels"] == [64, 128] and setting["latents"] == [8, 16]
    assert setting["frames"] == 37 and setting["steps"] == 2
    assert setting["dtype"] == "float32" and setting["threads"] == 1 and setting["device"]
    assert setting["versions"]["torch"] == torch.__version__
    forward = results["forward"]
    assert forward["attention"] + forward["linear"] + forward["rest"] == pytest.approx(forward["seconds"])
    assert min(forward.values()) > 0
    assert sum(results["part_flops"].values()) == results["forward_flops"]
    work, rate = results["part_flops"]["linear"], results["matmul_flops_per_second"]["float32"]
    assert results["part_to_matmul"]["linear"] == pytest.approx(work / forward["linear"] / rate)
    assert next(iter(results["attention_kernels"])) == "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert results["forward_host_seconds"] is results["forward_kernels"] is results["host_waits_per_chunk"] is None
    both = results["denoise_chunk"] + results["decode_chunk"]
    assert results["denoise_and_decode_chunk"] == both and setting["frames_per_chunk"] == 8
    size = replace(SIZES["toy"](), width=16, window_size=6)
    assert results["part_flops"] == forward_flops(size)
    assert size.num_frames(5) == 37
    assert results["forward_to_matmul"] == pytest.approx(
        results["forward_flops"] / forward["seconds"] / results["matmul_flops_per_second"]["float32"]
    )
    assert results["weights_bytes"]["transformer"] == 4 * sum(
        parameter.numel() for parameter in random_pipeline(size, CPU, torch.float32).transformer.parameters()
    )

    assert list(results["synchronous"]) == ["seconds", "frames_per_second", "latency"]

    for text in (setting["device"], torch.__version__, "37 frames of 64x128", "window of 6", "2 steps", "float32"):
        assert text in table
    for row in (
        "matmul bfloat16",
        "forward",
        "denoise",
        "decode",
        "both",
        "synchronous",
        "asynchronous",
        "first frame",
    ):
        assert any(line.strip().startswith(row) for line in table.splitlines()), row
    for row in ("host waits", "host", "kernels"):
        (line,) = (line for line in table.splitlines() if line.split("  -  ")[0].strip() == row)
        assert "not applicable" in line
    for row in ("between chunks", "real time", "stalls"):
        assert sum(line.strip().startswith(row) for line in table.splitlines()) == 2, row
    for how in ("synchronous", "asynchronous"):
        latency = results[how]["latency"]
        assert list(latency) == list(Latency().as_dict())
        assert f"  {latency['real_time_factor']:.2f} s/s" in table
        assert f"  {latency['stalls']}, {as_time(latency['stalled_seconds'])}" in table
    assert f"{results['synchronous']['frames_per_second']:.2f} frames/s" in table
    assert "resident memory" in table
    assert "decoding" in progress and "decoding" not in table  # stdout is the table alone
    assert all(line.startswith("longlive bench: ") for line in progress.splitlines())


def measure_quickly(
    monkeypatch: pytest.MonkeyPatch, *, share: float | None = 0.25, ending: BaseException | None, whole: object = None
) -> None:
    """Let a benchmark have measured all but whole videos, without measuring, and then have an error; or these, too."""

    def end(*args, **kwargs):
        if ending is not None:
            raise ending
        return whole

    report = "longlive_diffusers.benchmark.report."
    monkeypatch.setattr(report + "measure_matmul", lambda device, dtype: 2e9)
    shares = {"attention": share, "linear": share and 0.5, "rest": share}
    profiled = {"shares": shares, "attention_kernels": {"aten::bmm": 1.0}, "kernels": None}
    monkeypatch.setattr(report + "warm_up", lambda *args, **options: None)
    cache = SimpleNamespace(num_bytes=2**20, num_attended_tokens=64)
    forward = SimpleNamespace(kv_cache=cache)
    monkeypatch.setattr(report + "full_window_forward", lambda setup: nullcontext(forward))
    monkeypatch.setattr(report + "measure_forward", lambda *args: (4.0, None))
    monkeypatch.setattr(report + "profile_forward", lambda *args: profiled)
    monkeypatch.setattr(report + "measure_denoise", lambda *args: ([0.5] * 12, []))
    monkeypatch.setattr(report + "measure_whole", end)
    monkeypatch.setattr(report + "decoded_chunks", lambda *args: iter([0.25] * 12))


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 1, "error: out of memory; "),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_was_measured_before_a_failure_is_reported(monkeypatch, tmp_path, capsys, error, status, told):
    measure_quickly(monkeypatch, ending=error)
    path = tmp_path / "bench.json"
    assert main(["bench", "--json", str(path)]) == status
    table, err = capsys.readouterr()
    results = json.loads(path.read_text())["results"]
    assert results["forward"] == {"seconds": 4.0, "attention": 1.0, "linear": 2.0, "rest": 1.0}
    assert results["denoise_chunk"] == 0.5 and results["decode_chunk"] == 0.25
    assert "synchronous" not in results and "synchronous" not in table
    for row in ("matmul float32", "forward", "denoise", "decode", "weights", "KV cache"):
        assert any(line.startswith(row) for line in table.splitlines()), row
    assert told in err.splitlines()[-1]


def test_parts_that_the_profiler_did_not_see_are_null_and_a_dash(monkeypatch, tmp_path, capsys):
    measure_quickly(monkeypatch, share=None, ending=KeyboardInterrupt())
    path = tmp_path / "bench.json"
    assert main(["bench", "--json", str(path)]) == 130
    table, _ = capsys.readouterr()
    report = json.loads(path.read_text())
    assert report["results"]["forward"] == {"seconds": 4.0, "attention": None, "linear": None, "rest": None}
    assert report["results"]["part_to_matmul"] == {"attention": None, "linear": None}
    for part in ("attention", "linear", "rest"):
        (line,) = (line for line in table.splitlines() if line.split()[:1] == [part])
        assert line.split("  ")[-1] == "the profiler did not see the device at work" and "nan" not in line
    assert as_table(report) + "\n" == table  # also of a report that was read from its file


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("ending", [None, KeyboardInterrupt()])
def test_a_file_that_cannot_be_written_loses_neither_the_table_nor_another_file(monkeypatch, tmp_path, capsys, ending):
    whole = {"seconds": 1.0, "frames_per_second": 37.0, "latency": Latency().as_dict()}
    whole["latency"].update(first_frame=0.5, between_chunks_median=0.1, between_chunks_p95=0.1, real_time_factor=1.5)
    measure_quickly(monkeypatch, ending=ending, whole=whole)
    assert main(["bench", "--json", "/dev/full", "--results", str(tmp_path)]) == (1 if ending is None else 130)
    table, err = capsys.readouterr()
    assert any(line.startswith("denoise") for line in table.splitlines())
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"]["denoise_chunk"] == 0.5
    assert path.with_suffix(".md").read_text().startswith("# longlive bench")
    told = [line for line in err.splitlines() if "/dev/full" in line]
    program = "longlive" if ending is None else "longlive bench"
    assert told == [f"{program}: error: No space left on device: '/dev/full'"]


def test_a_table_that_cannot_be_printed_loses_no_file(monkeypatch, tmp_path, capsys):
    def fail(text):
        raise OSError(28, "No space left on device")

    measure_quickly(monkeypatch, ending=KeyboardInterrupt())
    monkeypatch.setattr("longlive_diffusers.cli.run_bench.as_table", fail)
    assert main(["bench", "--json", str(tmp_path / "bench.json")]) == 130
    assert json.loads((tmp_path / "bench.json").read_text())["results"]["denoise_chunk"] == 0.5
    assert "longlive bench: error: No space left on device\n" in capsys.readouterr().err


def test_what_measured_nothing_replaces_no_report(monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("longlive_diffusers.benchmark.report.measure_matmul", fail)
    path = tmp_path / "bench.json"
    path.write_text("the last report")
    assert main(["bench", "--json", str(path)]) == 1
    assert path.read_text() == "the last report"
    out, err = capsys.readouterr()
    assert out == "" and "longlive: error: out of memory; what needs less: " in err


def test_backend_and_compilation_reach_the_transformer(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        LongLiveTransformer3DModel, "compile_repeated_blocks", lambda self, **options: asked.append(options)
    )
    monkeypatch.setattr(LongLiveTransformer3DModel, "set_attention_backend", lambda self, name: asked.append(name))
    monkeypatch.setattr("longlive_diffusers.benchmark.report.measure_matmul", lambda device, dtype: 2e9)
    path = tmp_path / "bench.json"
    options = ["--window", "4", "--sink", "0", "--chunks", "2", "--steps", "1", "--height", "32", "--width", "32"]
    assert main(["bench", *options, "--compile", "--attention-backend", "native", "--json", str(path)]) == 0
    assert asked == ["native", {"fullgraph": True}]
    setting = json.loads(path.read_text())["setting"]
    assert setting["compiled"] is True and setting["attention_backend"] == "native"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "100"], "--height must be an integer, a multiple of 16 from 16 to 16384, got 100"),
        (["--window", "9"], "the window of 9 latent frames is not filled by whole chunks of 2"),
        (["--window", "4"], "--window-size 4 is too small"),
        (["--chunks", "3"], "--chunks 3 is too few: at least 8 are needed"),
        (["--json", "missing/bench.json"], "the folder 'missing' does not exist"),
        (["--json", "."], "it is a folder"),
        (["--device", "cuda:9"], "there is no device 'cuda:9' here"),
        (["--nvfp4", "te"], "--nvfp4 te needs TransformerEngine"),
        (["--attention-backend", "flash"], "--attention-backend flash cannot be used"),
        (["--window", "2", "--sink", "0", "--chunks", "1"], "--chunks 1 is too few: at least 2 are needed"),
        (["--results", "missing"], "the folder 'missing' does not exist"),
        (["--rounds", "3"], "--rounds 3 would do nothing without --compare"),
        (["--results", "a_file"], "Cannot write into 'a_file': it is not a folder"),
        (["--compare", "--threads 2"], "--compare cannot change --threads"),
        (["--compare", "--devices 2"], "--compare cannot change --devices"),
        (["--compare", "--json other.json"], "--compare cannot change --json"),
        (["--compare", "--compare '--compile'"], "--compare cannot change --compare"),
        (["--compare", "--dtype 'float32"], "--compare '--dtype 'float32': No closing quotation"),
        (["--compare", "--dtypes float32"], "--compare '--dtypes float32': unrecognized arguments: --dtypes float32"),
        (["--compare", "--steps many"], "--compare '--steps many': argument --steps: must be an integer from 1 to"),
        (["--compare", "--chunks 3"], "--compare '--chunks 3': --chunks 3 is too few: at least 8 are needed"),
        (["--compare", "--attention-backend flash"], "--attention-backend flash cannot be used"),
        (["--compare", "--nvfp4 te"], "--compare '--nvfp4 te': --nvfp4 te needs TransformerEngine"),
        (["--compare", "--size cpu-reference"], "would change the number of threads (torch's number of and 2)"),
        (["--attention-backend", "abacus"], "no attention backend 'abacus': there are "),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")

    def must_not_measure(*args, **kwargs):
        raise AssertionError("something was measured")

    monkeypatch.setattr("longlive_diffusers.cli.run_bench.measurements", must_not_measure)
    monkeypatch.setattr("longlive_diffusers.cli.run_bench.compare", must_not_measure)
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("longlive: error: ") and message in line
