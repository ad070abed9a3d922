"""How a budget is shared out: quotas of classes, as labelled or as trusted, and ranges for any other groups."""

import math
import warnings
from collections.abc import Mapping
from fractions import Fraction
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from selectsampler.optimizers import apportion
from selectsampler.scores.table import TRUSTED, Scores

__all__ = ["Quotas", "Shares", "class_quotas", "share_ranges"]

BLOCK = 2**16  # samples whose trust is added up at once

Quotas = Mapping[Any, int]
Shares = Mapping[int, tuple[float | str, float | str]]


def class_quotas(table: Scores, balance: str | Quotas | None, budget: int, eligible: Tensor | None) -> Tensor | None:
    """(C,), int64: how many samples of each class, summing to the budget; None where any number will do.

    Args:
        table: with labels, and trust for `trusted`.
        balance: `trusted`, `given`, {class name or number: quota} or None, as `select` takes it.
        budget: the number of samples in all.
        eligible: (n,), int64: the rows that can be selected. None: all.
    """
    if balance is None:
        return None
    if table.labels is None:
        raise ValueError("balance needs labels, and these scores have none.")
    labels = table.labels.cpu()
    names = list(table.class_names or [])
    classes = max(len(names), int(labels.max()) + 1)
    own = labels if eligible is None else labels[eligible]
    available = torch.bincount(own, minlength=classes)
    if isinstance(balance, Mapping):
        return _named_quotas(balance, budget, available, names)
    if balance == "given":
        return apportion(torch.bincount(labels, minlength=classes), budget, capacities=available)
    if balance == "trusted":
        trust, repeated = table["trust"].cpu(), torch.zeros(len(table), dtype=torch.bool)
        if "trusted_diversity" in table.columns:
            repeated = (table["trusted_diversity"].cpu() == 0) & (trust >= TRUSTED)
        if eligible is not None:
            trust, repeated = trust[eligible], repeated[eligible]
        return _trusted_quotas(trust, repeated, own, budget, classes)
    raise ValueError(f"balance is {balance!r}, but it must be 'auto', 'trusted', 'given', None or {{class: quota}}.")


def _trusted_quotas(trust: Tensor, repeated: Tensor, labels: Tensor, budget: int, classes: int) -> Tensor:
    """Quotas in proportion to the sum of trust, first of trusted samples, near-duplicates once, then of the rest."""
    sums = torch.zeros(classes, dtype=torch.float64)
    distinct = (trust >= TRUSTED) & ~repeated
    for some, own, again in zip(trust.split(BLOCK), labels.split(BLOCK), repeated.split(BLOCK), strict=True):
        sums.index_add_(0, own, some.double().masked_fill(again, 0.0))
    trusted = torch.bincount(labels[distinct], minlength=classes)
    within = min(budget, int(trusted.sum()))
    quotas = apportion(sums, within, capacities=trusted) if within else torch.zeros_like(trusted)
    if within < budget:
        warnings.warn(
            f"The budget is {budget}, but only {within} labels of distinct images are more likely right than wrong: "
            f"{budget - within} samples that are not trusted, or repeat another, are selected as well. Keep less.",
            stacklevel=5,
        )
        quotas = quotas + _most_trusted(trust[~distinct], labels[~distinct], budget - within, classes)
    return quotas


def _most_trusted(trust: Tensor, labels: Tensor, count: int, classes: int) -> Tensor:
    """(C,), int64: how many of the `count` samples of the highest trust are of each class; equals are apportioned."""
    lowest = trust.sort(descending=True).values[count - 1]
    above, level = (torch.bincount(labels[rows], minlength=classes) for rows in (trust > lowest, trust == lowest))
    return above + apportion(level, count - int(above.sum()), capacities=level)


def _named_quotas(balance: Quotas, budget: int, available: Tensor, names: list[str]) -> Tensor:
    quotas = torch.zeros_like(available)
    named: set[int] = set()
    for name, quota in balance.items():
        number = names.index(name) if name in names else name
        if not isinstance(number, Integral) or not 0 <= int(number) < len(available):
            raise ValueError(f"balance names a class {name!r} that is not there.")
        if int(number) in named:
            raise ValueError(f"balance names class {number} twice, by its name and by its number.")
        if not isinstance(quota, Integral) or not 0 <= int(quota) <= int(available[int(number)]):
            raise ValueError(
                f"balance asks class {name!r} for {quota} samples, but it has {int(available[number])}: ask for a "
                "whole number up to that."
            )
        named.add(int(number))
        quotas[number] = int(quota)
    if int(quotas.sum()) != budget:
        raise ValueError(f"The quotas sum to {int(quotas.sum())}, but the budget is {budget}.")
    return quotas


def share_ranges(groups: Tensor, shares: Shares, budget: int, samples: int) -> tuple[Tensor, Tensor]:
    """(G,), (G,), int64: the least and the most samples of each group that its range of shares allows.

    Shares are exact decimals, as `keep` is: 0.29 of 100 samples are 29, and a range that holds no whole number is
    refused.
    """
    if not isinstance(groups, Tensor) or groups.dtype != torch.int64 or groups.shape != (samples,):
        raise ValueError(f"groups must be an int64 tensor of shape ({samples},): the group of each sample.")
    if samples and int(groups.min()) < 0:
        raise ValueError(f"groups holds {int(groups.min())}, but groups are numbered from 0.")
    number_of_groups = int(groups.max()) + 1
    lowest = torch.zeros(number_of_groups, dtype=torch.int64)
    highest = torch.full((number_of_groups,), budget)
    for group, share in shares.items():
        if not isinstance(group, Integral) or not 0 <= group < number_of_groups:
            raise ValueError(
                f"shares names a group {group!r}, but groups are numbered from 0 to {number_of_groups - 1}."
            )
        try:
            low, high = share
            least, most = Fraction(str(low)), Fraction(str(high))
        except (TypeError, ValueError, ZeroDivisionError):
            raise ValueError(f"shares[{group}] is {share!r}, but it must be a pair: (lowest, highest).") from None
        if not 0 <= least <= most <= 1:
            raise ValueError(f"shares[{group}] is ({low}, {high}), but it must be a range within [0, 1].")
        lowest[group], highest[group] = math.ceil(least * budget), math.floor(most * budget)
        if lowest[group] > highest[group]:
            raise ValueError(f"shares[{group}] is ({low}, {high}): of {budget} samples no whole number lies within it.")
    return lowest, highest
