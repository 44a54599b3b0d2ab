"""Which columns of a picture belong to which rank, and how ranks hand each other columns.

A picture is split along its width into as many parts as there are ranks, in whole columns of *latents* (here 5 latent
columns on two ranks). Going up or down in resolution multiplies or divides every part alike, so that borders are at
the same place at every resolution, and a rank can work out the widths of all others from its own:

    latents               | a b c         | d e     |         3 + 2
    twice the resolution  | a a b b c c   | d d e e |         6 + 4
                              rank 0        rank 1

A picture that has fewer columns than there are ranks is split along its height; whatever is said of columns is then
true of its rows.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .all_to_all import gather_parts


WIDTH, HEIGHT = -1, -2  # the axes of pictures [..., height, width], whatever precedes them


def check_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Raise a ValueError unless this process is a member of `group`; None stands for working alone."""
    if group is not None and dist.get_rank(group) < 0:
        raise ValueError("This process is not in the group of ranks that it is to share its work with.")
    return group


@dataclass(frozen=True)
class ColumnSplit:
    """
    The split of pictures over the ranks of a group. With a single part, nothing is cut, gathered or exchanged.

    Args:
        columns: The number of latent columns of each rank.
        rank: This process's rank in the group.
        axis: What is split: `WIDTH` or `HEIGHT`.
        group: The ranks; None for a single part.
    """

    columns: tuple[int, ...]
    rank: int = 0
    axis: int = WIDTH
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_latents(cls, height: int, width: int, group: dist.ProcessGroup | None) -> "ColumnSplit":
        """Split latents of this size over the ranks of `group` as evenly as possible: along the width if it has a
        column for each rank, else along the height, else not at all."""
        num_ranks = 1 if group is None else dist.get_world_size(group)
        if num_ranks > 1:
            for axis, size in ((WIDTH, width), (HEIGHT, height)):
                if size >= num_ranks:
                    columns = tuple(size // num_ranks + (rank < size % num_ranks) for rank in range(num_ranks))
                    return cls(columns, dist.get_rank(group), axis, group)
        return cls((width,))

    @property
    def is_whole(self) -> bool:
        """Whether there is only one part."""
        return len(self.columns) == 1

    def widths(self, own: int) -> list[int]:
        """
        The widths of all ranks' parts at the resolution at which this rank's is `own` columns wide.

        Raises:
            NotImplementedError: If it is not a multiple of the latents' width, as all parts at one resolution are.
        """
        latent_columns = self.columns[self.rank]
        if own % latent_columns:
            raise NotImplementedError(f"{own} columns are no multiple of the {latent_columns} of this rank's latents.")
        return [own // latent_columns * columns for columns in self.columns]

    def part(self, picture: torch.Tensor) -> torch.Tensor:
        """Return this rank's columns of a picture whose width is a multiple of that of the latents, as a view."""
        if self.is_whole:
            return picture
        scale = picture.shape[self.axis] // sum(self.columns)
        start = sum(self.columns[: self.rank])
        return picture.narrow(self.axis, scale * start, scale * self.columns[self.rank])

    def gather(self, part: torch.Tensor, axis: int | None = None) -> torch.Tensor:
        """
        Join the parts of all ranks, on every rank.

        Args:
            part: What this rank has, equally shaped on all ranks but for `axis`.
            axis: What is joined, by default what is split. Something else has as many entries for each column, such
                as the tokens of attention; they come in the order of ranks.
        """
        if self.is_whole:
            return part
        axis = self.axis if axis is None else axis
        widths = self.widths(part.shape[axis])
        # The ranks' messages are equally long: narrower parts are filled up, and cut again.
        missing = max(widths) - part.shape[axis]
        if missing:
            filler = torch.zeros_like(part.narrow(axis, 0, 1)).repeat_interleave(missing, dim=axis)
            part = torch.cat([part, filler], dim=axis)
        assert self.group is not None  # several parts have several ranks
        parts = zip(gather_parts(part, self.group), widths, strict=True)
        return torch.cat([part.narrow(axis, 0, width) for part, width in parts], dim=axis)

    def exchange_edges(self, part: torch.Tensor, left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Fetch the neighbors' columns next to this rank's part. Every rank has to call it, with the same numbers.

        Args:
            part: This rank's columns.
            left, right: How many of the last columns of the rank before, and of the first ones of the rank after; the
                narrowest part has as many.

        Returns:
            These columns; none where there is no neighbor.
        """
        before, after, num_ranks = self.rank - 1, self.rank + 1, len(self.columns)
        columns = part.movedim(self.axis, 0)
        fetched = {before: left, after: right}
        given = {before: columns[:right], after: columns[len(columns) - left :]}
        neighbors = [rank for rank in (before, after) if 0 <= rank < num_ranks]
        # One message to each neighbor, and none to the others, as a single collective: unlike sends and receives it
        # needs no global ranks, and is in order with the group's other collectives.
        counts_in = [fetched[rank] if rank in neighbors else 0 for rank in range(num_ranks)]
        counts_out = [len(given[rank]) if rank in neighbors else 0 for rank in range(num_ranks)]
        outgoing = torch.cat([given[rank] for rank in neighbors]).contiguous()
        incoming = outgoing.new_empty(sum(counts_in), *outgoing.shape[1:])
        dist.all_to_all_single(incoming, outgoing, counts_in, counts_out, group=self.group)
        count_before = sum(counts_in[: self.rank])
        return incoming[:count_before].movedim(0, self.axis), incoming[count_before:].movedim(0, self.axis)
