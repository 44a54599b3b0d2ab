"""Tiny networks and batches for the tests of distillation."""

import torch

from longlive_diffusers import KVCache, LongLiveScheduler, LongLiveTransformer3DModel
from longlive_diffusers.parallel import FrameLayout
from objectives.distillation import Distillation, DistillationSettings, RolloutShape
from objectives.distillation_networks import DistillationNetworks, Role
from run.arguments import OptimizationArguments
from run.distillation_arguments import NetworkArguments
from run.distillation_start import build_networks
from tests.support.tiny_pipeline import CHANNELS, CHUNK_SIZE, SIDE, TEXT_DIM, TEXT_LENGTH, tiny_transformer


ROPE_OFFSET = 3.0
ONE_SHOT, THREE_SHOTS = ((0, 0, 0, 0), (0, 0, 0, 0)), ((0, 1, 1, 2), (0, 0, 1, 1))


def shared_networks(**options) -> DistillationNetworks:
    """One tiny network with two LoRAs, which are no longer at their start, where they do nothing."""
    model = NetworkArguments(pretrained_model_name_or_path="tiny", **{"rank": 3, **options})
    networks = build_networks(tiny_transformer(), model, OptimizationArguments(), frozen_dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    for role in (Role.GENERATOR, Role.FAKE_SCORE):
        for parameter in networks.parameters_of(role).values():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return networks


def objective(num_chunks: int = 4, num_ranks: int = 1, rank: int = 0, seed: int = 0, **settings) -> Distillation:
    chosen = DistillationSettings(**{"score_guidance_scale": 1.0, **settings})
    shape = RolloutShape.of(chosen, num_chunks * CHUNK_SIZE, CHUNK_SIZE)
    return Distillation(
        LongLiveScheduler(),
        chosen,
        shape,
        multi_shot_rope_offset=ROPE_OFFSET,
        seed=seed,
        layout=FrameLayout(shape.scored_frames, num_ranks, CHUNK_SIZE),
        rank=rank,
        frame_shape=(CHANNELS, SIDE, SIDE),
    )


def batch(shots=ONE_SHOT, *, has_image: bool = False, seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch as a `PromptDataset` gives it: a prompt for each shot, and another for the chunk that opens one."""
    generator = torch.Generator().manual_seed(seed)
    shot_index = torch.tensor(shots)
    opens = torch.diff(shot_index, prepend=shot_index[:, :1]) > 0
    texts = torch.randn(2, 2 * int(shot_index.max()) + 2, TEXT_LENGTH, TEXT_DIM, generator=generator)
    which = 2 * shot_index + opens
    items = {
        "prompt_embeds": torch.stack([own[index] for own, index in zip(texts, which, strict=True)]),
        "shot_index": shot_index,
        "cuts": opens,
        "switches": torch.zeros_like(opens),
        "sample_id": torch.tensor([0, 1]),
    }
    if has_image:
        items["first_frame"] = torch.randn(2, CHANNELS, 1, SIDE, SIDE, generator=generator)
    return items


def cache(network: LongLiveTransformer3DModel, num_chunks: int = 4, **options) -> KVCache:
    sizes = {"window_size": 6, "sink_size": 2, "multi_shot_sink": True, "num_frames": num_chunks * CHUNK_SIZE}
    return network.create_kv_cache(2, SIDE, SIDE, **{**sizes, **options})
