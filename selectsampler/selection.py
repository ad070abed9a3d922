"""The selection: which samples to train on, with the proof of what it is worth, and select(), which makes it."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectsampler.balance import Quotas, Shares
from selectsampler.export import write_array, write_lines, write_table
from selectsampler.grouping import rows_of_groups
from selectsampler.methods import Options, Problem, within_quotas, within_shares
from selectsampler.scores.table import Scores
from selectsampler.store import FORMAT, bytes_of, pack_strings, read_tensors, unpack_strings, write_tensors
from selectsampler.validation import as_indices, as_seed, check_vector, is_ascending, resolve_budget

__all__ = ["DEFAULT_WEIGHTS", "PAPER_WEIGHTS", "Selection", "select"]

PAPER_WEIGHTS = {"semantic_alignment": 1.0, "sample_diversity": 0.1}
DEFAULT_WEIGHTS = {"trust": 1.0, "intactness": 1.0}  # of these, those that were scored
SURE = 0.9  # at least this probable is the label of a sample that counts as surely right


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
        if keys is not None and len(keys) != len(self.indices):
            raise ValueError(f"There are {len(keys)} keys for {len(self.indices)} indices.")
        self.loss_weights = None if loss_weights is None else _weights(loss_weights, len(self.indices))
        self._keys = None if keys is None else list(keys)
        if loss_weights is not None or keys is not None:
            self._reorder(torch.as_tensor(indices).detach().cpu())
        self.objective = float(objective)
        self.bound = float(bound)
        self.provenance = provenance or {}
        digest = hashlib.sha256(bytes_of(self.indices))
        if self.loss_weights is not None:
            digest.update(b"weights" + bytes_of(self.loss_weights))
        self.fingerprint = digest.hexdigest()

    def _reorder(self, given: Tensor) -> None:
        """Bring weights and keys, as given for these indices, into the order of ascending indices."""
        if is_ascending(given):
            return
        order = given.argsort()
        self.loss_weights = None if self.loss_weights is None else self.loss_weights[order]
        self._keys = None if self._keys is None else [self._keys[i] for i in order.tolist()]

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
    balance: str | Quotas | None = "auto",
    groups: Tensor | None = None,
    shares: Shares | None = None,
    method: str = "auto",
    risk: float = 0.005,
    image_features: Tensor | None = None,
    coverage_weight: float = 0.05,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """The subset of exactly floor(keep * N) samples that is worth most.

    >>> selection = select(torch.tensor([0.1, 0.9, 0.5, 0.7]), keep=0.5)
    >>> selection.indices
    tensor([1, 3])

    The objective is the sum of the samples' utilities: for `Scores` their weighted sum (`Scores.utility`), for a tensor
    its own entries. With `PAPER_WEIGHTS` it is the selection optimization of arXiv 2410.11215, with `DEFAULT_WEIGHTS`
    the expected number of right labels and of intact images. Its highest sums are easy samples, though, which train
    fast and not far: `method="draw"` gives up a little of it, `risk`, for a choice by lot among all that is safe. As
    that lies closer together than the data does, the farther a sample lies from its neighbours, the better its chance,
    by the power of its distance with which the drawn lie as far apart as all that is trusted. Where trust finds
    all labels right that power is 0, and the subset a random one of what does not look damaged.

    Args:
        scores: `Scores`, or one float tensor (N,) of your own, finite, higher is better.
        keep: a fraction in (0, 1] of all N samples, taken as the exact decimal it is written as: 0.29 of 100 is 29.
        count: a number of samples instead. Neither is needed where `balance` gives every quota.
        score_weights: name of a score -> its weight; `DEFAULT_WEIGHTS` where the scores hold trust, else
            `PAPER_WEIGHTS`. Not with `draw`, which asks for trust and intactness only.
        balance: `trusted`: every class gets its share of the budget by its sum of trust (however many of its images
            are damaged), and none is asked for more than it has trusted samples; `given`: its share as labelled, by
            largest remainder; {class name or number: quota}, summing to the budget; None: no quotas. `auto` is
            `trusted` where the scores hold trust and labels, else None.
        groups: (N,), int64, from 0: any other groups (class x attribute, say), with `shares`, instead of `balance`.
        shares: {group: (lowest, highest)}: which share of the selection a group is to have, in [0, 1]; others are free.
            By how much the exact optimum would rise without all of them stands in the provenance as `price_of_all`, and
            without one alone, which frees little where the others leave no room, as `prices`.
        method: `draw`, by lot among the samples whose label and image are safe, then of the rest the most probable to
            be right in both; near-duplicates of a more trusted sample (their `trusted_diversity` is 0) come last of
            the trusted. Without `trusted_diversity` all that is safe has the same chance. `exact`, the optimum of
            utility; `group`, greedy on utility and coverage, with a bound on what any subset could reach;
            `straight_through`, the paper's gradient optimizer, cut to the exact size. `auto` is `draw` where the scores
            hold trust, without `score_weights`; else `exact`.
        risk: of method `draw`: how many more of the selected labels may be wrong, as a share and as trust reckons, than
            in the safest selection of distinct images that do not look damaged, under the same quotas; 0 is that
            selection, 1 takes any label. A tenth of it is allowed for damaged images, and the more intact half is
            always safe. What the safest selection and the lot come to stands in the provenance as `wrong_labels`, and
            as `diversity` how far the trusted and the drawn lie from their neighbours, and the power, at most 4.
        image_features: (N, D), of method `group`: the space to cover; by default that of the embeddings that were
            scored, which saved scores lack: then pass `embeddings.image`.
        coverage_weight: of method `group`: what it is worth to bring a trusted sample from nowhere to being kept.
        seed: of method `draw`.
        progress: show a bar on a terminal if it takes longer than two seconds.

    Raises:
        ValueError: for a keep outside (0, 1], a budget above the eligible samples, quotas or shares that do not fit, an
            unknown score or method, or a seed that is no whole number from 0 on.
    """
    if not isinstance(scores, (Scores, Tensor)):
        raise ValueError(f"select takes Scores or a tensor, not a {type(scores).__name__}: call score() first.")
    if keep is None and count is None and isinstance(balance, Mapping):
        count = sum(int(quota) for quota in balance.values() if isinstance(quota, Integral))  # others are refused below
    table = Scores({"utility": scores}) if isinstance(scores, Tensor) else scores
    budget = resolve_budget(keep, count, len(table))
    if not isinstance(risk, (int, float)) or not 0 <= risk <= 1:
        raise ValueError(f"risk is {risk!r}, but it must be a share in [0, 1].")
    seed = as_seed(seed)
    if method == "auto":
        method = "draw" if "trust" in table.columns and score_weights is None else "exact"
    if balance == "auto":
        trusted = "trust" in table.columns and table.labels is not None and method != "straight_through"
        balance = "trusted" if trusted and groups is None and shares is None else None
    if method == "draw" and "trust" not in table.columns:
        raise ValueError("method='draw' needs the score 'trust': score() gives it where there are two classes or more.")
    if method == "draw" and score_weights is not None:
        raise ValueError("method='draw' knows no score_weights: use method='exact' or 'group'.")
    if score_weights is None and isinstance(scores, Scores):
        score_weights = _default_weights(scores)
    problem = Problem(table, _eligible(table, budget), _weights_of_terms(scores, score_weights), budget)
    options = Options(method, risk, seed, image_features, coverage_weight, progress)
    if groups is None and shares is None:
        solved = within_quotas(problem, balance, options)
    else:
        solved = within_shares(problem, balance, groups, shares, options)
    eligible = problem.eligible
    del problem  # and with it the utility, eight bytes a sample
    indices = solved.chosen if eligible is None else eligible[solved.chosen]
    details: dict[str, Any] = {"method": method, "seed": seed, "keep": None if keep is None else str(keep)}
    weights = None if score_weights is None else {name: float(weight) for name, weight in score_weights.items()}
    details |= {"count": budget, "score_weights": weights, "balance": _as_json(balance)}
    details |= solved.details | _hard_but_trusted(table, indices)
    return Selection(
        indices,
        len(table),
        objective=solved.objective,
        bound=solved.bound,
        keys=None if table.keys is None else [table.keys[i] for i in indices.tolist()],
        provenance={**table.provenance, "selection": details},
    )


def _eligible(table: Scores, budget: int) -> Tensor | None:
    """The rows that can be selected; None: all."""
    if table.eligible is None or table.eligible.all():
        return None
    eligible = table.eligible.cpu().nonzero()[:, 0]
    if budget > len(eligible):
        raise ValueError(
            f"The budget is {budget}, but only {len(eligible)} of {len(table)} samples can be selected (the "
            f"others are unreadable): use count={len(eligible)} at most."
        )
    return eligible


def _default_weights(table: Scores) -> Mapping[str, float]:
    weights = DEFAULT_WEIGHTS if "trust" in table.columns else PAPER_WEIGHTS | {"intactness": 1.0}
    return {name: weight for name, weight in weights.items() if name in table.columns} or PAPER_WEIGHTS


def _hard_but_trusted(table: Scores, indices: Tensor) -> dict[str, Any]:
    """Of the samples that are surely right: the quarter of each class with the lowest margin, and how many stay."""
    if table.labels is None or not {"trust", "semantic_margin"} <= table.columns.keys():
        return {}
    margin, labels = table["semantic_margin"].cpu(), table.labels.cpu()
    sure, hard = table["trust"].cpu() >= SURE, torch.zeros(len(labels), dtype=torch.bool)
    for _, rows in rows_of_groups(labels):
        rows = rows[sure[rows]]
        if len(rows):
            hard[rows] = margin[rows] <= margin[rows].kthvalue(-(-len(rows) // 4)).values
    return {"hard_but_trusted": {"there": int(hard.sum()), "kept": int(hard[indices].sum())}}


def _as_json(balance: str | Quotas | None) -> Any:
    return {str(c): int(q) for c, q in balance.items()} if isinstance(balance, Mapping) else balance


def _weights(loss_weights: Tensor, samples: int) -> Tensor:
    weights = torch.as_tensor(loss_weights).detach().cpu().float().clone()  # the caller's may change
    check_vector(weights, name="loss_weights", samples=samples)
    if (weights < 0).any():
        raise ValueError(f"loss_weights[{int((weights < 0).nonzero()[0])}] is negative.")
    return weights


def _weights_of_terms(scores: Scores | Tensor, score_weights: Mapping[str, float] | None) -> Mapping[str, float] | None:
    """The weight of each score; None for a tensor, which is the utility itself."""
    if isinstance(scores, Tensor):
        if score_weights is not None:
            raise ValueError("score_weights go with Scores; a tensor of your own is the utility itself.")
        return None
    if not score_weights:
        raise ValueError("score_weights is empty: name at least one score.")
    return score_weights
