"""The rows of each class, of any number of samples, in four bytes a sample."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = ["rows_of_groups", "sort_by_group"]

BLOCK = 2**16  # rows that are sorted at once


def rows_of_groups(groups: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each group that has samples, ascending, with its rows (n,), int64, ascending.

    >>> [(group, rows.tolist()) for group, rows in rows_of_groups(torch.tensor([2, 0, 2]))]
    [(0, [1]), (2, [0, 2])]

    Args:
        groups: (N,), integers from 0, on any device.
    """
    order, counts = sort_by_group(groups)
    for group, rows in enumerate(order.split(counts.tolist())):
        if len(rows):
            yield group, rows.long()


def sort_by_group(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N,) by group and within it ascending, int32 where they fit, and how many there are of each, (G,), int64.

    On the CPU by counting, a block at a time, in no more memory than the result; elsewhere by sorting.

    Args:
        groups: (N,), integers from 0, on any device.
    """
    blocks = groups.split(BLOCK)
    number = max((int(block.max()) + 1 for block in blocks if len(block)), default=0)
    if groups.device.type != "cpu":
        return groups.argsort(stable=True), torch.bincount(groups, minlength=number)
    narrow = np.uint8 if number <= 2**8 else np.uint16 if number <= 2**16 else np.int64  # up to 16 bits: a radix sort
    counts = np.zeros(number, dtype=np.int64)
    for block in blocks:
        counts += np.bincount(block.numpy(), minlength=number)
    order = np.empty(len(groups), dtype=np.int32 if len(groups) < 2**31 else np.int64)
    start, ends = 0, np.cumsum(counts) - counts  # where the next row of each group goes
    for block in blocks:
        own = block.numpy().astype(narrow)
        rows = np.argsort(own, kind="stable")
        here = np.bincount(own, minlength=number)
        places = np.repeat(ends - (np.cumsum(here) - here), here)
        places += np.arange(len(own))
        order[places] = rows + start
        ends += here
        start += len(own)
    return torch.from_numpy(order), torch.from_numpy(counts)
