"""Semantic alignment: how well each image fits its label, and how much better than any other class."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from selectsampler.validation import check_features, check_labels

__all__ = ["semantic_alignment", "semantic_margin"]

BLOCK = 8192  # rows that are in float32 at once
COSINES = 2**22  # of images and prompts that are held at once: 16 MiB


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
    prompts = _checked(image_features, text_features, labels)
    own = image_features.new_empty(len(image_features), dtype=prompts.dtype)
    for start in range(0, len(own), BLOCK):  # bounds the float32 copies at any N
        rows = slice(start, start + BLOCK)
        own[rows] = (_unit(image_features[rows], name="image_features", first=start) * prompts[labels[rows]]).sum(dim=1)
    return own


def semantic_margin(image_features: Tensor, text_features: Tensor, labels: Tensor) -> Tensor:
    """How much better each image fits its label than any other class, in [-2, 2]; below 0 CLIP takes it for another.

    >>> images = torch.tensor([[2.0, 0.0], [3.0, 4.0]])
    >>> semantic_margin(images, torch.eye(2), labels=torch.tensor([0, 0]))
    tensor([ 1.0000, -0.2000])

    The cosine with its own class prompt (`semantic_alignment`) less the highest cosine with another. An image with a
    low margin and a label that can be trusted is a hard one.

    Args:
        image_features, text_features, labels: as of `semantic_alignment`, but of two classes or more.

    Returns:
        (N,), float32, on the device of the input.

    Raises:
        ValueError: as `semantic_alignment`, and for a single class.
    """
    prompts = _checked(image_features, text_features, labels)
    if len(prompts) < 2:
        raise ValueError("text_features has one class, so that there is no other to compare with.")
    margin = image_features.new_empty(len(image_features), dtype=prompts.dtype)
    rows_at_once = max(1, min(BLOCK, COSINES // len(prompts)))
    for start in range(0, len(margin), rows_at_once):
        rows = slice(start, start + rows_at_once)
        cosines = _unit(image_features[rows], name="image_features", first=start) @ prompts.T
        own = cosines.gather(1, labels[rows, None])
        margin[rows] = own[:, 0] - cosines.scatter_(1, labels[rows, None], -torch.inf).amax(dim=1)
    return margin


def _checked(image_features: Tensor, text_features: Tensor, labels: Tensor) -> Tensor:
    """The prompts at unit length."""
    check_features(image_features, name="image_features")
    check_features(text_features, name="text_features", dim=image_features.shape[1])
    check_labels(labels, samples=len(image_features), classes=len(text_features))
    return _unit(text_features, name="text_features")


def _unit(features: Tensor, *, name: str, first: int = 0) -> Tensor:
    features = features.float()
    zero = (features == 0).all(dim=1)
    if zero.any():
        row = first + int(zero.nonzero()[0])
        raise ValueError(f"{name}[{row}] is zero, so that it has no direction. Leave unreadable images out.")
    return normalize(features, dim=1)
