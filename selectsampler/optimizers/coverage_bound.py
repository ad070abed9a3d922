"""An upper bound on the utility and coverage of any subset of a size and quotas, by Lagrangian relaxation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selectsampler.optimizers.coverage import UNCOVERED, ClassCoverage
from selectsampler.optimizers.exact import top_k

__all__ = ["ENTRIES", "Survey", "coverage_bound", "survey"]

ROUNDS = 100
MOMENTUM = 0.7
PATIENCE = 5  # rounds without a better bound, after which steps become shorter
SHORTER = 1.5
ENTRIES = 2 * 2**20  # distances to near candidates, over all classes: 40 MiB with the numbers of both ends
FEWEST = 16  # near candidates of a sample
PER_KEPT = 8  # and as many times the candidates that share one kept sample: radii rarely grow beyond


@dataclass(frozen=True)
class Survey:
    """One class as its samples to be covered see it; on the CPU.

    Args:
        weights: (n,), float64: w_j, what it is worth to cover each.
        nearest: (n,), float64: distance to the nearest kept sample.
        covering: (m,), int64: the samples that may cover them.
        added: (m,), float64: sum_j w_j max(0, nearest_j - d_ij), what each of these would add.
        near: (n, r), float32: distances to the r nearest of `covering`.
        columns: (n, r), int32: which samples they are.
    """

    weights: Tensor
    nearest: Tensor
    covering: Tensor
    added: Tensor
    near: Tensor
    columns: Tensor

    @property
    def reach(self) -> Tensor:
        """(n,), float64: up to this radius all candidates are in `near`."""
        if self.near.shape[1] == len(self.covering):
            return torch.full_like(self.nearest, UNCOVERED)
        return self.near[:, -1].double()


def survey(coverage: ClassCoverage, covering: Tensor, kept: Tensor, *, most: int) -> Survey:
    """Look at a class once more, given which of `covering` are kept, (m,) bool; at most so many near ones a sample."""
    width = math.ceil(PER_KEPT * len(covering) / max(1, int(kept.sum())))
    width = min(max(FEWEST, min(width, most)), len(covering))
    added = torch.zeros(len(covering), dtype=torch.float64, device=kept.device)
    parts = []
    for rows, distances in coverage.tiles():
        nearest = torch.full((len(rows),), UNCOVERED, device=kept.device)
        if kept.any():
            nearest = distances[:, kept].amin(dim=1)
        added += coverage.fall(rows, nearest, distances)
        near = distances.topk(width, dim=1, largest=False)  # sorted
        parts.append((nearest.double().cpu(), near.values.cpu(), covering[near.indices].int().cpu()))
    nearest, values, columns = (torch.cat(some) for some in zip(*parts, strict=True))
    return Survey(coverage.weights.cpu(), nearest, covering.cpu(), added.cpu(), values, columns)


def coverage_bound(utility: Tensor, surveys: list[Survey], objective: float, groups: Tensor, quotas: Tensor) -> float:
    """No subset of the quotas has a higher sum_{i in S} u_i + sum_j w_j (2 - distance of j to S) than this.

    Give every j a radius r_j. As d(j, S) >= r_j - sum_{i in S} max(0, r_j - d_ij), every S with the quotas has

        F(S) <= sum_j w_j (2 - r_j) + sum_{i in S} v_i,    v_i = u_i + sum_j w_j max(0, r_j - d_ij),

    and so at most the sum with the largest v_i that the quotas allow: for any radii, any size and any sign of u. With
    the distances to a greedy solution as radii it is the online bound of Minoux (1978) and Leskovec et al. (2007); the
    least over all radii is the bound of the linear relaxation of the problem (the k-median's Lagrangian dual:
    Cornuejols, Fisher and Nemhauser, 1977). From the former, subgradient steps of Polyak's length go towards the
    latter: the radius of j grows where none of the largest v lies within it, and shrinks where several do.

    Args:
        utility: (N,), float64.
        surveys: of every class that has candidates, given a subset.
        objective: F of that subset, to which the steps aim.
        groups, quotas: (N,), (G,), int64.

    Returns:
        The least bound found, not below `objective`. Radii stay within the reach of the surveyed near candidates, so
        that the sums over these are the sums over all.
    """
    dense = utility.clone()
    for each in surveys:
        dense[each.covering] += each.added
    constant = sum(float(each.weights @ (UNCOVERED - each.nearest)) for each in surveys)
    best = constant + float(dense[top_k(dense, int(quotas.sum()), groups=groups, quotas=quotas)].sum())
    if surveys:
        best = min(best, _least_bound(surveys, utility, objective, groups, quotas))
    return max(best, objective)  # below it is rounding


def _least_bound(surveys: list[Survey], utility: Tensor, objective: float, groups: Tensor, quotas: Tensor) -> float:
    """The least bound of some rounds of subgradient steps, on all (sample to be covered, near candidate) pairs."""
    weights = torch.cat([each.weights for each in surveys])
    reach = torch.cat([each.reach for each in surveys])
    radii = torch.minimum(torch.cat([each.nearest for each in surveys]), reach)
    near = torch.cat([each.near.flatten() for each in surveys])
    columns = torch.cat([each.columns.flatten() for each in surveys])
    counts = torch.cat([torch.full((len(each.near),), each.near.shape[1]) for each in surveys])
    rows = torch.arange(len(radii), dtype=torch.int32).repeat_interleave(counts)
    k, best, length, since = int(quotas.sum()), math.inf, 1.0, 0
    momentum = torch.zeros_like(radii)
    for _ in range(ROUNDS):
        slack = radii[rows].sub_(near).clamp_(min=0)
        within = slack > 0
        value = utility.index_add(0, columns, slack.mul_(weights[rows]))
        largest = top_k(value, k, groups=groups, quotas=quotas)
        bound = float(weights @ (UNCOVERED - radii)) + float(value[largest].sum())
        since = 0 if bound < best else since + 1
        best = min(best, bound)
        if since == PATIENCE:
            length, since = length / SHORTER, 0
        taken = torch.zeros(len(utility), dtype=torch.bool)
        taken[largest] = True
        covers = (taken[columns] & within).double()
        momentum = MOMENTUM * momentum + 1 - torch.zeros_like(radii).index_add_(0, rows, covers)
        norm = float(weights @ momentum.square())
        if best <= objective or norm == 0:  # the subset is the best there is, or the radii are
            break
        radii = (radii + length * (bound - objective) / norm * momentum).clamp_(min=0).minimum(reach)
    return best
