"""The exact optimum of a separable objective whose groups may take any number within a range, and what ranges cost."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selectsampler.validation import check_labels, check_vector

__all__ = ["prices", "top_k_in_ranges"]


def top_k_in_ranges(utility: Tensor, k: int, *, groups: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """The subset of k samples with the highest sum of utilities that takes from each group no fewer and no more.

    >>> groups, lowest, highest = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1]), torch.tensor([3, 2])
    >>> top_k_in_ranges(torch.tensor([0.9, 0.8, 0.7, 0.2, 0.1]), 3, groups=groups, lowest=lowest, highest=highest)
    tensor([0, 1, 3])

    The best of each group up to its lowest number, then the best of what its highest number leaves: no other subset
    within the ranges has a higher sum.

    Args:
        utility: (N,), floating point, finite, higher is better. Ties go to the lower index.
        k: from 0 to N.
        groups: (N,), int64, in [0, G).
        lowest, highest: (G,), int64: how many samples a group gives, at least and at most.

    Returns:
        (k,), int64, ascending, on the device of `utility`.

    Raises:
        ValueError: if no subset lies within the ranges; a group that is too small for its own is named.
    """
    check_vector(utility, name="utility")
    check_labels(groups, samples=len(utility), classes=len(lowest))
    sizes = torch.bincount(groups.cpu(), minlength=len(lowest))
    lowest, highest = lowest.cpu(), torch.minimum(highest.cpu(), sizes)
    wrong = (lowest > highest).nonzero()
    if len(wrong):
        small = int(wrong[0])
        raise ValueError(
            f"Group {small} is to give {int(lowest[small])} samples or more, but it can give {int(highest[small])}."
        )
    if not int(lowest.sum()) <= k <= int(highest.sum()):
        raise ValueError(
            f"The groups' ranges allow {int(lowest.sum())} to {int(highest.sum())} samples in all, but the budget is "
            f"{k}: widen them."
        )
    chosen = _Ordered(utility, groups).within(k, lowest, highest)
    return torch.from_numpy(np.flatnonzero(chosen)).to(utility.device)


class _Ordered:
    """Samples sorted once, among all and in their groups, to be chosen from under any ranges."""

    def __init__(self, utility: Tensor, groups: Tensor) -> None:
        self.values, self.group = utility.detach().cpu().double().numpy(), groups.cpu().numpy()
        self.best_first = np.argsort(-self.values, kind="stable")
        in_groups = self.best_first[np.argsort(self.group[self.best_first], kind="stable")]
        sizes = np.bincount(self.group)
        starts = np.cumsum(sizes) - sizes
        self.place = np.empty(len(self.values), dtype=np.int64)  # of each sample in its group, the best first
        self.place[in_groups] = np.arange(len(self.values)) - starts[self.group[in_groups]]

    def within(self, k: int, lowest: Tensor, highest: Tensor) -> np.ndarray:
        """(N,), bool: the best k within the ranges, which allow k."""
        chosen = self.place < lowest.numpy()[self.group]
        free = self.best_first[(~chosen & (self.place < highest.numpy()[self.group]))[self.best_first]]
        chosen[free[: k - int(chosen.sum())]] = True
        return chosen


def prices(
    utility: Tensor, k: int, *, groups: Tensor, lowest: Tensor, highest: Tensor, of: Sequence[int] | None = None
) -> Tensor:
    """(G,), float64, at least 0: by how much the objective would rise if one group's range alone were lifted.

    >>> groups, lowest, highest = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1]), torch.tensor([3, 2])
    >>> prices(torch.tensor([0.9, 0.8, 0.7, 0.2, 0.1]), 3, groups=groups, lowest=lowest, highest=highest)
    tensor([0.0000, 0.5000], dtype=torch.float64)

    Arguments as in `top_k_in_ranges`; `of`: the groups that are asked for, the others get 0. None: all.
    """
    lowest, highest = lowest.cpu(), highest.cpu()
    taken = top_k_in_ranges(utility, k, groups=groups, lowest=lowest, highest=highest).cpu()
    ordered = _Ordered(utility, groups)
    held = ordered.values[taken.numpy()].sum()
    counts = torch.bincount(groups.cpu()[taken], minlength=len(lowest))
    result = torch.zeros(len(lowest), dtype=torch.float64)
    held_back = ((counts == lowest) & (lowest > 0)) | (counts == highest)
    for group in range(len(lowest)) if of is None else of:
        if not held_back[group]:
            continue
        least, most = lowest.clone(), highest.clone()
        least[group], most[group] = 0, k
        result[group] = max(0.0, ordered.values[ordered.within(k, least, most)].sum() - held)
    return result
