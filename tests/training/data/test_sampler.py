"""Who trains on what, and when."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from data.sampler import EpochSampler, SampleIndex, WithSampleId


counts = st.integers(1, 12)


def batches(number: int, **arguments) -> list[list[SampleIndex]]:
    return list(islice(EpochSampler(**arguments), number))


@settings(deadline=None)
@given(counts, counts, st.integers(1, 4), st.integers(0, 2**40))
def test_every_epoch_has_every_sample_once_in_an_order_of_its_own(num_samples, per_group, num_groups, seed):
    shape = {"num_samples": num_samples, "batch_size": per_group, "seed": seed, "num_groups": num_groups}
    stream = [
        draw
        for group_batches in zip(
            *(batches(30, **shape, group=group) for group in range(num_groups)),
            strict=True,
        )
        for batch in group_batches
        for draw in batch
    ]
    assert [draw.sample_id for draw in stream] == list(range(len(stream)))
    for start in range(0, len(stream) - num_samples + 1, num_samples):
        assert sorted(draw.index for draw in stream[start : start + num_samples]) == list(range(num_samples))


def test_epochs_and_seeds_differ_in_order():
    orders = [batch for seed in (0, 1) for batch in batches(2, num_samples=50, batch_size=50, seed=seed)]
    assert len({tuple(draw.index for draw in order) for order in orders}) == 4


@settings(deadline=None)
@given(st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]), counts, st.integers(0, 9))
def test_global_batches_do_not_depend_on_the_number_of_groups(split, num_samples, seed):
    num_groups, batch_size = split
    whole = EpochSampler(num_samples, batch_size=12, seed=seed)
    groups = [
        EpochSampler(num_samples, batch_size=batch_size, seed=seed, num_groups=num_groups, group=group)
        for group in range(num_groups)
    ]
    for k in (0, 1, 7):
        assert [draw for sampler in groups for draw in sampler.batch(k)] == whole.batch(k)


def test_processes_of_one_group_get_the_same():
    arguments = {"num_samples": 10, "batch_size": 2, "num_groups": 2, "group": 1}
    assert batches(8, **arguments) == batches(8, **arguments)


@settings(deadline=None)
@given(counts, counts, st.integers(0, 40))
def test_a_run_goes_on_where_it_was(num_samples, batch_size, start):
    arguments = {"num_samples": num_samples, "batch_size": batch_size, "seed": 3, "num_groups": 2, "group": 1}
    assert batches(3, **arguments, start_batch=start) == batches(start + 3, **arguments)[start:]


def test_sample_ids():
    sampler = EpochSampler(5, batch_size=2, num_groups=3, group=1)
    assert sampler.global_batch_size == 6
    assert sampler.sample_id(4, 1) == 4 * 6 + 2 + 1
    assert [draw.sample_id for draw in sampler.batch(4)] == [26, 27]


class Squares(Dataset):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict:
        return {"square": torch.tensor(index**2)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_items_know_their_ids_in_whatever_process_they_are_read(num_workers):
    sampler = EpochSampler(7, batch_size=3, seed=5, start_batch=2)
    loader = DataLoader(WithSampleId(Squares()), batch_sampler=sampler, num_workers=num_workers)
    for k, batch in zip(range(2, 6), loader, strict=False):
        assert batch["sample_id"].tolist() == [draw.sample_id for draw in sampler.batch(k)]
        assert batch["square"].tolist() == [draw.index**2 for draw in sampler.batch(k)]
    assert len(WithSampleId(Squares())) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"num_groups": 2, "group": 2}, r"group must be in \[0, 2\), got 2"),
        ({"start_batch": -3}, "start_batch must be at least 0, got -3"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**{"num_samples": 4, "batch_size": 1, **arguments})
