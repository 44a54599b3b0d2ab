"""Copies from the host to a GPU that the host does not wait for."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device, from the CPU to a GPU of CUDA's by pinned memory: from other memory, the copy would
    wait for all that the GPU has still to do. Other devices are waited for: nothing keeps the memory of `tensor` for
    them, and Metal would read what lies there later."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
