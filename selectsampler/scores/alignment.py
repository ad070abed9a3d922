"""Semantic alignment: how well each image fits its label."""

from torch import Tensor
from torch.nn.functional import normalize

from selectsampler.validation import check_features, check_labels

__all__ = ["semantic_alignment"]

BLOCK = 8192  # rows that are in float32 at once


def semantic_alignment(image_features: Tensor, text_features: Tensor, labels: Tensor) -> Tensor:
    """How well each image fits its label: cosine with its class prompt, in [-1, 1], higher is better.

    >>> images = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    >>> semantic_alignment(images, torch.eye(2), labels=torch.tensor([0, 1]))
    tensor([1.0000, 0.8000])

    SAS of arXiv 2410.11215 (sample scoring): SAS_i = cos(A_I f_i, A_T t_{y_i}), f_i and t_c CLIP's image and class
    prompt features, A_I and A_T the adapters, already applied to what is passed here.

    Args:
        image_features: (N, D), floating point, of any length but zero; computed in float32.
        text_features: (C, D), one a class, on the same device.
        labels: (N,), int64, in [0, C).

    Returns:
        (N,), float32, on the device of the input.

    Raises:
        ValueError: if shapes, dtypes or labels do not fit, or a feature is zero or not finite.
    """
    check_features(image_features, name="image_features")
    check_features(text_features, name="text_features", dim=image_features.shape[1])
    check_labels(labels, samples=len(image_features), classes=len(text_features))
    prompts = _unit(text_features, name="text_features")
    own = image_features.new_empty(len(image_features), dtype=prompts.dtype)
    for start in range(0, len(own), BLOCK):  # bounds the float32 copies at any N
        rows = slice(start, start + BLOCK)
        own[rows] = (_unit(image_features[rows], name="image_features", first=start) * prompts[labels[rows]]).sum(dim=1)
    return own


def _unit(features: Tensor, *, name: str, first: int = 0) -> Tensor:
    features = features.float()
    zero = (features == 0).all(dim=1)
    if zero.any():
        row = first + int(zero.nonzero()[0])
        raise ValueError(f"{name}[{row}] is zero, so that it has no direction. Leave unreadable images out.")
    return normalize(features, dim=1)
