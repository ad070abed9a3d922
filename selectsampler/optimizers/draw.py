"""A draw by lot among the samples that are safe enough, all with the same chance or by weights."""

import torch
from torch import Tensor

from selectsampler.optimizers.exact import top_k
from selectsampler.validation import check_vector

__all__ = ["draw", "safe_limit"]


def draw(
    utility: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    quotas: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The k samples of the highest utility, where the lot decides between equals.

    >>> draw(torch.tensor([0.1, 0.9, 0.9, 0.9, 0.9]), 2, seed=0)
    tensor([2, 4])

    Args:
        utility: (N,), floating point, finite, higher is better.
        k: from 0 to N.
        weights: (N,), floating point, finite, positive: one after another is drawn, each with a chance in proportion
            to its weight among what is left (Efraimidis and Spirakis, IPL 2006). None: all are alike.
        groups: (N,), int64, from 0; with `quotas`.
        quotas: (G,), int64, summing to k, none above its group's size.
        seed: the same seed draws the same samples; with other weights the same lots are weighed anew.

    Returns:
        (k,), int64, ascending.

    Raises:
        ValueError: as `top_k`, and for weights that are not positive.
    """
    order = _order(len(utility), weights, seed).to(utility.device)
    chosen = top_k(utility[order], k, groups=None if groups is None else groups[order], quotas=quotas)
    return order[chosen].sort().values


def safe_limit(
    probability: Tensor,
    k: int,
    risk: float,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    quotas: Tensor | None = None,
) -> float:
    """How probable the least safe sample may be, if k are drawn from all that are at least as safe.

    Those are the most that the extra risk allows. In a group with quota q, n samples as probable as the limit and
    probabilities p sorted from the highest, a draw holds q mean_{i <= max(n, q)} (1 - p_i) wrong ones in expectation
    (with weights: sum_i c_i (1 - p_i), with c_i the chance of being drawn), and the q safest hold
    q mean_{i <= q} (1 - p_i). The limit is the lowest with which the groups together hold at most risk * k more. At
    risk 0 it draws the safest themselves, at risk 1 from all.

    >>> safe_limit(torch.tensor([0.25, 1.0, 1.0, 0.75, 1.0]), 2, risk=0.1)
    0.75

    Args:
        probability: (N,), float, in [0, 1]: that a sample is right.
        k: from 0 to N.
        risk: in [0, 1].
        weights, groups, quotas: as in `draw`. None: all are alike, all are one group.

    Raises:
        ValueError: if risk lies outside [0, 1], a probability outside [0, 1], or a weight is not positive.
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
    _check_weights(weights, len(p))
    expected = _ExpectedWrong(p, groups.cpu(), quotas.cpu(), weights)
    limits = p.unique()  # ascending
    allowed = expected.at(float(limits[-1])) + risk * k + 1e-9 * k
    low, high = 0, len(limits) - 1  # the highest is always allowed: with it no group draws beyond its best
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if expected.at(float(limits[middle])) <= allowed else (middle + 1, high)
    return float(limits[low])


def _order(samples: int, weights: Tensor | None, seed: int) -> Tensor:
    """(N,), int64: who is drawn first, second, ...: the order in which exponential clocks of these rates ring."""
    rings = torch.empty(samples, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
    _check_weights(weights, samples)
    if weights is not None:
        rings /= weights.detach().cpu()
    return rings.argsort(stable=True)


def _check_weights(weights: Tensor | None, samples: int) -> None:
    if weights is None:
        return
    check_vector(weights, name="weights", samples=samples)
    if not (weights > 0).all():
        row = int((weights <= 0).nonzero()[0])
        raise ValueError(f"weights[{row}] is {float(weights[row])}, but a lot needs a positive weight.")


class _ExpectedWrong:
    """How many wrong ones the groups' draws hold in expectation, by the limit."""

    def __init__(self, probability: Tensor, groups: Tensor, quotas: Tensor, weights: Tensor | None) -> None:
        self.quotas = quotas
        best_first = probability.argsort(descending=True)
        order = best_first[groups[best_first].argsort(stable=True)]
        self.groups, self.probability = groups[order], probability[order]
        self.weights = None if weights is None else weights.detach().cpu().double()[order]
        self.wrong = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - self.probability).cumsum(0)])
        sizes = torch.bincount(groups, minlength=len(quotas))
        self.starts = sizes.cumsum(0) - sizes
        self.places = torch.arange(len(groups)) - self.starts[self.groups]

    def at(self, limit: float) -> float:
        """With draws from all that are at least as probable as this, and never from fewer than the quota."""
        safe = torch.bincount(self.groups[self.probability >= limit], minlength=len(self.quotas))
        drawn_from = torch.maximum(safe, self.quotas)
        if self.weights is None:
            wrong = self.wrong[self.starts + drawn_from] - self.wrong[self.starts]
            return float((self.quotas * wrong / drawn_from.clamp(min=1)).sum())
        rows = self.places < drawn_from[self.groups]
        drawn = _chances(self.weights[rows], self.groups[rows], self.quotas, drawn_from)
        return float((drawn * (1 - self.probability[rows])).sum())


def _chances(weights: Tensor, groups: Tensor, quotas: Tensor, sizes: Tensor) -> Tensor:
    """(n,), float64: how likely each is among the first of its group's clocks to ring.

    By the time t at which as many have rung in expectation as the quota: sum of 1 - exp(-w t) = q, by Newton's method,
    which comes from below, as the sum is concave in t.
    """

    def total(values: Tensor) -> Tensor:
        return torch.bincount(groups, weights=values, minlength=len(quotas))

    everyone = sizes <= quotas
    time = (quotas / total(weights)).masked_fill(everyone, 0.0)
    for _ in range(100):
        silent = torch.exp(-weights * time[groups])
        missing = quotas - total(1 - silent)
        if (missing.masked_fill(everyone, 0.0) <= 1e-9 * quotas).all():
            break
        time += (missing / total(weights * silent)).masked_fill(everyone, 0.0)
    return (1 - silent).masked_fill(everyone[groups], 1.0)
