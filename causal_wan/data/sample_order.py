"""Which row sample number n of a run is, and in which shape: a pure function of the seed and the number.

So order survives interruptions, and is the same for any number of processes and workers. Rows may be in buckets, one
shape a bucket: all samples of an optimizer step are then of one bucket, which keeps processes in step. Rows may come
from several sources with weights.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from causal_wan.seeds import RandomPurpose, seed_sequence, seeded_generator


class Interleaving:
    """An endless sequence of classes in fixed proportions, spread evenly: no stretch of it is far from its share.

    Item j of a class comes at time (j + offset) / share, with an offset in [0, 1) of its own.

    Args:
        shares: Of each class, positive, in any unit.
        seed, key: Of the offsets, as in `seed_sequence`.
    """

    def __init__(self, shares: Sequence[float], *, seed: int, key: Sequence[int]) -> None:
        self.shares = np.asarray(shares, np.float64) / np.sum(shares)
        self.offsets = np.random.default_rng(seed_sequence(seed, *key)).random(len(shares))
        self._classes = self._ranks = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The class at a position, and how many of that class come before it."""
        if len(self.shares) == 1:
            return 0, position
        if position >= len(self._classes):
            self._extend(max(1024, 2 * position))
        return int(self._classes[position]), int(self._ranks[position])

    def _extend(self, count: int) -> None:
        # By the time count + number of classes, at least count items have come.
        ranks = [np.arange(int((count + len(self.shares)) * share) + 2) for share in self.shares]
        times = [(rank + offset) / share for rank, offset, share in zip(ranks, self.offsets, self.shares, strict=True)]
        classes = np.repeat(np.arange(len(ranks)), [len(rank) for rank in ranks])
        first = np.argsort(np.concatenate(times), kind="stable")[:count]
        self._classes, self._ranks = classes[first], np.concatenate(ranks)[first]


class SampleOrder:
    """The order of a run's samples.

    Each cell, a bucket and a source, is gone through in epochs of its own, each shuffled anew. Buckets take turns by
    step, sources by sample, both in proportion.

    Args:
        buckets: Bucket of each row, int `(N,)`.
        sources: Source of each row, int `(N,)`.
        weights: Share of each source in the samples, in any unit; None is in proportion to their rows.
        seed: Of the run.
        samples_per_step: Samples of an optimizer step, all processes together.
        start_sample: A sample that begins a step,
        start_step: and the number of that step.
    """

    def __init__(
        self,
        buckets: Sequence[int],
        sources: Sequence[int],
        *,
        seed: int,
        samples_per_step: int,
        weights: Sequence[float] | None = None,
        start_sample: int = 0,
        start_step: int = 0,
    ) -> None:
        self.seed, self.samples_per_step = seed, samples_per_step
        self.start_sample, self.start_step = start_sample, start_step
        buckets, sources = np.asarray(buckets), np.asarray(sources)
        # A source may have no rows.
        rows_of_source = np.bincount(sources, minlength=0 if weights is None else len(weights))
        per_row = (
            np.ones(len(rows_of_source)) if weights is None else np.asarray(weights) / np.maximum(rows_of_source, 1)
        )
        self.buckets = np.unique(buckets)  # those that have rows
        self.cells: list[list[np.ndarray]] = []
        self.by_sample: list[Interleaving] = []
        shares_of_buckets = []
        for bucket in self.buckets:
            in_bucket = np.flatnonzero(buckets == bucket)
            here = np.unique(sources[in_bucket])
            cells = [in_bucket[sources[in_bucket] == source] for source in here]
            if weights is None:  # one order over all
                cells, shares = [in_bucket], [float(len(in_bucket))]
            else:
                shares = [len(cell) * per_row[source] for cell, source in zip(cells, here, strict=True)]
            self.cells.append(cells)
            self.by_sample.append(Interleaving(shares, seed=seed, key=(RandomPurpose.SOURCE, int(bucket))))
            shares_of_buckets.append(sum(shares))
        self.by_step = Interleaving(shares_of_buckets, seed=seed, key=(RandomPurpose.BUCKET,))
        self._permutations: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}

    def step(self, number: int) -> int:
        """The optimizer step that a sample belongs to, counted from 0."""
        return self.start_step + (number - self.start_sample) // self.samples_per_step

    def bucket(self, number: int) -> int:
        """The bucket of a sample."""
        return int(self.buckets[self.by_step[self.step(number)][0]])

    def candidates(self, number: int) -> Iterator[int]:
        """The row of a sample, then those that come after it in its cell, which may replace it."""
        if len(self.buckets) == 1:
            place, position = 0, number
        else:
            place, turn = self.by_step[self.step(number)]
            position = turn * self.samples_per_step + (number - self.start_sample) % self.samples_per_step
        cell, position = self.by_sample[place][position]
        rows = self.cells[place][cell]
        epoch, offset = divmod(position, len(rows))
        order = self._permutation(place, cell, epoch)
        for skip in range(len(rows)):
            yield int(rows[order[(offset + skip) % len(rows)]])

    def _permutation(self, place: int, cell: int, epoch: int) -> torch.Tensor:
        known, order = self._permutations.get((place, cell), (-1, None))
        if known != epoch:
            only = len(self.buckets) == 1 and len(self.cells[0]) == 1
            key = (epoch,) if only else (epoch, int(self.buckets[place]), cell)
            generator = seeded_generator(self.seed, RandomPurpose.ORDER, *key)
            order = torch.randperm(len(self.cells[place][cell]), generator=generator)
            self._permutations[place, cell] = epoch, order
        return order
