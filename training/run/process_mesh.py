"""Which processes share a clip (sequence parallelism) and which have clips of their own (data parallelism)."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class ProcessMesh:
    """
    Args:
        dp_size, dp_rank: The number of groups that have clips of their own, and the index of this process's group.
        sp_size, sp_rank: The number of processes that share the clips of a group, and the index of this process among
            them.
        sp: The dimension of the device mesh that spans a group, for the network's `sp_mesh`; None if a group is one
            process.
    """

    dp_size: int
    dp_rank: int
    sp_size: int
    sp_rank: int
    sp: DeviceMesh | None


def build_process_mesh(accelerator: Accelerator, sp_size: int | None) -> ProcessMesh:
    """
    Divide the processes into groups that share clips.

    Under FSDP the groups are the `cp` dimension of accelerate's own mesh (`parallelism_config` of its configuration
    file), which FSDP shards the weights over as well. Accelerate has no such mesh for DDP or for CPUs; there `sp_size`
    neighboring processes are a group.

    Raises:
        ValueError: If the processes do not divide into groups, or accelerate's configuration has another size.
    """
    parallelism, world, rank = accelerator.parallelism_config, accelerator.num_processes, accelerator.process_index
    configured = parallelism.cp_size if parallelism is not None else 1
    if parallelism is not None and parallelism.cp_enabled:
        if sp_size not in (None, configured):
            raise ValueError(f"--sp_size is {sp_size}, but accelerate's configuration has cp_size {configured}.")
        return ProcessMesh(
            world // configured, rank // configured, configured, rank % configured, accelerator.torch_device_mesh["cp"]
        )
    size = sp_size or 1
    if world % size:
        raise ValueError(f"{world} processes cannot be grouped by --sp_size {size}: it does not divide {world}.")
    if size > 1 and accelerator.is_fsdp2:
        raise ValueError(
            f"With FSDP, sequence parallelism is set in accelerate's configuration: parallelism_config_cp_size: {size}"
        )
    if size == 1:
        return ProcessMesh(world, rank, 1, 0, None)
    mesh = init_device_mesh(accelerator.device.type, (world // size, size), mesh_dim_names=("dp", "sp"))
    return ProcessMesh(world // size, rank // size, size, rank % size, mesh["sp"])
