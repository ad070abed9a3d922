"""The methods of select(): a problem in, what is chosen of it out, with objective, bound and how it came about."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selectsampler.balance import Quotas, Shares, class_quotas, share_ranges
from selectsampler.lottery import Lottery
from selectsampler.optimizers import group, prices, straight_through, top_k, top_k_in_ranges
from selectsampler.scores.table import TRUSTED, Scores
from selectsampler.validation import check_features

__all__ = ["Options", "Problem", "Solved", "within_quotas", "within_shares"]


@dataclass(frozen=True)
class Problem:
    """What an optimizer needs: scores and weights of the eligible rows (n,), None: all, and how many to choose."""

    table: Scores
    eligible: Tensor | None
    score_weights: Mapping[str, float] | None
    budget: int

    @cached_property
    def utility(self) -> Tensor:
        """(n,), float64, on the CPU."""
        if self.score_weights is None:
            return self.of_eligible(self.table["utility"].detach()).double()
        return self.of_eligible(self.table.utility(self.score_weights))

    @property
    def terms(self) -> Tensor:
        """(T, n), float64: the weighted terms whose sum is the utility."""
        if self.score_weights is None:
            return self.utility[None]
        each = [self.table.utility({name: weight}) for name, weight in self.score_weights.items()]
        return torch.stack([self.of_eligible(term) for term in each])

    @property
    def labels(self) -> Tensor | None:
        return None if self.table.labels is None else self.of_eligible(self.table.labels)

    def of_eligible(self, values: Tensor) -> Tensor:
        """The eligible ones of N values, on the CPU."""
        return values.cpu() if self.eligible is None else values.cpu()[self.eligible]

    def worth(self, chosen: Tensor) -> float:
        """The sum of utilities."""
        return sum(float(self.utility[rows].sum()) for rows in chosen.split(2**16))


@dataclass(frozen=True)
class Solved:
    """What an optimizer chose of the eligible rows, and how good that is."""

    chosen: Tensor
    objective: float
    bound: float
    details: dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How to choose: arguments of `select`."""

    method: str
    risk: float
    seed: int
    image_features: Tensor | None
    coverage_weight: float
    progress: bool


def within_quotas(problem: Problem, balance: str | Quotas | None, options: Options) -> Solved:
    """By any method, so many of each class as `balance` says."""
    quotas = class_quotas(problem.table, balance, problem.budget, problem.eligible)
    solved = _by_method(problem, quotas, options)
    counts = {} if quotas is None else {"quotas": quotas.tolist()}
    return replace(solved, details=counts | solved.details)


def _by_method(problem: Problem, quotas: Tensor | None, options: Options) -> Solved:
    labels = None if quotas is None else problem.labels
    if options.method == "draw":
        return _drawn(problem, labels, quotas, options)
    if options.method == "exact":
        return _exactly(problem, labels, quotas)
    if options.method == "straight_through":
        return _straight_through(problem, quotas, progress=options.progress)
    if options.method == "group":
        return _as_group(problem, quotas, options)
    known = "'auto', 'draw', 'exact', 'group' or 'straight_through'"
    raise ValueError(f"method is {options.method!r}, but it must be {known}.")


def _drawn(problem: Problem, groups: Tensor | None, quotas: Tensor | None, options: Options) -> Solved:
    lottery = _lottery(problem, options, groups=groups, quotas=quotas)
    chosen = lottery.draw(options.seed)
    return Solved(chosen, problem.worth(chosen), _exactly(problem, groups, quotas).objective, lottery.details())


def _lottery(problem: Problem, options: Options, **ranges: Tensor | None) -> Lottery:
    asked = ("trust", "intactness", "trusted_diversity")
    columns = {name: problem.of_eligible(values) for name, values in problem.table.columns.items() if name in asked}
    return Lottery(columns, problem.budget, options.risk, **ranges, progress=options.progress)


def _exactly(problem: Problem, groups: Tensor | None, quotas: Tensor | None) -> Solved:
    chosen = top_k(problem.utility, problem.budget, groups=groups, quotas=quotas)
    objective = problem.worth(chosen)
    return Solved(chosen, objective, objective, {})


def _straight_through(problem: Problem, quotas: Tensor | None, *, progress: bool) -> Solved:
    if quotas is not None:
        raise ValueError("method='straight_through' knows no quotas: use method='exact', or balance=None.")
    result = straight_through(problem.terms, problem.budget, progress=progress)
    curve = result.loss_curve[:: max(1, len(result.loss_curve) // 100)]
    details = {"gap": result.gap, "converged_size": result.converged_size, "steps": len(result.loss_curve)}
    objective = problem.worth(result.indices)
    return Solved(
        result.indices,
        objective,
        _exactly(problem, None, None).objective,
        details | {"converged": result.converged, "loss_curve": curve},
    )


def _as_group(problem: Problem, quotas: Tensor | None, options: Options) -> Solved:
    table = problem.table
    image_features = table.image_features if options.image_features is None else options.image_features
    if image_features is None:
        raise ValueError(
            "method='group' covers the space of the images, which neither saved scores nor a tensor hold: pass "
            "image_features=embeddings.image, or method='exact' to do without coverage."
        )
    check_features(image_features, name="image_features", rows=len(table))
    trust = problem.of_eligible(table["trust"]) if "trust" in table.columns else None
    result = group(
        problem.utility,
        image_features if problem.eligible is None else image_features[problem.eligible.to(image_features.device)],
        problem.budget,
        labels=problem.labels,
        weights=None if trust is None else trust * (trust >= TRUSTED),
        coverage_weight=options.coverage_weight,
        groups=None if quotas is None else problem.labels,
        quotas=quotas,
        progress=options.progress,
    )
    return Solved(result.indices, result.objective, result.bound, {"coverage_weight": options.coverage_weight})


def within_shares(
    problem: Problem,
    balance: str | Quotas | None,
    groups: Tensor | None,
    shares: Shares | None,
    options: Options,
) -> Solved:
    """The optimum within the ranges; or a draw, of as many of each group as a draw within the ranges comes to."""
    if groups is None or shares is None:
        raise ValueError("groups and shares go together: which group a sample is of, and which share a group may have.")
    if balance is not None or options.method not in ("draw", "exact"):
        raise ValueError("shares replace balance, and go with method='draw' and method='exact' only.")
    lowest, highest = share_ranges(groups, shares, problem.budget, len(problem.table))
    groups = problem.of_eligible(groups)
    ranges = {"groups": groups, "lowest": lowest, "highest": highest}
    chosen = top_k_in_ranges(problem.utility, problem.budget, **ranges)
    price = prices(problem.utility, problem.budget, **ranges, of=[int(group) for group in shares])
    details: dict[str, Any] = {"shares": {str(group): [str(low), str(high)] for group, (low, high) in shares.items()}}
    details["prices"] = {str(g): float(price[g]) for g in shares}
    best = problem.worth(chosen)
    details["price_of_all"] = _exactly(problem, None, None).objective - best
    if options.method == "exact":
        return Solved(chosen, best, best, details)
    utility = _lottery(problem, options).utility
    order = torch.randperm(len(utility), generator=torch.Generator().manual_seed(options.seed))
    within = top_k_in_ranges(utility[order], problem.budget, **ranges | {"groups": groups[order]})
    counts = torch.bincount(groups[order][within], minlength=len(lowest))
    solved = _drawn(problem, groups, counts, options)
    untrusted = int((problem.of_eligible(problem.table["trust"])[solved.chosen] < TRUSTED).sum())
    if untrusted:
        warnings.warn(
            f"Within these shares {untrusted} of {problem.budget} selected samples are more likely wrong than right. "
            "Keep less, or widen the shares.",
            stacklevel=3,
        )
    return Solved(solved.chosen, solved.objective, best, details | solved.details)
