"""How well kept samples cover a class: distances in bounded memory, and gains that follow each sample kept."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["UNCOVERED", "WORKSPACE", "ClassCoverage"]

UNCOVERED = 2.0  # the distance to a class's kept samples where there are none: unit vectors lie no farther apart
WORKSPACE = 48 * 2**20  # distances held in memory: 192 MiB, a class of 7,000
TILE = 2 * 2**20  # distances worked on at once: 16 MiB in float64
IDENTICAL = 1e-12  # a squared distance below this is rounding


class ClassCoverage:
    """The coverage of a class, sum_j w_j (UNCOVERED - distance of j to the nearest kept sample), as samples are kept.

    Distances are taken in float64, so that those of near-duplicates are right, and held in float32.

    Args:
        features: (N, D), of the whole data set.
        covered: (n,), int64: the samples j.
        covering: (m,), int64: the samples that may be kept to cover them.
        weights: (n,), float64: w_j.
        hold: hold all n x m distances in memory instead of computing them where they are needed.
    """

    def __init__(self, features: Tensor, covered: Tensor, covering: Tensor, weights: Tensor, *, hold: bool) -> None:
        self.weights = weights
        self.nearest = torch.full((len(covered),), UNCOVERED, device=features.device)
        self._rows = _unit(features[covered])
        self._columns = self._rows if torch.equal(covered, covering) else _unit(features[covering])
        self._held: Tensor | None = None
        if hold:
            held = torch.empty(len(covered), len(covering), device=features.device)
            for rows, distances in self.tiles():
                held[rows] = distances
            self._held = held

    def tiles(self, rows: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Some of the rows (t,), by default of all, and their distances (t, m) to all that may cover them, float32."""
        if rows is None:
            rows = torch.arange(len(self._rows), device=self._rows.device)
        for some in rows.split(max(1, TILE // max(1, len(self._columns)))):
            yield some, _distances(self._rows[some], self._columns) if self._held is None else self._held[some]

    def gains(self) -> Tensor:
        """(m,), float64: what each would add to the coverage."""
        total = torch.zeros(len(self._columns), dtype=torch.float64, device=self.weights.device)
        for rows, distances in self.tiles():
            total += self.fall(rows, self.nearest[rows], distances)
        return total

    def fall(self, rows: Tensor, nearest: Tensor, distances: Tensor) -> Tensor:
        """(m,), float64: sum over these rows of w_j max(0, nearest_j - d_ij), from nearest (t,), distances (t, m)."""
        weights = self.weights[rows]
        # in float64, so that what is taken from a gain is what was added to it; in float32 only order is asked for
        return weights @ nearest.double() - weights @ distances.minimum(nearest[:, None]).double()

    def keep(self, column: int) -> Tensor:
        """Keep this one of `covering`; returns (m,), float64: by how much less each would add from now on.

        Only rows that it lies nearer to than any kept before matter, max(0, nearest - d) - max(0, new - d) being
        max(0, nearest - max(d, new)); they soon are few.
        """
        if self._held is None:
            to_kept = _distances(self._rows, self._columns[column, None])[:, 0]
        else:
            to_kept = self._held[:, column]
        loss = torch.zeros(len(self._columns), dtype=torch.float64, device=self.weights.device)
        for rows, distances in self.tiles((to_kept < self.nearest).nonzero()[:, 0]):
            loss += self.fall(rows, self.nearest[rows], distances.maximum(to_kept[rows, None]))
        self.nearest = torch.minimum(self.nearest, to_kept)
        return loss


def _unit(features: Tensor) -> Tensor:
    features = features.double()
    return features / features.norm(dim=1, keepdim=True)


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, m), float32: Euclidean distances of unit vectors; float64 leaves those of near-duplicates their digits."""
    squared = (rows @ columns.T).mul_(-2).add_(2)
    return squared.masked_fill_(squared < IDENTICAL, 0).sqrt_().float()
