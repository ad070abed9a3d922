"""Sample diversity: how far each image lies from its nearest neighbours in its class, exactly and in bounded memory."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from selectsampler.precision import full_precision
from selectsampler.validation import check_features, check_labels, check_mask

__all__ = ["default_neighbours", "sample_diversity"]

WORKSPACE = 16 * 2**20  # entries of one block of distances: 64 MiB in float32, 128 in float64
TOLERANCE = 2e-6  # relative error of a mean distance that sends its row to float64; the contract is 1e-5


def sample_diversity(image_features: Tensor, labels: Tensor, k: int, *, among: Tensor | None = None) -> Tensor:
    """How far each image lies from its class: mean Euclidean distance to its k nearest of the class, higher is sparser.

    >>> points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    >>> sample_diversity(points, labels=torch.tensor([0, 0, 0, 1]), k=2)
    tensor([2.0000, 1.5000, 2.5000, 0.0000])

    SDS of arXiv 2410.11215 (sample scoring): SDS_i = 1/k sum over the k nearest j != i with y_j = y_i of |f_i - f_j|,
    on features that are not normalised. The released code counts the sample itself among its neighbours, so that its
    100 and 50 are k = 99 and 49 here.

    A class with fewer than k other samples uses all of them. A sample without any neighbour has no distance and gets 0,
    so that it is not preferred for being alone.

    Args:
        image_features: (N, D), floating point, any length, in any order; computed in float32, and in float64 where
            near-duplicates would lose digits, so that the result is within 1e-5 of exact arithmetic.
        labels: (N,), int64, from 0.
        k: at least 1; the sample itself is left out.
        among: (N,), bool; only these count as neighbours. None: all do.

    Returns:
        (N,), float32, on the device of the input. Extra memory is bounded by one class's float32 features and 200 MiB.

    Raises:
        ValueError: if shapes, dtypes or labels do not fit, k is less than 1, or a feature is not finite.
    """
    check_features(image_features, name="image_features")
    check_labels(labels, samples=len(image_features))
    if k < 1:
        raise ValueError(f"k is {k}, but at least one neighbour is needed.")
    if among is not None:
        check_mask(among, name="among", samples=len(labels))
    diversity = torch.zeros(len(labels), dtype=torch.float32, device=image_features.device)
    with full_precision():
        for rows in _classes(labels):
            features = image_features[rows]
            candidates = torch.arange(len(rows), device=rows.device) if among is None else among[rows].nonzero()[:, 0]
            if len(candidates):
                diversity[rows] = _mean_nearest(features, candidates, k)
    return diversity


def default_neighbours(labels: Tensor) -> int:
    """The paper's k, carried over to any data set: a tenth of the mean class, at most 100, the sample itself left out.

    >>> default_neighbours(torch.arange(10).repeat(5000)), default_neighbours(torch.arange(100).repeat(500))
    (99, 49)
    """
    classes = len(labels.unique())
    return max(1, min(100, round(len(labels) / classes / 10)) - 1)


def _classes(labels: Tensor) -> Iterator[Tensor]:
    """The rows of each class, ascending, in any storage order."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    yield from (rows for rows in order.split(counts.tolist()) if len(rows))


def _mean_nearest(features: Tensor, candidates: Tensor, k: int) -> Tensor:
    """(n,): mean distance of each row to its k nearest among `candidates` (m,), itself left out."""
    # centred, distances stay and norms shrink, and with them the rounding error
    centre = features.float().mean(dim=0)
    centred = features.float() - centre
    others = centred[candidates]
    own_column = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
    own_column[candidates] = torch.arange(len(candidates), device=features.device)
    norms = centred.square().sum(dim=1)
    other_norms = norms[candidates]
    rounding = 8 * torch.finfo(torch.float32).eps * (norms + norms.max())
    means = torch.zeros_like(norms)
    inexact = []
    for rows in _blocks(len(features), len(others), device=features.device):
        squared = torch.addmm(other_norms, centred[rows], others.T, alpha=-2).add_(norms[rows, None])
        nearest, _ = _k_nearest(squared, own_column[rows], k)
        distances = nearest.clamp_(min=0).sqrt()
        means[rows] = _mean(distances)
        # d is uncertain by (error of d^2) / 2d; at a distance of zero everything is uncertain
        error = _mean(rounding[rows, None] / (2 * distances).clamp_(min=1e-30))
        inexact.append(rows[error > TOLERANCE * means[rows]])
    again = torch.cat(inexact)
    for some in _blocks(len(again), len(others), device=features.device):
        rows = again[some]
        queries, exact_others = (features[some_rows].double() - centre for some_rows in (rows, candidates))
        means[rows] = _mean_nearest_exactly(queries, exact_others, own_column[rows], k)
    return means


def _mean_nearest_exactly(queries: Tensor, others: Tensor, own_column: Tensor, k: int) -> Tensor:
    """As `_mean_nearest`, for some rows, from float64: neighbours by products, their distances by differences."""
    norms, query_norms = others.square().sum(dim=1), queries.square().sum(dim=1)
    squared = torch.addmm(norms, queries, others.T, alpha=-2).add_(query_norms[:, None])
    nearest, columns = _k_nearest(squared, own_column, k)
    distances = torch.empty_like(nearest)
    for some in _blocks(len(queries), columns.shape[1] * others.shape[1], device=queries.device):
        distances[some] = (queries[some, None] - others[columns[some]]).norm(dim=2)
    distances.masked_fill_(nearest.isinf(), torch.inf)
    # products cannot tell apart who lies closer than their own rounding: there, distances to all by differences
    farthest = distances.amax(dim=1)  # infinite where all others were taken: there is nothing to tell apart
    rounding = 8 * torch.finfo(torch.float64).eps * (query_norms + norms.max())
    blurred = ((farthest > 0) & (farthest.square() * TOLERANCE < rounding)).nonzero()[:, 0]
    to_all = torch.cdist(queries[blurred], others, compute_mode="donot_use_mm_for_euclid_dist")
    distances[blurred] = _k_nearest(to_all, own_column[blurred], k)[0]
    return _mean(distances).float()


def _k_nearest(squared: Tensor, own_column: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row and their columns; the row's own column (-1: it has none) counts as infinitely far."""
    has_own = own_column >= 0
    squared[has_own.nonzero()[:, 0], own_column[has_own]] = torch.inf
    nearest = squared.topk(min(k, squared.shape[1]), dim=1, largest=False, sorted=False)
    return nearest.values, nearest.indices


def _mean(distances: Tensor) -> Tensor:
    """Mean of the finite entries of each row, 0 where there are none."""
    finite = distances.isfinite()
    return torch.where(finite, distances, 0).sum(dim=1) / finite.sum(dim=1).clamp(min=1)


def _blocks(rows: int, entries: int, *, device: torch.device) -> Sequence[Tensor]:
    """Row numbers in blocks that fit the workspace at `entries` numbers a row."""
    return torch.arange(rows, device=device).split(max(1, WORKSPACE // max(1, entries)))
