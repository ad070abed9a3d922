"""The selection: which samples to train on, with the proof of what it is worth, and select(), which makes it."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectsampler.export import write_array, write_lines, write_table
from selectsampler.optimizers import apportion, straight_through, top_k
from selectsampler.scores.table import Scores
from selectsampler.store import FORMAT, bytes_of, pack_strings, read_tensors, unpack_strings, write_tensors
from selectsampler.validation import as_indices, check_vector, resolve_budget

__all__ = ["PAPER_WEIGHTS", "Selection", "select"]

PAPER_WEIGHTS = {"semantic_alignment": 1.0, "sample_diversity": 0.1}

Quotas = Mapping[Any, int]


class Selection:
    """The samples to train on: exactly the budget, ascending, each once.

    >>> selection = Selection([5, 2, 9], population=10)
    >>> selection.indices, len(selection)
    (tensor([2, 5, 9]), 3)

    Args:
        indices: (k,), unique integers in [0, population), in any order.
        population: N, the size of the data set that they index.
        loss_weights: (k,), float, one for each index as given, or None: a weight of each sample's loss.
        objective: the sum of utilities over the selection; nan where there is none.
        bound: no subset of the size and quotas has a higher objective than this; nan where unknown.
        keys: (k,), file names or ids of the indices as given, or None.
        provenance: what made it, as JSON values.

    Raises:
        ValueError: if an index repeats or lies outside, or lengths differ.
    """

    def __init__(
        self,
        indices: Tensor | Sequence[int],
        population: int,
        *,
        loss_weights: Tensor | None = None,
        objective: float = math.nan,
        bound: float = math.nan,
        keys: Sequence[str] | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.indices = as_indices(indices, population=population)
        self.population = population
        order = torch.as_tensor(indices).detach().cpu().argsort() if len(indices) else self.indices
        self.loss_weights = None if loss_weights is None else _weights(loss_weights, len(self.indices))[order]
        if keys is not None and len(keys) != len(self.indices):
            raise ValueError(f"There are {len(keys)} keys for {len(self.indices)} indices.")
        self._keys = None if keys is None else [keys[i] for i in order.tolist()]
        self.objective = float(objective)
        self.bound = float(bound)
        self.provenance = provenance or {}
        digest = hashlib.sha256(bytes_of(self.indices))
        if self.loss_weights is not None:
            digest.update(b"weights" + bytes_of(self.loss_weights))
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        return f"Selection({len(self)} of {self.population}, fingerprint {self.fingerprint[:8]})"

    def weights_for(self, indices: Tensor | Sequence[int]) -> Tensor:
        """(B,), float32: the loss weights of these data set indices, 1 where the selection has none.

        Raises:
            ValueError: if an index is not selected.
        """
        asked = torch.as_tensor(indices, dtype=torch.int64)
        here = asked.cpu()
        if not len(self.indices):
            positions, found = here, torch.zeros_like(here, dtype=torch.bool)
        else:
            positions = torch.searchsorted(self.indices, here).clamp(max=len(self.indices) - 1)
            found = self.indices[positions] == here
        if not found.all():
            raise ValueError(f"Index {int(here[~found][0])} is not selected, so that it has no weight.")
        weights = torch.ones(len(here)) if self.loss_weights is None else self.loss_weights[positions]
        return weights.to(asked.device)

    def keys(self) -> list[str]:
        """File names of the selected samples, or their indices as text where the data set has no names."""
        return [str(i) for i in self.indices.tolist()] if self._keys is None else list(self._keys)

    def verify(self, dataset: Any) -> None:
        """Check that `dataset` is the one that this was selected from: its size, its file names and its content.

        Labels are not compared: they may be given from outside.

        Raises:
            ValueError: saying what differs; nothing, if all is as it was.
        """
        from selectsampler.embeddings.datasets import as_images
        from selectsampler.embeddings.encode import dataset_fingerprint

        images = as_images(dataset)
        if len(images) != self.population:
            raise ValueError(f"The data set has {len(images)} samples; {self.population} were there to select from.")
        names = images.keys()
        if names is not None and self._keys is not None:
            for index, key in zip(self.indices.tolist(), self._keys, strict=True):
                if names[index] != key:
                    raise ValueError(f"Sample {index} is {names[index]!r} now, but was {key!r} when it was selected.")
        by_identity = (
            self.provenance.get("fingerprint", "auto") == "auto"
        )  # others are not known without decoding every image
        made_from = self.provenance.get("inputs") if by_identity else None
        if made_from is not None and dataset_fingerprint(images) not in (None, made_from):
            raise ValueError("The data set changed after the selection: a file's name, size or content. Select again.")

    def export(self, path: Path | str) -> None:
        """Write what was selected for other programs, by the ending of `path`.

        `.txt`: file names, one a line; `.npy`: the indices, int64; `.csv` and `.parquet`: index, key and loss weight.
        """
        path = Path(path)
        if path.suffix == ".txt":
            write_lines(path, self.keys())
        elif path.suffix == ".npy":
            write_array(path, self.indices.numpy())
        else:
            table: dict[str, list[Any]] = {"index": self.indices.tolist(), "key": self.keys()}
            if self.loss_weights is not None:
                table["loss_weight"] = self.loss_weights.tolist()
            write_table(path, table)

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, atomically."""
        tensors = {"indices": self.indices}
        if self.loss_weights is not None:
            tensors["loss_weights"] = self.loss_weights
        if self._keys is not None:
            tensors["keys"] = pack_strings(self._keys)
        metadata = {
            "kind": "selection",
            "format": FORMAT,
            "population": self.population,
            "objective": None if math.isnan(self.objective) else self.objective,
            "bound": None if math.isnan(self.bound) else self.bound,
            "fingerprint": self.fingerprint,
            "provenance": self.provenance,
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "Selection":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, holds something else, or does not match its fingerprint.
        """
        tensors, metadata = read_tensors(path, kind="selection")
        selection = cls(
            tensors["indices"],
            metadata["population"],
            loss_weights=tensors.get("loss_weights"),
            objective=math.nan if metadata["objective"] is None else metadata["objective"],
            bound=math.nan if metadata["bound"] is None else metadata["bound"],
            keys=unpack_strings(tensors["keys"]) if "keys" in tensors else None,
            provenance=metadata["provenance"],
        )
        if selection.fingerprint != metadata["fingerprint"]:
            raise ValueError(f"{path} does not match its fingerprint: it was changed after it was saved.")
        return selection


def select(
    scores: Scores | Tensor,
    keep: float | str | None = None,
    *,
    count: int | None = None,
    score_weights: Mapping[str, float] | None = None,
    balance: str | Quotas | None = None,
    method: str = "exact",
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """The subset of exactly floor(keep * N) samples that is worth most.

    >>> selection = select(torch.tensor([0.1, 0.9, 0.5, 0.7]), keep=0.5)
    >>> selection.indices
    tensor([1, 3])

    The objective is the sum of the samples' utilities, for `Scores` sum over scores of weight * scaled / mean(scaled)
    (`Scores.utility`; the selection optimization of arXiv 2410.11215), for a tensor its own entries.

    Args:
        scores: `Scores`, or one float tensor (N,) of your own, finite, higher is better.
        keep: a fraction in (0, 1] of all N samples, taken as the exact decimal it is written as: 0.29 of 100 is 29.
        count: a number of samples instead. Neither is needed where `balance` gives every quota.
        score_weights: name of a score -> its weight; by default the paper's, 1 for alignment and 0.1 for diversity.
        balance: None; `given`: every class gets its share of the budget as labelled, by largest remainder; or
            {class name or number: quota}, summing to the budget.
        method: `exact`, the optimum; `straight_through`, the paper's gradient optimizer, cut to the exact size.
        seed: of methods that draw at random; neither of these does.
        progress: show a bar on a terminal if it takes longer than two seconds.

    Raises:
        ValueError: for a keep outside (0, 1], a budget above the eligible samples, quotas that do not fit, or an
            unknown score or method.
    """
    if not isinstance(scores, (Scores, Tensor)):
        raise ValueError(f"select takes Scores or a tensor, not a {type(scores).__name__}: call score() first.")
    if keep is None and count is None and isinstance(balance, Mapping):
        count = int(sum(balance.values()))
    table = Scores({"utility": scores}) if isinstance(scores, Tensor) else scores
    budget = resolve_budget(keep, count, len(table))
    eligible = torch.arange(len(table)) if table.eligible is None else table.eligible.cpu().nonzero()[:, 0]
    if budget > len(eligible):
        raise ValueError(
            f"The budget is {budget}, but only {len(eligible)} of {len(table)} samples can be selected (the "
            f"others are unreadable): use count={len(eligible)} at most."
        )
    terms = _utility_terms(scores, score_weights)[:, eligible]
    quotas = None if balance is None else _quotas(table, balance, budget, eligible)
    groups = None if quotas is None or table.labels is None else table.labels.cpu()[eligible]
    details: dict[str, Any] = {"method": method, "seed": seed}
    utility = terms.sum(dim=0)
    optimum = top_k(utility, budget, groups=groups, quotas=quotas)
    if method == "exact":
        chosen = optimum
    elif method == "straight_through":
        if quotas is not None:
            raise ValueError("method='straight_through' knows no quotas: use method='exact', or balance=None.")
        result = straight_through(terms, budget, progress=progress)
        chosen = result.indices
        curve = result.loss_curve[:: max(1, len(result.loss_curve) // 100)]
        details |= {"gap": result.gap, "converged_size": result.converged_size, "steps": len(result.loss_curve)}
        details |= {"converged": result.converged, "loss_curve": curve}
    else:
        raise ValueError(f"method is {method!r}, but it must be 'exact' or 'straight_through'.")
    indices = eligible[chosen]
    weights = None
    if not isinstance(scores, Tensor):
        weights = {name: float(weight) for name, weight in (score_weights or PAPER_WEIGHTS).items()}
    details |= {"keep": None if keep is None else str(keep), "count": budget, "score_weights": weights}
    quota_of = {str(c): int(q) for c, q in balance.items()} if isinstance(balance, Mapping) else balance
    details["balance"] = quota_of
    return Selection(
        indices,
        len(table),
        objective=float(utility[chosen].sum()),
        bound=float(utility[optimum].sum()),
        keys=None if table.keys is None else [table.keys[i] for i in indices.tolist()],
        provenance={**table.provenance, "selection": details},
    )


def _weights(loss_weights: Tensor, samples: int) -> Tensor:
    weights = torch.as_tensor(loss_weights).detach().cpu().float()
    check_vector(weights, name="loss_weights", samples=samples)
    if (weights < 0).any():
        raise ValueError(f"loss_weights[{int((weights < 0).nonzero()[0])}] is negative.")
    return weights


def _utility_terms(scores: Scores | Tensor, score_weights: Mapping[str, float] | None) -> Tensor:
    """(T, N), float64, on the CPU: the weighted terms whose sum is the utility."""
    if isinstance(scores, Tensor):
        if score_weights is not None:
            raise ValueError("score_weights go with Scores; a tensor of your own is the utility itself.")
        return scores.detach().cpu().double()[None]
    weights = PAPER_WEIGHTS if score_weights is None else score_weights
    if not weights:
        raise ValueError("score_weights is empty: name at least one score.")
    return torch.stack([scores.utility({name: weight}).cpu() for name, weight in weights.items()])


def _quotas(table: Scores, balance: str | Quotas, budget: int, eligible: Tensor) -> Tensor:
    """(C,), int64: how many samples of each class, summing to the budget."""
    if table.labels is None:
        raise ValueError("balance needs labels, and these scores have none.")
    labels = table.labels.cpu()
    names = list(table.class_names or [])
    classes = max(len(names), int(labels.max()) + 1)
    available = torch.bincount(labels[eligible], minlength=classes)
    if isinstance(balance, str):
        if balance != "given":
            raise ValueError(f"balance is {balance!r}, but it must be None, 'given' or {{class: quota}}.")
        return apportion(torch.bincount(labels, minlength=classes), budget, capacities=available)
    quotas = torch.zeros(classes, dtype=torch.int64)
    named: set[int] = set()
    for name, quota in balance.items():
        number = names.index(name) if name in names else name
        if not isinstance(number, Integral) or not 0 <= int(number) < classes:
            raise ValueError(f"balance names a class {name!r} that is not there.")
        if int(number) in named:
            raise ValueError(f"balance names class {number} twice, by its name and by its number.")
        if not isinstance(quota, Integral) or not 0 <= int(quota) <= int(available[int(number)]):
            raise ValueError(
                f"balance asks class {name!r} for {quota} samples, but it has {int(available[number])}: ask for a "
                "whole number up to that."
            )
        named.add(int(number))
        quotas[number] = int(quota)
    if int(quotas.sum()) != budget:
        raise ValueError(f"The quotas sum to {int(quotas.sum())}, but the budget is {budget}.")
    return quotas
