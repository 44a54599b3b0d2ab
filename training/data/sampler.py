"""Which samples each process trains on, as a function of the seed and the index of the batch alone.

The samples of all epochs, each epoch in an order of its own, make one endless stream. Global batch `k` is positions
`k * B` to `(k + 1) * B - 1` of it, and data-parallel group `g` takes the `g`-th part of that. So the same samples meet
in a batch however many groups share it, a run can resume from any batch without having seen the ones before, and the
processes of one sequence-parallel group, which have the same `g`, get the same samples. If an epoch ends in the middle
of a batch, the next epoch fills the batch.

A position in the stream is also a sample's id, which seeds its randomness (its noise, its timesteps). It is the same
for any number of groups, and never repeats.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, Sampler


class SampleIndex(NamedTuple):
    """
    Args:
        index: The index of a sample in its dataset.
        sample_id: Its position in the stream, from 0.
    """

    index: int
    sample_id: int


class EpochSampler(Sampler[list[SampleIndex]]):
    """
    The endless batches of one data-parallel group. Use it as `DataLoader(WithSampleId(dataset), batch_sampler=...)`;
    the loader must not be passed to `accelerator.prepare`, which would divide it once more.

    Args:
        num_samples: The length of the dataset.
        batch_size: The number of samples in a batch of this group.
        seed: The seed of the order.
        num_groups: The number of data-parallel groups; the processes of a sequence-parallel group count as one.
        group: The index of this process's group.
        start_batch: The index of the first batch; to resume a run, the number of batches already trained on.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int = 0,
        num_groups: int = 1,
        group: int = 0,
        start_batch: int = 0,
    ) -> None:
        for name, value, least in (
            ("num_samples", num_samples, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("num_groups", num_groups, 1),
            ("start_batch", start_batch, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= group < num_groups:
            raise ValueError(f"group must be in [0, {num_groups}), got {group}")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.num_groups, self.group, self.start_batch = num_groups, group, start_batch
        self._order: tuple[int, np.ndarray] | None = None  # of the last epoch that was asked for

    @property
    def global_batch_size(self) -> int:
        """The number of samples in a batch of all groups together."""
        return self.num_groups * self.batch_size

    def sample_id(self, batch: int, i: int) -> int:
        """Return the position in the stream of sample `i` of this group's batch `batch`."""
        return batch * self.global_batch_size + self.group * self.batch_size + i

    def batch(self, batch: int) -> list[SampleIndex]:
        """Return this group's part of global batch `batch`."""
        ids = [self.sample_id(batch, i) for i in range(self.batch_size)]
        return [SampleIndex(self._index_of(sample_id), sample_id) for sample_id in ids]

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        batch = self.start_batch
        while True:
            yield self.batch(batch)
            batch += 1

    def _index_of(self, sample_id: int) -> int:
        epoch, position = divmod(sample_id, self.num_samples)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_samples))
        return int(self._order[1][position])


class WithSampleId(Dataset):
    """
    A dataset, whose items are dicts, indexed by an `EpochSampler`: each item is given its "sample_id", so that the id
    is known whichever process reads the item. What it fails with is an item, too: `{"failure": error}`, because torch
    would hand the traceback of the process that reads over as the error's text.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: SampleIndex) -> dict:
        try:
            return {**self.dataset[sample.index], "sample_id": sample.sample_id}
        except (ValueError, OSError) as error:
            return {"failure": error}


def raise_failures(batches: Iterable[dict]) -> Iterator[dict]:
    """Iterate over batches of a [`WithSampleId`], and raise what one of them has failed with."""
    for batch in batches:
        if "failure" in batch:
            raise batch["failure"][0]
        yield batch
