"""A linear layer for a CPU whose weight lies as oneDNN multiplies it, so that it is not rearranged in every call."""

import torch
import torch.nn.functional as F
from torch import nn

from . import onednn


class PackedLinear(nn.Module):
    """
    `y = x W^T + b` on a CPU, for inference. The weight is kept in oneDNN's own layout, and not a second time: what
    asks for `weight` - a state dict, a copy, another device or dtype - gets it in the usual one.

    Args:
        linear: The layer that it takes the place of, in float32 or bfloat16; its bias is shared.
        rows: How many rows its inputs usually have: the layout is chosen for it. Others give the same result.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.in_features, self.out_features, self.rows = linear.in_features, linear.out_features, rows
        self.bias = linear.bias
        self.times_kept = 0
        self.keep(linear.weight.detach())
        self.train(linear.training)

    def keep(self, weight: torch.Tensor) -> None:
        """Replace the weight, by one in the usual layout. On other devices, and in dtypes that oneDNN does not know,
        it is kept as it is. `times_kept` counts the weights so far."""
        self.is_packed = weight.device.type == "cpu" and onednn.has_onednn(weight.dtype)
        # In a tuple, so that nothing that goes through parameters and buffers finds a tensor without storage.
        kept = torch.ops.mkldnn._reorder_linear_weight(weight, self.rows) if self.is_packed else weight
        self.kept, self.times_kept = (kept,), self.times_kept + 1

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight, `[out_features, in_features]`: to change it changes nothing, see [`keep`]."""
        return self.kept[0].to_dense() if self.is_packed else self.kept[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        return self.multiply(x, "none")

    def multiply(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Compute the layer, and then, if `activation` is "gelu" and not "none", GELU in its tanh approximation."""
        is_fused = self.is_packed and not torch.is_grad_enabled() and x.dtype == self.kept[0].dtype
        if is_fused and not torch.is_autocast_enabled("cpu"):
            return onednn.linear(x, self.kept[0], self.bias, activation)
        product = F.linear(x, self.weight, self.bias)
        return product if activation == "none" else F.gelu(product, approximate="tanh")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.keep(fn(self.weight))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        loaded = state_dict.get(prefix + "weight")
        if loaded is None:
            missing_keys.append(prefix + "weight")
        elif loaded.shape != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            errors.append(f"size mismatch for {prefix}weight: {tuple(loaded.shape)} instead of {expected}.")
        else:
            self.keep(loaded.to(self.kept[0].dtype))
        others = {name: value for name, value in state_dict.items() if name != prefix + "weight"}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)

    def __getstate__(self):
        return {**self.__dict__, "kept": (self.weight,)}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.keep(self.kept[0])
