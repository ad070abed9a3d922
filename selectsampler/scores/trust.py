"""Label trust: how likely each label is right, calibrated without clean labels, and with it how noisy a data set is."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selectsampler.precision import full_precision
from selectsampler.progress import progress_bar
from selectsampler.scores.transition import (
    anchored_transition,
    even_transition,
    given_labels,
    likeliest,
    of_label,
)
from selectsampler.scores.trust_evidence import Evidence, likeliest_transition
from selectsampler.scores.trust_heads import ROUNDS, STEPS, Data, Heads
from selectsampler.validation import as_seed, check_features, check_labels

__all__ = ["Trust", "label_trust"]

FLATTERED = 1.33  # how much too high a temperature noise that follows the image can make likely
TELLING = 0.45  # what classes must say of their images' wrong labels, that confusions of classes count; see `gain`


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
        by_class: whether confusions of classes took part in the probability, or an even matrix of the same noise rate.
    """

    probability: Tensor
    transition: Tensor
    noise_rate: float
    class_noise: Tensor
    unknown: tuple[int, ...]
    by_class: bool


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
    rest. Nobody gains by having learned that images of one class are labelled as another: who gains less in hits
    through a T that suits each gains just that, and nothing whose labels are no likelier through it. Then T is taken
    anew, from all samples by expectation and maximisation; confusions that do not stand out share one rate. In the end

        trust = P(z = y | image, y) = p(y | image) T[y, y] / sum_z p(z | image) T[z, y].

    That blames confusions on the class. Where it is the image that is hard to tell, an even T of the same noise rate
    ranks better, and stands in for T here unless T makes the labels likelier by at least 0.45 d^2 log C nats for each
    wrong label: log C if the class alone said what an image is mistaken for, 0 if it said nothing, d being the doubt of
    the evidence, the mean of 1 - sum_z p(z | image)^2: the more it doubts, the more T fits its errors. That was chosen
    by what ranks better on noise of seven kinds, in and off CLIP's domain.

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
    seed = as_seed(seed)
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
        transition = even_transition(classes, 0.1).to(labels.device)
        heads = Heads(data, _fitted_temperature(data, transition, seed), folds, seed)
        with progress_bar("trust", ROUNDS * STEPS, unit="step", show=progress) as bar:
            for number in range(ROUNDS):
                heads.train(transition, seed=(seed, number), advance=bar.update)
                transition = anchored_transition(data, heads)
        fitted = _fitted_temperature(data, transition, seed)
        temperature = fitted if temperature is None else min(fitted, max(temperature, fitted / FLATTERED))
        evidence = Evidence(data, heads, temperature, unknown, transition, seed)
        transition = likeliest_transition(data, evidence, transition)
        rate = max(evidence.noise_rate(transition), 1 / samples)  # at 0 every label would be equally right
        even = even_transition(classes, rate).to(labels.device)
        by_class = evidence.gain(transition, even) >= TELLING
        judging = transition if by_class else even
        probability = torch.cat(
            [
                of_label(given_labels(logits, judging, labels[rows]), labels[rows])
                for logits, rows in evidence.in_blocks()
            ]
        )
    wrong = 1 - probability
    counts = torch.bincount(labels, minlength=classes)
    class_noise = torch.zeros(classes, device=labels.device).index_add_(0, labels, wrong) / counts
    return Trust(probability, transition, float(wrong.mean()), class_noise, unknown, by_class)


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
    return 1 / float(likeliest(start, lambda log: log.exp() * cosines, transition, data.labels[rows]).exp())
