"""Sample diversity: how far each image lies from its nearest neighbours in its class, exactly and in bounded memory."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from selectsampler.grouping import rows_of_groups
from selectsampler.precision import full_precision
from selectsampler.validation import check_features, check_labels, check_mask

__all__ = ["default_neighbours", "sample_diversity"]

WORKSPACE = 40 * 2**20  # entries of distances held at once: 160 MiB in float32; a quarter of them in float64
BLOCK = 512  # rows of distances that are worked on at once: they stay in the processor's cache
TOLERANCE = 5e-6  # relative error of a mean distance that sends its row to float64; the contract is 1e-5


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
        (N,), float32, on the device of the input. Extra memory is bounded by two copies of one class's features (in
        float64 where near-duplicates need it) and 256 MiB.

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
        for _, rows in rows_of_groups(labels):
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
    classes = int((torch.bincount(labels) > 0).sum())
    return max(1, min(100, round(len(labels) / classes / 10)) - 1)


def _mean_nearest(features: Tensor, candidates: Tensor, k: int) -> Tensor:
    """(n,): mean distance of each row to its k nearest among `candidates` (m,), itself left out."""
    own_column = torch.full((len(features),), -1, dtype=torch.int64, device=features.device)
    own_column[candidates] = torch.arange(len(candidates), device=features.device)
    # centred, distances stay and norms shrink, and with them the rounding error
    centre = features.float().mean(dim=0)
    means, spread, twins = _mean_nearest_by_products(features, candidates, own_column, k, centre)
    # Rounding of a single product stayed below 8 eps in all that was tried (dimensions 16 to 1,024), and averages out
    # over k neighbours, unless they are twins of each other, whose products are rounded alike.
    neighbours = min(k, len(candidates))
    alike = int(twins.sum()) / neighbours + neighbours**-0.5
    error = torch.finfo(torch.float32).eps * (0.25 + 8 * min(1.0, alike)) * spread
    again = (twins | (error > TOLERANCE * means)).nonzero()[:, 0]
    if len(again) == 0:
        return means
    others = features[candidates].double() - centre
    for some in _blocks(len(again), len(candidates), device=features.device):
        rows = again[some]
        means[rows] = _mean_nearest_exactly(features[rows].double() - centre, others, own_column[rows], k)
    return means


def _mean_nearest_by_products(
    features: Tensor, candidates: Tensor, own_column: Tensor, k: int, centre: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Three of (n,): means in float32; means of (|a|^2 + |b|^2) / 2d, with which their errors grow; who has a twin."""
    samples, dim = features.shape
    others = _with_norms(features[candidates], centre)
    norms = 2 * others[:, dim]
    others[:, :dim].neg_()
    others[:, dim : dim + 2] = others[:, dim : dim + 2].flip(1)
    means, spread = (torch.zeros(samples, device=features.device) for _ in range(2))
    twins = torch.zeros(samples, dtype=torch.bool, device=features.device)
    step = max(1, min(BLOCK, WORKSPACE // len(candidates)))
    buffer = others.new_empty(min(step, samples), len(candidates))
    # among all, distances below the diagonal are those above it, and cost no product
    keeps_strips = len(candidates) == samples and samples**2 / 2 <= WORKSPACE
    strips: list[Tensor] = []
    for start in range(0, samples, step):
        rows = slice(start, min(start + step, samples))
        own = _with_norms(features[rows], centre)
        halves, known = buffer[: len(own)], 0  # of the squared distances
        for strip in strips:
            known += step
            halves[:, known - step : known] = strip[start - known : rows.stop - known]
        torch.mm(own, others[known:].T, out=halves[:, known:])
        if keeps_strips:
            strips.append(halves[:, rows.stop :].T.clone(memory_format=torch.contiguous_format))
        distances = _smallest(_without_own(halves, own_column[rows]), k).mul(2).clamp_(min=0).sqrt_()
        means[rows] = _mean(distances)
        own_norms = 2 * own[:, dim, None]
        reachable = (own_norms.sqrt() + distances).square_().clamp_(max=norms.max())  # |b| <= |a| + d, and no longer
        sums = reachable.add_(own_norms)
        twins[rows] = (distances.square() <= 16 * torch.finfo(torch.float32).eps * sums).any(dim=1)
        spread[rows] = _mean((sums / (2 * distances)).masked_fill_(distances.isinf(), torch.inf))
    return means, spread, twins


def _with_norms(features: Tensor, centre: Tensor) -> Tensor:
    """(n, W), float32: centred features, then |f|^2 / 2, then 1, so that one product of two such gives distances."""
    dim = features.shape[1]
    extended = centre.new_zeros(len(features), -(-(dim + 2) // 16) * 16)  # rows of whole cache lines
    torch.sub(features, centre, out=extended[:, :dim])
    extended[:, dim] = torch.linalg.vector_norm(extended[:, :dim], dim=1, dtype=torch.float64).square() / 2
    extended[:, dim + 1] = 1
    return extended


def _mean_nearest_exactly(queries: Tensor, others: Tensor, own_column: Tensor, k: int) -> Tensor:
    """As `_mean_nearest`, for some rows, from float64: neighbours by products, their distances by differences."""
    norms, query_norms = others.square().sum(dim=1), queries.square().sum(dim=1)
    squared = torch.addmm(norms, queries, others.T, alpha=-2).add_(query_norms[:, None])
    nearest, columns = _without_own(squared, own_column).topk(min(k, len(others)), largest=False, sorted=False)
    distances = torch.empty_like(nearest)
    for some in _blocks(len(queries), columns.shape[1] * others.shape[1], device=queries.device):
        distances[some] = (queries[some, None] - others[columns[some]]).norm(dim=2)
    distances.masked_fill_(nearest.isinf(), torch.inf)
    # products cannot tell apart who lies closer than their own rounding: there, distances to all by differences
    farthest = distances.amax(dim=1)  # infinite where all others were taken: there is nothing to tell apart
    rounding = 8 * torch.finfo(torch.float64).eps * (query_norms + norms.max())
    blurred = ((farthest > 0) & (farthest.square() * TOLERANCE < rounding)).nonzero()[:, 0]
    to_all = torch.cdist(queries[blurred], others, compute_mode="donot_use_mm_for_euclid_dist")
    distances[blurred] = _smallest(_without_own(to_all, own_column[blurred]), k)
    return _mean(distances).float()


def _without_own(distances: Tensor, own_column: Tensor) -> Tensor:
    """The distances, changed in place: the row's own column (-1: it has none) counts as infinitely far."""
    has_own = own_column >= 0
    distances[has_own.nonzero()[:, 0], own_column[has_own]] = torch.inf
    return distances


def _smallest(values: Tensor, k: int) -> Tensor:
    """(b, min(k, m)): the k smallest of each row, in no order; `values` are moved about."""
    if k >= values.shape[1]:
        return values
    if values.device.type != "cpu":
        return values.topk(k, dim=1, largest=False, sorted=False).values
    # NumPy's partition has vector instructions and frees the interpreter; torch.topk takes eight times as long
    threads = torch.get_num_threads() if values.numel() > 2**20 else 1
    parts = [part.numpy() for part in values.chunk(threads)]
    if len(parts) == 1:
        parts[0].partition(k - 1, axis=1)
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(lambda part: part.partition(k - 1, axis=1), parts))
    return values[:, :k]


def _mean(distances: Tensor) -> Tensor:
    """Mean of the finite entries of each row, 0 where there are none."""
    finite = distances.isfinite()
    return torch.where(finite, distances, 0).sum(dim=1) / finite.sum(dim=1).clamp(min=1)


def _blocks(rows: int, entries: int, *, device: torch.device) -> Sequence[Tensor]:
    """Row numbers in blocks that fit the workspace at `entries` numbers in float64 a row."""
    return torch.arange(rows, device=device).split(max(1, WORKSPACE // 4 // max(1, entries)))
