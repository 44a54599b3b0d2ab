"""The numbers of a server that has run for long."""

from longlive_diffusers.serve.metrics import Metrics


def test_no_digit_of_a_number_is_lost():
    metrics = Metrics()
    for seconds in (2_000_000.0, 0.8125, 1 / 3):
        metrics.measure("denoise", seconds)
    gauges = {"memory_used_bytes": (85_899_345_921, "Bytes."), "load": (1234567.875, "Of the machine.")}
    lines = metrics.as_text(gauges).splitlines()
    for sample in (
        f"longlive_denoise_seconds_sum {2_000_000.8125 + 1 / 3!r}",
        'longlive_denoise_seconds{quantile="0.5"} 0.8125',
        'longlive_denoise_seconds{quantile="0.95"} 2000000.0',
        "longlive_memory_used_bytes 85899345921",
        "longlive_load 1234567.875",
    ):
        assert sample in lines
