"""Time and memory: waiting for the device, peaks, the bytes of weights, and how to say them."""

import sys

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure anew, where that is possible: a process cannot reset its own peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Bytes, and what they count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU by PyTorch, at most"
    return _peak_resident_memory(), "resident memory of the whole process, at most"


def _peak_resident_memory() -> int:
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def weights_bytes(model: torch.nn.Module) -> int:
    """Memory of a model's weights and buffers, as they are stored."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def as_time(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def as_size(num_bytes: int) -> str:
    """Bytes in words."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
