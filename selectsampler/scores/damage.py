"""Is an image damaged? Learned from images of the data set itself and from their twins, damaged on purpose."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, logsigmoid

from selectsampler.precision import fast_products, full_precision
from selectsampler.validation import as_seed, check_features, check_mask

__all__ = ["intactness"]

FEWEST = 30  # images that have twins; from fewer nothing can be learned
FOLDS = 4
HIDDEN = 128
ROUNDS = ((250, 1.0), *[(250, 0.5)] * 4, (500, 0.8))  # steps, and the share of the images that are examples
MANY = 2000  # twins from which on these are the steps
BATCH = 256
LEARNING_RATE = 5e-3
STRANGERS = 0.2  # weight of images of no known kind of damage, beside the twins
MADE = 2**14  # such images, of which every batch draws some
ANCHOR = 0.03  # weight of the loss that takes every image for intact; see `_loss`
LEAST, LEAST_OF_KIND = 5e-3, 1e-3  # shares of damaged images, of all kinds and of one, below which none is estimated
FEW = 20  # twins: of one kind, with fewer it is not judged by itself; of a fold, with fewer suspects have theirs too
OUTRANK = 0.65  # share of pairs in which a twin must outrank an image, that its evidence counts
BY_KINDS = 1 / 3  # weight of what each kind's own evidence says; the rest is that of all evidence together
SLOPE = 1e-2  # weight of the expectation that evidence is a log ratio as it stands


def intactness(
    image_statistics: Tensor,
    twins: Tensor,
    twin_statistics: Tensor,
    *,
    eligible: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """How likely each image is intact, in [0, 1], higher is better; below 0.5 it is more likely damaged.

    >>> intact = intactness(embeddings.image_statistics, embeddings.twins, embeddings.twin_statistics)  # doctest: +SKIP
    >>> suspects = (intact < 0.5).nonzero()[:, 0]                                                     # doctest: +SKIP

    `embed` damages some images of the data set in ways of its own, and notes the statistics of these twins. A small
    network learns to say which of the two, image or twin, was damaged, and how. Comparing an image with its own twin
    cancels what the image shows, so that a rare image hardly falls below 0.5, and holds where many images of the data
    set are damaged already: it is hardly told that they are intact, only that their twins are worse. Statistics of many
    images thrown together stand for damage of an unknown kind. No image is judged by a network that saw it or its twin.
    The answer is the mean, in log odds, of two: by all kinds together, which also finds what resembles none of them,
    and by each kind as often as it seems to occur, which finds the one kind that has hit many images.
    CLIP's features take no part: they tell what an image shows, which the comparison with its twin is to cancel, and
    those of the twins would cost a second pass of the encoder.

    Limits: it sees what the statistics see, not content, and of an image larger than 256 pixels the middle only. Damage
    unlike that of all twins is found less surely, or not at all; so is damage that was stored as JPEG afterwards, and
    all damage where there are only a few hundred twins. Where one mild kind of damage has hit many images it looks
    normal, and few of them fall below 0.5, though they rank below the intact ones. Intact images that look unlike all
    others rank below them as well: grey ones among coloured ones, or those with white bars (`benchmarks/damage.py`).

    Args:
        image_statistics: (N, S), floating point, finite, as `embed` notes them.
        twins: (T, 2), int64: the image that a twin was made from, in [0, N), and the number of its kind of damage.
        twin_statistics: (T, S), floating point, finite.
        eligible: (N,), bool; the others (unreadable images) take no part and get 0. None: all are.
        seed: of the folds, the batches and the networks.

    Returns:
        (N,), float32, on the device of the input.

    Raises:
        ValueError: if there are no statistics, shapes do not fit, or fewer than 30 images have twins.
    """
    samples, seed = _check(image_statistics, twins, twin_statistics), as_seed(seed)
    if eligible is None:
        eligible = torch.ones(samples, dtype=torch.bool, device=twins.device)
    check_mask(eligible, name="eligible", samples=samples)
    known = eligible[twins[:, 0]]
    twins, twin_statistics = twins[known], twin_statistics[known]
    originals = len(twins[:, 0].unique())
    if originals < FEWEST:
        raise ValueError(
            f"There are damaged twins of {originals} images, but {FEWEST} are needed to learn from. embed() makes one "
            "of every fourth image: embed more images, or leave this score out."
        )
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, samples)).generate_state(1)[0]))
    scaled = _scaling(image_statistics[eligible])
    images, damaged = scaled(image_statistics[eligible]), scaled(twin_statistics)
    number = eligible.cumsum(0) - 1
    twins = torch.stack([number[twins[:, 0]], twins[:, 1].unique(return_inverse=True)[1]], dim=1)
    result = torch.zeros(samples, device=image_statistics.device)
    result[eligible] = _cross_fitted(images, damaged, twins, generator)
    return result


def _check(image_statistics: Tensor, twins: Tensor, twin_statistics: Tensor) -> int:
    if image_statistics is None or twins is None or twin_statistics is None:
        raise ValueError(
            "There are no image statistics or no damaged twins: embed() notes them while it sees the pixels, and "
            "features of one's own come without. Make the embeddings with embed(), or leave this score out."
        )
    check_features(image_statistics, name="image_statistics")
    check_features(twin_statistics, name="twin_statistics", dim=image_statistics.shape[1])
    if twins.dtype != torch.int64 or twins.shape != (len(twin_statistics), 2):
        raise ValueError(f"twins must be int64 of shape ({len(twin_statistics)}, 2), not {tuple(twins.shape)}.")
    if len(twins) and not 0 <= int(twins[:, 0].min()) <= int(twins[:, 0].max()) < len(image_statistics):
        raise ValueError(f"twins[:, 0] must lie in [0, {len(image_statistics)}), the rows of image_statistics.")
    if len(twins) and int(twins[:, 1].min()) < 0:
        raise ValueError(f"twins[:, 1] holds {int(twins[:, 1].min())}, but kinds of damage are numbered from 0.")
    return len(image_statistics)


def _scaling(values: Tensor) -> Callable[[Tensor], Tensor]:
    """Maps statistics to medians of 0 and deviations of 1, within 4 deviations."""
    values = values.float()
    middle, spread = values.median(dim=0).values, values.std(dim=0, correction=0) + 1e-6
    return lambda others: ((others.float() - middle) / spread).clamp(-4, 4)


def _cross_fitted(images: Tensor, damaged: Tensor, twins: Tensor, generator: torch.Generator) -> Tensor:
    """(n,), float32: the intactness of each image.

    Where one kind has damaged many images, their pairs teach that it is nothing (the twin is worse still). So who looks
    damaged in one round is no example in the next; step by step, as the first round can hardly tell.
    """
    folds = torch.randperm(len(images), generator=generator).to(images.device) % FOLDS
    odds = torch.zeros(len(images), device=images.device)
    effort = min(1.0, (len(twins) / MANY) ** 0.5)  # few twins are learned soon
    for steps, share in ROUNDS:
        usable = odds <= odds.sort().values[math.ceil(share * len(images)) - 1]
        networks = _train(images, damaged, twins, folds, usable, generator, steps=math.ceil(effort * steps))
        evidence = _evidence(networks, images, folds), _evidence(networks, damaged, folds[twins[:, 0]])
        odds = torch.lerp(_together(*evidence), _by_kinds(*evidence, twins[:, 1]), BY_KINDS)
    return torch.sigmoid(-odds).float()


def _together(of_images: Tensor, of_twins: Tensor) -> Tensor:
    """(n,), float64: log odds of damage in whatever way, also an unknown one, by the sum of all evidence."""
    return _log_odds(of_images.logsumexp(dim=1), of_twins.logsumexp(dim=1), least=LEAST)


def _by_kinds(of_images: Tensor, of_twins: Tensor, kind: Tensor) -> Tensor:
    """(n,), float64: log odds of damage of any known kind, each judged by its own evidence and twins.

    In the sum of all evidence kinds stand as often as there are twins of them. Here those that hardly occur count
    little, so that intact images that look a little like one of them do not outrank those damaged by another.
    """
    judged = [number for number in range(of_images.shape[1] - 1) if int((kind == number).sum()) >= FEW]
    if not judged:
        return _together(of_images, of_twins)
    intact = torch.zeros(len(of_images), dtype=torch.float64, device=of_images.device)  # log of the probability
    for number in judged:
        intact += logsigmoid(-_log_odds(of_images[:, number], of_twins[kind == number, number], least=LEAST_OF_KIND))
    return (-torch.expm1(intact.clamp(max=-1e-30))).log() - intact


def _train(
    images: Tensor,
    damaged: Tensor,
    twins: Tensor,
    folds: Tensor,
    usable: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
) -> list[Tensor]:
    """One small network a fold, side by side: statistics in, for each kind of damage log p(kind) / p(intact) out."""
    kinds = int(twins[:, 1].max()) + 2
    rows = [((folds != fold) & usable).nonzero()[:, 0] for fold in range(FOLDS)]
    pairs = [((folds != fold) & usable)[twins[:, 0]].nonzero()[:, 0] for fold in range(FOLDS)]
    if min(map(len, pairs)) < FEW:  # hardly an original is above suspicion
        pairs = [(folds != fold)[twins[:, 0]].nonzero()[:, 0] for fold in range(FOLDS)]
    shapes = ((images.shape[1], HIDDEN), (1, HIDDEN), (HIDDEN, kinds), (1, kinds))
    weights = [
        (torch.randn(FOLDS, *shape, generator=generator) * (shape[0] > 1) / shape[0] ** 0.5).to(images.device)
        for shape in shapes
    ]
    weights = [weight.requires_grad_() for weight in weights]
    fused = images.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-2, fused=fused)
    strangers = _strangers(images[usable], generator)
    everything = [torch.arange(len(strangers), device=images.device)] * FOLDS
    with fast_products():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
            pair, row, strange = (_draw(each, generator) for each in (pairs, rows, everything))
            parts = ((images, twins[pair, 0]), (damaged, pair), (images, row), (strangers, strange))
            batch = [values.index_select(0, each.flatten()).view(FOLDS, BATCH, -1) for values, each in parts]
            logits = _logits(weights, torch.cat(batch, dim=1)).split(BATCH, dim=1)
            loss = _loss(logits, twins[pair, 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [weight.detach() for weight in weights]


def _loss(logits: Sequence[Tensor], kind: Tensor) -> Tensor:
    """Sum over the networks of how badly they tell which of two images was damaged, and how.

    Conditional logistic regression: of all (image of the pair, kind) one is true. It says nothing of how one pair
    compares with another, nor of the level of the logits: a weak ordinary loss, for which every image of the data set
    is intact, settles that without teaching the networks the damage that is already there.
    """
    own, twin, other, strange = logits
    kinds = own.shape[-1]
    unknown = torch.full_like(kind, kinds - 1)
    paired = _entropy(torch.cat([twin, own], dim=-1), kind)
    paired = paired + STRANGERS * _entropy(torch.cat([strange, other], dim=-1), unknown)
    intact = torch.zeros_like(own[..., :1])
    alone = _entropy(torch.cat([other, intact], dim=-1), torch.full_like(kind, kinds))
    alone = alone + (1 - STRANGERS) * _entropy(torch.cat([twin, intact], dim=-1), kind)
    alone = alone + STRANGERS * _entropy(torch.cat([strange, intact], dim=-1), unknown)
    return (1 - ANCHOR) * paired + ANCHOR * alone / 2


def _entropy(logits: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), target.flatten()) * len(logits)


def _logits(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """(F, n, K) of (F, n, S)."""
    first, first_bias, second, second_bias = weights
    return gelu(inputs @ first + first_bias) @ second + second_bias


def _evidence(weights: Sequence[Tensor], inputs: Tensor, folds: Tensor) -> Tensor:
    """(n, K): log of p(damaged in this way) / p(intact) for each kind, the unknown last, by the network of the fold."""
    result = torch.zeros(len(inputs), weights[-1].shape[-1], device=inputs.device)
    with full_precision():
        for fold in range(FOLDS):
            rows = (folds == fold).nonzero()[:, 0]
            own = [weight[fold : fold + 1] for weight in weights]
            for chunk in rows.split(65536):
                result[chunk] = _logits(own, inputs[chunk][None])[0]
    return result


def _strangers(images: Tensor, generator: torch.Generator) -> Tensor:
    """(MADE, S): statistics that no image has: each principal component of another image, half as far again."""
    middle = images.mean(dim=0)
    centred = images - middle
    covariance = centred.T @ centred / len(images)
    axes = torch.linalg.eigh(covariance + 1e-2 * torch.eye(len(covariance), device=images.device)).eigenvectors
    rows = torch.randint(len(images), (MADE, len(axes)), generator=generator).to(images.device)
    mixed = (centred @ axes).gather(0, rows)
    return (1.5 * mixed @ axes.T + middle).clamp(-4, 4)


def _draw(rows: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """(F, n): of each set a batch, with replacement."""
    return torch.stack(
        [of_fold[torch.randint(len(of_fold), (BATCH,), generator=generator).to(of_fold.device)] for of_fold in rows]
    )


def _log_odds(of_images: Tensor, of_twins: Tensor, *, least: float) -> Tensor:
    """(n,), float64: log odds of damage, linear in the evidence.

    Slope and offset minimise, for evidence up to the median twin's, the logistic loss of learning from positive and
    unlabelled examples (du Plessis et al., ICML 2015): the mean probability is the estimated share of damaged images,
    and their mean evidence is that of the twins. Evidence being a log ratio of densities, a slope of 1 is expected, and
    taken where hardly any image says otherwise.
    """
    share = _share(of_images, of_twins, least)
    plain = of_twins.median()  # beyond it evidence is as good as certain, and does not bend the curve
    images, twins = of_images.clamp(max=plain).double(), of_twins.clamp(max=plain).double()
    middle = twins.mean()
    inputs = torch.stack([images - middle, torch.ones_like(images)], dim=1)
    target = torch.stack([torch.zeros_like(share), share])
    beta = torch.stack([torch.ones_like(share), torch.logit(share)])
    expected, prior = beta.clone(), torch.tensor([SLOPE, 1e-9], dtype=torch.float64, device=inputs.device)
    for _ in range(60):  # Newton's method, no step above 1; the loss is strictly convex
        p = torch.sigmoid(inputs @ beta)
        gradient = inputs.T @ p / len(images) - target + prior * (beta - expected)
        curvature = (inputs * (p * (1 - p))[:, None]).T @ inputs / len(images) + torch.diag(prior)
        step = torch.linalg.solve(curvature, gradient).clamp(-1, 1)
        beta = beta - step
        if float(step.abs().max()) < 1e-9:
            break
    slope = beta[0].clamp(min=1e-3)  # more evidence is never a better sign, whatever a handful of twins says
    return slope * (of_images.double() - middle) + beta[1]


def _share(of_images: Tensor, of_twins: Tensor, least: float) -> Tensor:
    """How many images are damaged: above no threshold more than there are, for each twin above it.

    Where twins hardly outrank images, the evidence knows nothing of damage, and no more than the least is assumed.
    """
    ranks = torch.searchsorted(of_images.sort().values, of_twins)
    if float(ranks.double().mean()) < OUTRANK * len(of_images):
        return torch.tensor(least, dtype=torch.float64, device=of_images.device)
    thresholds = of_twins.quantile(torch.linspace(0.1, 0.5, 20, device=of_twins.device))
    ratios = [(of_images >= t).double().mean() / (of_twins >= t).double().mean() for t in thresholds]
    return torch.stack(ratios).min().clamp(least, 0.5)
