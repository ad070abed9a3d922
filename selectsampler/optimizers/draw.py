"""A draw by lot among the samples that are safe enough, all with the same chance or by weights."""

import torch
from torch import Tensor

from selectsampler.optimizers.exact import top_k
from selectsampler.validation import as_seed, check_labels, check_vector

__all__ = ["ExpectedWrong", "chances", "draw", "safe_limit"]


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
        ValueError: as `top_k`, for weights that are not positive and a seed that is no whole number from 0.
    """
    rings = torch.empty(len(utility), dtype=torch.float64).exponential_(
        generator=torch.Generator().manual_seed(as_seed(seed))
    )
    if weights is not None:
        rings /= _checked(weights, len(utility))
    order = rings.argsort(stable=True).to(utility.device)  # in which exponential clocks of these rates ring
    chosen = top_k(utility[order], k, groups=None if groups is None else groups[order], quotas=quotas)
    return order[chosen].sort().values


def chances(
    utility: Tensor,
    k: int,
    *,
    weights: Tensor | None = None,
    groups: Tensor | None = None,
    quotas: Tensor | None = None,
) -> Tensor:
    """How likely `draw` is to draw each sample.

    >>> chances(torch.tensor([0.1, 0.9, 0.9, 0.9, 1.0]), 2)
    tensor([0.0000, 0.3333, 0.3333, 0.3333, 1.0000], dtype=torch.float64)

    With weights that is a close approximation: 1 - exp(-w t), with the time t at which as many clocks have rung in
    expectation as are to be drawn. Of two with weights of 100 and 1, one is drawn with 0.97 and 0.03 in place of 0.99
    and 0.01; of many the error vanishes.

    Args:
        utility, k, weights, groups, quotas: as of `draw`.

    Returns:
        (N,), float64, summing to k.

    Raises:
        ValueError: as `draw`.
    """
    check_vector(utility, name="utility")
    groups, quotas = _one_group(groups, quotas, len(utility), k)
    if k == 0:
        return torch.zeros(len(utility), dtype=torch.float64)
    values = utility.detach().cpu().double()
    order = values.argsort(descending=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups, minlength=len(quotas))
    last = (sizes.cumsum(0) - sizes + quotas - 1).clamp(min=0, max=len(order) - 1)
    threshold = values[order[last]].masked_fill(quotas == 0, torch.inf)[groups]  # the utility of the last that is taken
    result = (values > threshold).double()
    tied = (values == threshold).nonzero()[:, 0]
    left = quotas - torch.bincount(groups, weights=result, minlength=len(quotas))
    of_tied = torch.ones(len(tied), dtype=torch.float64) if weights is None else _checked(weights, len(values))[tied]
    result[tied] = _chances(of_tied, groups[tied], left)
    return result


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
    (with weights: sum_i c_i (1 - p_i), with c_i the `chances`), and the q safest hold q mean_{i <= q} (1 - p_i). The
    limit is the lowest with which the groups together hold at most risk * k more. At risk 0 it draws the safest
    themselves, at risk 1 from all.

    >>> safe_limit(torch.tensor([0.25, 1.0, 1.0, 0.75, 1.0]), 2, risk=0.1)
    0.75

    Args:
        probability: (N,), float, in [0, 1]: that a sample is right.
        k: from 0 to N.
        risk: in [0, 1].
        weights, groups, quotas: as of `draw`. None: all are alike, all are one group.

    Raises:
        ValueError: if risk or a probability lies outside [0, 1], or as `draw`.
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk is {risk}, but it must be a share in [0, 1].")
    p = probability.detach().cpu().double()
    if len(p) and not 0 <= float(p.min()) <= float(p.max()) <= 1:
        raise ValueError(f"Probabilities lie in [0, 1], but these lie between {float(p.min())} and {float(p.max())}.")
    return ExpectedWrong(p, *_one_group(groups, quotas, len(p), k)).limit(risk, weights)


class ExpectedWrong:
    """How many wrong ones the groups' draws hold in expectation, by the limit.

    Args:
        probability: (N,), float64, in [0, 1].
        groups: (N,), int64.
        quotas: (G,), int64, none above its group's size.
    """

    def __init__(self, probability: Tensor, groups: Tensor, quotas: Tensor) -> None:
        self.quotas = quotas
        best_first = probability.argsort(descending=True)
        self.order = best_first[groups[best_first].argsort(stable=True)]
        self.groups, self.probability = groups[self.order], probability[self.order]
        self.wrong = torch.cat([torch.zeros(1, dtype=torch.float64), (1 - self.probability).cumsum(0)])
        sizes = torch.bincount(groups, minlength=len(quotas))
        self.starts = sizes.cumsum(0) - sizes
        self.places = torch.arange(len(groups)) - self.starts[self.groups]
        self.limits = probability.unique()  # ascending

    def limit(self, risk: float, weights: Tensor | None = None) -> float:
        """The lowest limit that adds no more than this risk to the safest selection; see `safe_limit`."""
        k = int(self.quotas.sum())
        if k == 0:
            return 1.0
        weights = None if weights is None else _checked(weights, len(self.order))[self.order]
        allowed = self._at(float(self.limits[-1]), weights) + risk * k + 1e-9 * k
        low, high = 0, len(self.limits) - 1  # the highest is always allowed: with it no group draws beyond its best
        while low < high:
            middle = (low + high) // 2
            fits = self._at(float(self.limits[middle]), weights) <= allowed
            low, high = (low, middle) if fits else (middle + 1, high)
        return float(self.limits[low])

    def _at(self, limit: float, weights: Tensor | None) -> float:
        """With draws from all that are at least as probable as this, and never from fewer than the quota."""
        safe = torch.bincount(self.groups[self.probability >= limit], minlength=len(self.quotas))
        drawn_from = torch.maximum(safe, self.quotas)
        if weights is None:
            wrong = self.wrong[self.starts + drawn_from] - self.wrong[self.starts]
            return float((self.quotas * wrong / drawn_from.clamp(min=1)).sum())
        rows = self.places < drawn_from[self.groups]
        drawn = _chances(weights[rows], self.groups[rows], self.quotas)
        return float((drawn * (1 - self.probability[rows])).sum())


def _chances(weights: Tensor, groups: Tensor, quotas: Tensor) -> Tensor:
    """(n,), float64: how likely each is among the first of its group's clocks to ring, as many as the quota.

    By the time t at which that many have rung in expectation: sum of 1 - exp(-w t) = q, by Newton's method, which comes
    from below, as the sum is concave in t.
    """

    def total(values: Tensor) -> Tensor:
        return torch.bincount(groups, weights=values, minlength=len(quotas))

    everyone = torch.bincount(groups, minlength=len(quotas)) <= quotas
    time = (quotas / total(weights)).masked_fill(everyone, 0.0)
    for _ in range(100):
        silent = torch.exp(-weights * time[groups])
        missing = quotas - total(1 - silent)
        if (missing.masked_fill(everyone, 0.0) <= 1e-9 * quotas).all():
            break
        time += (missing / total(weights * silent)).masked_fill(everyone, 0.0)
    return (1 - silent).masked_fill(everyone[groups], 1.0)


def _one_group(groups: Tensor | None, quotas: Tensor | None, samples: int, k: int) -> tuple[Tensor, Tensor]:
    """Groups and quotas on the CPU, checked; without any, all are one group."""
    if not 0 <= k <= samples:
        raise ValueError(f"k is {k}, but it must lie between 0 and the {samples} samples.")
    if (groups is None) != (quotas is None):
        raise ValueError("groups and quotas go together.")
    if groups is None or quotas is None:
        return torch.zeros(samples, dtype=torch.int64), torch.tensor([k])
    groups, quotas = groups.cpu(), quotas.cpu()
    check_labels(groups, samples=samples, classes=len(quotas))
    sizes = torch.bincount(groups, minlength=len(quotas))
    if int(quotas.sum()) != k or bool((quotas > sizes).any()) or bool((quotas < 0).any()):
        raise ValueError(f"quotas must sum to k = {k}, with none below 0 or above its group's size.")
    return groups, quotas


def _checked(weights: Tensor, samples: int) -> Tensor:
    """The weights, float64, on the CPU."""
    check_vector(weights, name="weights", samples=samples)
    weights = weights.detach().cpu().double()
    if not (weights > 0).all():
        row = int((weights <= 0).nonzero()[0])
        raise ValueError(f"weights[{row}] is {float(weights[row])}, but a lot needs a positive weight.")
    return weights
