"""Which ranks of the world make a stream together."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .stream_config import StreamParallelConfig


def rank_rows(config: StreamParallelConfig) -> list[list[int]]:
    """Return the ranks that share a stream with this one: one row or, with split branches, one for each branch."""
    if config.mesh is not None:
        return _rows_of_mesh(config, config.mesh)
    world, rank, degree = dist.get_world_size(), dist.get_rank(), config.ulysses_degree
    if world % config.num_ranks:
        branches = " for each of two branches of guidance" if config.cfg_parallel else ""
        raise ValueError(
            f"{world} ranks cannot be divided into streams of {config.num_ranks}: `ulysses_degree` is {degree}"
            f"{branches}."
        )
    first = rank - rank % config.num_ranks
    return [list(range(start, start + degree)) for start in range(first, first + config.num_ranks, degree)]


def _rows_of_mesh(config: StreamParallelConfig, mesh: DeviceMesh) -> list[list[int]]:
    names = ("cfg", "ulysses") if config.cfg_parallel else ("ulysses",)
    missing = [name for name in names if name not in (mesh.mesh_dim_names or ())]
    if missing:
        raise ValueError(f"`mesh` needs dimensions named {names}, it has {mesh.mesh_dim_names}.")
    rows = mesh[names].mesh.reshape(-1, mesh["ulysses"].size()).tolist()
    if len(rows) != (2 if config.cfg_parallel else 1) or len(rows[0]) != config.ulysses_degree:
        raise ValueError(
            f"`mesh` has {len(rows)} x {len(rows[0])} ranks of a stream, but `ulysses_degree` is "
            f"{config.ulysses_degree} and `cfg_parallel` {config.cfg_parallel}."
        )
    in_order = [rank for row in rows for rank in row]
    if in_order != sorted(in_order):  # as the members of a process group are
        raise ValueError(f"The ranks of a stream must ascend in its `mesh`, they are {rows}.")
    return rows
