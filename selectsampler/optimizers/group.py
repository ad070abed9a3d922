"""Group selection: the samples that are worth most together, by utility and coverage, with a certificate."""

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm import tqdm

from selectsampler.optimizers.coverage import UNCOVERED, WORKSPACE, ClassCoverage
from selectsampler.optimizers.coverage_bound import ENTRIES, coverage_bound, survey
from selectsampler.optimizers.exact import top_k
from selectsampler.progress import progress_bar
from selectsampler.scores.s_clip_loss import inverse_lengths
from selectsampler.validation import check_features, check_labels, check_vector

__all__ = ["GroupSelection", "group"]


@dataclass(frozen=True, eq=False)
class GroupSelection:
    """What group selection chose, and how far from the best it can be.

    Args:
        indices: (k,), int64, ascending.
        objective: F of these samples.
        bound: no subset of the size and quotas has a higher F than this.
        order: (k,), int64: the same samples in the order in which they were taken; without quotas the first k' of them
            are the selection of size k'.
        gains: (k,), float64: what each added to F, in that order.
    """

    indices: Tensor
    objective: float
    bound: float
    order: Tensor
    gains: Tensor


def group(
    utility: Tensor,
    image_features: Tensor,
    k: int,
    *,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    coverage_weight: float = 1.0,
    groups: Tensor | None = None,
    quotas: Tensor | None = None,
    progress: bool = True,
) -> GroupSelection:
    """Choose k samples that are worth much themselves and together leave no part of their classes far from them.

    >>> angles = torch.tensor([0.0, 0.1, 0.2, 1.5, 1.6])
    >>> points = torch.stack([angles.cos(), angles.sin()], dim=1)
    >>> chosen = group(torch.zeros(5), points, 2)
    >>> chosen.indices, chosen.order
    (tensor([2, 3]), tensor([2, 3]))
    >>> group(torch.tensor([0.0, 0.9, 1.0, 0.1, 0.0]), points, 2, coverage_weight=0.0).indices  # utility alone
    tensor([1, 2])

    Maximises, over the subsets S of exactly k samples (and `quotas[g]` of each group g), utility and facility location:

        F(S) = sum_{i in S} u_i + coverage_weight sum_j w_j max_{i in S, y_i = y_j, w_i > 0} (1 - |f_i - f_j| / 2)

    with features f of length one, so that a similarity lies in [0, 1], and is 0 where a class keeps none. Where each
    class keeps one, coverage is a constant minus half the summed distance of each sample to the nearest kept one of its
    class. Untrusted samples (w = 0) need not be covered, and cover none.

    Greedy: always the sample that adds most, gains kept exact; without quotas and for u >= 0, F(S) is at least 1 - 1/e
    of the optimum (Nemhauser, Wolsey and Fisher, 1978), with quotas half of it, and in practice far more: `bound` is
    the optimum's upper bound from the Lagrangian relaxation (`coverage_bound`).

    Classes do not interact, so that the work is quadratic in the size of a class only: 50,000 samples of ten classes
    and 512 dimensions take half a minute on one core. Where the distances of one class exceed 192 MiB (7,000 samples),
    or those of all classes that quotas tie together (each with several groups, and some in common), they are
    computed where they are needed, which is some times slower.

    Args:
        utility: (N,), floating point, finite, higher is better; negative ones are allowed.
        image_features: (N, D), floating point, of any length but zero, on the device on which the work is done.
        k: from 0 to N.
        labels: (N,), int64, from 0: classes, whose samples cover one another. None: `groups`, or all are one class.
        weights: (N,), in [0, 1]: how much a sample counts as one to be covered, its trust. None: 1 each.
        coverage_weight: what coverage is worth against utility, at least 0: a sample of weight 1 that is kept, in a
            class that kept none before, adds this much for itself.
        groups: (N,), int64, from 0; with `quotas`. None: `labels`. They may cut across classes.
        quotas: (G,), int64, summing to k, none above its group's size.
        progress: show a bar on a terminal if it takes longer than two seconds.

    Returns:
        A `GroupSelection`. The same input gives the same result; gains that differ by less than 1e-12 of the largest
        possible are ties, and go to the lower index. Extra memory: 256 MiB, the features of a class (of classes tied
        together) in float64, and some 400 bytes a sample.

    Raises:
        ValueError: if shapes, k, groups or quotas do not fit, a weight lies outside [0, 1] or a feature is zero.
    """
    samples = len(utility)
    if quotas is not None and groups is None:
        groups = labels
    top_k(utility, k, groups=groups, quotas=quotas)  # says what does not fit
    if labels is None:
        labels = torch.zeros(samples, dtype=torch.int64) if groups is None else groups
    if weights is None:
        weights = torch.ones(samples)
    _check(image_features, labels, weights, coverage_weight, samples)
    if groups is None or quotas is None:
        groups, quotas = torch.zeros(samples, dtype=torch.int64), torch.tensor([k])
    device = image_features.device
    scaled = weights.to(device).double() * (coverage_weight / UNCOVERED)
    problem = _Problem(image_features, utility.to(device).double(), scaled, groups.to(device), quotas.to(device))
    classes = _classes(problem, labels.to(device))
    parts = list(_parts(problem, classes))
    total = sum(len(each.covered) for each in classes) + sum(_steps(problem, part) for part in parts)
    with progress_bar("group", total, unit="sample", show=progress) as bar:
        order, gains = _merge([list(_greedy(problem, part, bar)) for part in parts], problem)
        indices = order.sort().values
        objective, bound = _certificate(problem, classes, indices, bar)
    home = utility.device
    return GroupSelection(indices.to(home), objective, bound, order.to(home), gains.to(home))


@dataclass(frozen=True)
class _Problem:
    """Maximise sum_{i in S} u_i + sum_j w_j (UNCOVERED - distance of j to S), quotas[g] of each group g."""

    features: Tensor
    utility: Tensor
    weights: Tensor
    groups: Tensor
    quotas: Tensor

    @cached_property
    def tick(self) -> float:
        """Gains are compared in whole multiples of this: above their rounding, far below what matters."""
        largest = float(self.utility.abs().max()) + UNCOVERED * float(self.weights.sum())
        return math.ldexp(1.0, math.frexp(largest)[1] - 40)


@dataclass(frozen=True)
class _Class:
    """The samples of one class, (n,), int64, ascending: what may be kept, what is to be covered, what both."""

    candidates: Tensor
    covered: Tensor
    covering: Tensor

    def coverage(self, problem: _Problem, *, hold: bool) -> ClassCoverage:
        weights = problem.weights[self.covered]
        return ClassCoverage(problem.features, self.covered, self.covering, weights, hold=hold)


class _Gains:
    """What each candidate of a class would add, given those taken so far; -inf where it is taken or its group full."""

    def __init__(self, problem: _Problem, members: _Class, *, hold: bool) -> None:
        self.samples = members.candidates
        self.groups = problem.groups[self.samples]
        self._coverage = members.coverage(problem, hold=hold)
        self._covering = torch.searchsorted(self.samples, members.covering)
        self._column = torch.full_like(self.samples, -1)
        self._column[self._covering] = torch.arange(len(self._covering), device=self.samples.device)
        self._tick = problem.tick
        self.values = problem.utility[self.samples]
        self.values[self._covering] += self._coverage.gains()

    def best(self) -> tuple[float, int, int]:
        """(-ticks, sample, position) of the best: of several classes, the least is the best of all."""
        ticks, position = (self.values / self._tick).round_().max(dim=0)  # of equals the first
        return -float(ticks), int(self.samples[position]), int(position)

    def take(self, position: int) -> float:
        """Take the candidate there; returns what it added."""
        gain = float(self.values[position])
        column = int(self._column[position])
        if column >= 0:
            self.values[self._covering] -= self._coverage.keep(column)
        self.values[position] = -math.inf
        return gain

    def close(self, group: int) -> None:
        self.values[self.groups == group] = -math.inf


Taken = tuple[float, int, float]  # -ticks, sample, gain


def _classes(problem: _Problem, labels: Tensor) -> list[_Class]:
    """Those classes that have candidates: samples of a group whose quota is not zero."""
    wanted, trusted = problem.quotas[problem.groups] > 0, problem.weights > 0
    order = labels.argsort(stable=True)
    classes = []
    for rows in order.split(labels.bincount().tolist()):
        if wanted[rows].any():
            classes.append(_Class(rows[wanted[rows]], rows[trusted[rows]], rows[wanted[rows] & trusted[rows]]))
    return classes


def _parts(problem: _Problem, classes: list[_Class]) -> Iterator[list[_Class]]:
    """The classes, one by one where what one takes changes no other's order: where each lies in a single group.

    Others stay together with the classes that they share groups with: a group that is full for one is full for all.
    """
    groups_of = [problem.groups[each.candidates].unique().tolist() for each in classes]
    parent = list(range(len(problem.quotas)))  # of each group: another that shares a class with it, or itself

    def root(group: int) -> int:
        while parent[group] != group:
            parent[group] = group = parent[parent[group]]
        return group

    for groups in groups_of:
        for group in groups[1:]:
            parent[root(group)] = root(groups[0])
    joined = Counter(root(group) for group in set().union(*groups_of))
    together: dict[int, list[_Class]] = {}
    for each, groups in zip(classes, groups_of, strict=True):
        if joined[root(groups[0])] == 1:
            yield [each]
        else:
            together.setdefault(root(groups[0]), []).append(each)
    yield from together.values()


def _steps(problem: _Problem, part: list[_Class]) -> int:
    """How many samples greedy takes from these classes."""
    candidates = torch.cat([each.candidates for each in part])
    return min(len(candidates), int(problem.quotas[problem.groups[candidates].unique()].sum()))


def _greedy(problem: _Problem, part: list[_Class], bar: tqdm) -> Iterator[Taken]:
    """The samples of these classes in the order in which they add most, until all their groups are full."""
    hold = sum(len(each.covered) * len(each.covering) for each in part) <= WORKSPACE
    gains = [_Gains(problem, each, hold=hold) for each in part]
    room = problem.quotas.tolist()
    heads = [each.best() for each in gains]
    for _ in range(_steps(problem, part)):
        which = min(range(len(heads)), key=heads.__getitem__)
        ticks, sample, position = heads[which]
        group = int(gains[which].groups[position])
        yield ticks, sample, gains[which].take(position)
        bar.update()
        room[group] -= 1
        changed = [which] if room[group] else range(len(gains))
        for number in changed:
            if not room[group]:
                gains[number].close(group)
            heads[number] = gains[number].best()


def _merge(sequences: list[list[Taken]], problem: _Problem) -> tuple[Tensor, Tensor]:
    """The greedy order over all classes, and what each sample adds.

    Classes do not interact, so that it takes the best of the sequences' heads until its group is full; then nothing
    that is left of that sequence can be taken.
    """
    room, groups = problem.quotas.tolist(), problem.groups.tolist()
    order, gains = [], []
    heads = [(sequence[0], number, 0) for number, sequence in enumerate(sequences) if sequence]
    heapq.heapify(heads)
    while heads:
        (_, sample, gain), number, place = heapq.heappop(heads)
        if not room[groups[sample]]:
            continue
        room[groups[sample]] -= 1
        order.append(sample)
        gains.append(gain)
        if place + 1 < len(sequences[number]):
            heapq.heappush(heads, (sequences[number][place + 1], number, place + 1))
    device = problem.features.device
    return torch.tensor(order, dtype=torch.int64, device=device), torch.tensor(
        gains, dtype=torch.float64, device=device
    )


def _certificate(problem: _Problem, classes: list[_Class], indices: Tensor, bar: tqdm) -> tuple[float, float]:
    """F of these samples, and its upper bound over all subsets of the size and quotas."""
    kept = torch.zeros(len(problem.utility), dtype=torch.bool, device=indices.device)
    kept[indices] = True
    most = ENTRIES // max(1, sum(len(each.covered) for each in classes))
    surveys = []
    for each in classes:
        surveys.append(survey(each.coverage(problem, hold=False), each.covering, kept[each.covering], most=most))
        bar.update(len(each.covered))
    coverage = sum(float(each.weights @ (UNCOVERED - each.nearest)) for each in surveys)
    objective = float(problem.utility[indices].sum()) + coverage
    groups, quotas = problem.groups.cpu(), problem.quotas.cpu()
    return objective, coverage_bound(problem.utility.cpu(), surveys, objective, groups, quotas)


def _check(image_features: Tensor, labels: Tensor, weights: Tensor, coverage_weight: float, samples: int) -> None:
    check_features(image_features, name="image_features", rows=samples)
    inverse_lengths(image_features, name="image_features")  # names a feature that is zero
    check_labels(labels, samples=samples)
    check_vector(weights, name="weights", samples=samples)
    outside = (weights < 0) | (weights > 1)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(f"weights[{row}] is {float(weights[row])}, but a weight must lie in [0, 1].")
    if not 0 <= coverage_weight < math.inf:
        raise ValueError(f"coverage_weight is {coverage_weight}, but it must be finite and not negative.")
