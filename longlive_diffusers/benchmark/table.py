"""The report of `longlive bench` as text: what was measured, then a line for each number and what it counts."""

from typing import Any

from .kv_cache import kv_cache_rows
from .measure import as_size, as_time
from .runs import matmul_side


FORWARD_PARTS = {
    "attention": "scores and sums over keys, self and cross (shares from a profile of its own)",
    "linear": "linear layers",
    "rest": "norms, modulation, rotation, cache writes, copies",
}


def as_table(report: dict[str, Any]) -> str:
    """Format the report, the one that `--json` writes, as text."""
    setting, results = report["setting"], report["results"]
    forward, chunk = results["forward"], setting["chunk_size"]
    share = lambda name: f"{100 * forward[name] / forward['seconds']:.0f} %"  # noqa: E731
    ratio = results["forward_to_matmul"]
    side = matmul_side(setting["device_type"])
    size, versions = setting["size"], ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    nvfp4 = f", blocks in NVFP4 ({setting['nvfp4_backend']})" if setting["nvfp4_backend"] else ""
    compiled = ", compiled" if setting["compiled"] else ""
    height, width = setting["pixels"]
    network = f"{setting['layers']} layers, width {setting['width']}, {setting['heads']} heads, FFN {setting['ffn']}"
    latents = "x".join(map(str, setting["latents"]))
    lines = [
        f"device    {setting['device']}, {setting['threads']} CPU threads",
        f"software  {versions}",
        f"network   {size}: {network}; random weights, {setting['dtype']}{nvfp4}",
        f"attention backend {setting['attention_backend']}{compiled}; {setting['text_tokens']} text tokens",
        f"video     {setting['frames']} frames of {height}x{width}, batch 1",
        f"          {setting['chunks']} chunks of {chunk} latent frames of {latents}",
        f"cache     window of {setting['window_size']} latent frames, sink {setting['sink_size']}",
        f"solver    {setting['steps']} steps and the clean pass: {setting['steps'] + 1} forwards a chunk; no guidance",
        "",
    ]
    rows = [
        *(
            (f"matmul {name}", f"{rate / 1e12:.3f} TFLOP/s", f"the device's own rate: best {side}^3 product")
            for name, rate in results["matmul_flops_per_second"].items()
        ),
        ("forward", as_time(forward["seconds"]), "one forward of the transformer on a chunk, full window; median"),
        *((f"  {name}", f"{as_time(forward[name])}  {share(name)}", text) for name, text in FORWARD_PARTS.items()),
        ("  work", f"{results['forward_flops'] / 1e12:.4f} TFLOP", "matrix products of that forward, by formula"),
        (
            "  rate",
            f"{results['forward_flops_per_second'] / 1e12:.3f} TFLOP/s",
            "work by time" + ("" if ratio is None else f": {100 * ratio:.0f} % of the matmul rate of this dtype"),
        ),
        ("denoise", as_time(results["denoise_chunk"]), "a chunk at full window: all forwards, solver, noise; median"),
        ("  first chunk", as_time(results["denoise_first_chunk"]), "the same, with an empty cache, and allocating it"),
        ("decode", as_time(results["decode_chunk"]), "a chunk through the VAE, alone on the device; median"),
        ("  first chunk", as_time(results["decode_first_chunk"]), "the same, for the beginning of a video"),
        *_whole_rows("synchronous", results["synchronous"], "denoise and decode in turn"),
        *_whole_rows("asynchronous", results["asynchronous"], "decode while the next chunk is denoised"),
        *kv_cache_rows(results["kv_caches"]),
        ("weights", as_size(sum(results["weights_bytes"].values())), "transformer and VAE"),
        ("KV cache", as_size(results["kv_cache_bytes"]), "keys and values of the window, all layers"),
        ("peak memory", as_size(results["peak_memory_bytes"]), results["peak_memory_counts"]),
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(lines + [f"{name:<{widths[0]}}  {value:<{widths[1]}}  {text}" for name, value, text in rows])


def _whole_rows(name: str, result: dict[str, float], how: str) -> list[tuple[str, str, str]]:
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
    ]
