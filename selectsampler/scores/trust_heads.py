"""Of trust: the features of a data set in blocks, and classifiers on them that learn true classes from noisy labels."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from selectsampler.precision import fast_products

__all__ = ["ROUNDS", "STEPS", "Data", "Heads", "drawn_rows"]

STEPS, ROUNDS, BATCH = 100, 3, 1280  # of all heads: steps a round, rounds, samples a step
LEARNING_RATE = 0.02
SHRINKAGE = 2.0  # weighs |W|^2 / n: a Gaussian prior around the zero-shot classifier
EIGENVALUE_FLOOR = 1e-3  # of the largest: directions without variance are not blown up
BLOCK = 2**20  # logits that are held at once
FITTED = 2**21  # logits that scalars and the last transition matrix are fitted to


class Data:
    """Features as directions, in blocks; their mean and what whitens them."""

    block_rows = 2048

    def __init__(self, image_features: Tensor, text_features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = image_features, labels
        self.text = normalize(text_features.float(), dim=1)
        self.mean, self.whitening = self._whiten()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.text)

    def directions(self, rows: Tensor) -> Tensor:
        """(b, D), float32, of length 1."""
        return normalize(self.features[rows].float(), dim=-1)

    def blocks(self) -> Iterator[Tensor]:
        """All rows, ascending, in blocks whose logits fit."""
        rows = torch.arange(len(self), device=self.labels.device)
        yield from rows.split(max(1, min(self.block_rows, BLOCK // self.classes)))

    def some(self, seed: int) -> Tensor:
        """Rows to fit scalars to, drawn at random, ascending."""
        count = min(len(self), 10_000, FITTED // self.classes)
        return drawn_rows(len(self), count, (seed, 1)).to(self.labels.device)

    def _whiten(self) -> tuple[Tensor, Tensor]:
        """(D,), (D, D): (direction - mean) @ whitening has unit variance in every direction that varies at all."""
        dim = self.features.shape[1]
        total, moment = (
            torch.zeros(*shape, dtype=torch.float64, device=self.text.device) for shape in ((dim,), (dim, dim))
        )
        for rows in self.blocks():
            directions = self.directions(rows)
            if not directions.any(dim=1).all():
                row = int(rows[~directions.any(dim=1)][0])
                raise ValueError(f"image_features[{row}] is zero, so that it has no direction. Leave such samples out.")
            total += directions.sum(dim=0)
            moment += directions.T @ directions
        mean = total / len(self)
        variances, axes = torch.linalg.eigh(moment / len(self) - torch.outer(mean, mean))
        return mean.float(), (axes / (variances.clamp(min=0) + EIGENVALUE_FLOOR * variances[-1] + 1e-12).sqrt()).float()


class Heads:
    """F linear classifiers side by side, each blind to the labels of its fold."""

    def __init__(self, data: Data, temperature: float, folds: int, seed: int) -> None:
        self.data, self.temperature = data, temperature
        order = torch.from_numpy(np.random.default_rng([seed, folds]).permutation(len(data)))
        self.fold = torch.empty(len(data), dtype=torch.int32)
        self.fold[order] = torch.arange(len(data), dtype=torch.int32) % folds
        self.fold = self.fold.to(data.labels.device)
        dim, classes, device = data.text.shape[1], data.classes, data.labels.device
        self.weight = torch.zeros(dim, folds, classes, device=device)  # on whitened features
        self.bias = torch.zeros(folds, classes, device=device)
        self.trust_in_prompts = torch.ones(folds, classes, device=device)
        self.linear = self._linear()

    def logits(self, rows: Tensor) -> Tensor:
        """(b, C): of each row by the head that did not see its label."""
        matrices, offsets = self.linear
        directions, fold = self.data.directions(rows), self.fold[rows]
        logits = torch.empty(len(rows), self.data.classes, device=rows.device)
        for number in fold.unique().tolist():
            here = fold == number
            logits[here] = directions[here] @ matrices[:, number] + offsets[number]
        return logits

    def train(self, transition: Tensor, *, seed: tuple[int, int], advance: Callable[[int], object]) -> None:
        """One round of gradient steps on the likelihood of the labels through `transition`."""
        parameters = [self.weight, self.bias, self.trust_in_prompts]
        fused = transition.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=fused)
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        label_columns = transition.T.contiguous()
        with fast_products():
            for step in range(STEPS):
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
                rows = torch.randint(len(self.fold), (min(BATCH, len(self.fold)),), generator=generator)
                gradients = self._gradients(rows.to(transition.device), label_columns)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
                advance(1)
        self.linear = self._linear()

    def _linear(self) -> tuple[Tensor, Tensor]:
        """(D, F, C), (F, C): heads as they act on directions."""
        head = (self.data.whitening @ self.weight.flatten(1)).view_as(self.weight)
        zero_shot = self.data.text.T[:, None] * (self.trust_in_prompts / self.temperature)
        return head + zero_shot, self.bias - torch.tensordot(self.data.mean, head, dims=1)

    def _gradients(self, rows: Tensor, label_columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the mean negative log-likelihood of the labels of a batch: to weight, bias and trust_in_prompts.

        To the logits it is p(z | image) - p(z | image, y); written out, as autograd would keep every product. Each head
        leaves out the rows of its fold. One by one, so that the logits of one head are held.
        """
        data, (matrices, offsets) = self.data, self._linear()
        directions, fold, columns = data.directions(rows), self.fold[rows], label_columns[data.labels[rows]]
        of_matrices, of_offsets = torch.empty_like(matrices), torch.empty_like(offsets)
        for number in range(len(offsets)):
            posterior = (directions @ matrices[:, number]).add_(offsets[number]).softmax(dim=1)
            likelihood = (posterior * columns).sum(dim=1, keepdim=True)
            weighs = (likelihood > 1e-9) & (fold != number)[:, None]
            residual = posterior.sub_(posterior * columns / likelihood).where(weighs, 0.0)
            residual /= (fold != number).sum().clamp(min=1)
            of_matrices[:, number], of_offsets[number] = directions.T @ residual, residual.sum(dim=0)
        of_prompts = (of_matrices * data.text.T[:, None]).sum(dim=0) / self.temperature
        of_head = of_matrices.sub_(data.mean[:, None, None] * of_offsets)
        of_weight = (data.whitening.T @ of_head.flatten(1)).view_as(self.weight)
        seen = len(data) * (1 - 1 / len(offsets))
        return of_weight.add_(self.weight, alpha=2 * SHRINKAGE / seen), of_offsets, of_prompts


def drawn_rows(samples: int, count: int, seed: tuple[int, int]) -> Tensor:
    """(count,), int64, ascending: rows drawn at random."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(samples)[:count]))
