"""NormSim_2-D: keep what lies along the main directions of the pool itself, dropping a little at a time."""

import numpy as np
import torch
from torch import Tensor

from selectsampler.scores.s_clip_loss import inverse_lengths
from selectsampler.validation import check_features

__all__ = ["double_units", "norm_sim_dynamic", "squared_norm_sim_2"]

BLOCK = 2048  # rows at once: 16 MiB in float64 at D = 1,024


def norm_sim_dynamic(image_features: Tensor, k: int, *, rounds: int = 500, seed: int = 0) -> Tensor:
    """The k survivors of NormSim_2 against the pool itself, in a pool that shrinks in equal steps.

    >>> norm_sim_dynamic(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [1.0, 0.1]]), k=3, rounds=1)
    tensor([0, 1, 3])

    NormSim_2-D of arXiv 2405.19547: the target is the surviving pool; each round drops the samples of the lowest
    NormSim_2(x) = sqrt(x' M x), M = sum of x x' over the survivors, and M is taken again. After round r of R there are
    N - floor((N - k) r / R) samples left.

    M loses what was dropped, or is taken anew where fewer stay than go. Where fewer samples go than half the
    dimensions, the scores themselves lose (x.d)^2 for every d dropped: at most about half the time of scores anew.

    Args:
        image_features: (N, D), floating point, of any length but zero; computed in float64, as each round decides on
            all that follow.
        k: how many survive, from 1 to N.
        rounds: R, at least 1; more rounds follow the shrinking pool more closely.
        seed: of the order in which samples of exactly equal score are dropped.

    Returns:
        (k,), int64, ascending, on the CPU. Extra memory: a few numbers a sample, D x D, and 64 MiB.

    Raises:
        ValueError: if shapes do not fit, a feature is zero, or k or rounds is out of its range.
    """
    check_features(image_features, name="image_features")
    samples = len(image_features)
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, but it must be from 1 to the {samples} samples.")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, but at least one is needed.")
    inverse_lengths(image_features, name="image_features")  # names a feature that is zero before any work is done
    # in a seeded order, a stable sort breaks ties at random, and the same way each time
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(samples)
    alive = torch.from_numpy(order).to(image_features.device)
    moment = _moment(image_features, alive)
    scores = _scores(image_features, alive, moment)
    for round_ in range(1, rounds + 1):
        stay = samples - (samples - k) * round_ // rounds
        if stay == len(alive):
            continue
        by_score = scores.argsort(stable=True)
        dropped, kept = alive[by_score[: len(alive) - stay]], by_score[len(alive) - stay :].sort().values
        alive, scores = alive[kept], scores[kept]
        if stay == k:
            break
        if len(dropped) > stay:
            moment = _moment(image_features, alive)
        else:
            moment -= _moment(image_features, dropped)
        if 2 * len(dropped) < image_features.shape[1]:
            scores -= _shares(image_features, alive, dropped)
        else:
            scores = _scores(image_features, alive, moment)
    return alive.sort().values.cpu()


def double_units(features: Tensor) -> Tensor:
    """(n, D), float64: features of unit length, none of which may be zero."""
    units = features.double()
    return units / units.norm(dim=1, keepdim=True)


def squared_norm_sim_2(units: Tensor, moment: Tensor) -> Tensor:
    """(n,), float64: x' M x of unit features, the square of NormSim_2."""
    return (units @ moment).mul_(units).sum(dim=1)


def _moment(features: Tensor, rows: Tensor) -> Tensor:
    """(D, D), float64: the sum of x x' over these rows."""
    moment = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for some in rows.split(BLOCK):
        units = double_units(features[some])
        moment += units.T @ units
    return moment


def _scores(features: Tensor, rows: Tensor, moment: Tensor) -> Tensor:
    """(n,), float64: the squares of NormSim_2 of these rows."""
    return torch.cat([squared_norm_sim_2(double_units(features[some]), moment) for some in rows.split(BLOCK)])


def _shares(features: Tensor, rows: Tensor, dropped: Tensor) -> Tensor:
    """(n,), float64: sum of (x.d)^2 over the dropped samples d, what they had given to the scores of these rows."""
    gone = double_units(features[dropped]).T
    return torch.cat([(double_units(features[some]) @ gone).square_().sum(dim=1) for some in rows.split(BLOCK)])
