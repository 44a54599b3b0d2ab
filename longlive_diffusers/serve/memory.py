"""The memory that a server uses, and what is left."""

import psutil
import torch


def memory_in_use(device: torch.device) -> dict[str, int]:
    """Return, in bytes, what this process uses and what is still free on the device that makes the streams: of a GPU,
    its own memory; of a CPU, the machine's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return {
            "used_bytes": torch.cuda.memory_allocated(device),
            "free_bytes": free + unused,
            "total_bytes": total,
        }
    machine = psutil.virtual_memory()
    return {
        "used_bytes": psutil.Process().memory_info().rss,
        "free_bytes": machine.available,
        "total_bytes": machine.total,
    }
