"""The default way to select: by lot among what is safe, as diverse as what is trusted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selectsampler.optimizers import ExpectedWrong, chances, draw, safe_limit, top_k
from selectsampler.progress import progress_bar
from selectsampler.scores.table import TRUSTED

__all__ = ["Lottery"]

WARY = 0.1  # of `risk`, for damaged images: intactness is less sure than trust, and intact images are plenty
STEEPEST = 4.0  # the highest power of the distance by which chances grow
HALVINGS = 7  # on the way to a lower one
CLOSE = 5e-3  # a difference of mean distances, of which the mean of all is 1, that does not count


@dataclass(frozen=True)
class Terms:
    """By which a lot is drawn.

    Args:
        safe: (n,), bool: label and image are safe to draw.
        weights: (n,), float64: of the chances, or None, all are alike.
        distance: how far the drawn lie from their neighbours, in the mean and in expectation.
        power: of its own distance by which a sample's chance grows.
    """

    safe: Tensor
    weights: Tensor | None
    distance: float
    power: float


class Lottery:
    """Who can be drawn, as label and image are safe, and by which weights.

    Args:
        columns: of the scores `trust`, and of `intactness` and `trusted_diversity` those that there are: (n,) each.
        budget: how many are drawn.
        risk: how many more of the drawn labels may be wrong than of the safest, as a share and in expectation.
        groups, quotas: (n,), (G,), int64, or None: all are one group.
        progress: show a bar on a terminal if it takes longer than two seconds.

    Attributes:
        terms: by which the lot is drawn.
        utility: (n,), float64: 2 for what is safe to draw, then the probability that label and image are right.
    """

    def __init__(
        self,
        columns: Mapping[str, Tensor],
        budget: int,
        risk: float,
        *,
        groups: Tensor | None = None,
        quotas: Tensor | None = None,
        progress: bool = False,
    ) -> None:
        self.trust, self.budget, self.risk = columns["trust"].double(), budget, risk
        self.ranges: dict[str, Any] = {"groups": groups, "quotas": quotas}
        self.able = torch.ones(len(self.trust), dtype=torch.bool)  # the image is safe, and no repeat
        self.rest, self.distance = self.trust.clone(), torch.ones_like(self.trust)
        self.limits: dict[str, float] = {}
        if "intactness" in columns:
            self._leave_out_damaged(columns["intactness"].double())
        if "trusted_diversity" in columns:
            self._leave_out_repeats(columns["trusted_diversity"].double())
        worth = torch.where(self.able, self.trust, self.rest)
        self.lowest = safe_limit(worth, budget, risk, **self.ranges)  # below it others are worth more
        groups = torch.zeros(len(self.trust), dtype=torch.int64) if groups is None else groups
        quotas = torch.tensor([budget]) if quotas is None else quotas
        self.groups = groups[self.able]
        self.quotas = torch.minimum(quotas, torch.bincount(self.groups, minlength=len(quotas)))
        self.expected_wrong = ExpectedWrong(self.trust[self.able], self.groups, self.quotas)
        self.wanted = self._mean_distance_of_trusted()
        self.terms = self._evened_out(progress=progress)
        self.utility = self._utility(self.terms.safe)

    def _leave_out_damaged(self, intact: Tensor) -> None:
        half = float(intact.median())  # as `intactness` does not hold more than half of the images for damaged
        limit = min(half, safe_limit(intact, self.budget, WARY * self.risk, **self.ranges))
        self.limits["intact_limit"] = limit
        self.able &= intact >= limit
        self.rest *= intact

    def _leave_out_repeats(self, diversity: Tensor) -> None:
        """Near-duplicates are no safer than what is barely trusted, so that they come last of the trusted, in order."""
        repeated = diversity <= 0  # or not trusted
        beyond = (self.rest - TRUSTED).clamp(min=0) * repeated
        self.rest -= (1 - 1e-6) * beyond
        self.able &= ~repeated
        self.distance[~repeated] = (diversity / self.trust.clamp(min=1e-9))[~repeated]  # it is trust times distance

    def _evened_out(self, *, progress: bool) -> Terms:
        """With the chances of whom the drawn lie as far from their neighbours, in the mean, as all that is trusted.

        What is safe lies closer, as it is the typical that is surely right. So a sample's chance grows with a power of
        its distance, the lowest with which the means agree, or `STEEPEST`: 0 where all are trusted.
        """
        with progress_bar("select", HALVINGS + 2, unit="try", show=progress) as bar:
            even = self._with_power(0.0)
            bar.update()
            if even.distance >= self.wanted - CLOSE:
                return even
            steepest = self._with_power(STEEPEST)
            bar.update()
            if steepest.distance <= self.wanted + CLOSE:
                return steepest
            low, high = 0.0, STEEPEST
            for _ in range(HALVINGS):
                terms = self._with_power((low + high) / 2)
                bar.update()
                if abs(terms.distance - self.wanted) <= CLOSE:
                    break
                low, high = (terms.power, high) if terms.distance < self.wanted else (low, terms.power)
        return terms

    def _mean_distance_of_trusted(self) -> float:
        """Of each group by trust, and of the groups by how many of them are drawn."""
        trust, distance = self.trust[self.able], self.distance[self.able]
        sums = [torch.bincount(self.groups, values, len(self.quotas)) for values in (trust * distance, trust)]
        means = (sums[0] / sums[1]).nan_to_num()
        return float((self.quotas * means).sum() / self.quotas.sum().clamp(min=1))

    def _with_power(self, power: float) -> Terms:
        weights = None if power == 0 else (self.distance**power).clamp(min=1e-30)
        limit = self.expected_wrong.limit(self.risk, None if weights is None else weights[self.able])
        safe = self.able & (self.trust >= max(limit, self.lowest))
        chance = chances(self._utility(safe), self.budget, weights=weights, **self.ranges)[self.able]
        distance = float((chance * self.distance[self.able]).sum() / chance.sum().clamp(min=1e-9))
        return Terms(safe, weights, distance, power)

    def _utility(self, safe: Tensor) -> Tensor:
        return self.rest.masked_fill(safe, 2.0)

    def draw(self, seed: int) -> Tensor:
        """The rows that are drawn, (budget,), int64, ascending."""
        return draw(self.utility, self.budget, weights=self.terms.weights, **self.ranges, seed=seed)

    def details(self) -> dict[str, Any]:
        """What it comes to, as JSON values: limits, wrong labels in expectation, diversity."""
        safe = self.terms.safe
        safest = top_k(torch.where(safe, 1 + self.trust, self.rest), self.budget, **self.ranges)
        chance = chances(self.utility, self.budget, weights=self.terms.weights, **self.ranges)
        expected = float((chance * (1 - self.trust)).sum()) / self.budget
        limits = self.limits | {"safe_limit": float(self.trust[safe].min()) if safe.any() else 1.0}
        wrong = {"of_safest": float((1 - self.trust[safest]).mean()), "expected": expected}
        diversity = {"of_trusted": self.wanted, "drawn": self.terms.distance, "power": self.terms.power}
        counts = {"risk": self.risk, **limits, "safe": int(safe.sum())}
        return counts | {"wrong_labels": wrong, "diversity": diversity}
