"""Data set adaptation: linear adapters that move CLIP's image and text features towards this data set.

Training on labels that may be wrong must not teach the adapters those very labels, so by default every sample is
aligned by adapters that never saw its label (cross-fitting), and samples that the adapters themselves doubt weigh less.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from selectsampler.embeddings.features import Embeddings
from selectsampler.precision import fast_products, full_precision
from selectsampler.progress import progress_bar
from selectsampler.validation import as_seed

__all__ = ["Adapted", "adapt", "info_nce_loss", "prompt_loss"]

BLOCK = 8192  # rows whose adapted features are held at once
DEFAULTS: dict[str, dict[str, Any]] = {
    "cross_fit": {"steps": 200, "batch_size": 256, "shrinkage": 60.0},
    "info_nce": {"steps": 800, "batch_size": 512, "shrinkage": 30.0},
}

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class Adapted:
    """Embeddings with the adapters that were fitted to them; what `adapt` returns and `score` takes.

    Fold f's adapters were trained without the samples of fold f. They span a space of their own, so that only alignment
    uses them; distances are taken in `distance_features`.

    Args:
        embeddings: what was adapted.
        image_adapters: (F, D, D), float32; an adapted image feature is `image @ image_adapters[f].T`.
        text_adapters: (F, D, D), float32.
        folds: (N,), int64, in [0, F): whose adapters align a sample.
        method: `none`, `info_nce` or `cross_fit`.
        provenance: the arguments, temperatures and loss curves, as JSON values.
    """

    embeddings: Embeddings
    image_adapters: Tensor
    text_adapters: Tensor
    folds: Tensor
    method: str
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.embeddings)

    def by_fold(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of one fold (n,), their adapted image features (n, D) and all adapted prompts (C, D), float32.

        Fold after fold, and within a fold in blocks of `BLOCK` rows, so that memory stays bounded at any N.
        """
        if self.method == "none":  # nothing to multiply by
            for start in range(0, len(self), BLOCK):
                rows = torch.arange(start, min(start + BLOCK, len(self)), device=self.folds.device)
                yield rows, self.embeddings.image[rows].float(), self.embeddings.text.float()
            return
        for fold, (image_adapter, text_adapter) in enumerate(zip(self.image_adapters, self.text_adapters, strict=True)):
            text = _times(self.embeddings.text, text_adapter)
            for rows in (self.folds == fold).nonzero()[:, 0].split(BLOCK):
                yield rows, _times(self.embeddings.image[rows], image_adapter), text

    @property
    def distance_features(self) -> Tensor:
        """(N, D): the space in which samples are compared. The features as they came, or the one adapter's."""
        if self.method != "info_nce":
            return self.embeddings.image
        return _times(self.embeddings.image, self.image_adapters[0])


def _times(features: Tensor, adapter: Tensor) -> Tensor:
    """Adapted features, float32."""
    with full_precision():
        return features.float() @ adapter.T


def adapt(
    embeddings: Embeddings,
    *,
    method: str = "cross_fit",
    folds: int = 5,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float = 3e-3,
    robustness: float = 0.5,
    shrinkage: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Adapted:
    """Fit linear, dimension-preserving image and text adapters to a data set, starting from the identity.

    `cross_fit` (ours): each sample is aligned by adapters trained without its fold. The samples of a class are all
    positives of its prompt: the loss is the mean of the cross-entropy of an image over the prompts and of a prompt over
    the images (`prompt_loss`). Where a label is unlikely under the adapters being trained its gradient is weighted by
    likelihood ** robustness, as in generalised cross-entropy (arXiv 1805.07836).

    `info_nce` (arXiv 2410.11215): one pair of adapters, trained on all samples with InfoNCE over (image, prompt of its
    label) pairs. The paper publishes neither optimizer, rate, length nor temperature, and its code loads one adapter
    into both modalities by mistake: the identity as a start, Adam with a cosine decay, the number of steps, a learned
    temperature that starts at 0.07, and the shrinkage are our choices.

    `none`: identities.

    Both add shrinkage / n times the squared distance of the adapters from the identity to the loss (n samples; a
    Gaussian prior on the adapters), which keeps small data sets from learning their noise and is nothing to large ones.

    >>> adapted = adapt(embeddings)                        # doctest: +SKIP
    >>> adapted.provenance["loss_curves"][0][-1]           # doctest: +SKIP

    Args:
        embeddings: of N samples; unreadable ones are left out of the training.
        method: `cross_fit`, `info_nce` or `none`.
        folds: F, from 2 to N; `cross_fit` only.
        steps: gradient steps of each fold; by default 200 for `cross_fit` and 800 for `info_nce`.
        batch_size: samples a step (all, if there are fewer); by default 256 for `cross_fit` and 512 for `info_nce`.
        learning_rate: Adam's first rate; it decays to zero along a cosine.
        robustness: in [0, 1]; 0 trusts every label. `cross_fit` only.
        shrinkage: at least 0; by default 60 for `cross_fit` and 30 for `info_nce`.
        seed: of the folds and the batches. The same seed on the same machine gives the same adapters.
        progress: show a bar on a terminal if it takes longer than two seconds.

    Raises:
        ValueError: for an unknown method, or folds, steps, batch size, rate, robustness or shrinkage out of range.
    """
    if not isinstance(embeddings, Embeddings):
        raise ValueError(f"adapt takes Embeddings, not a {type(embeddings).__name__}: make them with embed().")
    if method not in ("none", "info_nce", "cross_fit"):
        raise ValueError(f"method is {method!r}, but it must be 'none', 'info_nce' or 'cross_fit'.")
    if not 0 <= robustness <= 1:
        raise ValueError(f"robustness is {robustness}, but it must lie in [0, 1].")
    for name, value in (("shrinkage", shrinkage), ("learning_rate", learning_rate)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, but it must be finite and not negative.")
    for name, number, least in (("batch_size", batch_size, 2), ("steps", steps, 1), ("folds", folds, 1)):
        if number is not None and (number != int(number) or number < least):
            raise ValueError(f"{name} is {number}, but it must be a whole number, at least {least}.")
    seed = as_seed(seed)
    if method == "none":
        return _identity(embeddings)
    given = {"steps": steps, "batch_size": batch_size, "shrinkage": shrinkage}
    chosen = DEFAULTS[method] | {name: value for name, value in given.items() if value is not None}
    if method == "info_nce":
        schedule = Schedule(**chosen, learning_rate=learning_rate, seed=seed)
        return _info_nce(embeddings, schedule, progress=progress)
    schedule = Schedule(**chosen, learning_rate=learning_rate, seed=seed, robustness=robustness)
    return _cross_fit(embeddings, schedule, folds=folds, progress=progress)


def prompt_loss(image: Tensor, text: Tensor, labels: Tensor, temperature: Tensor, robustness: float = 0.0) -> Tensor:
    """Symmetric cross-entropy of images and class prompts; all images of a class are positives of its prompt.

    With p(c|i) and p(i|c) the softmax of cosine / temperature over the C prompts and over the B images, and y_i a
    label:

        loss = - 1/2 mean_i w_i [log p(y_i|i) + log p(i|y_i)],    w_i ~ p(y_i|i) ** robustness, of mean 1, no gradient.

    The second term keeps one image's cosine comparable with another's: without it (plain cross-entropy) cosines drift
    and separate wrong labels far worse than the posterior does.

    Args:
        image: (..., B, D), float; text: (..., C, D), float; labels: (..., B), int64; temperature: (...), float.
        robustness: in [0, 1].

    Returns:
        (...), one loss for each leading index.
    """
    logits = _logits(image, text, temperature)
    of_label = _at_labels(logits.log_softmax(dim=-1), labels)
    of_image = _at_labels(logits.log_softmax(dim=-2), labels)
    weights = of_label.detach().exp() ** robustness
    return -(weights / weights.mean(dim=-1, keepdim=True) * (of_label + of_image)).mean(dim=-1) / 2


def info_nce_loss(image: Tensor, text: Tensor, labels: Tensor, temperature: Tensor, robustness: float = 0.0) -> Tensor:
    """InfoNCE over the B pairs of an image and its label's prompt, as CLIP is trained (arXiv 2410.11215).

    Every other pair of the batch is a negative, those of the same class too. The B x B logits hold each class's column
    as often as the class is in the batch, so that B x C logits and the counts give the same loss. Arguments as in
    `prompt_loss`; every label is trusted.
    """
    logits = _logits(image, text, temperature)
    counts = torch.zeros_like(logits[..., 0, :]).scatter_add_(-1, labels, torch.ones_like(logits[..., 0]))
    over_prompts = (logits + counts.log()[..., None, :]).logsumexp(dim=-1)
    over_images = logits.logsumexp(dim=-2).gather(-1, labels)
    return -(2 * _at_labels(logits, labels) - over_prompts - over_images).mean(dim=-1) / 2


def _logits(image: Tensor, text: Tensor, temperature: Tensor) -> Tensor:
    lengths = image.norm(dim=-1, keepdim=True).clamp_min(1e-12)  # divided by after the product, which is smaller
    return image @ normalize(text, dim=-1).mT / (lengths * temperature[..., None, None])


def _at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """(..., B): of each image's row the entry of its label."""
    return values.gather(-1, labels[..., None])[..., 0]


@dataclass(frozen=True)
class Schedule:
    """How adapters are trained."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    robustness: float = 0.0
    shrinkage: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a cosine from `learning_rate` to zero."""
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2


def _identity(embeddings: Embeddings) -> Adapted:
    eye = torch.eye(embeddings.image.shape[1], device=embeddings.image.device)[None]
    folds = embeddings.labels.new_zeros(1).expand(len(embeddings))
    return Adapted(embeddings, eye, eye, folds, "none", {"method": "none"})


def _info_nce(embeddings: Embeddings, schedule: Schedule, *, progress: bool) -> Adapted:
    rows = _trainable(embeddings)
    image_adapters, text_adapters, trained = _train(embeddings, [rows], info_nce_loss, schedule, progress=progress)
    provenance = {"method": "info_nce", **vars(schedule), **trained}
    return Adapted(
        embeddings, image_adapters, text_adapters, torch.zeros_like(embeddings.labels), "info_nce", provenance
    )


def _cross_fit(embeddings: Embeddings, schedule: Schedule, *, folds: int, progress: bool) -> Adapted:
    rows = _trainable(embeddings)
    if not 2 <= folds <= len(rows):
        raise ValueError(
            f"folds is {folds}, but it must lie between 2 and the {len(rows)} readable samples. "
            "With so few, method='none' is as good."
        )
    assignment = torch.zeros_like(embeddings.labels)
    assignment[rows] = _stratified_folds(embeddings.labels[rows], folds, schedule.seed)
    seen = [rows[assignment[rows] != fold] for fold in range(folds)]
    image_adapters, text_adapters, trained = _train(embeddings, seen, prompt_loss, schedule, progress=progress)
    provenance = {"method": "cross_fit", "folds": folds, **vars(schedule), **trained}
    return Adapted(embeddings, image_adapters, text_adapters, assignment, "cross_fit", provenance)


def _trainable(embeddings: Embeddings) -> Tensor:
    if embeddings.readable is None:
        return torch.arange(len(embeddings), device=embeddings.labels.device)
    return embeddings.readable.nonzero()[:, 0]


def _stratified_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """A fold for each sample: random, with every class spread evenly over the folds."""
    shuffled = np.random.default_rng([seed, folds]).permutation(len(labels))
    by_class = shuffled[np.argsort(labels.cpu().numpy()[shuffled], kind="stable")]
    assignment = np.empty(len(labels), dtype=np.int64)
    assignment[by_class] = np.arange(len(labels)) % folds
    return torch.from_numpy(assignment).to(labels.device)


def _train(
    embeddings: Embeddings, seen: Sequence[Tensor], loss_of: Loss, schedule: Schedule, *, progress: bool
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A pair of adapters for each set of rows, (F, D, D) twice, all trained side by side; temperatures, loss curves.

    Nothing of one set reaches the adapters of another: the losses are summed, and Adam works entry by entry.
    """
    device = embeddings.text.device
    text = embeddings.text.float().expand(len(seen), -1, -1)
    dim = text.shape[2]
    # what adapters add to the identity, so that shrinkage is weight decay; transposed, as gradients come out that way
    changes = [torch.zeros(len(seen), dim, dim, device=device, requires_grad=True) for _ in range(2)]
    log_temperatures = torch.full((len(seen),), math.log(0.07), device=device, requires_grad=True)
    shrinkage = schedule.shrinkage * len(seen) / sum(map(len, seen))  # the sets are of one size, but for a sample
    groups: list[dict[str, Any]] = [{"params": changes, "weight_decay": 2 * shrinkage}, {"params": [log_temperatures]}]
    fused = device.type in ("cpu", "cuda")  # one pass over the adapters instead of ten
    optimizer = torch.optim.Adam(groups, lr=schedule.learning_rate, fused=fused)
    curve = []
    with fast_products(), progress_bar("adapt", schedule.steps, unit="step", show=progress) as bar:
        for step, batch in zip(range(schedule.steps), _batches(seen, schedule), strict=False):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            image, labels = embeddings.image[batch].float(), embeddings.labels[batch]
            adapted = [torch.baddbmm(each, each, change) for each, change in zip((image, text), changes, strict=True)]
            losses = loss_of(adapted[0], adapted[1], labels, log_temperatures.exp(), schedule.robustness)
            if step % math.ceil(schedule.steps / 20) == 0 or step == schedule.steps - 1:
                distances = [change.detach().square().sum((1, 2)) for change in changes]
                curve.append(losses.detach() + shrinkage * sum(distances))
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            bar.update()
    trained = {
        "temperatures": log_temperatures.detach().exp().tolist(),
        "loss_curves": torch.stack(curve, dim=1).tolist(),
    }
    image_adapters, text_adapters = (torch.eye(dim, device=device) + change.detach().mT for change in changes)
    return image_adapters, text_adapters, trained


def _batches(seen: Sequence[Tensor], schedule: Schedule) -> Iterator[Tensor]:
    """(F, B) rows, without end: a batch of each set, drawn for itself, all of one size."""
    size = min([schedule.batch_size, *(len(rows) for rows in seen)])
    streams = [_batches_of(rows, size, seed=(schedule.seed, fold)) for fold, rows in enumerate(seen)]
    for batches in zip(*streams, strict=True):
        yield torch.stack(batches)


def _batches_of(rows: Tensor, size: int, *, seed: tuple[int, int]) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    while True:
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]
