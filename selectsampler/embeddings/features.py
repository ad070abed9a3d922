"""What is known of a data set once a CLIP model has seen it: features, labels, statistics and where they come from."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectsampler.grouping import rows_of_groups
from selectsampler.store import FORMAT, Column, pack_strings, read_tensors, unpack_strings, write_tensors
from selectsampler.validation import check_classes, check_features, check_labels, check_mask

__all__ = ["Embeddings"]


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Features of N images and of C class prompts, with the labels as given.

    >>> images, prompts = torch.randn(6, 4), torch.randn(2, 4)
    >>> embeddings = Embeddings(image=images, text=prompts, labels=[0, 1, 0, 1, 0, 1], class_names=["cat", "dog"])
    >>> len(embeddings), embeddings.labels.dtype
    (6, torch.int64)

    Args:
        image: (N, D), floating point, finite, of the length the model gave them; stored as float16 by `embed`.
        text: (C, D), floating point, finite, one class prompt a class.
        labels: (N,), integers in [0, C), as given, right or wrong.
        class_names: C distinct names.
        image_statistics: (N, S), float32, of the raw pixels, in the order of `STATISTICS`; None: no image was seen.
        twins: (T, 2), int64: images that `embed` damaged on purpose, as (row, number of the kind of damage), or None.
        twin_statistics: (T, S), float32, of these images after the damage.
        readable: (N,), bool; False where the file could not be decoded: such a sample is never selected. None: all are.
        keys: N file names relative to the data set's root, or None.
        temperature: the model's own, 1 / exp(logit_scale); None where unknown.
        provenance: what made the features (weights, preprocessing, precision, inputs), as JSON values.

    Raises:
        ValueError: if shapes, dtypes, labels and names do not fit together, or a feature is not finite.
    """

    image: Tensor
    text: Tensor
    labels: Tensor
    class_names: Sequence[str]
    image_statistics: Tensor | None = None
    twins: Tensor | None = None
    twin_statistics: Tensor | None = None
    readable: Tensor | None = None
    keys: Sequence[str] | None = None
    temperature: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_features(self.image, name="image")
        check_features(self.text, name="text", dim=self.image.shape[1])
        samples, classes = len(self.image), len(self.class_names)
        if samples == 0:
            raise ValueError("There are no samples.")
        if len(self.text) != classes:
            raise ValueError(f"There are {len(self.text)} class prompts for {classes} class names.")
        object.__setattr__(self, "labels", as_labels(self.labels))
        check_labels(self.labels, samples=samples)
        check_classes(self.class_names, self.labels)
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.readable is not None:
            check_mask(self.readable, name="readable", samples=samples)
        for name in ("image_statistics", "keys"):
            value = getattr(self, name)
            if value is not None and len(value) != samples:
                raise ValueError(f"{name} has {len(value)} rows, but there are {samples} samples.")
        self._check_twins()
        _warn_of_empty_classes(self.labels, self.class_names)

    def _check_twins(self) -> None:
        if (self.twins is None) != (self.twin_statistics is None):
            raise ValueError("twins and twin_statistics come together: give both, or neither.")
        if self.twins is not None and self.twins.shape != (len(self.twin_statistics), 2):  # type: ignore[arg-type]
            raise ValueError(
                f"twins must hold a row and a kind of damage for each row of twin_statistics, not {self.twins.shape}."
            )

    def __repr__(self) -> str:
        return f"Embeddings({len(self)} images of {len(self.class_names)} classes, {self.image.shape[1]} features)"

    def __len__(self) -> int:
        return len(self.image)

    def with_labels(self, labels: Tensor | Sequence[int]) -> "Embeddings":
        """The same images under other labels; no image is embedded again."""
        return replace(self, labels=as_labels(labels))

    def to(self, device: str | torch.device) -> "Embeddings":
        """The same embeddings, all tensors on `device`."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)  # type: ignore[arg-type]

    def iter_classes(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each class that has samples: its number, its rows (n,), int64, ascending, and their features (n, D).

        One class is in memory at a time, if the embeddings were loaded from a file. Where the rows of a class lie side
        by side, as in an image folder, they are read in one go.
        """
        for label, rows in rows_of_groups(self.labels):
            yield label, rows, self.image[rows]

    def save(self, path: Path | str) -> None:
        """Write one safetensors file, atomically."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        tensors["class_names"] = pack_strings(self.class_names)
        if self.keys is not None:
            tensors["keys"] = pack_strings(self.keys)
        metadata = {
            "kind": "embeddings",
            "format": FORMAT,
            "temperature": self.temperature,
            "provenance": self.provenance,
        }
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "Embeddings":
        """Open what `save` wrote: a map of the file, of which only what is used is read, when it is used.

        Scores that go by blocks or classes so take features of any size; `to("cpu")` does not bring them into memory,
        but `to("cuda")` brings them to the GPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated or holds something else.
        """
        tensors, metadata = read_tensors(path, kind="embeddings")
        packed = {name: unpack_strings(tensors.pop(name)) for name in ("class_names", "keys") if name in tensors}
        return cls(**tensors, **packed, temperature=metadata["temperature"], provenance=metadata["provenance"])  # type: ignore[arg-type]

    @classmethod
    def merge(cls, paths: Sequence[Path | str], into: Path | str) -> "Embeddings":
        """Put shards of a data set, files that `save` wrote, together in one file, and load it; in little memory.

        >>> Embeddings.merge(sorted(Path("shards").glob("*.safetensors")), "whole.safetensors")   # doctest: +SKIP

        Args:
            paths: in the order of the rows; all of the same model and classes.
            into: the file to write.

        Raises:
            FileNotFoundError: if a file is not there.
            ValueError: if a file cannot be read, or is of another model, of other classes or has other fields.
        """
        if not paths:
            raise ValueError("There are no shards to merge.")
        read = [read_tensors(path, kind="embeddings") for path in paths]
        (first, metadata), names = read[0], read[0][0].keys()
        for path, (tensors, other) in zip(paths, read, strict=True):
            _check_same_kind(path, tensors, other, first, metadata)
        starts = np.cumsum([0, *(len(tensors["image"]) for tensors, _ in read)]).tolist()
        for start, (tensors, _) in zip(starts, read, strict=False):
            if "twins" in tensors:
                tensors["twins"] = tensors["twins"] + torch.tensor([start, 0])
        columns: dict[str, Tensor | Column] = {}
        for name in names:
            parts = [tensors[name] for tensors, _ in read]
            shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
            columns[name] = parts[0] if name in ("text", "class_names") else Column(parts[0].dtype, shape, parts)
        write_tensors(into, columns, metadata | {"provenance": _common([other["provenance"] for _, other in read])})
        return cls.load(into)


def _check_same_kind(
    path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, Any], first: dict[str, Tensor], of_first: Any
) -> None:
    """Shards that are merged differ in their rows alone."""
    if tensors.keys() != first.keys():
        raise ValueError(f"{path} has {', '.join(sorted(tensors))}, but the first shard {', '.join(sorted(first))}.")
    for name, tensor in tensors.items():
        if tensor.dtype != first[name].dtype or tensor.shape[1:] != first[name].shape[1:]:
            raise ValueError(f"{path}: {name} has another type or dimension than in the first shard.")
    same_prompts = all(torch.equal(tensors[name], first[name]) for name in ("text", "class_names"))
    if not same_prompts or metadata["temperature"] != of_first["temperature"]:
        raise ValueError(f"{path} is of another model or of other classes than the first shard: embed it again.")


def _common(provenances: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all agree on."""
    return {key: value for key, value in provenances[0].items() if all(p.get(key) == value for p in provenances)}


def as_labels(labels: Tensor | Sequence[int]) -> Tensor:
    """Labels as an int64 tensor; floats, masks and multi-label targets are refused."""
    try:
        if not isinstance(labels, Tensor) and any(isinstance(label, str) for label in labels):
            raise ValueError("they are strings. Pass labels=[class_names.index(name) for name in ...].")
        tensor = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be one whole number a sample: {error}") from None
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        kind = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
        raise ValueError(f"labels must be one whole number a sample, shape (N,), not {kind}.")
    return tensor.to(torch.int64)


def _warn_of_empty_classes(labels: Tensor, class_names: Sequence[str]) -> None:
    counts = torch.bincount(labels, minlength=len(class_names))
    empty = [class_names[i] for i in (counts == 0).nonzero()[:, 0].tolist()]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        warnings.warn(
            f"{len(empty)} of {len(class_names)} classes have no sample: {shown}. Check that class_names are in the "
            "order of the labels.",
            stacklevel=4,
        )
