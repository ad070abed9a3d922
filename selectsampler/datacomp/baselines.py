"""DataComp's own filters, as far as they need nothing but the metadata: what a new filter is compared with."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from selectsampler.precision import full_precision
from selectsampler.scores.norm_sim import unit_features

__all__ = ["basic_filter", "image_based_filter", "nearest_centroids", "text_based_filter"]


def basic_filter(
    texts: Sequence[str | None],
    widths: np.ndarray,
    heights: np.ndarray,
    *,
    is_english: Callable[[str], bool] | None = None,
) -> np.ndarray:
    """(n,), bool: DataComp's basic filter: 3 words, 6 characters, 200 pixels, and sides of at most 3 to 1.

    >>> basic_filter(["a red bicycle", "bike"], np.array([640, 640]), np.array([480, 480]))
    array([ True, False])

    The original also keeps English captions only, by a fastText model that has to be downloaded; `is_english`
    stands in for it.
    """
    captions = _captions(texts)
    words = np.array([len(caption.split()) for caption in captions]) > 2
    characters = np.array([len(caption) for caption in captions]) > 5
    shorter, longer = np.minimum(widths, heights), np.maximum(widths, heights)
    return words & characters & (shorter >= 200) & (longer <= 3.0 * shorter) & _english(captions, is_english)


def text_based_filter(
    texts: Sequence[str | None], words: Collection[str], *, is_english: Callable[[str], bool] | None = None
) -> np.ndarray:
    """(n,), bool: captions that hold one of `words`, whatever its case.

    >>> text_based_filter(["A Tabby on a sofa", "sale"], words={"tabby", "sofa"})
    array([ True, False])

    The original takes the synsets of ImageNet-21k from WordNet, by a download; here the words are yours.
    """
    wanted = {word.casefold() for word in words}
    captions = _captions(texts)
    held = np.array([not wanted.isdisjoint(caption.casefold().split()) for caption in captions], dtype=bool)
    return held & _english(captions, is_english)


def image_based_filter(image_features: Tensor, centroids: Tensor, wanted: Tensor) -> Tensor:
    """(N,), bool: images whose nearest centroid is one that `nearest_centroids` gives for an image of the target.

    Args:
        image_features: (N, D), floating point.
        centroids: (C, D), of a clustering of image features (DataComp publishes 100,000).
        wanted: int64, numbers of centroids.
    """
    return torch.isin(nearest_centroids(image_features, centroids), wanted)


def nearest_centroids(image_features: Tensor, centroids: Tensor) -> Tensor:
    """(N,), int64: the centroid with the highest inner product with each unit feature, as DataComp assigns them."""
    assigned = []
    with full_precision():
        for some in image_features.split(1024):
            images = unit_features(some, name="image_features")
            best = torch.full((len(some),), -torch.inf, device=some.device)
            which = torch.zeros(len(some), dtype=torch.int64, device=some.device)
            for first in range(0, len(centroids), 8192):
                similarity, place = (images @ centroids[first : first + 8192].float().T).max(dim=1)
                which = torch.where(similarity > best, place + first, which)
                best = torch.maximum(best, similarity)
            assigned.append(which)
    return torch.cat(assigned) if assigned else torch.zeros(0, dtype=torch.int64)


def _captions(texts: Sequence[str | None]) -> list[str]:
    """A caption that is null says as much as an empty one."""
    return ["" if text is None else text for text in texts]


def _english(texts: Sequence[str], is_english: Callable[[str], bool] | None) -> np.ndarray:
    return np.array([is_english is None or is_english(text) for text in texts], dtype=bool)
