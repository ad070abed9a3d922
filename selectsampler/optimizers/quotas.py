"""Whole numbers in given proportions that sum to an exact total."""

from fractions import Fraction

import torch
from torch import Tensor

__all__ = ["apportion"]


def apportion(weights: Tensor, total: int, *, capacities: Tensor | None = None) -> Tensor:
    """Share `total` out in proportion to `weights`, by largest remainder (Hamilton's method), exactly.

    >>> apportion(torch.tensor([5, 3, 1]), 4)
    tensor([2, 1, 1])

    Taking the integer part a class at a time would lose up to a sample a class. Remainders are compared as exact
    fractions; equal ones go to the lower group. What exceeds a group's capacity is shared out again among the others.

    Args:
        weights: (G,), not negative, not all zero.
        total: at least 0, at most the sum of the capacities.
        capacities: (G,), int64, the most that a group can take. None: no limit.

    Returns:
        (G,), int64, summing to `total`.

    Raises:
        ValueError: if a weight is negative or not finite, all are zero, or the capacities do not suffice.
    """
    shares = [
        Fraction(weight) if weight == weight and abs(weight) != float("inf") else None for weight in weights.tolist()
    ]
    wrong = next((i for i, share in enumerate(shares) if share is None or share < 0), None)
    if wrong is not None:
        raise ValueError(f"weights[{wrong}] is {weights[wrong].item()}, but weights must be finite and not negative.")
    limits = [total] * len(shares) if capacities is None else capacities.tolist()
    reachable = sum(limit for limit, share in zip(limits, shares, strict=True) if share)
    if total < 0 or total > reachable:
        raise ValueError(f"{total} cannot be shared out: groups with a positive weight take {reachable} at most.")
    quotas = [0] * len(shares)
    while sum(quotas) < total:
        free = [i for i, share in enumerate(shares) if share and quotas[i] < limits[i]]
        _share_out(quotas, shares, limits, free, total - sum(quotas))
    return torch.tensor(quotas, dtype=torch.int64)


def _share_out(quotas: list[int], shares: list, limits: list[int], free: list[int], amount: int) -> None:
    """Add `amount` to the quotas of the free groups, in proportion, each up to its limit."""
    weight = sum(shares[i] for i in free)
    ideal = {i: amount * shares[i] / weight for i in free}
    gains = {i: int(ideal[i]) for i in free}
    for i in sorted(free, key=lambda i: (gains[i] - ideal[i], i))[: amount - sum(gains.values())]:
        gains[i] += 1
    for i in free:
        quotas[i] = min(limits[i], quotas[i] + gains[i])
