"""The report of `longlive bench` as text: what was measured, then a line for each number and what it counts."""

from typing import Any

from ..limits import FPS
from ..wording import counted
from .markdown import markdown_table
from .measure import as_size, as_time
from .runs import matmul_side


FORWARD_PARTS = {
    "attention": "scores and sums over keys, self and cross (shares from a profile of its own)",
    "linear": "linear layers",
    "rest": "norms, modulation, rotation, cache writes, copies",
}
MINOR = 0.02  # kernels that take less of attention's time are left out


Row = tuple[str, ...]


HEADER = ("measured", "value", "what it counts")


def as_table(report: dict[str, Any]) -> str:
    """Format the report, the one that `--json` writes, as text. What was not measured is left out."""
    lines = [*_condition_lines(report), ""]
    for rows in _tables(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        cells = (zip(row, widths, strict=True) for row in rows)
        lines += [*("  ".join(f"{cell:<{width}}" for cell, width in row).rstrip() for row in cells), ""]
    return "\n".join(lines[:-1])


def as_markdown(report: dict[str, Any]) -> str:
    """Format the report as a file of Markdown."""
    conditions = "\n".join(["```text", *_condition_lines(report), "```"])
    tables = [
        markdown_table(header, [tuple(map(str.strip, row)) for row in rows]) for header, *rows in _tables(report)
    ]
    title = f"# longlive bench, {report['setting']['date'][:10]}: {' against '.join(report['labels'])}"
    return "\n\n".join([title, f"`{report['command']}`", conditions, *tables]) + "\n"


def _condition_lines(report: dict[str, Any]) -> list[str]:
    """Return what the numbers depend on; of a second setting, in what it differs."""
    lines = _setting_lines(report["setting"])
    if "compared_setting" not in report:
        return lines
    others = [line for line in _setting_lines(report["compared_setting"])[1:] if line not in lines]
    return [*lines, "", f"against {report['labels'][1]}", *others]


def _tables(report: dict[str, Any]) -> list[list[Row]]:
    """Return the tables, each with its header first."""
    setting, results = report["setting"], report["results"]
    if "compared_setting" not in report:
        return [[HEADER, *_rows(setting, results)]]
    tables = [[HEADER, *_rows(setting, results)]]
    settings = {"first": setting, "second": report["compared_setting"]}
    for (which, own), once in zip(settings.items(), results.get("once", ()), strict=False):
        tables.append([(f"{which} setting", *HEADER[1:]), *_rows(own, once)])
    return tables + ([comparison_rows(results["ratios"])] if "ratios" in results else [])


def comparison_rows(ratios: dict[str, dict[str, Any]]) -> list[Row]:
    """Return the table of a comparison: a header, and a line for each quantity."""
    header = ("seconds, median", "first", "second", "second / first", "range of pairs (its confidence)", "pairs")
    return [header] + [
        (
            name,
            as_time(found["first"]),
            as_time(found["second"]),
            f"{found['ratio']:.3f}",
            f"{found['least_ratio']:.3f} - {found['greatest_ratio']:.3f} ({100 * found['confidence']:.0f} %)",
            str(len(found["pairs"])),
        )
        for name, found in ratios.items()
    ]


def _rows(setting: dict[str, Any], results: dict[str, Any]) -> list[Row]:
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
        ("weights_bytes", _weights_rows),
        ("kv_cache_bytes", _cache_rows),
        ("peak_memory_bytes", _memory_rows),
    ]
    return [row for name, make_rows in parts if name in results for row in make_rows(setting, results)]


def _setting_lines(setting: dict[str, Any]) -> list[str]:
    size, versions = setting["size"], ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    nvfp4 = f", blocks in NVFP4 ({setting['nvfp4_backend']})" if setting["nvfp4_backend"] else ""
    shared = f"{setting['devices']} processes, each on " if setting["devices"] > 1 else ""
    compiled = ", compiled" if setting["compiled"] else ""
    stream = "".join(f", {name} {value}" for name, value in setting["stream"].items() if value is not None)
    commit = f", commit {setting['commit']}" if setting["commit"] else ""
    load = "" if setting["load_average"] is None else f", load average {setting['load_average']}"
    cpu = "" if setting["device_type"] == "cpu" else f", {setting['cpu']}"
    height, width = setting["pixels"]
    network = f"{setting['layers']} layers, width {setting['width']}, {setting['heads']} heads, FFN {setting['ffn']}"
    latents = "x".join(map(str, setting["latents"]))
    steps = setting["steps"]
    forwards = f"{counted(steps, 'step')} and the clean pass: {counted(steps + 1, 'forward')} a chunk"
    if setting["stream"].get("clean_pass") == "last":
        forwards = f"{counted(steps, 'step')}, the last of which is remembered: {counted(steps, 'forward')} a chunk"
    return [
        f"date      {setting['date']}",
        f"device    {shared}{setting['device']}{cpu}, {counted(setting['threads'], 'CPU thread')} of "
        f"{counted(setting['cores'], 'core')}{load}",
        f"software  {versions}{commit}",
        f"network   {size}: {network}; random weights, {setting['dtype']}{nvfp4}",
        f"speed     {setting['speed']}; attention backend {setting['attention_backend']}{compiled}; "
        f"{setting['text_tokens']} text tokens; decoder {setting['decoder']}{stream}",
        f"video     {setting['frames']} frames of {height}x{width}, batch 1",
        f"          {setting['chunks']} chunks of {setting['chunk_size']} latent frames of {latents}",
        f"cache     window of {setting['window_size']} latent frames, sink {setting['sink_size']}",
        f"solver    {forwards}; no guidance",
    ]


def _matmul_rows(setting: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    side = matmul_side(setting["device_type"])
    return [
        (f"matmul {name}", f"{rate / 1e12:.3f} TFLOP/s", f"the device's own rate: best {side}^3 product")
        for name, rate in results["matmul_flops_per_second"].items()
    ]


def _forward_rows(setting: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    forward, host = results["forward"], results["forward_host_seconds"]
    on_each = " on each device" if setting["devices"] > 1 else ""
    compared = f"{100 * results['forward_to_matmul']:.0f} % of this run's matmul rate in {setting['dtype']}"
    parts = [
        (f"  {name}", "-", "the profiler did not see the device at work")
        if forward[name] is None
        else (f"  {name}", f"{as_time(forward[name])}  {100 * forward[name] / forward['seconds']:.0f} %", text)
        for name, text in FORWARD_PARTS.items()
    ]
    by_part = [f"{name} {100 * share:.0f} %" for name, share in results["part_to_matmul"].items() if share is not None]
    not_here = "not applicable: a CPU is its own host"
    kernels = results["forward_kernels"]
    return [
        ("forward", as_time(forward["seconds"]), "one forward of the transformer on a chunk, full window; median"),
        *parts,
        (
            "  work",
            f"{results['forward_flops'] / 1e12:.4f} TFLOP",
            f"matrix products of that forward{on_each}, by formula",
        ),
        (
            "  rate",
            f"{results['forward_flops_per_second'] / 1e12:.3f} TFLOP/s",
            f"work by time: {compared}" + (f" ({', '.join(by_part)})" if by_part else ""),
        ),
        *(
            ("  kernel", name, f"{100 * share:.0f} % of attention's time")
            for name, share in results["attention_kernels"].items()
            if share >= MINOR
        ),
        ("  host", *(("-", not_here) if host is None else (as_time(host), "Python's part, before it waits; median"))),
        ("  kernels", *(("-", not_here) if kernels is None else (str(kernels), "launched, with copies and fills"))),
    ]


def _denoise_rows(setting: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    waits, seconds = results["host_waits_per_chunk"], results["denoise_chunk"]
    rate = f"{setting['frames_per_chunk'] / seconds:.2f} frames/s"
    waiting = (
        "calls that wait for the GPU while a chunk is denoised" if waits is not None else "not applicable on a CPU"
    )
    return [
        ("denoise", as_time(seconds), f"a chunk at full window: all forwards, solver, noise; median; {rate}"),
        ("  first chunk", as_time(results["denoise_first_chunk"]), "the same, with an empty cache, and allocating it"),
        ("  host waits", "-" if waits is None else str(waits), waiting),
    ]


def _decode_rows(setting: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    frames, decoder = setting["frames_per_chunk"], {"vae": "the VAE", "tiny": "the tiny decoder"}[setting["decoder"]]
    both = results["denoise_and_decode_chunk"]
    return [
        (
            "decode",
            as_time(results["decode_chunk"]),
            f"a chunk through {decoder}, alone on the device; median; {frames / results['decode_chunk']:.2f} frames/s",
        ),
        ("  first chunk", as_time(results["decode_first_chunk"]), "the same, for the beginning of a video"),
        ("both", as_time(both), f"denoise and decode a chunk, one after the other; {frames / both:.2f} frames/s"),
    ]


def _weights_rows(_: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    return [("weights", as_size(sum(results["weights_bytes"].values())), "transformer and decoder")]


def _cache_rows(_: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    return [("KV cache", as_size(results["kv_cache_bytes"]), "keys and values of the window, all layers")]


def _memory_rows(_: dict[str, Any], results: dict[str, Any]) -> list[Row]:
    return [("peak memory", as_size(results["peak_memory_bytes"]), results["peak_memory_counts"])]


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
            as_time(latency["first_frame"]),
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
