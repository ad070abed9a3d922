"""Checks of what a caller hands over. Each raises a ValueError that names the first bad entry and the way out."""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from numbers import Integral

import torch
from torch import Tensor

__all__ = [
    "as_indices",
    "as_seed",
    "check_classes",
    "check_features",
    "check_labels",
    "check_mask",
    "check_vector",
    "is_ascending",
    "resolve_budget",
]

BLOCK = 2**16  # entries of a vector that are looked at at once: temporaries stay small at any N
ENTRIES = 2**20  # of a matrix


def check_features(features: Tensor, *, name: str, rows: int | None = None, dim: int | None = None) -> None:
    """Features are a finite floating point matrix (N, D), with N and D as given."""
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor of shape (N, D), not {_describe(features)}.")
    if rows is not None and len(features) != rows:
        raise ValueError(f"{name} has {len(features)} rows, but there are {rows} samples.")
    if dim is not None and features.shape[1] != dim:
        raise ValueError(f"{name} has dimension {features.shape[1]}, but {dim} was expected: were two models mixed?")
    blocks = features.split(max(1, ENTRIES // max(1, features.shape[1])))
    if not all(math.isfinite(block.sum(dtype=torch.float32)) for block in blocks):
        bad = torch.cat([~torch.isfinite(block).all(dim=1) for block in blocks])
        if bad.any():  # else a sum alone overflowed
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{name} holds NaN or infinity in {int(bad.sum())} rows, row {row} first. Embed these images again, "
                "or drop them."
            )


def check_labels(labels: Tensor, *, samples: int, classes: int | None = None) -> None:
    """Labels are an int64 vector (N,) in [0, C)."""
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be an int64 tensor of shape (N,), not {_describe(labels)}.")
    if len(labels) != samples:
        raise ValueError(f"There are {len(labels)} labels for {samples} samples.")
    if not len(labels):
        return
    lowest, highest = (int(value) for value in labels.aminmax())
    if lowest < 0 or (classes is not None and highest >= classes):
        outside = labels < 0 if classes is None else (labels < 0) | (labels >= classes)
        row = int(outside.nonzero()[0])
        range_ = "from 0 on" if classes is None else f"from 0 to {classes - 1}"
        raise ValueError(
            f"labels[{row}] is {int(labels[row])}, but classes are numbered {range_} ({int(outside.sum())} labels "
            "lie outside). Drop unlabelled samples, or name every class."
        )


def check_vector(values: Tensor, *, name: str, samples: int | None = None) -> None:
    """Values are a finite floating point vector (N,)."""
    if not isinstance(values, Tensor) or values.ndim != 1 or not values.is_floating_point():
        raise ValueError(f"{name} must be a floating point tensor of shape (N,), not {_describe(values)}.")
    if samples is not None and len(values) != samples:
        raise ValueError(f"{name} has {len(values)} entries, but there are {samples} samples.")
    if not all(torch.isfinite(block).all() for block in values.split(BLOCK)):
        bad = ~torch.isfinite(values)
        row = int(bad.nonzero()[0])
        raise ValueError(f"{name}[{row}] is {float(values[row])} ({int(bad.sum())} such entries): it must be finite.")


def check_mask(mask: Tensor, *, name: str, samples: int) -> None:
    """A mask is a bool vector (N,)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (samples,):
        raise ValueError(f"{name} must be a bool tensor of shape ({samples},), not {_describe(mask)}.")


def check_classes(class_names: Sequence[str], labels: Tensor) -> None:
    """Class names are distinct strings that reach as far as the labels do."""
    if (
        class_names is None
        or isinstance(class_names, str)
        or not isinstance(class_names, Iterable)
        or not all(isinstance(name, str) and name.strip() for name in class_names)
    ):
        raise ValueError(f"class_names must be a sequence of non-empty strings, one a class, not {class_names!r:.100}.")
    if len(set(class_names)) < len(class_names):
        twice = next(name for i, name in enumerate(class_names) if name in class_names[:i])
        raise ValueError(
            f"The class name {twice!r} stands twice, so that two classes would share one prompt. Tell them apart, "
            "as in 'crane (bird)' and 'crane (machine)'."
        )
    if len(labels) and int(labels.max()) >= len(class_names):
        beyond = labels >= len(class_names)
        row = int(beyond.nonzero()[0])
        raise ValueError(
            f"labels[{row}] is {int(labels[row])}, but there are only {len(class_names)} class names. Pass one name "
            "a class, in the order of the labels."
        )


def as_indices(indices: Tensor | Sequence[int], *, population: int | None = None) -> Tensor:
    """The indices as an ascending int64 tensor (k,) on the CPU; they must be unique and in [0, population)."""
    given = torch.as_tensor(indices).detach().cpu() if len(indices) else torch.empty(0, dtype=torch.int64)
    if given.ndim != 1 or given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise ValueError(
            f"indices must be integers of shape (k,), not {_describe(given)}. A mask? Take mask.nonzero()[:, 0]."
        )
    ordered = given.to(torch.int64)
    ordered = ordered.clone() if is_ascending(ordered) else ordered.sort().values  # the caller's may change
    if len(ordered) and (int(ordered[0]) < 0 or (population is not None and int(ordered[-1]) >= population)):
        culprit = int(ordered[0]) if int(ordered[0]) < 0 else int(ordered[-1])
        end = "" if population is None else f", {population}"
        raise ValueError(f"Index {culprit} lies outside [0{end}).")
    if not is_ascending(ordered):
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        raise ValueError(f"Index {int(repeated[0])} stands more than once ({len(repeated)} repetitions in all).")
    return ordered


def as_seed(seed: int) -> int:
    """The seed as a Python integer: NumPy's are none that every generator and file format takes."""
    if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed!r}, but it must be a whole number from 0 to 2**63 - 1.")
    return int(seed)


def is_ascending(values: Tensor) -> bool:
    """Whether each of the values, (n,), is higher than the one before it."""
    blocks = (values[start : start + BLOCK + 1] for start in range(0, len(values), BLOCK))
    return all(bool((block[1:] > block[:-1]).all()) for block in blocks)


def resolve_budget(keep: float | str | Fraction | None, count: int | None, population: int) -> int:
    """How many samples `keep` or `count` asks for: floor(keep * N), with `keep` taken as an exact decimal.

    >>> resolve_budget(0.29, None, 100)
    29
    """
    if (keep is None) == (count is None):
        raise ValueError("Give either keep, a fraction in (0, 1], or count, a number of samples.")
    if count is not None:
        if not isinstance(count, Integral) or isinstance(count, bool) or not 1 <= count <= population:
            raise ValueError(f"count is {count!r}, but it must be a whole number from 1 to the {population} samples.")
        return int(count)
    try:
        fraction = Fraction(str(keep))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"keep is {keep!r}, but it must be a fraction in (0, 1].") from None
    if not 0 < fraction <= 1:
        raise ValueError(f"keep is {keep}, but it must be a fraction in (0, 1]. For a number of samples use count=.")
    budget = int(fraction * population)  # a Fraction: exact, int() is the floor of a positive number
    if budget == 0:
        raise ValueError(f"keep={keep} of {population} samples leaves none. Keep more, or pass count=1.")
    return budget


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
