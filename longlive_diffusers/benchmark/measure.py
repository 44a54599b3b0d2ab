"""Time and memory: waiting for the device, peak memory, the size of weights, and how numbers are formatted."""

import sys

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak where that is possible, on a GPU; a process cannot reset its own peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Return the peak memory in bytes, and what it counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU by PyTorch, at most"
    return _peak_resident_memory(), "resident memory of the whole process, at most"


def _peak_resident_memory() -> int:
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def weights_bytes(model: torch.nn.Module) -> int:
    """Return the memory of a model's weights and buffers, as they are stored, in bytes."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def as_time(seconds: float) -> str:
    """Format seconds."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def as_size(num_bytes: float) -> str:
    """Format a number of bytes."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
