"""The order of an epoch: a permutation drawn from (seed, epoch), of which only what is asked for is worked out."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selectsampler.grouping import sort_by_group

__all__ = ["EpochOrder"]

LARGE = 2**24  # samples from which on a permutation is drawn in buckets: as a whole it takes seconds
KEPT = 2  # passes that are held: loaders read ahead into the next


class EpochOrder:
    """The samples of one rank in one epoch, in order.

    >>> EpochOrder(torch.tensor([2, 3, 5, 7]), seed=0, epoch=1, shuffle=False, epoch_size=3)[0:3]
    tensor([7, 2, 3])
    >>> primes = torch.tensor([2, 3, 5, 7, 11])
    >>> [EpochOrder(primes, shuffle=False, num_replicas=2, rank=rank)[0:3].tolist() for rank in (0, 1)]
    [[2, 5, 11], [3, 7, 2]]

    Every pass through the indices is a permutation drawn from (seed, number of the pass). An epoch is one pass; with
    `epoch_size`, epochs are cut one after the other from an endless walk through passes. A rank has every R-th sample
    from its own number on, made even by repeating the epoch's head or dropping its tail.

    Memory: four bytes an index for a pass (eight from 2 ** 31 on), and nothing where there is no shuffling. From
    2 ** 24 indices on the permutation is drawn bucket by bucket, so that its start is there at once.

    Args:
        indices: (k,), int64, at least one.
        seed, epoch: from 0.
        shuffle, epoch_size, num_replicas, rank, drop_last: as `SelectSampler` takes them.
    """

    def __init__(
        self,
        indices: Tensor,
        seed: int = 0,
        epoch: int = 0,
        *,
        shuffle: bool = True,
        epoch_size: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.indices, self.seed, self.shuffle = indices, seed, shuffle
        self.epoch_length = len(indices) if epoch_size is None else epoch_size
        self.first = epoch * self.epoch_length  # of this epoch's samples, in the walk
        self.num_replicas, self.rank = num_replicas, rank
        self.length = self.epoch_length // num_replicas if drop_last else -(-self.epoch_length // num_replicas)
        self._passes: dict[int, _Permutation] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, rows: slice) -> Tensor:
        """(n,), int64: the samples from `rows.start` to `rows.stop`; after the last comes the first again."""
        parts = [self._pass(number, places) for number, places in self._pieces(rows.start, rows.stop)]
        return parts[0] if len(parts) == 1 else torch.cat([self.indices[:0], *parts])

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The rows from `start` to `stop` as pieces of passes: the number of a pass, and places in it."""
        while start < stop:
            row = start % self.length
            place = (row * self.num_replicas + self.rank) % self.epoch_length
            number, offset = divmod(self.first + place, len(self.indices))
            room = min(self.epoch_length - place, len(self.indices) - offset)  # until the epoch ends, or the pass
            count = min(stop - start, self.length - row, -(-room // self.num_replicas))
            yield number, slice(offset, offset + (count - 1) * self.num_replicas + 1, self.num_replicas)
            start += count

    def _pass(self, number: int, places: slice) -> Tensor:
        """The samples at these places of a pass."""
        if not self.shuffle:
            return self.indices[places]
        if number not in self._passes:
            while len(self._passes) >= KEPT:
                self._passes.pop(next(iter(self._passes)))
            self._passes[number] = _Permutation(len(self.indices), self.seed, number)
        return self.indices.index_select(0, self._passes[number][places])


class _Permutation:
    """A uniform permutation of the numbers below `size`.

    A large one is drawn in two steps: every number draws a bucket, and each bucket is shuffled for itself, in the
    processor's cache, when it is first looked at. That again is uniform (Rao 1961, Sandelius 1962).
    """

    def __init__(self, size: int, seed: int, number: int) -> None:
        self.key = (seed, number)
        narrow = torch.int32 if size < 2**31 else torch.int64  # the same numbers either way, in half the memory
        if size <= LARGE:
            self.numbers = torch.randperm(size, generator=_generator(*self.key), dtype=narrow)
            self.ends = [size]
            self.shuffled = [True]
            return
        bits = np.random.PCG64(np.random.SeedSequence(self.key)).random_raw(-(-size // 8))
        drawn = torch.from_numpy(bits.astype("<u8", copy=False).view(np.uint8)[:size])
        self.numbers, counts = sort_by_group(drawn)
        self.ends = counts.cumsum(0).tolist()
        self.shuffled = (counts < 2).tolist()

    def __getitem__(self, places: slice) -> Tensor:
        """The numbers at these places."""
        start = 0
        for bucket, end in enumerate(self.ends):
            if not self.shuffled[bucket] and start < places.stop and places.start < end:
                order = torch.randperm(end - start, generator=_generator(*self.key, bucket))
                self.numbers[start:end] = self.numbers[start:end][order]
                self.shuffled[bucket] = True
            start = end
        return self.numbers[places]


def _generator(*key: int) -> torch.Generator:
    """Seeds are mixed, not added: seed 0's second pass is not seed 1's first."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
