"""NormSim: how near an image lies to the images of the tasks that a model is trained for."""

import math

import torch
from torch import Tensor

from selectsampler.precision import full_precision
from selectsampler.scores.s_clip_loss import inverse_lengths
from selectsampler.validation import check_features

__all__ = ["norm_sim", "norm_sim_2", "second_moment", "unit_features"]

BLOCK = 4096


def norm_sim(image_features: Tensor, target_features: Tensor, *, p: float = math.inf) -> Tensor:
    """How near each image lies to the target's, from 0 on, higher is nearer: the p-norm of its cosines with them.

    >>> images, target = torch.tensor([[2.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    >>> norm_sim(images, target)
    tensor([1.0000, 0.8000])
    >>> norm_sim(images, target, p=2)
    tensor([1., 1.])

    NormSim_p of arXiv 2405.19547: NormSim_p(x) = || F_target x ||_p, rows of F_target and x of unit length. p = inf
    is the nearest target image, max |t.x|, in [0, 1]; p = 2 is sqrt(x' (F'F) x), which needs of the target its second
    moment only.

    Args:
        image_features: (N, D), floating point, of any length but zero; computed in float32.
        target_features: (T, D), image features of the target's (training) images, on the same device.
        p: 2 or infinity.

    Returns:
        (N,), float32, on the device of the input. Extra memory is at most 192 MiB, whatever N and T are.

    Raises:
        ValueError: if shapes or dtypes do not fit, the target is empty, a feature is zero, or p is another number.
    """
    check_features(image_features, name="image_features")
    check_features(target_features, name="target_features", dim=image_features.shape[1])
    if len(target_features) == 0:
        raise ValueError("target_features is empty: NormSim needs at least one image of the target.")
    if p not in (2, math.inf):
        raise ValueError(f"p is {p}, but NormSim is defined here for p=2 and p=float('inf').")
    if p == 2:
        return norm_sim_2(image_features, second_moment(target_features, name="target_features"))
    scale = inverse_lengths(target_features, name="target_features")
    nearest = torch.zeros(len(image_features), device=image_features.device)
    with full_precision():
        for start in range(0, len(image_features), BLOCK):
            rows = slice(start, start + BLOCK)
            images = unit_features(image_features[rows], name="image_features", first=start)
            for first in range(
                0, len(target_features), BLOCK
            ):  # in float32 a block at a time: next to nothing beside the product
                some = slice(first, first + BLOCK)
                cosines = images @ (target_features[some].float() * scale[some, None]).T
                lowest, highest = cosines.aminmax(dim=1)  # instead of a pass for the absolute values
                nearest[rows] = torch.maximum(nearest[rows], torch.maximum(highest, -lowest))
    return nearest


def second_moment(features: Tensor, *, name: str = "features") -> Tensor:
    """(D, D), float64: the sum of x x' over unit features (N, D), of which NormSim_2 is sqrt(x' M x)."""
    moment = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    with full_precision():
        for start in range(0, len(features), BLOCK):
            rows = unit_features(features[start : start + BLOCK], name=name, first=start)
            moment += rows.T @ rows
    return moment


def norm_sim_2(image_features: Tensor, moment: Tensor) -> Tensor:
    """(N,), float32: NormSim_2 from the target's second moment (D, D), without the target itself."""
    result = torch.empty(len(image_features), device=image_features.device)
    moment = moment.float()
    with full_precision():
        for start in range(0, len(image_features), BLOCK):
            rows = slice(start, start + BLOCK)
            images = unit_features(image_features[rows], name="image_features", first=start)
            result[rows] = (images @ moment).mul_(images).sum(dim=1).clamp_(min=0).sqrt_()
    return result


def unit_features(features: Tensor, *, name: str, first: int = 0) -> Tensor:
    """(N, D), float32, of unit length; `first` is the row that an error counts from."""
    try:
        return features.float() * inverse_lengths(features, name=name)[:, None]
    except ValueError:
        if first == 0:
            raise
    lengths = features.float().norm(dim=1)
    row = first + int((~((lengths > 0) & lengths.isfinite())).nonzero()[0])
    raise ValueError(f"{name}[{row}] is zero or not finite, so that it has no direction. Leave unreadable samples out.")
