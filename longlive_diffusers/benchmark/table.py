"""The report of `longlive bench` as text: what was measured, then a line for each number and what it counts."""

from typing import Any

from ..limits import FPS
from ..wording import counted
from .kv_cache import kv_cache_rows
from .measure import as_size, as_time
from .runs import matmul_side


FORWARD_PARTS = {
    "attention": "scores and sums over keys, self and cross (shares from a profile of its own)",
    "linear": "linear layers",
    "rest": "norms, modulation, rotation, cache writes, copies",
}


Row = tuple[str, str, str]


def as_table(report: dict[str, Any]) -> str:
    """Format the report, the one that `--json` writes, as text. What was not measured is left out."""
    setting, results = report["setting"], report["results"]
    parts = [
        ("matmul_flops_per_second", _matmul_rows),
        ("forward", _forward_rows),
        ("denoise_chunk", _denoise_rows),
        ("decode_chunk", _decode_rows),
        ("synchronous", lambda _, found: _whole_rows("synchronous", found, "denoise and decode in turn")),
        (
            "asynchronous",
            lambda _, found: _whole_rows("asynchronous", found, "decode while the next chunk is denoised"),
        ),
        ("kv_caches", lambda _, found: kv_cache_rows(found["kv_caches"])),
        ("weights_bytes", _weights_rows),
        ("peak_memory_bytes", _memory_rows),
    ]
    rows = [row for name, make_rows in parts if name in results for row in make_rows(setting, results)]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [*_setting_lines(setting), ""]
    return "\n".join(lines + [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {text}" for name, value, text in rows])


def _setting_lines(setting: dict[str, Any]) -> list[str]:
    size, versions = setting["size"], ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    nvfp4 = f", blocks in NVFP4 ({setting['nvfp4_backend']})" if setting["nvfp4_backend"] else ""
    shared = f"{setting['devices']} processes, each on " if setting["devices"] > 1 else ""
    compiled = ", compiled" if setting["compiled"] else ""
    height, width = setting["pixels"]
    network = f"{setting['layers']} layers, width {setting['width']}, {setting['heads']} heads, FFN {setting['ffn']}"
    latents = "x".join(map(str, setting["latents"]))
    return [
        f"device    {shared}{setting['device']}, {counted(setting['threads'], 'CPU thread')}",
        f"software  {versions}",
        f"network   {size}: {network}; random weights, {setting['dtype']}{nvfp4}",
        f"attention backend {setting['attention_backend']}{compiled}; {setting['text_tokens']} text tokens",
        f"video     {setting['frames']} frames of {height}x{width}, batch 1",
        f"          {setting['chunks']} chunks of {setting['chunk_size']} latent frames of {latents}",
        f"cache     window of {setting['window_size']} latent frames, sink {setting['sink_size']}",
        f"solver    {setting['steps']} steps and the clean pass: {setting['steps'] + 1} forwards a chunk; no guidance",
    ]


def _matmul_rows(setting: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    side = matmul_side(setting["device_type"])
    return [
        (f"matmul {name}", f"{rate / 1e12:.3f} TFLOP/s", f"the device's own rate: best {side}^3 product")
        for name, rate in results["matmul_flops_per_second"].items()
    ]


def _forward_rows(setting: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    forward, ratio = results["forward"], results["forward_to_matmul"]
    on_each = " on each device" if setting["devices"] > 1 else ""
    compared = "" if ratio is None else f": {100 * ratio:.0f} % of the matmul rate of this dtype"
    parts = [
        (f"  {name}", f"{as_time(forward[name])}  {100 * forward[name] / forward['seconds']:.0f} %", text)
        for name, text in FORWARD_PARTS.items()
    ]
    return [
        ("forward", as_time(forward["seconds"]), "one forward of the transformer on a chunk, full window; median"),
        *parts,
        (
            "  work",
            f"{results['forward_flops'] / 1e12:.4f} TFLOP",
            f"matrix products of that forward{on_each}, by formula",
        ),
        ("  rate", f"{results['forward_flops_per_second'] / 1e12:.3f} TFLOP/s", f"work by time{compared}"),
    ]


def _denoise_rows(_: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    return [
        ("denoise", as_time(results["denoise_chunk"]), "a chunk at full window: all forwards, solver, noise; median"),
        ("  first chunk", as_time(results["denoise_first_chunk"]), "the same, with an empty cache, and allocating it"),
    ]


def _decode_rows(_: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    return [
        ("decode", as_time(results["decode_chunk"]), "a chunk through the VAE, alone on the device; median"),
        ("  first chunk", as_time(results["decode_first_chunk"]), "the same, for the beginning of a video"),
    ]


def _weights_rows(_: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    return [("weights", as_size(sum(results["weights_bytes"].values())), "transformer and VAE")]


def _memory_rows(_: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    return [
        ("KV cache", as_size(results["kv_cache_bytes"]), "keys and values of the window, all layers"),
        ("peak memory", as_size(results["peak_memory_bytes"]), results["peak_memory_counts"]),
    ]


def _whole_rows(name: str, results: dict[str, Any], how: str) -> list[Row]:
    result = results[name]
    latency = result["latency"]
    gaps = f"{as_time(latency['between_chunks_median'])}, {as_time(latency['between_chunks_p95'])}"
    return [
        (
            name,
            f"{result['frames_per_second']:.2f} frames/s",
            f"the whole video in {as_time(result['seconds'])}: {how}",
        ),
        (
            "  first frame",
            as_time(result["first_frame"]),
            "from the call to the first chunk's frames; no text encoder",
        ),
        ("  between chunks", gaps, "from one chunk's frames to the next one's; median, 95th percentile"),
        (
            "  real time",
            f"{latency['real_time_factor']:.2f} s/s",
            f"video made in a second, after the first chunk, at {FPS} frames per second",
        ),
        (
            "  stalls",
            f"{latency['stalls']}, {as_time(latency['stalled_seconds'])}",
            "waits of a viewer who begins with the first frame; how long in all",
        ),
    ]
