"""All scores of a data set side by side, on one scale, with what they came from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from selectsampler.adaptation import Adapted, adapt
from selectsampler.embeddings.features import Embeddings
from selectsampler.export import write_table
from selectsampler.grouping import rows_of_groups
from selectsampler.progress import progress_bar
from selectsampler.scores.alignment import semantic_alignment, semantic_margin
from selectsampler.scores.damage import FEWEST, intactness
from selectsampler.scores.diversity import default_neighbours, sample_diversity
from selectsampler.scores.duplicates import near_duplicates
from selectsampler.scores.trust import Trust, label_trust
from selectsampler.store import FORMAT, pack_strings, read_tensors, unpack_strings, write_tensors
from selectsampler.validation import as_seed, check_labels, check_mask, check_vector

__all__ = ["SCORES", "Scores", "score"]

SCORES = ("semantic_alignment", "sample_diversity", "semantic_margin", "trust", "trusted_diversity", "intactness")
ON_SCALE = ("trust", "trusted_diversity", "intactness")  # probabilities, or multiples of a mean: added up as they are
BLOCK = 2**16  # samples whose utility is worked out at once
TRUSTED = 0.5  # at least this probable is the label of a sample that counts as trusted


@dataclass(frozen=True, eq=False)
class Scores:
    """One column a score, one row a sample; higher is better.

    >>> scores = Scores({"semantic_alignment": torch.tensor([0.1, 0.3, 0.2])})
    >>> scores.scaled("semantic_alignment")
    tensor([0.0000, 1.0000, 0.5000])

    Args:
        columns: name -> (N,), float32, finite, as the score's own function gives it (before scaling).
        labels: (N,), int64, or None where there are no classes.
        class_names: C names, or None.
        eligible: (N,), bool; False rows (unreadable images) are never selected and take no part in scaling. None: all.
        keys: N file names, or None.
        image_features: (N, D), or None: where `select` looks for coverage; held, not copied, and not saved.
        scaling: `min_max`: (s - min) / (max - min); `rank`: the share of samples that score lower, ties in the middle.
            Both map the eligible samples to [0, 1]; a column without any spread maps to 0. `trust`,
            `trusted_diversity` and `intactness` have a scale of their own and are not scaled.
        provenance: as JSON values.

    Raises:
        ValueError: if there is no column, lengths differ, a score is not finite, or a label is no class.
    """

    columns: Mapping[str, Tensor]
    labels: Tensor | None = None
    class_names: Sequence[str] | None = None
    eligible: Tensor | None = None
    keys: Sequence[str] | None = None
    image_features: Tensor | None = field(default=None, repr=False)
    scaling: str = "min_max"
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("Scores need at least one column.")
        samples = len(next(iter(self.columns.values())))
        if samples == 0:
            raise ValueError("There are no samples.")
        for name, values in self.columns.items():
            check_vector(values, name=f"The score {name!r}", samples=samples)
        if self.labels is not None:
            classes = None if self.class_names is None else len(self.class_names)
            check_labels(self.labels, samples=samples, classes=classes)
        if self.eligible is not None:
            check_mask(self.eligible, name="eligible", samples=samples)
        if self.scaling not in ("min_max", "rank"):
            raise ValueError(f"scaling is {self.scaling!r}, but it must be 'min_max' or 'rank'.")
        for name in ("keys", "image_features"):
            value = getattr(self, name)
            if value is not None and len(value) != samples:
                raise ValueError(f"{name} has {len(value)} rows, but there are {samples} samples.")

    def __repr__(self) -> str:
        return f"Scores({len(self)} samples: {', '.join(self.columns)})"

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.columns:
            raise ValueError(f"There is no score {name!r}; there are {', '.join(self.columns)}.")
        return self.columns[name]

    def scaled(self, name: str) -> Tensor:
        """(N,), float32: a column on its scale over the eligible samples, in [0, 1] where scaled; 0 for the others."""
        values = self[name].float()
        scale = {"min_max": _min_max, "rank": _rank}[self.scaling]
        if self.eligible is None:
            return values.clone() if name in ON_SCALE else scale(values)
        result = torch.zeros_like(values)
        rows = self.eligible
        result[rows] = values[rows] if name in ON_SCALE else scale(values[rows])
        return result

    def utility(self, weights: Mapping[str, float]) -> Tensor:
        """(N,), float64: what one sample is worth, sum over scores of weight * scaled / mean(scaled).

        With weights 1 for semantic alignment and 0.1 for sample diversity this is what the optimizer of arXiv
        2410.11215 maximises over the selected samples. Means are those of the eligible samples. Scores with a scale of
        their own (`trust`, `trusted_diversity`, `intactness`) are weighted as they are.
        """
        utility = torch.zeros(len(self), dtype=torch.float64, device=self[next(iter(self.columns))].device)
        eligible = len(self) if self.eligible is None else int(self.eligible.sum())
        for name, weight in weights.items():
            _add_term(utility, self.scaled(name), weight, samples=None if name in ON_SCALE else eligible)
        return utility

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, atomically."""
        tensors = {f"score.{name}": values for name, values in self.columns.items()}
        for name in ("labels", "eligible"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
        for name in ("class_names", "keys"):
            if getattr(self, name) is not None:
                tensors[name] = pack_strings(getattr(self, name))
        order = list(self.columns)
        metadata = {"kind": "scores", "format": FORMAT, "columns": order, "scaling": self.scaling}
        write_tensors(path, tensors, metadata | {"provenance": self.provenance})

    @classmethod
    def load(cls, path: Path | str) -> "Scores":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated or holds something else.
        """
        tensors, metadata = read_tensors(path, kind="scores")
        packed = {name: unpack_strings(tensors.pop(name)) for name in ("class_names", "keys") if name in tensors}
        return cls(
            columns={name: tensors.pop(f"score.{name}") for name in metadata["columns"]},
            **tensors,  # type: ignore[arg-type]
            **packed,  # type: ignore[arg-type]
            scaling=metadata["scaling"],
            provenance=metadata["provenance"],
        )

    def to_table(self) -> dict[str, list[Any]]:
        """The rows as columns of Python values: index, key, label, class, eligible and every score."""
        table: dict[str, list[Any]] = {"index": list(range(len(self)))}
        if self.keys is not None:
            table["key"] = list(self.keys)
        if self.labels is not None:
            table["label"] = self.labels.tolist()
            if self.class_names is not None:
                table["class"] = [self.class_names[label] for label in table["label"]]
        if self.eligible is not None:
            table["eligible"] = self.eligible.tolist()
        return table | {name: values.tolist() for name, values in self.columns.items()}

    def export(self, path: Path | str) -> None:
        """Write the table as `.csv`, or as `.parquet` (needs `pip install selectsampler[parquet]`)."""
        write_table(path, self.to_table())


def score(
    embeddings: Embeddings | Adapted,
    *,
    columns: Sequence[str] = SCORES,
    k: int | None = None,
    scaling: str = "min_max",
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score every sample: how well it fits its label, how likely that label is right, how much it adds to its class.

    >>> scores = score(adapt(embeddings))        # doctest: +SKIP
    >>> scores["trust"]                          # doctest: +SKIP

    Args:
        embeddings: of N samples; adapted ones are aligned with the adapters that did not see their label.
        columns: which scores. `semantic_alignment` and `sample_diversity` are those of arXiv 2410.11215.
            `semantic_margin` is by how much an image fits its label better than any other class. `trust`, in [0, 1], is
            the probability that the label is right (`label_trust`). Both are left out where all are of one class.
            `trusted_diversity` is trust times the distance to the nearest trusted samples of the class, over the mean
            of that distance; 0 for near-duplicates of a more trusted sample, and for samples that are not trusted.
            `intactness`, in [0, 1], is the probability that the image is not damaged; left out where `embed` made too
            few damaged twins to learn from. What was left out stands in the provenance as `left_out`.
        k: neighbours of both diversities; by default `default_neighbours(labels)`, the paper's numbers.
        scaling: how columns are brought to [0, 1] when they are added up: `min_max` (the paper's) or `rank`.
        seed: of the trust's folds and batches.
        progress: show bars on a terminal for what takes longer than two seconds.

    Returns:
        Scores with these columns; unreadable images are not eligible.

    Raises:
        ValueError: if k is less than 1, or a column or the scaling unknown.
    """
    if not isinstance(embeddings, (Embeddings, Adapted)):
        raise ValueError(f"score takes Embeddings, adapted or not, not a {type(embeddings).__name__}.")
    unknown = [name for name in columns if name not in SCORES]
    if unknown or not columns:
        raise ValueError(f"columns names {', '.join(unknown) or 'nothing'}, but there are {', '.join(SCORES)}.")
    seed = as_seed(seed)
    adapted = embeddings if isinstance(embeddings, Adapted) else adapt(embeddings, method="none")
    source = adapted.embeddings
    k = default_neighbours(source.labels) if k is None else k
    provenance = {**source.provenance, "adaptation": adapted.provenance, "k": k, "scaling": scaling, "score_seed": seed}
    made = {}
    if "semantic_alignment" in columns:
        made["semantic_alignment"] = _by_fold(semantic_alignment, adapted)
    if "sample_diversity" in columns:
        made["sample_diversity"] = _diversity(adapted.distance_features, source, k, progress=progress)
    if "semantic_margin" in columns and _several_classes(source):
        made["semantic_margin"] = _by_fold(semantic_margin, adapted)
    if {"trust", "trusted_diversity"} & set(columns) and _several_classes(source):
        trust = _trust(source, seed, progress=progress)
        provenance["trust"] = _described(trust, source.class_names)
        made["trust"] = trust.probability
        made["trusted_diversity"] = _trusted_diversity(source, trust.probability, k, progress=progress)
    if "intactness" in columns:
        made |= _intactness(source, seed)
    if left_out := [name for name in columns if name not in made]:
        provenance["left_out"] = left_out
    return Scores(
        columns={name: made[name] for name in columns if name in made},
        labels=source.labels,
        class_names=source.class_names,
        eligible=source.readable,
        keys=source.keys,
        image_features=adapted.distance_features,
        scaling=scaling,
        provenance=provenance,
    )


def _by_fold(compare: Callable[[Tensor, Tensor, Tensor], Tensor], adapted: Adapted) -> Tensor:
    """(N,): how images compare with prompts, each by the adapters that did not see its label; 0 for unreadable ones."""
    source = adapted.embeddings
    compared = torch.zeros(len(source), device=source.image.device)
    for rows, image, text in adapted.by_fold():
        if source.readable is not None:
            image, rows = image[source.readable[rows]], rows[source.readable[rows]]
        compared[rows] = compare(image, text, source.labels[rows])
    return compared


def _diversity(features: Tensor, source: Embeddings, k: int, *, progress: bool) -> Tensor:
    """Sample diversity among the readable images, class by class for the sake of the progress bar."""
    diversity = torch.zeros(len(source), device=source.image.device)
    with progress_bar("score", len(source), unit="image", show=progress) as bar:
        for _, rows in rows_of_groups(source.labels):
            readable = rows if source.readable is None else rows[source.readable[rows]]
            diversity[readable] = sample_diversity(features[readable], torch.zeros_like(readable), k)
            bar.update(len(rows))
    return diversity


def _intactness(source: Embeddings, seed: int) -> dict[str, Tensor]:
    """The column, or none where there are too few damaged twins to learn from."""
    if source.image_statistics is None or source.twins is None or source.twin_statistics is None:
        return {}
    originals = source.twins[:, 0]
    if source.readable is not None:
        originals = originals[source.readable[originals]]
    if len(originals.unique()) < FEWEST:
        return {}
    return {
        "intactness": intactness(
            source.image_statistics, source.twins, source.twin_statistics, eligible=source.readable, seed=seed
        )
    }


def _several_classes(source: Embeddings) -> bool:
    """Whether a label can be wrong at all: two classes have readable samples."""
    labels = source.labels if source.readable is None else source.labels[source.readable]
    return len(labels.unique()) > 1


def _trust(source: Embeddings, seed: int, *, progress: bool) -> Trust:
    """Trust of the readable images; 0 for the others."""

    def judged(images: Tensor, labels: Tensor) -> Trust:
        return label_trust(
            images,
            source.text,
            labels,
            temperature=source.temperature,
            folds=min(5, len(labels)),
            class_names=source.class_names,
            seed=seed,
            progress=progress,
        )

    if source.readable is None:
        return judged(source.image, source.labels)
    rows = source.readable.nonzero()[:, 0].to(source.labels.device)
    trust = judged(source.image[rows], source.labels[rows])
    probability = torch.zeros(len(source), device=source.image.device)
    probability[rows] = trust.probability
    return replace(trust, probability=probability)


def _trusted_diversity(source: Embeddings, trust: Tensor, k: int, *, progress: bool) -> Tensor:
    """Trust times the distance to the nearest trusted samples of the class, over its mean.

    0 for near-duplicates and what is not trusted; who has no trusted neighbour stands as far off as the mean.
    """
    trusted = trust >= TRUSTED
    diversity, repeated = torch.zeros_like(trust), torch.zeros_like(trusted)
    with progress_bar("score", len(source), unit="image", show=progress) as bar:
        for _, rows in rows_of_groups(source.labels):
            readable = rows if source.readable is None else rows[source.readable[rows]]
            directions, one = normalize(source.image[readable].float(), dim=1), torch.zeros_like(readable)
            diversity[readable] = sample_diversity(directions, one, k, among=trusted[readable])
            repeated[readable] = near_duplicates(directions, one, trust[readable])
            bar.update(len(rows))
    far = trusted & (diversity > 0)
    relative = diversity / diversity[far].mean() if far.any() else diversity
    alone = trusted & (diversity == 0)
    return (trust * relative.masked_fill_(alone, 1.0)).masked_fill_(repeated | ~trusted, 0)


def _described(trust: Trust, class_names: Sequence[str]) -> dict[str, Any]:
    """What was found of the labels, as JSON values."""
    return {
        "noise_rate": trust.noise_rate,
        "by_class": trust.by_class,
        "class_noise": [None if share != share else share for share in trust.class_noise.tolist()],
        "transition": trust.transition.tolist() if len(class_names) <= 100 else None,
        "unknown": [class_names[number] for number in trust.unknown],
    }


def _add_term(utility: Tensor, scaled: Tensor, weight: float, *, samples: int | None) -> None:
    """Add weight * scaled to the utility, over the mean of so many samples unless None; float64 copies stay small."""
    parts, mean = scaled.split(BLOCK), 1.0
    if samples is not None:
        mean = float(sum(part.double().sum() for part in parts)) / max(1, samples)
    if mean > 0:
        for total, part in zip(utility.split(BLOCK), parts, strict=True):
            total += weight * part.double() / mean


def _min_max(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    return (values - low).div_(high - low) if high > low else torch.zeros_like(values)


def _rank(values: Tensor) -> Tensor:
    """Share of samples that score lower, ties in the middle, from 0 for the lowest to 1 for the highest."""
    unique, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    if len(unique) == 1:
        return torch.zeros_like(values)
    middle = counts.cumsum(0).float() - (counts.float() + 1) / 2
    return (middle / (len(values) - 1))[inverse]
