"""Of trust: how likely a sample of one class is labelled as another, and what follows from it for a label."""

from collections.abc import Callable

import torch
from torch import Tensor

from selectsampler.scores.trust_heads import Data, Heads

__all__ = [
    "anchored_transition",
    "even_transition",
    "given_labels",
    "likeliest",
    "of_label",
    "without_chance",
]

ANCHORS = 0.06  # of a class's mean size: its anchors, the samples that are surest to be of it
EXCESS = 1.5  # times the background that a confusion must come to, and by
STANDS_OUT = 3.0  # standard deviations more, before it counts as one of its own
SETTLED = 6  # rounds after which it is settled which do
MOST_WRONG = 0.95  # share of a class's labels that may be wrong


def even_transition(classes: int, rate: float) -> Tensor:
    """(C, C): a transition matrix under which every wrong label is equally likely."""
    return torch.full((classes, classes), rate / (classes - 1)).fill_diagonal_(1 - rate)


def anchored_transition(data: Data, heads: Heads) -> Tensor:
    """(C, C): the transition matrix, from the labels of the anchors."""
    anchors = _anchors(data, heads)
    pairs = torch.arange(data.classes, device=anchors.device) * data.classes + data.labels[anchors]
    most = torch.bincount(data.labels, minlength=data.classes).clamp(min=2) // 2  # of a small class, not of others
    few_enough = torch.arange(len(anchors), device=anchors.device)[:, None] < most
    counts = torch.bincount(pairs[few_enough], minlength=data.classes**2)  # of anchors of z labelled y
    counts = counts.view(data.classes, data.classes).float()
    return without_chance(counts, torch.zeros_like(counts))


def without_chance(counts: Tensor, variance: Tensor) -> Tensor:
    """(C, C), rows sum to 1: shares of counts, (C, C); off the diagonal, what does not stand out shares one rate."""
    own = torch.eye(len(counts), dtype=torch.bool, device=counts.device)
    sizes = counts.sum(dim=1, keepdim=True).clamp(min=1e-9).expand_as(counts)
    apart = torch.zeros_like(own)
    for _ in range(SETTLED):  # the background is what does not stand out from it
        rest = ~(apart | own)
        background = counts[rest].sum() / sizes[rest].sum().clamp(min=1e-9)
        expected = background * sizes
        apart = (counts > EXCESS * expected + STANDS_OUT * (expected + variance + 0.5).sqrt()) & ~own
    wrong = torch.where(apart, counts / sizes, background).masked_fill(own, 0)
    wrong = wrong / (wrong.sum(dim=1, keepdim=True) / MOST_WRONG).clamp(min=1)
    return wrong + torch.diag(1 - wrong.sum(dim=1))


def _anchors(data: Data, heads: Heads) -> Tensor:
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


def likeliest(parameters: Tensor, logits: Callable[[Tensor], Tensor], transition: Tensor, labels: Tensor) -> Tensor:
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


def given_labels(logits: Tensor, transition: Tensor, labels: Tensor) -> Tensor:
    """(b, C): the posterior of the true class, the label as given known as well."""
    joint = logits.softmax(dim=1) * transition.T[labels]
    return joint / joint.sum(dim=1, keepdim=True).clamp(min=1e-30)


def of_label(posterior: Tensor, labels: Tensor) -> Tensor:
    """(b,): the posterior of the class that is the label."""
    return posterior.gather(1, labels[:, None])[:, 0]
