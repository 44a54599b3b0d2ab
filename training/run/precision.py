"""What is computed in bfloat16 and what in float32, where that is not left to accelerate."""

from dataclasses import replace

import torch
from accelerate import Accelerator


def keep_inputs_in_float32(accelerator: Accelerator) -> None:
    """
    Let FSDP2 convert only weights to bfloat16, and sum gradients over the processes in float32. Call this before the
    network is prepared; it does nothing without FSDP2, or in float32.

    Accelerate's own policy rounds every input of the network and of its blocks: timestep 937.5 to 936, position 299 to
    300, and rotations, which cannot be applied in bfloat16. The network converts what it computes with by itself.
    """
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, cast_forward_inputs=False, reduce_dtype=torch.float32, output_dtype=None
        )


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype that networks compute in: what weights that are not trained need to be stored as."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def precision_name(accelerator: Accelerator) -> str:
    """Return the name of the precision that networks compute in."""
    names = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return names.get(accelerator.mixed_precision, accelerator.mixed_precision)
