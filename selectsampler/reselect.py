"""Selection that follows the training: when to select again, on which losses, and the same on every process."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectsampler.distributed import check_agreement, from_rank_zero, gather, process_count
from selectsampler.optimizers import top_k
from selectsampler.sampler import SelectSampler
from selectsampler.selection import Selection
from selectsampler.validation import as_seed, check_vector

__all__ = ["LossTracker", "Reselect", "TrainingState", "soft_pruning", "trusted_and_hard"]


@dataclass(frozen=True)
class TrainingState:
    """What a `select_fn` sees of the training: the selection so far and the tracked losses, if there are any."""

    selection: Selection
    losses: "LossTracker | None"


SelectFn = Callable[[int, TrainingState], Selection]


class LossTracker:
    """Running loss of every sample: mean, variance and forgetting events.

    >>> losses = LossTracker(population=4)
    >>> losses.update(torch.tensor([2, 0]), torch.tensor([0.5, 3.0]))
    >>> losses.mean
    tensor([3.0000,    nan, 0.5000,    nan])

    Indices come from `sampler.batch_indices(step, batch_size)`, which is right behind any loader that reads ahead. On
    several processes losses wait until `synchronize`, which `Reselect` calls at every epoch, so that all ranks hold the
    same.

    Args:
        population: N, the size of the data set.
        momentum: in [0, 1): the weight of the past in mean and variance; 0 keeps the last loss.
    """

    def __init__(self, population: int, *, momentum: float = 0.9) -> None:
        if population < 1 or not 0 <= momentum < 1:
            raise ValueError(f"population={population}, momentum={momentum}: at least 1, and in [0, 1).")
        self.momentum = momentum
        self.mean = torch.full((population,), torch.nan)
        self.variance = torch.zeros(population)
        self.seen = torch.zeros(population, dtype=torch.int64)
        self.forgotten = torch.zeros(population, dtype=torch.int64)
        self.learned = torch.zeros(population, dtype=torch.bool)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, indices: Tensor, losses: Tensor) -> None:
        """Note the losses of a batch.

        Args:
            indices: (B,), int64, of the data set.
            losses: (B,), floating point, not reduced (`reduction="none"`). A sample counts as learned while its loss is
                below log 2: then its class has more than half the probability. Falling back is a forgetting event.
                Losses that are not finite, as of a step that overflows in half precision, are not noted.

        Raises:
            ValueError: if lengths differ, or an index lies outside the data set.
        """
        indices, losses = torch.as_tensor(indices).detach().cpu(), losses.detach().float().cpu()
        if losses.shape != indices.shape or losses.ndim != 1:
            raise ValueError(
                f"Losses have shape {tuple(losses.shape)}, indices {tuple(indices.shape)}: one loss a sample is "
                'needed, reduction="none".'
            )
        outside = (indices < 0) | (indices >= len(self.mean))
        if outside.any():
            raise ValueError(f"Index {int(indices[outside][0])} is not of this data set of {len(self.mean)} samples.")
        finite = losses.isfinite()
        indices, losses = indices[finite], losses[finite]
        if process_count() == 1:
            self._apply(indices, losses)
        else:
            self._waiting.append((indices, losses))

    def synchronize(self) -> None:
        """Share what every rank noted since the last time, so that all hold the same. All ranks must call it."""
        noted, self._waiting = self._waiting, []
        indices = gather(torch.cat([rows for rows, _ in noted]) if noted else torch.empty(0, dtype=torch.int64))
        losses = gather(torch.cat([values for _, values in noted]) if noted else torch.empty(0))
        self._apply(indices, losses)

    def state_dict(self) -> dict[str, Any]:
        """All that is known, as tensors; on several processes what was shared by the last `synchronize`."""
        return {name: getattr(self, name).clone() for name in self._columns()} | {"momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; a state of another data set is refused."""
        for name in self._columns():
            if name not in state or state[name].shape != self.mean.shape:
                raise ValueError(f"This is no state of a LossTracker of {len(self.mean)} samples: see {name!r}.")
            setattr(self, name, state[name].clone())
        self.momentum = state["momentum"]

    @staticmethod
    def _columns() -> tuple[str, ...]:
        return ("mean", "variance", "seen", "forgotten", "learned")

    def _apply(self, indices: Tensor, losses: Tensor) -> None:
        rows, first = _first_of_each(indices)  # an epoch's padding shows a sample twice
        losses = losses[first]
        known = self.seen[rows] > 0
        step = losses - self.mean[rows]
        gain = 1 - self.momentum
        self.mean[rows] = torch.where(known, self.mean[rows] + gain * step, losses)
        self.variance[rows] = torch.where(known, self.momentum * (self.variance[rows] + gain * step.square()), 0.0)
        learned = losses < math.log(2)
        self.forgotten[rows] += self.learned[rows] & ~learned
        self.learned[rows] = learned
        self.seen[rows] += 1


class Reselect:
    """Selects again while the model trains, on rank 0, and gives every rank the same selection.

    >>> reselect = Reselect(sampler, select_fn, every=5)             # doctest: +SKIP
    >>> for epoch in range(first_epoch, epochs):                     # doctest: +SKIP
    ...     reselect.on_epoch_start(epoch)

    Other ranks wait while rank 0 selects, as long as the process group lets them: for a `select_fn` of many minutes,
    one that embeds say, give `init_process_group` a long `timeout`. With `epoch_size` a renewed selection is walked
    from where the old one stood: that no sample repeats before all were seen holds from its next whole pass on.

    Args:
        sampler: whose selection is renewed.
        select_fn: (epoch, state) -> `Selection`; called on rank 0 alone. `state.selection` is the one so far,
            `state.losses` the tracker or None. None keeps the selection that the sampler has.
        every: epochs between selections, at least 1.
        start: the first epoch that selects.
        allow_resize: whether a selection may have another length; schedules that count batches must cope.
        losses: a `LossTracker` that the training loop feeds.
    """

    def __init__(
        self,
        sampler: SelectSampler,
        select_fn: SelectFn | None = None,
        *,
        every: int = 1,
        start: int = 0,
        allow_resize: bool = False,
        losses: LossTracker | None = None,
    ) -> None:
        if every < 1 or start < 0:
            raise ValueError(f"every={every}, start={start}: at least 1 and 0 are needed.")
        self.sampler = sampler
        self.select_fn = select_fn
        self.every = every
        self.start = start
        self.allow_resize = allow_resize
        self.losses = losses
        self.selected_at: int | None = None

    def due(self, epoch: int) -> bool:
        """Whether `epoch` starts with a new selection; one that was resumed in its middle does not."""
        scheduled = epoch >= self.start and (epoch - self.start) % self.every == 0
        return self.select_fn is not None and scheduled and epoch != self.selected_at

    def on_epoch_start(self, epoch: int) -> None:
        """Set the sampler's epoch, compare the ranks' selections, share their losses, and select again if it is due.

        Raises:
            ValueError: on every rank, if ranks hold different selections, or the new one has another length.
            RuntimeError: on every rank, if `select_fn` failed on rank 0 (with one process, its own error).
        """
        self.sampler.set_epoch(epoch)
        check_agreement(self.sampler.selection.fingerprint, what="the selection")
        if self.losses is not None:
            self.losses.synchronize()
        if self.select_fn is not None and self.due(epoch):
            self.sampler.update(self._select(self.select_fn, epoch), allow_resize=self.allow_resize)
            self.selected_at = epoch

    def state_dict(self) -> dict[str, Any]:
        """The selection, when it was made, and the losses: tensors and numbers, for any checkpoint."""
        selection = self.sampler.selection
        return {
            "selected_at": self.selected_at,
            "indices": selection.indices,
            "population": selection.population,
            "loss_weights": selection.loss_weights,
            "losses": None if self.losses is None else self.losses.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Install the selection of `state`, and its losses. Before or after the sampler's own state."""
        selection = Selection(state["indices"], state["population"], loss_weights=state["loss_weights"])
        if selection.fingerprint != self.sampler.selection.fingerprint:  # else keep its keys and provenance
            self.sampler.update(selection, allow_resize=True)
        self.selected_at = state["selected_at"]
        if self.losses is not None and state["losses"] is not None:
            self.losses.load_state_dict(state["losses"])

    def _select(self, select_fn: SelectFn, epoch: int) -> Selection:
        """Rank 0's selection, on every rank."""
        state = TrainingState(self.sampler.selection, self.losses)

        def make() -> Selection:
            made = select_fn(epoch, state)
            if not isinstance(made, Selection):
                raise ValueError(
                    f"select_fn returned a {type(made).__name__}: return a Selection(indices, population)."
                )
            return made

        return from_rank_zero(make, what=f"the selection of epoch {epoch}")


def trusted_and_hard(trust: Tensor, count: int, *, classes: int, seed: int = 0) -> SelectFn:
    """A `select_fn` that draws what is probably labelled right and not learned yet, anew each time.

    The network being trained is a second judge of the labels: p = exp(-mean loss) is the probability that it gives
    them, against what `trust` says. With the rest of both spread evenly over the other classes,

        right = trust p / (trust p + (1 - trust) (1 - p) / (classes - 1)),

    and samples are drawn without repetition in proportion to right * (1 - p). So a high loss on a sample whose label is
    not trusted does not count as hard, what is learned comes less often, and a label that only the network believes
    comes back. Samples that were not seen yet stand at chance, p = 1 / classes, where right = trust.

    >>> losses = LossTracker(3, momentum=0.0)
    >>> losses.update(torch.tensor([0, 1, 2]), torch.tensor([9.0, 1.0, 0.0]))
    >>> select_fn = trusted_and_hard(torch.tensor([0.01, 0.9, 0.9]), count=1, classes=10)
    >>> select_fn(0, TrainingState(Selection([0], population=3), losses)).indices
    tensor([1])

    Args:
        trust: (N,), floating point, in [0, 1]: how likely each label is right, as by adapters that did not see it.
        count: samples to select.
        classes: C, at least 2.
        seed: of the draws, mixed with the epoch.
    """
    seed = as_seed(seed)
    check_vector(trust, name="trust")
    if (trust < 0).any() or (trust > 1).any():
        raise ValueError("trust must lie in [0, 1]: a probability that the label is right.")
    if classes < 2:
        raise ValueError(f"classes is {classes}, but there must be at least two for a label to be wrong.")
    known = trust.cpu().double()

    def select_fn(epoch: int, state: TrainingState) -> Selection:
        p = (-_mean_losses(state)).exp().nan_to_num(1 / classes)
        right = known * p / (known * p + (1 - known) * (1 - p) / (classes - 1)).clamp_min(1e-300)
        weight = right * (1 - p)
        race = torch.from_numpy(np.random.default_rng([seed, epoch]).exponential(size=len(known)))
        chosen = top_k(weight / race, count)  # the first `count` of clocks that ring at these rates
        return Selection(chosen, len(known), provenance={"select_fn": "trusted_and_hard", "epoch": epoch})

    return select_fn


def soft_pruning(prune: float, *, among: Tensor | None = None, seed: int = 0) -> SelectFn:
    """A `select_fn` in the manner of InfoBatch (arXiv 2303.04947): easy samples are skipped at random, and weigh more.

    Samples whose mean loss lies below the mean of all are dropped with probability `prune`; those that stay get a loss
    weight of 1 / (1 - prune), so that the expected gradient is that of all samples. Use
    `selection.weights_for(indices)` on the losses, and `Reselect(..., allow_resize=True)`, since the number varies.

    Args:
        prune: in [0, 1).
        among: (k,), indices that may be selected at all, as of trusted samples; None: all.
        seed: of the draws, mixed with the epoch.
    """
    seed = as_seed(seed)
    if not 0 <= prune < 1:
        raise ValueError(f"prune is {prune}, but it must lie in [0, 1).")

    def select_fn(epoch: int, state: TrainingState) -> Selection:
        loss = _mean_losses(state)
        rows = torch.arange(len(loss)) if among is None else among.cpu().sort().values
        easy = loss[rows] < loss[rows].nanmean()  # false for samples that were not seen
        random = torch.from_numpy(np.random.default_rng([seed, epoch]).random(len(rows)))
        kept = ~easy | (random >= prune)
        weights = torch.where(easy, 1 / (1 - prune), 1.0)[kept]
        provenance = {"select_fn": "soft_pruning", "epoch": epoch, "prune": prune}
        return Selection(rows[kept], len(loss), loss_weights=weights, provenance=provenance)

    return select_fn


def _mean_losses(state: TrainingState) -> Tensor:
    if state.losses is None:
        raise ValueError("This select_fn needs losses: pass Reselect(..., losses=LossTracker(population)).")
    return state.losses.mean.double()


def _first_of_each(indices: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct indices, and where each stands first."""
    rows, inverse = indices.unique(return_inverse=True)
    first = torch.full_like(rows, len(indices)).scatter_reduce_(0, inverse, torch.arange(len(indices)), "amin")
    return rows, first
