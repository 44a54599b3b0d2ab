"""accelerate's FSDP2 with its `cp` dimension, on gloo ranks."""

from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, ParallelismConfig


def use_fsdp2(accelerator: Accelerator, *, cp_size: int) -> None:
    """
    Tell the state of accelerate what `training/configs/eight_gpus.yaml` tells it on GPUs. It offers neither FSDP nor
    `cp` on a CPU, though torch has both; everything after that is accelerate's own code.

    Args:
        accelerator: The accelerator of several processes on the CPU, which has prepared nothing yet.
        cp_size: The number of neighboring ranks that share a clip.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LongLiveTransformerBlock"],
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    config = ParallelismConfig(dp_shard_size=accelerator.num_processes // cp_size, cp_size=cp_size)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.parallelism_config = config
    config._validate_accelerator(accelerator)
    accelerator.state.device_mesh = config.get_device_mesh("cpu")
