"""The methods of select(): a problem in, what is chosen of it out, with objective, bound and how it came about."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selectsampler.balance import Quotas, Shares, class_quotas, share_ranges
from selectsampler.optimizers import draw, group, prices, safe_limit, straight_through, top_k, top_k_in_ranges
from selectsampler.progress import progress_bar
from selectsampler.scores.table import TRUSTED, Scores
from selectsampler.validation import check_features

__all__ = ["Options", "Problem", "Solved", "within_quotas", "within_shares"]

STEEPEST, TRIES = 4.0, 8  # the highest power of the distance by which chances grow, and how often others are tried
ENOUGH = 5e-3  # difference of mean distances, of which the mean of all is 1, that does not count
WARY = 0.1  # of `risk`, for damaged images: intactness is less sure than trust, and intact images are plenty


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
    if balance == "auto" and options.method == "straight_through":
        balance = None  # it knows no quotas
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
    trust = problem.of_eligible(problem.table.columns["trust"]).double()
    ranges = {"groups": groups, "quotas": quotas}
    drawn = _evened(problem, trust, options, ranges)
    safest = top_k(trust, problem.budget, **ranges)
    wrong = {name: float((1 - trust[rows]).mean()) for name, rows in (("of_safest", safest), ("expected", drawn.rows))}
    details = {"risk": options.risk, **drawn.limits, "wrong_labels": wrong, "diversity": drawn.diversity}
    return Solved(drawn.rows, problem.worth(drawn.rows), _exactly(problem, groups, quotas).objective, details)


@dataclass(frozen=True)
class _Draw:
    """What was drawn, from what, how far it lies from its neighbours, and which power of that chances grew with."""

    rows: Tensor
    limits: dict[str, Any]
    diversity: dict[str, float]

    @property
    def power(self) -> float:
        return self.diversity["power"]

    @property
    def missing(self) -> float:
        return self.diversity["of_trusted"] - self.diversity["drawn"]


def _evened(problem: Problem, trust: Tensor, options: Options, ranges: Mapping[str, Tensor | None]) -> _Draw:
    """A draw whose samples lie as far from their neighbours, in the mean, as all that is trusted does.

    What is safe lies closer, as it is the typical that is surely right. So a sample's chance grows with a power of its
    distance, the least (up to `STEEPEST`) with which the means agree: 0 where all labels are right.
    """

    def by(power: float) -> _Draw:
        lots = {**ranges, "weights": None if power == 0 else distance**power}
        worth, limits = _worth(problem, trust, options.risk, lots)
        rows = draw(worth, problem.budget, **lots, seed=options.seed)
        found = distance[rows][apart[rows]].mean().nan_to_num()
        return _Draw(rows, limits, {"of_trusted": float(wanted), "drawn": float(found), "power": power})

    diversity = problem.of_eligible(problem.table.columns.get("trusted_diversity", torch.zeros_like(trust))).double()
    apart = diversity > 0
    distance = torch.where(apart, diversity / trust.clamp(min=1e-9), 1.0)  # trusted diversity is trust times distance
    wanted = (diversity.sum() / trust[apart].sum()).nan_to_num()
    with progress_bar("select", TRIES + 2, unit="draw", show=options.progress) as bar:
        low = by(0.0)
        bar.update()
        if low.missing <= ENOUGH:
            return low
        high = by(STEEPEST)
        bar.update()
        for _ in range(TRIES):
            if high.missing >= -ENOUGH:
                break
            share = high.missing / (high.missing - low.missing)  # regula falsi: where the straight line crosses zero
            tried = by(high.power + share * (low.power - high.power))
            low, high = (tried, high) if tried.missing > ENOUGH else (low, tried)
            bar.update()
    return high


def _worth(problem: Problem, trust: Tensor, risk: float, lots: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """(n,), float64: 1 for all that is safe to draw, then the probability that label and image are right; and how.

    Near-duplicates are no safer than what is barely trusted, so that they come last of the trusted.
    """
    columns, limit = problem.table.columns, safe_limit(trust, problem.budget, risk, **lots)
    worth, safe, limits = trust.clone(), trust >= limit, {"safe_limit": limit}
    if "intactness" in columns:
        intact = problem.of_eligible(columns["intactness"])
        half = float(intact.median())  # as `intactness` does not hold more than half of the images for damaged
        limits["intact_limit"] = min(half, safe_limit(intact, problem.budget, WARY * risk, **lots))
        safe &= intact.double() >= limits["intact_limit"]
        worth *= intact
    if "trusted_diversity" in columns:
        repeated = problem.of_eligible(columns["trusted_diversity"]) == 0
        worth[repeated] = worth[repeated].clamp(max=TRUSTED)
        safe &= ~repeated
    worth[safe] = 1.0
    return worth, limits | {"safe": int(safe.sum())}


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
            "method='group' covers the space of the images, which saved scores do not hold: pass "
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
    if balance not in ("auto", None) or options.method not in ("draw", "exact"):
        raise ValueError("shares replace balance, and go with method='draw' and method='exact' only.")
    lowest, highest = share_ranges(groups, shares, problem.budget, len(problem.table))
    groups = problem.of_eligible(groups)
    ranges = {"groups": groups, "lowest": lowest, "highest": highest}
    chosen = top_k_in_ranges(problem.utility, problem.budget, **ranges)
    price = prices(problem.utility, problem.budget, **ranges)
    details: dict[str, Any] = {"shares": {str(group): [str(low), str(high)] for group, (low, high) in shares.items()}}
    details["prices"] = {str(g): float(price[g]) for g in shares}
    best = problem.worth(chosen)
    if options.method == "exact":
        return Solved(chosen, best, best, details)
    worth, _ = _worth(problem, problem.of_eligible(problem.table["trust"]).double(), options.risk, {})
    order = torch.randperm(len(worth), generator=torch.Generator().manual_seed(options.seed))
    counts = torch.bincount(
        groups[order][top_k_in_ranges(worth[order], problem.budget, **ranges | {"groups": groups[order]})],
        minlength=len(lowest),
    )
    solved = _drawn(problem, groups, counts, options)
    return Solved(solved.chosen, solved.objective, best, details | solved.details)
