"""The exact optimum of a separable objective: the k samples of highest utility, overall or in each group."""

import numpy as np
import torch
from torch import Tensor

from selectsampler.grouping import sort_by_group
from selectsampler.validation import check_labels, check_vector

__all__ = ["top_k"]


def top_k(utility: Tensor, k: int, *, groups: Tensor | None = None, quotas: Tensor | None = None) -> Tensor:
    """The subset of k samples with the highest sum of utilities, with exactly `quotas[g]` samples of each group g.

    >>> top_k(torch.tensor([0.1, 0.4, 0.4, 0.3]), 1)
    tensor([1])
    >>> top_k(torch.tensor([0.1, 0.4, 0.4, 0.3]), 2, groups=torch.tensor([0, 1, 1, 0]), quotas=torch.tensor([1, 1]))
    tensor([1, 3])

    The optimizer of arXiv 2410.11215 maximises a sum over samples under a budget, and this is that sum's maximum: no
    other subset of the size (and quotas) has a higher one. Takes linear time.

    Args:
        utility: (N,), floating point, finite, higher is better; compared as float64. Ties go to the lower index.
        k: from 0 to N.
        groups: (N,), int64, from 0; with `quotas`.
        quotas: (G,), int64, summing to k, none above its group's size.

    Returns:
        (k,), int64, ascending, on the device of `utility`.

    Raises:
        ValueError: if k, groups or quotas do not fit; a group that is too small is named.
    """
    check_vector(utility, name="utility")
    if not 0 <= k <= len(utility):
        raise ValueError(f"k is {k}, but it must lie between 0 and the {len(utility)} samples.")
    values = utility.detach().cpu().double().numpy()
    if (groups is None) != (quotas is None):
        raise ValueError("groups and quotas go together.")
    if groups is None or quotas is None:
        chosen = _largest(values, k)
    else:
        chosen = _largest_of_groups(values, groups.cpu(), quotas.cpu(), k)
    return torch.from_numpy(np.flatnonzero(chosen)).to(utility.device)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Which are the k largest, as a mask; of equals the first."""
    if k == 0:
        return np.zeros(len(values), dtype=bool)
    threshold = np.partition(values, len(values) - k)[len(values) - k]
    above = values > threshold
    at_threshold = np.flatnonzero(values == threshold)[: k - np.count_nonzero(above)]
    above[at_threshold] = True
    return above


def _largest_of_groups(values: np.ndarray, groups: Tensor, quotas: Tensor, k: int) -> np.ndarray:
    check_labels(groups, samples=len(values), classes=len(quotas))
    if quotas.ndim != 1 or quotas.is_floating_point() or int(quotas.sum()) != k:
        raise ValueError(f"quotas must be whole numbers that sum to k = {k}, but they sum to {quotas.sum().item()}.")
    sizes = torch.bincount(groups, minlength=len(quotas))
    wrong = (quotas < 0) | (quotas > sizes)
    if wrong.any():
        group = int(wrong.nonzero()[0])
        raise ValueError(f"quotas[{group}] is {int(quotas[group])}, but group {group} has {int(sizes[group])} samples.")
    order, end = sort_by_group(groups)[0].numpy(), 0
    chosen = np.zeros(len(values), dtype=bool)
    for size, quota in zip(sizes.tolist(), quotas.tolist(), strict=True):
        members, end = order[end : end + size], end + size
        if quota:
            chosen[members] = _largest(values[members], quota)
    return chosen
