"""Prompts as items: each chunk is conditioned as in generation, and has the embeddings of just that text."""

import random
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from data.latent_cache import collate
from data.prompt_dataset import ChunkTexts, PromptDataset, plan_chunks
from data.prompt_list import PromptSample, PromptShot
from data.sampler import EpochSampler, WithSampleId
from data.text_cache import TextCache
from longlive_diffusers import ShotPlan
from longlive_diffusers.pipelines.shots import Shot
from tests.support.tiny_pipeline import TEXT_DIM, TEXT_LENGTH
from tests.support.training_caches import build_text, encode


CUT = "Cut! "


def video(*shots: PromptShot | str) -> PromptSample:
    return PromptSample("v", tuple(PromptShot(shot) if isinstance(shot, str) else shot for shot in shots))


def switch(prompt: str, chunks: int | None = None) -> PromptShot:
    return PromptShot(prompt, chunks, cut=False)


@pytest.mark.parametrize(
    ("shots", "prompts", "shot_index", "switches"),
    [
        (["a"], ["a"] * 4, [0, 0, 0, 0], []),
        (["a", "b"], ["a", "a", CUT + "b", "b"], [0, 0, 1, 1], []),
        (["a", "b", "c"], ["a", "a", CUT + "b", CUT + "c"], [0, 0, 1, 2], []),
        (["a", "b", "c", "d", "e"], ["a", CUT + "b", CUT + "c", CUT + "d"], [0, 1, 2, 3], []),
        (["a", "b", switch("c")], ["a", "a", CUT + "b", "c"], [0, 0, 1, 1], [3]),
        (["a", switch("b")], ["a", "a", "b", "b"], [0, 0, 0, 0], [2]),
        (["a", switch("b"), "c", switch("d")], ["a", "b", CUT + "c", "d"], [0, 0, 1, 1], [1, 3]),
        (["a", switch("b"), switch("a")], ["a", "a", "b", "a"], [0, 0, 0, 0], [2, 3]),
        (["a", switch("a")], ["a"] * 4, [0] * 4, []),
        (["a", "a"], ["a", "a", CUT + "a", "a"], [0, 0, 1, 1], []),
        ([switch("a"), "b"], ["a", "a", CUT + "b", "b"], [0, 0, 1, 1], []),
        ([PromptShot("a", 1), PromptShot("b", 1)], ["a", CUT + "b", "b", "b"], [0, 1, 1, 1], []),
        ([PromptShot("a", 3), PromptShot("b", 99)], ["a", "a", "a", CUT + "b"], [0, 0, 0, 1], []),
        ([PromptShot("a", 4), switch("b", 1)], ["a"] * 4, [0] * 4, []),
        ([PromptShot("a", 99), PromptShot("b", 1)], ["a"] * 4, [0] * 4, []),
        ([PromptShot("a", 1), switch("b", 1), PromptShot("c", 1)], ["a", "b", CUT + "c", "c"], [0, 0, 1, 1], [1]),
    ],
)
def test_chunks(shots, prompts, shot_index, switches):
    cuts = tuple(prompt.startswith(CUT) for prompt in prompts)
    expected = ChunkTexts(tuple(prompts), tuple(shot_index), cuts, tuple(index in switches for index in range(4)))
    assert plan_chunks(video(*shots), 4, CUT) == expected


def test_chunks_are_those_of_a_session_that_is_redirected():
    rng = random.Random(0)
    for _ in range(200):
        shots = [
            PromptShot(rng.choice("abc"), rng.randint(1, 4), rng.random() < 0.5) for _ in range(rng.randint(1, 5))
        ]
        num_chunks = rng.randint(1, 12)
        found = plan_chunks(video(*shots), num_chunks, CUT)
        plan, begin = ShotPlan([Shot(shots[0].prompt, None)]), 0
        starts = {}  # the shots but the first, by their first chunks
        for before, shot in pairwise(shots):
            begin += before.chunks or 0
            starts[begin] = shot
        for index in range(num_chunks):
            old = plan.chunk(index).prompt
            if index in starts:
                plan = plan.redirected(index, starts[index].prompt, cut=starts[index].cut)
            chunk = plan.chunk(index)
            assert (found.prompts[index], found.shot_index[index]) == (chunk.conditioning(CUT), chunk.shot_index)
            assert found.cuts[index] == chunk.cuts
            assert found.switches[index] == (not chunk.cuts and chunk.prompt != old)


def test_what_cannot_be_planned():
    with pytest.raises(ValueError, match="at least 1 chunk, got 0"):
        plan_chunks(video("a"), 0, CUT)
    with pytest.raises(ValueError, match="a list of them for 2 shots"):
        plan_chunks(video("a", PromptShot("b", 2)), 4, CUT)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plan_chunks(video(PromptShot("a", 0), PromptShot("b", 2)), 4, CUT)


SAMPLES = [video("a red fox", switch("a fox"), "it"), video("a red fox"), video("one two three four")]


def texts(folder) -> TextCache:
    prompts = ["a red fox", "a fox", CUT + "it", "it", "one two three four"]
    return TextCache(build_text(prompts, folder / "text"), max_sequence_length=TEXT_LENGTH)


class Frames:
    """First frames that say which they are."""

    def __init__(self, count: int, num_latent_frames: int = 1):
        self.count, self.num_latent_frames = count, num_latent_frames

    def __len__(self) -> int:
        return self.count

    def latents(self, index: int) -> torch.Tensor:
        return torch.full((3, self.num_latent_frames, 2, 2), float(index))


def test_items(tmp_path):
    data = PromptDataset(SAMPLES, texts(tmp_path), 4, CUT)
    assert len(data) == 3 and data.names == ["v", "v", "v"]
    assert data.distinct_prompts() == ["a red fox", "a fox", CUT + "it", "one two three four"]
    item = data[0]
    assert item.keys() == {"prompt_embeds", "shot_index", "cuts", "switches"}
    assert torch.equal(item["prompt_embeds"], encode(["a red fox", "a red fox", "a fox", CUT + "it"]))
    assert item["shot_index"].dtype == torch.int64 and item["shot_index"].tolist() == [0, 0, 0, 1]
    assert item["cuts"].dtype == item["switches"].dtype == torch.bool
    assert item["cuts"].tolist() == [False, False, False, True]
    assert item["switches"].tolist() == [False, False, True, False]


@pytest.mark.parametrize("collate_fn", [collate, default_collate])
def test_batches(tmp_path, collate_fn):
    data = PromptDataset(SAMPLES, texts(tmp_path), 4, CUT, first_frames=Frames(3))
    sampler = EpochSampler(3, batch_size=2, seed=1)
    loader = iter(DataLoader(WithSampleId(data), batch_sampler=sampler, collate_fn=collate_fn))
    for number in range(3):
        batch = next(loader)
        indices = [sample.index for sample in sampler.batch(number)]
        assert batch["sample_id"].tolist() == [2 * number, 2 * number + 1]
        assert batch["prompt_embeds"].shape == (2, 4, TEXT_LENGTH, TEXT_DIM)
        assert batch["first_frame"].shape == (2, 3, 1, 2, 2)
        assert batch["first_frame"][:, 0, 0, 0, 0].tolist() == indices
        for key in ("prompt_embeds", "shot_index", "cuts", "switches"):
            assert torch.equal(batch[key], torch.stack([data[index][key] for index in indices]))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples": []}, "at least one sample"),
        ({"num_chunks": 0}, "at least 1 chunk, got 0"),
        ({"first_frames": Frames(2)}, "3 samples, but 2 first frames"),
        ({"first_frames": Frames(3, 2)}, "1 latent frame, got 2"),
        ({"samples": [video("a dog")]}, "1 of 1 prompts are not in the cache '.*text', first 'a dog'"),
        ({"scene_cut_prefix": "Now "}, "1 of 4 prompts are not in the cache '.*text', first 'Now it'"),
    ],
)
def test_what_is_refused(tmp_path, changed, message):
    arguments = {"samples": SAMPLES, "texts": texts(tmp_path), "num_chunks": 4, "scene_cut_prefix": CUT}
    with pytest.raises(ValueError, match=message):
        PromptDataset(**{**arguments, **changed})
