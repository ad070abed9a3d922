"""Near-duplicates: which images show again what another of their class shows."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from selectsampler.precision import full_precision
from selectsampler.validation import check_features, check_labels, check_vector

__all__ = ["near_duplicates"]

NEAR = 0.1  # of the usual distance to the nearest preferred sample of the class
COPY = 1e-3  # between directions: float16 features cannot tell such images apart
BLOCK = 2**23  # entries of a block of products: 32 MiB


def near_duplicates(image_features: Tensor, labels: Tensor, preference: Tensor) -> Tensor:
    """Samples that nearly repeat a preferred one of their class.

    >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1e-3], [1.0, 1.0]])
    >>> near_duplicates(points, torch.zeros(4, dtype=torch.int64), preference=torch.tensor([0.9, 0.9, 1.0, 0.5]))
    tensor([ True, False, False, False])

    A sample is a near-duplicate if it lies nearer to a sample of its class with a higher preference (of equals, the one
    that stands first) than 0.001, or than a tenth of what is usual in the class: the median of that distance, of those
    above a tenth of the class's spread (the root mean square distance of two of its samples), so that it holds where
    every image has copies. Distances are Euclidean, between directions. Of a group of near-duplicates exactly one
    stays, unless they form a chain.

    Args:
        image_features: (N, D), floating point, of any length but zero.
        labels: (N,), int64, from 0.
        preference: (N,), floating point: which of two is to stay.

    Returns:
        (N,), bool, on the device of the input.

    Raises:
        ValueError: if shapes or dtypes do not fit, or a feature is zero or not finite.
    """
    check_features(image_features, name="image_features")
    check_labels(labels, samples=len(image_features))
    check_vector(preference, name="preference", samples=len(image_features))
    repeated = torch.zeros_like(labels, dtype=torch.bool)
    by_preference = preference.argsort(descending=True, stable=True)
    by_class = by_preference[labels[by_preference].argsort(stable=True)]
    with full_precision():
        for rows in by_class.split(labels.bincount().tolist()):
            if len(rows) > 1:
                directions = normalize(image_features[rows].float(), dim=1)
                distance = _to_nearest_before(directions)
                repeated[rows[1:]] = distance < max(COPY, NEAR * _usual(distance, directions))
    return repeated


def _usual(distance: Tensor, directions: Tensor) -> float:
    """The median distance of those that are no copies; 0 where a class has nothing else, or two samples only."""
    spread = float((2 - 2 * directions.mean(dim=0).square().sum()).clamp(min=0).sqrt())
    others = distance[distance > NEAR * spread]
    return float(others.median()) if len(others) and len(distance) > 1 else 0.0


def _to_nearest_before(directions: Tensor) -> Tensor:
    """(n - 1,): of each row but the first, the distance to the nearest row before it."""
    samples = len(directions)
    cosine = torch.empty(samples - 1, device=directions.device)
    step = max(1, BLOCK // samples)
    for start in range(1, samples, step):
        stop = min(start + step, samples)
        products = directions[start:stop] @ directions[: stop - 1].T
        products.masked_fill_(~torch.ones_like(products, dtype=torch.bool).tril(start - 1), -1)
        cosine[start - 1 : stop - 1] = products.amax(dim=1)
    return (2 - 2 * cosine).clamp(min=0).sqrt()
