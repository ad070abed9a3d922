"""Label noise as pure functions of (labels, rate, seed)."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["symmetric"]


def symmetric(labels: Tensor, rate: float, *, classes: int, seed: int) -> Tensor:
    """Exactly round(rate * N) labels changed, each to another class, all others equally likely.

    >>> truth = torch.arange(10).repeat(100)
    >>> int((symmetric(truth, 0.4, classes=10, seed=0) != truth).sum())
    400

    Args:
        labels: (N,), int64, in [0, classes).
        rate: in [0, 1].
        classes: at least 2.
        seed: of the rows and of their new labels.

    Raises:
        ValueError: if the rate or the number of classes is out of range.
    """
    if not 0 <= rate <= 1 or classes < 2:
        raise ValueError(f"rate={rate} and classes={classes}: a rate in [0, 1] and at least two classes are needed.")
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.permutation(len(labels))[: round(rate * len(labels))])
    flipped = labels.clone()
    flipped[rows] = (labels[rows] + torch.from_numpy(random.integers(1, classes, len(rows)))) % classes
    return flipped
