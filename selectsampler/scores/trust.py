"""Label trust: how likely each label is right, calibrated without clean labels, and with it how noisy a data set is."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from selectsampler.precision import fast_products, full_precision
from selectsampler.progress import progress_bar
from selectsampler.validation import check_features, check_labels

__all__ = ["Trust", "label_trust"]

STEPS, ROUNDS, BATCH = 100, 3, 1280  # of all heads: steps a round, rounds, samples a step
LEARNING_RATE = 0.02
SHRINKAGE = 2.0  # weighs |W|^2 / n: a Gaussian prior around the zero-shot classifier
EIGENVALUE_FLOOR = 1e-3  # of the largest: directions without variance are not blown up
ANCHORS = 0.06  # of a class's mean size: its anchors, the samples that are surest to be of it
FLATTERED = 1.33  # how much too high a temperature noise that follows the image can make likely
TELLING = 0.18  # of log C nats a wrong label: what its class must say of it, that confusions of classes count
BY_CHANCE = 0.01  # a gain in hits over the prompts that says little
STANDS_OUT = 3.0  # standard deviations by which a confusion exceeds the background before it counts as one of its own
PASSES = 8  # of expectation and maximisation, for the last transition matrix
ENOUGH = 20  # samples a class that it takes to tell one confusion from chance
REFERENCES, NEIGHBOURS, BANDWIDTH = 4096, 50, 0.1
GROUP = 8  # references of which the most similar is looked at first
NEGLIGIBLE = 0.02  # a weight of the neighbours that is not worth looking them up
BLOCK = 2**20  # logits that are held at once
FITTED = 2**21  # logits that scalars and the last transition matrix are fitted to


@dataclass(frozen=True, eq=False)
class Trust:
    """What `label_trust` finds.

    Args:
        probability: (N,), float32, in [0, 1]: how likely each label is right.
        transition: (C, C), float32, rows sum to 1: how likely a sample of class z (row) is labelled y (column), as
            estimated from all samples. Of a class without samples nothing is known: its row has 1 for itself.
        noise_rate: the share of wrong labels among all.
        class_noise: (C,), float32: the share of wrong labels among the samples given each label; nan for empty classes.
        unknown: the classes whose samples the prompts find hardly more often than they find others.
    """

    probability: Tensor
    transition: Tensor
    noise_rate: float
    class_noise: Tensor
    unknown: tuple[int, ...]


def label_trust(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    *,
    temperature: float | None = None,
    folds: int = 5,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Trust:
    """How likely each label is right, from all that the embeddings know: prompts, other labels, near neighbours.

    >>> trust = label_trust(embeddings.image, embeddings.text, embeddings.labels)         # doctest: +SKIP
    >>> trust.probability[:3], trust.noise_rate                                           # doctest: +SKIP
    (tensor([0.9993, 0.0021, 0.9871]), 0.198)

    The true class z of an image is hidden, and its label y is drawn from row z of a transition matrix T. Three kinds of
    evidence speak for z:

    - the prompts: zero-shot classification, a softmax of cosine / temperature, which no wrong label has ever touched.
      The temperature is the likeliest; but as noise that follows the image makes too high a one likely, that of CLIP's
      training is preferred to a higher one, up to a third;
    - heads: linear classifiers on the whitened features, added to the zero-shot one and trained through T by the
      likelihood of the labels as given, log sum_z p(z | image) T[z, y], so that they learn true classes from noisy
      labels (arXiv 1609.03683); each sample is judged by the head that never saw its label. For their training T is
      read off the anchors, the samples that are surest of each class: what they are labelled;
    - the classes of near neighbours, their own labels judged by the heads.

    Heads and neighbours are weighed so that the labels are likeliest. How far they outweigh the prompts is not left to
    likelihood: noise that follows the image is predictable from it, so that whoever learns the noise makes the labels
    likelier. But as long as most labels of images alike are right, it cannot change which class comes first. So their
    gain in hits, g = (a - a_prompts) / (a - 1 / C), where a is how often the first class is the label, is held against
    their gain in mean log-likelihood, l: log p(z | image) weighs them by g / (g + l / 2 + 0.01), and the prompts by the
    rest. Then T is taken anew, from all samples by expectation and maximisation; confusions that do not stand out share
    one rate. In the end

        trust = P(z = y | image, y) = p(y | image) T[y, y] / sum_z p(z | image) T[z, y].

    That blames confusions on the class. Where it is the image that is hard to tell, an even T of the same noise rate
    ranks better, and stands in for T here unless T makes the labels likelier by at least 0.18 log C nats for each wrong
    label: log C if the class alone said what an image is mistaken for, 0 if it said nothing.

    Where neither CLIP nor the data tell classes apart, what is ambiguous by nature counts as noise in part. Where
    people confuse what CLIP confuses, the ranking holds, but less noise is reported than there is.

    Args:
        image_features: (N, D), floating point, of any length but zero; their directions count, in float32.
        text_features: (C, D), one prompt a class, on the same device.
        labels: (N,), int64, in [0, C), as given.
        temperature: that CLIP was trained with (`Embeddings.temperature`), if it is known.
        folds: F, from 2 to N.
        class_names: C names, for the warning.
        seed: of folds, batches and references.
        progress: show a bar on a terminal if it takes longer than two seconds.

    Returns:
        `Trust`. Memory beyond the features: the features of 4,096 samples, and a dozen times 16 MiB of logits.

    Raises:
        ValueError: if shapes, dtypes or labels do not fit, a feature is zero, the temperature is not positive, or fewer
            than two classes have samples.
    """
    check_features(image_features, name="image_features")
    check_features(text_features, name="text_features", dim=image_features.shape[1])
    samples, classes = len(image_features), len(text_features)
    check_labels(labels, samples=samples, classes=classes)
    if classes < 2:
        raise ValueError("There is one class only, so that no label can be wrong. Trust needs at least two.")
    if folds != int(folds) or not 2 <= folds <= samples:
        raise ValueError(f"folds is {folds}, but it must be a whole number from 2 to the {samples} samples.")
    if class_names is not None and len(class_names) != classes:
        raise ValueError(f"There are {len(class_names)} class names, but text_features names {classes} classes.")
    if seed < 0:
        raise ValueError(f"seed is {seed}, but it must not be negative.")
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but it must be positive; 0.01 is usual. None: it is fitted.")
    if not text_features.any(dim=1).all():
        row = int((~text_features.any(dim=1)).nonzero()[0])
        raise ValueError(f"text_features[{row}] is zero, so that it has no direction. Embed the class prompts again.")
    present = torch.bincount(labels, minlength=classes) > 0
    if not present.all():
        names = None if class_names is None else [class_names[row] for row in present.nonzero()[:, 0].tolist()]
        options = {"temperature": temperature, "folds": folds, "seed": seed, "progress": progress}
        return _among_present(image_features, text_features, labels, present, names, options)
    with full_precision():
        data = Data(image_features, text_features, labels)
        unknown = _unknown_classes(data, class_names)
        transition = _uniform(classes, 0.1).to(labels.device)
        heads = _Heads(data, _fitted_temperature(data, transition, seed), folds, seed)
        with progress_bar("trust", ROUNDS * STEPS, unit="step", show=progress) as bar:
            for number in range(ROUNDS):
                heads.train(transition, seed=(seed, number), advance=bar.update)
                transition = _anchored_transition(data, heads)
        fitted = _fitted_temperature(data, transition, seed)
        temperature = fitted if temperature is None else min(fitted, max(temperature, fitted / FLATTERED))
        evidence = _Evidence(data, heads, temperature, unknown, transition, seed)
        transition = _transition(data, evidence, transition)
        even = _uniform(classes, evidence.noise_rate(transition)).to(labels.device)
        judging = transition if evidence.gain(transition, even) >= TELLING else even
        probability = torch.cat(
            [
                _of_label(_given_labels(logits, judging, labels[rows]), labels[rows])
                for logits, rows in evidence.in_blocks()
            ]
        )
    wrong = 1 - probability
    counts = torch.bincount(labels, minlength=classes)
    class_noise = torch.zeros(classes, device=labels.device).index_add_(0, labels, wrong) / counts
    return Trust(probability, transition, float(wrong.mean()), class_noise, unknown)


def _among_present(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    present: Tensor,
    class_names: Sequence[str] | None,
    options: dict[str, Any],
) -> Trust:
    """`label_trust` among the classes that have samples: what an empty class is labelled as cannot be known."""
    classes, rows = len(present), present.nonzero()[:, 0]
    if len(rows) < 2:
        raise ValueError("Only one class has samples, so that no label can be wrong. Trust needs at least two.")
    renumbered = (present.cumsum(0) - 1)[labels]
    found = label_trust(image_features, text_features[rows], renumbered, class_names=class_names, **options)
    transition = torch.eye(classes, device=labels.device)
    transition[rows[:, None], rows] = found.transition
    class_noise = torch.full((classes,), torch.nan, device=labels.device)
    class_noise[rows] = found.class_noise
    unknown = tuple(int(rows[number]) for number in found.unknown)
    return replace(found, transition=transition, class_noise=class_noise, unknown=unknown)


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
        return _drawn(len(self), count, (seed, 1)).to(self.labels.device)

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


class _Heads:
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


def _unknown_classes(data: Data, class_names: Sequence[str] | None) -> tuple[int, ...]:
    """Classes whose samples zero-shot classification finds hardly more often than it finds others; with a warning."""
    found = torch.zeros(data.classes, data.classes, device=data.labels.device)  # labelled, and taken for
    for rows in data.blocks():
        taken_for = (data.directions(rows) @ data.text.T).argmax(dim=1)
        pairs = data.labels[rows] * data.classes + taken_for
        found += torch.bincount(pairs, minlength=data.classes**2).view_as(found)
    sizes = found.sum(dim=1)
    chance = found.sum(dim=0) / len(data)
    margin = torch.maximum(0.1 * (1 - chance), 3 * (chance * (1 - chance) / sizes.clamp(min=1)).sqrt())
    hits = found.diagonal() + 2 * found.diagonal().sqrt()  # as many as there may be but for bad luck: few are few
    hardly = (sizes >= 10) & (hits < (chance + margin) * sizes)
    unknown = tuple(hardly.nonzero()[:, 0].tolist())
    if unknown:
        names = ", ".join(str(number if class_names is None else class_names[number]) for number in unknown[:5])
        warnings.warn(
            f"CLIP does not know {len(unknown)} of {data.classes} classes by their prompts: {names}"
            f"{', ...' if len(unknown) > 5 else ''}. Their labels are judged by the data's own evidence; check the "
            "class names, or give templates that describe them.",
            stacklevel=3,
        )
    return unknown


def _fitted_temperature(data: Data, transition: Tensor, seed: int) -> float:
    """The temperature of the zero-shot classifier under which the labels are likeliest."""
    rows = data.some(seed)
    cosines = data.directions(rows) @ data.text.T
    start = torch.full((1,), math.log(20.0), device=rows.device)
    return 1 / float(_likeliest(start, lambda log: log.exp() * cosines, transition, data.labels[rows]).exp())


def _anchored_transition(data: Data, heads: _Heads) -> Tensor:
    """(C, C): the transition matrix, from the labels of the anchors."""
    anchors = _anchors(data, heads)
    pairs = torch.arange(data.classes, device=anchors.device) * data.classes + data.labels[anchors]
    counts = torch.bincount(pairs.flatten(), minlength=data.classes**2)  # of anchors of z labelled y
    counts = counts.view(data.classes, data.classes).float()
    return _without_chance(counts, torch.zeros_like(counts))


def _transition(data: Data, evidence: "_Evidence", transition: Tensor) -> Tensor:
    """(C, C): the transition matrix under which the labels are likeliest, the evidence for true classes being given.

    Fitted to some samples in a few passes; where these are few a class, to all samples, in one.
    """
    few = len(evidence.some) < min(len(data), ENOUGH * data.classes)
    for _ in range(1 if few else PASSES):
        counts, variance = torch.zeros_like(transition), torch.zeros_like(transition)  # of samples of z labelled y
        for logits, rows in evidence.in_blocks() if few else [(evidence.logits_of_some, evidence.some)]:
            posterior = _given_labels(logits, transition, data.labels[rows])
            counts.index_add_(1, data.labels[rows], posterior.T)
            variance.index_add_(1, data.labels[rows], (posterior * (1 - posterior)).T)
        transition = _without_chance(counts, variance)
    return transition


def _without_chance(counts: Tensor, variance: Tensor) -> Tensor:
    """(C, C), rows sum to 1: shares of counts, (C, C); off the diagonal, what does not stand out shares one rate."""
    own = torch.eye(len(counts), dtype=torch.bool, device=counts.device)
    sizes = counts.sum(dim=1, keepdim=True).clamp(min=1e-9).expand_as(counts)
    apart = torch.zeros_like(own)
    for _ in range(6):  # the background is what does not stand out from it
        rest = ~(apart | own)
        background = counts[rest].sum() / sizes[rest].sum().clamp(min=1e-9)
        expected = background * sizes
        apart = (counts > 1.5 * expected + STANDS_OUT * (expected + variance + 0.5).sqrt()) & ~own
    wrong = torch.where(apart, counts / sizes, background).masked_fill(own, 0)
    wrong = wrong / (wrong.sum(dim=1, keepdim=True) / 0.95).clamp(min=1)
    return wrong + torch.diag(1 - wrong.sum(dim=1))


def _anchors(data: Data, heads: _Heads) -> Tensor:
    """(m, C), int64: of each class the rows whose posterior of it is highest, whatever their label."""
    per_class = min(len(data), max(20, round(ANCHORS * len(data) / data.classes)))
    best = torch.empty(0, data.classes, device=data.labels.device)
    rows_of = torch.empty(0, data.classes, dtype=torch.int64, device=data.labels.device)
    for rows in data.blocks():
        values = torch.cat([best, heads.logits(rows).softmax(dim=1)])
        candidates = torch.cat([rows_of, rows[:, None].expand(-1, data.classes)])
        best, places = values.topk(min(per_class, len(values)), dim=0)
        rows_of = candidates.gather(0, places)
    return rows_of


class _Evidence:
    """What speaks for the classes of an image: the data's own evidence, of heads and neighbours, and the prompts."""

    def __init__(
        self, data: Data, heads: _Heads, temperature: float, unknown: tuple[int, ...], transition: Tensor, seed: int
    ) -> None:
        self.data, self.heads, self.temperature, self.unknown = data, heads, temperature, list(unknown)
        self.neighbours = _Neighbours(data, heads, transition, seed)
        self.some = data.some(seed)  # rows that weights, and then the transition matrix, are fitted to
        parts = heads.logits(self.some).log_softmax(dim=1), self.neighbours.log_posterior(self.some)
        self.of_neighbours = self._weight_of_neighbours(torch.stack(parts), transition)
        own = self._joined(*parts)
        prompts = self._prompts(self.some, own)
        self.share = self._share_against_prompts(own, prompts, transition)
        self.logits_of_some = torch.lerp(prompts, own, self.share)

    def _weight_of_neighbours(self, parts: Tensor, transition: Tensor) -> float:
        """Against heads: under which the labels are likeliest."""
        weights = _likeliest(
            torch.zeros(2, device=transition.device),
            lambda weights: torch.tensordot(weights.softmax(dim=0), parts, dims=1),
            transition,
            self.data.labels[self.some],
        )
        return float(weights.softmax(dim=0)[1])

    def _share_against_prompts(self, own: Tensor, prompts: Tensor, transition: Tensor) -> float:
        """Of heads and neighbours: what they gain over the prompts in hits, against what they gain in likelihood."""
        labels, both = self.data.labels[self.some], (own, prompts)
        hits, hits_of_prompts = (float((logits.argmax(dim=1) == labels).float().mean()) for logits in both)
        likelihood, likelihood_of_prompts = (
            float((logits.softmax(dim=1) * transition.T[labels]).sum(dim=1).clamp(min=1e-9).log().mean())
            for logits in both
        )
        gain = max(0.0, hits - hits_of_prompts) / max(hits - 1 / self.data.classes, 1e-6)
        learnt = max(0.0, likelihood - likelihood_of_prompts) / 2
        return gain / (gain + learnt + BY_CHANCE)

    def noise_rate(self, transition: Tensor) -> float:
        """The share of wrong labels, if they come about by this transition matrix."""
        return float(1 - (self.logits_of_some.softmax(dim=1) @ transition.diagonal()).mean())

    def gain(self, transition: Tensor, even: Tensor) -> float:
        """By how many log C nats a wrong label this transition matrix makes the labels likelier than an even one."""
        posterior, labels = self.logits_of_some.softmax(dim=1), self.data.labels[self.some]
        likelihoods = [(posterior * matrix.T[labels]).sum(dim=1).clamp(min=1e-9).log() for matrix in (transition, even)]
        nats = float((likelihoods[0] - likelihoods[1]).mean())
        return nats / max(self.noise_rate(transition) * math.log(self.data.classes), 1e-9)

    def logits(self, rows: Tensor) -> Tensor:
        """(b, C): log p(z | image) up to a constant, by what did not see the label."""
        own = self.heads.logits(rows).log_softmax(dim=1)
        if self.of_neighbours >= NEGLIGIBLE:
            own = self._joined(own, self.neighbours.log_posterior(rows))
        return torch.lerp(self._prompts(rows, own), own, self.share)

    def in_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits of all samples and their rows, block by block."""
        for rows in self.data.blocks():
            yield self.logits(rows), rows

    def _joined(self, heads: Tensor, neighbours: Tensor) -> Tensor:
        """(b, C): the log posterior of heads and neighbours."""
        return torch.lerp(heads, neighbours, self.of_neighbours).log_softmax(dim=1)

    def _prompts(self, rows: Tensor, own: Tensor) -> Tensor:
        """(b, C): the log posterior of zero-shot classification; of classes that CLIP does not know, `own`."""
        logits = self.data.directions(rows) @ self.data.text.T / self.temperature
        if not self.unknown:
            return logits.log_softmax(dim=1)
        unknown = own[:, self.unknown]
        known = torch.log1p(-unknown.exp().sum(dim=1, keepdim=True).clamp(max=1 - 1e-6))
        logits[:, self.unknown] = -torch.inf
        logits = logits.log_softmax(dim=1) + known
        logits[:, self.unknown] = unknown
        return logits


class _Neighbours:
    """The classes of an image's nearest neighbours among references, whose labels are judged by the heads first."""

    def __init__(self, data: Data, heads: _Heads, transition: Tensor, seed: int) -> None:
        self.data = data
        self.rows = _drawn(len(data), min(len(data), REFERENCES), (seed, 2)).to(data.labels.device)
        self.directions = data.directions(self.rows) - data.mean
        self.posterior = torch.cat(
            [
                _given_labels(heads.logits(rows), transition, data.labels[rows])
                for rows in self.rows.split(BLOCK // data.classes)
            ]
        )

    def log_posterior(self, rows: Tensor) -> Tensor:
        """(b, C): the log of the neighbours' mean posterior, the nearer the heavier, with half a neighbour of doubt."""
        with fast_products():
            similarity = (self.data.directions(rows) - self.data.mean) @ self.directions.T
        place = torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)
        itself = self.rows[place] == rows
        similarity[itself.nonzero()[:, 0], place[itself]] = -torch.inf
        nearest, which = _largest(similarity, min(NEIGHBOURS, len(self.rows)))
        weights = ((nearest - nearest[:, :1]) / BANDWIDTH).softmax(dim=1)
        mean = embedding_bag(which, self.posterior, per_sample_weights=weights, mode="sum")
        doubt = 0.5 / NEIGHBOURS
        return ((mean + doubt / self.data.classes) / (1 + doubt)).log()


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two of (b, k): the k largest of each row, falling, and their columns.

    They lie in the k groups of columns with the largest maxima, so that two short lists are sorted instead of all.
    """
    samples, columns = values.shape
    if columns % GROUP or columns <= GROUP * k:
        return values.topk(k, dim=1)
    grouped = values.view(samples, GROUP, columns // GROUP)
    groups = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    largest, place = grouped.gather(2, groups[:, None].expand(-1, GROUP, -1)).flatten(1).topk(k, dim=1)
    return largest, groups.gather(1, place % k) + place // k * (columns // GROUP)


def _likeliest(parameters: Tensor, logits: Callable[[Tensor], Tensor], transition: Tensor, labels: Tensor) -> Tensor:
    """The parameters, (M,), found from those given, with whose logits the labels are likeliest."""
    parameters = parameters.clone().requires_grad_()
    columns = transition.T[labels]
    optimizer = torch.optim.LBFGS([parameters], max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(logits(parameters).softmax(dim=1) * columns).sum(dim=1).clamp(min=1e-9).log().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters.detach()


def _given_labels(logits: Tensor, transition: Tensor, labels: Tensor) -> Tensor:
    """(b, C): the posterior of the true class, the label as given known as well."""
    joint = logits.softmax(dim=1) * transition.T[labels]
    return joint / joint.sum(dim=1, keepdim=True).clamp(min=1e-30)


def _of_label(posterior: Tensor, labels: Tensor) -> Tensor:
    return posterior.gather(1, labels[:, None])[:, 0]


def _uniform(classes: int, rate: float) -> Tensor:
    """(C, C): a transition matrix under which every wrong label is equally likely."""
    return torch.full((classes, classes), rate / (classes - 1)).fill_diagonal_(1 - rate)


def _drawn(samples: int, count: int, seed: tuple[int, int]) -> Tensor:
    """(count,), int64, ascending: rows drawn at random."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(samples)[:count]))
