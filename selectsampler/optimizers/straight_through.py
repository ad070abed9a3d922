"""The gradient optimizer of arXiv 2410.11215, as released, with what its authors do not report: curve, size and gap."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from selectsampler.optimizers.exact import top_k
from selectsampler.progress import progress_bar
from selectsampler.validation import check_vector

__all__ = ["StraightThrough", "straight_through"]


@dataclass(frozen=True, eq=False)
class StraightThrough:
    """What the straight-through optimizer ended in.

    Args:
        indices: (k,), int64, ascending: the k largest of its final variable, ties to the lower index.
        converged_size: how many samples it had switched on when it stopped; within its tolerance of k.
        gap: (optimum - value) / |optimum| of the sum of utilities over k samples; 0 where it found the optimum.
        loss_curve: the loss of every step.
        converged: whether the size came within the tolerance before `max_steps`.
    """

    indices: Tensor
    converged_size: int
    gap: float
    loss_curve: list[float]
    converged: bool


def straight_through(
    utility_terms: Tensor,
    k: int,
    *,
    learning_rate: float = 1e-3,
    momentum: float = 0.9,
    sharpness: float = 100.0,
    start: float = 0.01,
    size_weight: float = 2.0,
    tolerance: float = 1e-3,
    max_steps: int = 20_000,
    progress: bool = True,
) -> StraightThrough:
    """Choose k samples by gradient descent through a binarised sigmoid (selection optimization of arXiv 2410.11215).

    Every sample has a parameter w_i, `start` at first; x_i = sigmoid(sharpness w_i), b_i = [x_i > 1/2], gradients of b
    pass to x as they are (straight-through). SGD with momentum on

        loss = - sum_t mean_i(b_i u_ti) + size_weight |S - k| / N,    S = sum_i b_i,

    stops once size_weight |S - k| / N < tolerance. Since the terms are separable and every w starts equal, samples
    cross
    the threshold in the order of their utility: it is a top-k, found slowly. `top_k` is exact; this stays for
    faithfulness and to show the gap.

    Args:
        utility_terms: (T, N), floating point, finite: the weighted terms, SA / mean(SA) and 0.1 SD / mean(SD).
        k: from 1 to N.
        learning_rate, momentum, sharpness, start, size_weight, tolerance: as released.
        max_steps: where it gives up; the indices are those of the k largest w all the same.
        progress: show a bar on a terminal if it takes longer than two seconds.

    Raises:
        ValueError: if a term is not finite or k out of range.
    """
    for term, values in enumerate(utility_terms):
        check_vector(values, name=f"utility_terms[{term}]")
    utility = utility_terms.sum(dim=0).float()
    samples = len(utility)
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, but it must lie between 1 and the {samples} samples.")
    w = torch.full_like(utility, start)
    velocity = torch.zeros_like(w)
    loss_curve: list[float] = []
    with progress_bar("select", samples - k, unit="sample", show=progress) as bar:
        for _ in range(max_steps):
            x = torch.sigmoid(sharpness * w)
            selected = x > 0.5
            size = int(selected.sum())
            loss_curve.append(float(-utility[selected].sum() / samples + size_weight * abs(size - k) / samples))
            bar.update(max(0, samples - size - bar.n))
            if size_weight * abs(size - k) / samples < tolerance:
                break
            # the loss's gradient: b passes it to x unchanged, x = sigmoid(sharpness w)
            sign = (size > k) - (size < k)
            velocity.mul_(momentum).add_((size_weight * sign - utility) / samples * sharpness * x * (1 - x))
            w -= learning_rate * velocity
    converged = len(loss_curve) < max_steps
    if not converged:
        warnings.warn(
            f"The straight-through optimizer holds {size} samples after {max_steps} steps, not {k}: it stalls where "
            "many utilities exceed size_weight. The k largest of its variable are taken; top_k has no such limit.",
            stacklevel=2,
        )
    indices = top_k(w, k)
    optimum, value = float(utility.double()[top_k(utility, k)].sum()), float(utility.double()[indices].sum())
    gap = (optimum - value) / abs(optimum) if optimum else 0.0
    return StraightThrough(indices, size, gap, loss_curve, converged)
