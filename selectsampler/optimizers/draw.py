"""A draw by lot among the samples that are safe enough: the subset keeps the density of the data."""

import torch
from torch import Tensor

from selectsampler.optimizers.exact import top_k

__all__ = ["draw", "safe_limit"]


def draw(
    utility: Tensor, k: int, *, groups: Tensor | None = None, quotas: Tensor | None = None, seed: int = 0
) -> Tensor:
    """The k samples of the highest utility, where the lot decides between equals.

    >>> draw(torch.tensor([0.1, 0.9, 0.9, 0.9, 0.9]), 2, seed=0)
    tensor([1, 4])

    Args:
        utility: (N,), floating point, finite, higher is better.
        k: from 0 to N.
        groups: (N,), int64, from 0; with `quotas`.
        quotas: (G,), int64, summing to k, none above its group's size.
        seed: the same seed draws the same samples.

    Returns:
        (k,), int64, ascending.

    Raises:
        ValueError: as `top_k`.
    """
    order = torch.randperm(len(utility), generator=torch.Generator().manual_seed(seed)).to(utility.device)
    chosen = top_k(utility[order], k, groups=None if groups is None else groups[order], quotas=quotas)
    return order[chosen].sort().values


def safe_limit(
    probability: Tensor, k: int, risk: float, *, groups: Tensor | None = None, quotas: Tensor | None = None
) -> float:
    """How probable the least safe sample may be, if k are drawn from all that are at least as safe.

    Those are the most that the extra risk allows. In a group with quota q, n samples as probable as the limit and
    probabilities p sorted from the highest, a draw holds q mean_{i <= max(n, q)} (1 - p_i) wrong ones in expectation,
    and the q safest hold q mean_{i <= q} (1 - p_i). The limit is the lowest with which the groups together hold at most
    risk * k more. At risk 0 it draws the safest themselves, at risk 1 from all.

    >>> safe_limit(torch.tensor([0.25, 1.0, 1.0, 0.75, 1.0]), 2, risk=0.1)
    0.75

    Args:
        probability: (N,), float, in [0, 1]: that a sample is right.
        k: from 0 to N.
        risk: in [0, 1].
        groups, quotas: as in `draw`. None: all are one group.

    Raises:
        ValueError: if risk lies outside [0, 1], or a probability outside [0, 1].
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk is {risk}, but it must be a share in [0, 1].")
    if k == 0:
        return 1.0
    p = probability.detach().cpu().double()
    if not 0 <= float(p.min()) <= float(p.max()) <= 1:
        raise ValueError(f"Probabilities lie in [0, 1], but these lie between {float(p.min())} and {float(p.max())}.")
    if groups is None or quotas is None:
        groups, quotas = torch.zeros(len(p), dtype=torch.int64), torch.tensor([k])
    expected = _ExpectedWrong(p, groups.cpu(), quotas.cpu())
    limits = p.unique()  # ascending
    allowed = expected.at(float(limits[-1])) + risk * k + 1e-9 * k
    low, high = 0, len(limits) - 1  # the highest is always allowed: with it no group draws beyond its best
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if expected.at(float(limits[middle])) <= allowed else (middle + 1, high)
    return float(limits[low])


class _ExpectedWrong:
    """How many wrong ones the groups' draws hold in expectation, by the limit."""

    def __init__(self, probability: Tensor, groups: Tensor, quotas: Tensor) -> None:
        self.quotas = quotas
        best_first = probability.argsort(descending=True)
        order = best_first[groups[best_first].argsort(stable=True)]
        self.groups, self.probability = groups[order], probability[order]
        self.wrong = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - self.probability).cumsum(0)])
        self.starts = torch.bincount(groups, minlength=len(quotas)).cumsum(0)
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.starts[:-1]])

    def at(self, limit: float) -> float:
        """With draws from all that are at least as probable as this, and never from fewer than the quota."""
        safe = torch.bincount(self.groups[self.probability >= limit], minlength=len(self.quotas))
        drawn_from = torch.maximum(safe, self.quotas)
        wrong = self.wrong[self.starts + drawn_from] - self.wrong[self.starts]
        return float((self.quotas * wrong / drawn_from.clamp(min=1)).sum())
