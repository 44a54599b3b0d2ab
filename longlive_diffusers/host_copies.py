"""Copies between the host and a GPU that the host does not wait for."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device, from the CPU to a GPU of CUDA's by pinned memory: from other memory, the copy would
    wait for all that the GPU has still to do. Other devices are waited for: nothing keeps the memory of `tensor` for
    them, and Metal would read what lies there later."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class HostCopy:
    """A copy of a tensor in the host's memory, which a GPU writes beside what it computes.

    Args:
        tensor: The tensor. The copy is not part of its graph.

    Attributes:
        copy: The copy, which is whole on a GPU's host only when `fetch` is.
    """

    def __init__(self, tensor: torch.Tensor):
        self._device, self._requires_grad = tensor.device, tensor.requires_grad
        self._written: torch.Event | None = None
        if self._device.type != "cuda":
            self.copy = tensor.detach().to("cpu", copy=True)
            return
        present, beside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        beside.wait_stream(present)
        with torch.cuda.stream(beside):
            self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.copy.copy_(tensor.detach(), non_blocking=True)
            self._written = beside.record_event()
        tensor.record_stream(beside)  # its memory is not given to another before it was read

    def fetch(self) -> torch.Tensor:
        """Return a tensor of the same numbers on the device, which requires a gradient if the first one does."""
        if self._written is not None:
            torch.cuda.current_stream(self._device).wait_event(self._written)
        return self.copy.to(self._device, non_blocking=True, copy=True).requires_grad_(self._requires_grad)
