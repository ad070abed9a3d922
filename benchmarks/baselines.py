"""What others select by, as pure functions: scores and labels in, indices out, by the definitions of their papers.

Features are CLIP's image features, where the papers use those of a network trained for the purpose. Hard samples are
those with the highest score; ties are broken at random.
"""

from collections.abc import Callable

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from torch import Tensor
from torch.nn.functional import one_hot

import selectsampler as ss
from selectsampler.optimizers import apportion, top_k
from selectsampler.reselect import SelectFn, TrainingState, soft_pruning

__all__ = [
    "TrainingDynamics",
    "confident_learning",
    "coverage_centric",
    "el2n",
    "hardest",
    "herding",
    "infobatch",
    "k_center_greedy",
    "moderate",
    "repeated_random",
    "zero_shot_probability",
]


ANNEALED = 0.125  # the last share of the visits, in which InfoBatch prunes nothing, as published


def hardest(scores: Tensor, count: int, *, seed: int) -> Tensor:
    """The `count` highest scores, ties at random."""
    order = torch.from_numpy(np.random.default_rng([seed, 2]).permutation(len(scores)))
    return order[scores[order].argsort(descending=True, stable=True)[:count]].sort().values


def el2n(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(N,): the length of a network's error, mean over networks trained a little (arXiv 2107.07075, equation 3).

    Args:
        probabilities: (R, N, C), of R networks.
        labels: (N,), int64, as given.
    """
    return (probabilities - one_hot(labels, probabilities.shape[2])).norm(dim=2).mean(dim=0)


class TrainingDynamics:
    """What a training does to each sample, as its batches pass: forgetting (arXiv 1812.05159) and AUM (2001.10528).

    Args:
        labels: (N,), int64, as given.

    Attributes:
        events: (N,): how often a sample was right when it was last seen and is wrong now.
        learned: (N,), bool: it was right once.
        margins: (N,): sum over visits of the label's logit less the largest other.
        visits: (N,): how often it was seen.
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.events, self.margins, self.visits = (torch.zeros(len(labels)) for _ in range(3))
        self.learned, self.right = (torch.zeros(len(labels), dtype=torch.bool) for _ in range(2))

    def update(self, indices: Tensor, logits: Tensor) -> None:
        """Note a batch: indices (B,), each once, and logits (B, C) before the update."""
        labels = self.labels[indices][:, None]
        own, others = logits.gather(1, labels)[:, 0], logits.scatter(1, labels, -torch.inf).amax(dim=1)
        right = own > others
        self.events[indices] += (self.right[indices] & ~right).float()
        self.right[indices] = right
        self.learned[indices] |= right
        self.margins[indices] += own - others
        self.visits[indices] += 1

    def forgetting(self) -> Tensor:
        """(N,): the number of forgetting events; infinite for what was never learned, as published."""
        return torch.where(self.learned, self.events, torch.inf)

    def area_under_margin(self) -> Tensor:
        """(N,): the mean margin; low for wrong labels and hard samples."""
        return self.margins / self.visits.clamp(min=1)


def herding(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """Of each class, one after another, the sample that brings the mean of those chosen nearest to the class's mean.

    Welling 2009, as in iCaRL (arXiv 1611.07725). Classes keep their shares.
    """

    def choose(rows: Tensor, quota: int) -> list[int]:
        own = features[rows].double()
        mean, total, squares, chosen = own.mean(dim=0), torch.zeros(own.shape[1]).double(), own.square().sum(dim=1), []
        for size in range(1, quota + 1):
            # |size * mean - total - x|^2, up to what is the same for all x
            chosen.append(int((squares - 2 * own @ (size * mean - total)).argmin()))
            total += own[chosen[-1]]
            squares[chosen[-1]] = torch.inf
        return chosen

    return _in_each_class(labels, count, choose)


def k_center_greedy(features: Tensor, labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Of each class, from a random start, always the sample that is farthest from those chosen (arXiv 1708.00489).

    In each class by itself, as DeepCore (arXiv 2204.08499) does. Classes keep their shares.
    """
    random = np.random.default_rng([seed, 3])

    def choose(rows: Tensor, quota: int) -> list[int]:
        own = features[rows].double()
        squares, chosen = own.square().sum(dim=1), [int(random.integers(len(rows)))]
        nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64)
        while len(chosen) < quota:
            nearest = nearest.minimum(squares + squares[chosen[-1]] - 2 * own @ own[chosen[-1]])
            nearest[chosen[-1]] = -torch.inf
            chosen.append(int(nearest.argmax()))
        return chosen

    return _in_each_class(labels, count, choose)


def _in_each_class(labels: Tensor, count: int, choose: Callable[[Tensor, int], list[int]]) -> Tensor:
    """What `choose` takes of each class's rows (n,), as many as its share of the count."""
    quotas = apportion(labels.bincount(), count).tolist()
    rows_of = labels.argsort(stable=True).split(labels.bincount().tolist())
    parts = [rows[choose(rows, quota)] for rows, quota in zip(rows_of, quotas, strict=True) if quota]
    return torch.cat(parts).sort().values


def moderate(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """The samples whose distance to their class's mean is nearest to the median distance (Moderate-DS, ICLR 2023)."""
    classes = int(labels.max()) + 1
    sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels, features)
    centres = sums / labels.bincount(minlength=classes).clamp(min=1)[:, None]
    distance = (features - centres[labels]).norm(dim=1)
    return top_k(-(distance - distance.quantile(0.5)).abs(), count)


def coverage_centric(
    difficulty: Tensor, count: int, *, hardest_share: float, strata: int = 50, seed: int = 0
) -> Tensor:
    """CCS (arXiv 2210.15809): without the hardest, equally many from each of 50 ranges of difficulty, if they last.

    Args:
        difficulty: (N,), as the negative area under the margin.
        count: at most what is left without the hardest.
        hardest_share: beta, in [0, 1): so many of all are dropped first.
        strata: ranges of equal length.
        seed: of the draws.
    """
    random = np.random.default_rng([seed, 4])
    left = difficulty.argsort(stable=True)[: len(difficulty) - round(hardest_share * len(difficulty))]
    values = difficulty[left].double()
    length = (values.max() - values.min()).clamp(min=1e-12) / strata
    stratum = ((values - values.min()) / length).long().clamp(max=strata - 1)
    parts = [part for part in left[stratum.argsort(stable=True)].split(stratum.bincount().tolist()) if len(part)]
    chosen: list[Tensor] = []
    for number, part in enumerate(sorted(parts, key=len)):  # the smallest first: what it lacks, the others give
        share = min(len(part), (count - sum(map(len, chosen))) // (len(parts) - number))
        chosen.append(part[torch.from_numpy(random.permutation(len(part))[:share])])
    return torch.cat(chosen).sort().values


def confident_learning(posterior: Tensor, labels: Tensor, count: int) -> Tensor:
    """What cleanlab keeps: first what it finds no issue with, and within that by its label quality score.

    Args:
        posterior: (N, C), of models that did not see the sample (arXiv 1911.00068).
        labels: (N,), int64, as given.
        count: so many, where confident learning itself would say how many.
    """
    given, probabilities = labels.numpy(), posterior.double().numpy()
    issues = find_label_issues(given, probabilities, n_jobs=1)
    quality = get_label_quality_scores(given, probabilities, method="self_confidence")
    return top_k(torch.from_numpy(quality - issues.astype(float)), count)  # quality lies in [0, 1]


def zero_shot_probability(embeddings: ss.Embeddings) -> Tensor:
    """(N,): how probable CLIP holds each label, without any training."""
    image, text = (torch.nn.functional.normalize(f.float(), dim=1) for f in (embeddings.image, embeddings.text))
    posterior = (image @ text.T / embeddings.temperature).softmax(dim=1)
    return posterior.gather(1, embeddings.labels[:, None])[:, 0]


def repeated_random(population: int, epoch_size: int, *, seed: int) -> ss.SelectSampler:
    """RS2 (arXiv 2305.18424): epochs of so many samples, all in turn, none again before all were seen."""
    return ss.SelectSampler(range(population), seed=seed, epoch_size=epoch_size)


def infobatch(population: int, *, annealing: Callable[[], bool], seed: int) -> SelectFn:
    """InfoBatch (arXiv 2303.04947): half of the easy are skipped and the others weigh more, but none while annealing.

    It goes by the last loss of each sample: `LossTracker(population, momentum=0.0)`.
    """
    prune, everything = soft_pruning(0.5, seed=seed), ss.Selection(range(population), population)

    def select(epoch: int, state: TrainingState) -> ss.Selection:
        return everything if epoch == 0 or annealing() else prune(epoch, state)

    return select
