"""What several benchmarks share: the half of CIFAR-10 to select from, a head fitted on given labels, intervals."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from selectsampler.recipes.data import ZippedImageFolder
from sklearn.linear_model import LogisticRegression
from torch import Tensor

__all__ = ["half_width", "interval", "linear_head", "pool"]


def pool(data: Path, *, change: Callable[[Any], Any] | None = None) -> ZippedImageFolder:
    """Files 0000 to 2499 of each class: the CLIP of the committed results was pretrained on the others."""
    return ZippedImageFolder(data, "cifar10/train", accept=lambda name: int(Path(name).stem) < 2500, change=change)


def linear_head(directions: Tensor, labels: Tensor, seed: int, *, strength: float, folds: int = 5) -> Tensor:
    """(N, C): posteriors by logistic regressions of inverse penalty `strength`, each trained on the other folds."""
    inputs = ((directions - directions.mean(dim=0)) / directions.std(dim=0)).numpy()
    fold = np.random.default_rng([seed, 8]).permutation(len(labels)) % folds
    posterior = np.empty((len(labels), int(labels.max()) + 1))
    for number in range(folds):
        seen, judged = fold != number, fold == number
        model = LogisticRegression(C=strength, max_iter=1000).fit(inputs[seen], labels.numpy()[seen])
        posterior[judged] = model.predict_proba(inputs[judged])
    return torch.from_numpy(posterior).float()


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t over the seeds; two or more."""
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Mean and 95 % interval over the seeds; of a single seed its value."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {half_width(values):.{digits}f}"
