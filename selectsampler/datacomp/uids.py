"""Uid files: which samples of a pool to train on, as DataComp's tools read them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selectsampler.export import write_array
from selectsampler.store import replace_atomically

__all__ = [
    "UID",
    "UidFilter",
    "contains",
    "format_uids",
    "merge_uids",
    "parse_uids",
    "read_uids",
    "sort_uids",
    "write_uids",
]

DUPLICATES = ("keep", "drop", "refuse")

UID = np.dtype("u8,u8")
"""A uid of 32 hex digits: its first 16 and its last 16 as numbers."""

_NIBBLES = np.full(256, 255, dtype=np.uint8)
_NIBBLES[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)
_NIBBLES[np.frombuffer(b"ABCDEF", dtype=np.uint8)] = np.arange(10, 16)


def parse_uids(strings: Sequence[str] | np.ndarray, *, first: int = 0) -> np.ndarray:
    """(n,), `UID`: strings of 32 hex digits as numbers; `first` is the row that an error counts from.

    >>> parse_uids(["0000000000000001000000000000000a"])
    array([(1, 10)], dtype=[('f0', '<u8'), ('f1', '<u8')])

    Raises:
        ValueError: naming the first string that is no uid.
    """
    for row, text in enumerate(strings):
        if len(text) != 32 or not text.isascii():
            raise ValueError(f"The uid in row {first + row} is {text!r}, but a uid has 32 hex digits.")
    digits = _NIBBLES[np.frombuffer("".join(strings).encode(), dtype=np.uint8)].reshape(-1, 32)
    if (digits == 255).any():
        row = int((digits == 255).any(axis=1).argmax())
        raise ValueError(f"The uid in row {first + row} is {strings[row]!r}, but a uid has 32 hex digits.")
    halves = (
        (digits[:, 0::2] << 4 | digits[:, 1::2]).view(">u8").astype("<u8")
    )  # two digits a byte, first digit highest
    return np.ascontiguousarray(halves).view(UID).reshape(-1)


def format_uids(uids: np.ndarray) -> list[str]:
    """The 32 hex digits of each uid.

    >>> format_uids(np.array([(1, 10)], dtype=UID))
    ['0000000000000001000000000000000a']
    """
    return [f"{high:016x}{low:016x}" for high, low in zip(uids["f0"].tolist(), uids["f1"].tolist(), strict=True)]


def sort_uids(uids: np.ndarray) -> np.ndarray:
    """(n,), `UID`: in the order that DataComp's readers search in, first half before second half, both unsigned."""
    return uids[np.lexsort((uids["f1"], uids["f0"]))]


def contains(uids: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(m,), int64: how often each uid asked for stands in `uids`, which are sorted. By halving, as DataComp does."""
    return np.searchsorted(uids, asked, "right") - np.searchsorted(uids, asked, "left")


def read_uids(path: Path | str, *, sort: bool = False) -> np.ndarray:
    """(n,), `UID`: what a uid file holds; a uid that stands twice counts twice.

    Args:
        path: of a `.npy` file, made here, by DataComp's own tools or by another filter.
        sort: sort a file that is not, instead of refusing it.

    Raises:
        ValueError: if the file holds something else, or is not sorted: DataComp's readers would lose samples silently.
    """
    try:
        uids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no uid file: it cannot be read as an array ({error}).") from None
    if not isinstance(uids, np.ndarray) or uids.dtype != UID or uids.ndim != 1:
        found = f"{uids.dtype} of shape {uids.shape}" if isinstance(uids, np.ndarray) else "several arrays"
        raise ValueError(f"{path} is no uid file: it holds {found}, but uids are {UID} of shape (n,).")
    if sort:
        return sort_uids(uids)
    place = first_unsorted(uids)
    if place is not None:
        raise ValueError(
            f"{path} is not sorted: entry {place} is lower than the one before it. DataComp's readers search by "
            "halving and would lose samples. Read it with sort=True and write it again with write_uids."
        )
    return uids


def check_local(path: Path | str | None, *, name: str) -> None:
    """Refuse a URL where files are written: it would become a folder of that name."""
    # a Path has already made one slash of two; a letter alone is a drive
    if path is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{name} is {path}, but it must be a local path: copy the file there afterwards.")


def first_unsorted(uids: np.ndarray) -> int | None:
    """The first entry that is lower than the one before it, or None."""
    high, low = uids["f0"], uids["f1"]
    wrong = (high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))
    return int(wrong.argmax()) + 1 if wrong.any() else None


def write_uids(
    path: Path | str,
    uids: np.ndarray,
    *,
    duplicates: str = "keep",
    provenance: Mapping[str, Any] | None = None,
    keys: bool = False,
) -> np.ndarray:
    """Write a uid file as DataComp's tools read it, atomically, and return what was written.

    >>> write_uids("subset.npy", parse_uids(["ff" * 16, "00" * 16]))    # doctest: +SKIP

    Args:
        path: ends in `.npy`.
        uids: (n,), `UID`, in any order; they are sorted.
        duplicates: `keep`, a uid that stands twice is trained on twice; `drop`; or `refuse`.
        provenance: written beside it as `.json`: how these were chosen.
        keys: write `.keys.txt` beside it as well, every uid once in hex: an allow-list for loaders.

    Raises:
        ValueError: if the uids have another dtype or shape, or repeat although that is refused.
    """
    path = Path(path)
    check_local(path, name="path")
    if path.suffix != ".npy":
        raise ValueError(f"{path}: a uid file is written as .npy, or numpy would add it to the name.")
    if uids.dtype != UID or uids.ndim != 1:
        raise ValueError(
            f"uids are {uids.dtype} of shape {uids.shape}, but must be {UID} of shape (n,): see parse_uids."
        )
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates is {duplicates!r}, but it must be one of {', '.join(DUPLICATES)}.")
    ordered = sort_uids(uids)
    if duplicates == "refuse":
        _refuse_repeats(ordered)
    # a second array of all uids only where one is asked for
    distinct = _counted(ordered)[0] if keys or duplicates == "drop" else ordered
    if duplicates == "drop":
        ordered = distinct
    if keys:
        with replace_atomically(path.with_suffix(".keys.txt")) as file:
            for start in range(0, len(distinct), 65_536):
                file.write("".join(f"{uid}\n" for uid in format_uids(distinct[start : start + 65_536])).encode())
    if provenance is not None:
        with replace_atomically(path.with_suffix(".json")) as file:
            file.write((json.dumps(dict(provenance), indent=1, sort_keys=True) + "\n").encode())
    write_array(path, ordered)
    return ordered


def _refuse_repeats(ordered: np.ndarray) -> None:
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        twice = ordered[repeated[0]]
        times = int(contains(ordered, twice))
        raise ValueError(
            f"The uid {format_uids(ordered[repeated[:1]])[0]} stands {times} times. Pass duplicates='keep' or 'drop'."
        )


_MERGES = {"union": np.maximum, "intersection": np.minimum, "sum": np.add}


def merge_uids(paths: Sequence[Path | str], how: str = "union") -> np.ndarray:
    """(n,), `UID`, sorted: the uids of several files together, whoever made them.

    >>> merge_uids(["ours.npy", "dfn.npy"], how="intersection")    # doctest: +SKIP

    Args:
        paths: uid files; unsorted ones are taken as well.
        how: a uid stands in the result as often as in the file that has most of it (`union`), in the file that has
            fewest (`intersection`), or in all files together (`sum`). The last weights what several filters agree on.

    Raises:
        ValueError: if there is no file, one is no uid file, or `how` is something else.
    """
    if how not in _MERGES:
        raise ValueError(f"how is {how!r}, but it must be one of {', '.join(_MERGES)}.")
    if not paths:
        raise ValueError("There are no uid files to merge.")
    files = [_counted(read_uids(path, sort=True)) for path in paths]
    uids = np.concatenate([distinct for distinct, _ in files])
    counts = np.concatenate([times for _, times in files])
    order = np.lexsort((uids["f1"], uids["f0"]))
    everything, holders = _counted(uids[order])
    if not len(everything):
        return everything
    starts = np.cumsum(holders) - holders
    counts = _MERGES[how].reduceat(counts[order], starts)
    if how == "intersection":
        counts[holders < len(files)] = 0
    return np.repeat(everything, counts)


class UidFilter:
    """Which samples of a loader stand in a uid file: to train on a subset without copying a single tar.

    >>> webdataset.WebDataset(urls).select(UidFilter("subset.npy"))    # doctest: +SKIP

    It takes a WebDataset sample, whose uid stands in its `json` (bytes, text or a dict) or is its `__key__` up to a
    `-`, or a uid as 32 hex digits. The file is a memory map, which workers share. A uid that stands twice passes once
    here; `count` says how often it stands.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        read_uids(path)  # refuses what is unsorted
        self._uids = np.load(path, mmap_mode="r")

    def __call__(self, sample: Mapping[str, Any] | str) -> bool:
        return self.count(sample) > 0

    def __getstate__(self) -> dict[str, Any]:
        """The path alone: a worker maps the file for itself, instead of being sent a copy."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._uids = np.load(self.path, mmap_mode="r")

    def count(self, sample: Mapping[str, Any] | str) -> int:
        """How often the sample stands in the file."""
        uid = parse_uids([sample if isinstance(sample, str) else _uid_of(sample)])[0]
        return int(np.searchsorted(self._uids, uid, "right") - np.searchsorted(self._uids, uid, "left"))


def _uid_of(sample: Mapping[str, Any]) -> str:
    if "json" in sample:
        content = sample["json"] if isinstance(sample["json"], Mapping) else json.loads(sample["json"])
        return content["uid"]
    return str(sample["__key__"]).partition("-")[0]


def _counted(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of sorted uids, and how often each stands there."""
    if not len(ordered):
        return ordered, np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[starts], np.diff(np.append(starts, len(ordered)))
