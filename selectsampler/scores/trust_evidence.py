"""Of trust: what speaks for the classes of an image, the prompts, the heads and the nearest neighbours, weighed."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from selectsampler.precision import fast_products
from selectsampler.scores.transition import even_transition, given_labels, likeliest, without_chance
from selectsampler.scores.trust_heads import BLOCK, Data, Heads, drawn_rows

__all__ = ["Evidence", "likeliest_transition"]

PASSES = 8  # of expectation and maximisation, for the last transition matrix
ENOUGH = 20  # samples a class that it takes to tell one confusion from chance
BY_CHANCE = 0.01  # a gain in hits over the prompts that says little
REFERENCES, NEIGHBOURS, BANDWIDTH = 4096, 50, 0.1
GROUP = 8  # references of which the most similar is looked at first
NEGLIGIBLE = 0.02  # a weight of the neighbours that is not worth looking them up


class Evidence:
    """What speaks for the classes of an image: the data's own evidence, of heads and neighbours, and the prompts."""

    def __init__(
        self, data: Data, heads: Heads, temperature: float, unknown: tuple[int, ...], transition: Tensor, seed: int
    ) -> None:
        self.data, self.heads, self.temperature, self.unknown = data, heads, temperature, list(unknown)
        self.neighbours = Neighbours(data, heads, transition, seed)
        self.some = data.some(seed)  # rows that weights, and then the transition matrix, are fitted to
        parts = heads.logits(self.some).log_softmax(dim=1), self.neighbours.log_posterior(self.some)
        self.of_neighbours = self._weight_of_neighbours(torch.stack(parts), transition)
        own = self._joined(*parts)
        prompts = self._prompts(self.some, own)
        self.share = self._share_against_prompts(own, prompts, transition)
        self.logits_of_some = torch.lerp(prompts, own, self.share)

    def _weight_of_neighbours(self, parts: Tensor, transition: Tensor) -> float:
        """Against heads: under which the labels are likeliest."""
        weights = likeliest(
            torch.zeros(2, device=transition.device),
            lambda weights: torch.tensordot(weights.softmax(dim=0), parts, dims=1),
            transition,
            self.data.labels[self.some],
        )
        return float(weights.softmax(dim=0)[1])

    def _share_against_prompts(self, own: Tensor, prompts: Tensor, transition: Tensor) -> float:
        """Of heads and neighbours: what they gain over the prompts in hits, against what they gain in likelihood.

        In hits as they are and through transition matrices that suit each, whichever gains less: that images of one
        class are labelled as another is no merit of who has learned it.
        """
        labels, both = self.data.labels[self.some], [logits.softmax(dim=1) for logits in (own, prompts)]
        plain, plain_of_prompts = (_fit(posterior, labels) for posterior in both)
        anchored, anchored_of_prompts = (_fit(posterior @ transition, labels) for posterior in both)
        suited, suited_of_prompts = (_fit(posterior @ self._suited(posterior), labels) for posterior in both)
        if suited.likelihood <= suited_of_prompts.likelihood:
            return 0.0
        gained = max(0.0, min(plain.hits - plain_of_prompts.hits, suited.hits - suited_of_prompts.hits))
        gain = gained / max(plain.hits - 1 / self.data.classes, 1e-6)
        learnt = max(0.0, anchored.likelihood - anchored_of_prompts.likelihood) / 2
        return gain / (gain + learnt + BY_CHANCE)

    def _suited(self, posterior: Tensor) -> Tensor:
        """(C, C): the transition matrix that makes the labels likeliest, this being the posterior of true classes.

        Confusions that do not stand out share one rate, unless the labels are so much likelier with one for each that
        it pays by the Bayesian information criterion, as with few classes. A class most of whose labels are of another
        is one that the evidence errs on: its labels count as right.
        """
        labels, classes = self.data.labels[self.some], self.data.classes
        each = even_transition(classes, 0.1).to(labels.device)
        for _ in range(PASSES):  # each by itself, as what stands out may do so only after some passes
            counts, variance = _counts(posterior.log(), each, labels)
            each = counts / counts.sum(dim=1, keepdim=True).clamp(min=1e-9)
        shared = without_chance(counts, variance)
        gain = _fit(posterior @ each, labels).likelihood - _fit(posterior @ shared, labels).likelihood
        price = (classes * (classes - 1) - 1) * math.log(len(labels)) / 2
        transition = each if gain * len(labels) > price else shared
        likely = transition.diagonal() >= transition.amax(dim=1)
        return transition.where(likely[:, None], torch.eye(classes, device=labels.device))

    def noise_rate(self, transition: Tensor) -> float:
        """The share of wrong labels, if they come about by this transition matrix."""
        return float(1 - (self.logits_of_some.softmax(dim=1) @ transition.diagonal()).mean())

    def gain(self, transition: Tensor, even: Tensor) -> float:
        """How much likelier one transition matrix makes the labels than an even one, where that is not for doubt.

        In nats for each wrong label, over log C and the square of the doubt: how often two classes drawn from the
        evidence for an image differ.
        """
        posterior, labels = self.logits_of_some.softmax(dim=1), self.data.labels[self.some]
        likelihoods = [(posterior * matrix.T[labels]).sum(dim=1).clamp(min=1e-9).log() for matrix in (transition, even)]
        nats = float((likelihoods[0] - likelihoods[1]).mean())
        doubt = float(1 - posterior.square().sum(dim=1).mean())
        return nats / max(self.noise_rate(transition) * math.log(self.data.classes) * doubt**2, 1e-9)

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


def likeliest_transition(data: Data, evidence: Evidence, transition: Tensor) -> Tensor:
    """(C, C): the transition matrix under which the labels are likeliest, the evidence for true classes being given.

    Fitted to some samples in a few passes; where these are few a class, to all samples, in one.
    """
    few = len(evidence.some) < min(len(data), ENOUGH * data.classes)
    for _ in range(1 if few else PASSES):
        counts = torch.zeros(2, *transition.shape, device=transition.device)
        for logits, rows in evidence.in_blocks() if few else [(evidence.logits_of_some, evidence.some)]:
            counts += _counts(logits, transition, data.labels[rows])
        transition = without_chance(*counts)
    return transition


class Fit(NamedTuple):
    """How often the likeliest label is the one given, and the mean log-likelihood of those given."""

    hits: float
    likelihood: float


def _fit(predicted: Tensor, labels: Tensor) -> Fit:
    """Of (b, C): the probability of every label of every sample."""
    likelihood = predicted.gather(1, labels[:, None]).clamp(min=1e-9).log().mean()
    return Fit(float((predicted.argmax(dim=1) == labels).float().mean()), float(likelihood))


def _counts(logits: Tensor, transition: Tensor, labels: Tensor) -> Tensor:
    """(2, C, C): how many samples of z are labelled y, in expectation, and the variance of that."""
    posterior = given_labels(logits, transition, labels)
    counts = torch.zeros(2, *transition.shape, device=transition.device)
    counts[0].index_add_(1, labels, posterior.T)
    counts[1].index_add_(1, labels, (posterior * (1 - posterior)).T)
    return counts


class Neighbours:
    """The classes of an image's nearest neighbours among references, whose labels are judged by the heads first."""

    def __init__(self, data: Data, heads: Heads, transition: Tensor, seed: int) -> None:
        self.data = data
        self.rows = drawn_rows(len(data), min(len(data), REFERENCES), (seed, 2)).to(data.labels.device)
        self.directions = data.directions(self.rows) - data.mean
        self.posterior = torch.cat(
            [
                given_labels(heads.logits(rows), transition, data.labels[rows])
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
        nearest, which = largest(similarity, min(NEIGHBOURS, len(self.rows)))
        weights = ((nearest - nearest[:, :1]) / BANDWIDTH).softmax(dim=1)
        mean = embedding_bag(which, self.posterior, per_sample_weights=weights, mode="sum")
        doubt = 0.5 / NEIGHBOURS
        return ((mean + doubt / self.data.classes) / (1 + doubt)).log()


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
