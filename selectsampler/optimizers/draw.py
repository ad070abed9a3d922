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


def safe_limit(probability: Tensor, k: int, risk: float) -> float:
    """How probable the least safe sample may be, if k are drawn from all that are at least as safe.

    Those n samples are the most that the extra risk allows: with p sorted from the highest,

        mean_{i <= n} (1 - p_i) <= mean_{i <= k} (1 - p_i) + risk

    so that k samples drawn at random of the n hold at most `risk` more wrong ones, in expectation and as a share, than
    the k safest do; equals of the least safe count as safe too. At risk 0 it draws the k safest themselves, at risk 1
    from all.

    >>> safe_limit(torch.tensor([0.25, 1.0, 1.0, 0.75, 1.0]), 2, risk=0.1)
    0.75

    Args:
        probability: (N,), float, in [0, 1]: that a sample is right.
        k: from 0 to N.
        risk: in [0, 1].

    Raises:
        ValueError: if risk lies outside [0, 1].
    """
    if not 0 <= risk <= 1:
        raise ValueError(f"risk is {risk}, but it must be a share in [0, 1].")
    if k == 0:
        return 1.0
    best_first = probability.double().sort(descending=True).values
    wrong = (1 - best_first).cumsum(0) / torch.arange(1, len(best_first) + 1, device=best_first.device)
    safe = int((wrong <= wrong[k - 1] + risk).sum())
    return float(best_first[safe - 1])
