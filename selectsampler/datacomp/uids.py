"""Uid files: which samples of a pool to train on, as DataComp's tools read them."""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from selectsampler.datacomp.files import fetch, file_system, is_url, local_copy

__all__ = [
    "UID",
    "UidFilter",
    "block_of",
    "check_uid_file",
    "contains",
    "first_unsorted",
    "format_uids",
    "map_sorted_uids",
    "map_uids",
    "order_of",
    "parse_uids",
    "read_uids",
    "sort_uids",
]

BLOCK = 2**20  # uids that are looked at at once

UID = np.dtype("u8,u8")
"""A uid of 32 hex digits: its first 16 and its last 16 as numbers."""

_HEX = re.compile("[0-9a-fA-F]{32}")
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
        if not isinstance(text, str) or len(text) != 32 or not text.isascii():
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
    return uids[order_of(uids)]


def order_of(uids: np.ndarray) -> np.ndarray:
    """(n,), int64: the rows of uids in that order; quick where stretches are sorted."""
    order = np.argsort(uids["f0"], kind="stable")
    high, low = uids["f0"][order], uids["f1"][order]
    torn = (high[1:] == high[:-1]) & (low[1:] < low[:-1])  # rare: first halves alone hardly ever agree
    return np.lexsort((uids["f1"], uids["f0"])) if torn.any() else order


def contains(uids: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """(m,), int64: how often each uid asked for stands in `uids`, which are sorted. By halving, as DataComp does."""
    held, counts = np.asarray(uids), np.zeros(len(asked), dtype=np.int64)
    first = _places(held, asked, after=False)
    there = np.flatnonzero(first < len(held))
    there = there[held[first[there]] == asked[there]]
    counts[there] = _places(held, asked[there], after=True) - first[there]
    return counts


def _places(uids: np.ndarray, asked: np.ndarray, *, after: bool) -> np.ndarray:
    """(m,), int64: how many of sorted uids are lower than each one asked for, or not higher (`after`).

    As `np.searchsorted`, which compares pairs twenty times as slowly and would copy the first halves.
    """
    low, high = np.zeros(len(asked), dtype=np.int64), np.full(len(asked), len(uids), dtype=np.int64)
    for _ in range(len(uids).bit_length()):
        middle = (low + high) >> 1
        seen = uids[np.minimum(middle, len(uids) - 1)]
        second = seen["f1"] <= asked["f1"] if after else seen["f1"] < asked["f1"]
        beyond = (low < high) & ((seen["f0"] < asked["f0"]) | ((seen["f0"] == asked["f0"]) & second))
        low, high = np.where(beyond, middle + 1, low), np.where(beyond, high, middle)
    return low


def read_uids(path: Path | str, *, sort: bool = False) -> np.ndarray:
    """(n,), `UID`: what a uid file holds; a uid that stands twice counts twice.

    Args:
        path: of a `.npy` file, local or any fsspec URL, made here, by DataComp's own tools or by another filter.
        sort: sort a file that is not, instead of refusing it.

    Raises:
        ValueError: if the file holds something else, or is not sorted: DataComp's readers would lose samples silently.
    """
    return np.array(map_sorted_uids(path, sort=sort))


def map_sorted_uids(path: Path | str, *, sort: bool = False) -> np.ndarray:
    """As `read_uids`, but as a memory map where the file is local and sorted."""
    uids = map_uids(path)
    place = first_unsorted(uids)
    if place is not None and not sort:
        raise ValueError(
            f"{path} is not sorted: entry {place} is lower than the one before it. DataComp's readers search by "
            "halving and would lose samples. Read it with sort=True and write it again with write_uids."
        )
    return uids if place is None else sort_uids(np.asarray(uids))


def map_uids(path: Path | str, folder: Path | None = None) -> np.ndarray:
    """(n,), `UID`: what a uid file holds, in its order: a memory map of a local file or of a copy that is fetched.

    Args:
        path: local, or any fsspec URL.
        folder: where the copy of a remote file stays; without one it is read into memory.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        if is_url(path) and folder is None:
            with local_copy(path) as local:
                uids = np.load(local, allow_pickle=False)
        else:
            local = fetch(path, folder) if is_url(path) and folder is not None else Path(path)
            uids = np.load(local, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no uid file: it cannot be read as an array ({error}).") from None
    if not isinstance(uids, np.ndarray):
        raise ValueError(f"{path} is no uid file: it holds several arrays, but uids are {UID} of shape (n,).")
    _check_kind(path, uids.dtype, uids.shape)
    return uids


def check_uid_file(path: Path | str) -> None:
    """Refuse what is no uid file, by its header and its size alone.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else.
    """
    fs, root = file_system(str(path))
    if not fs.isfile(root):
        raise FileNotFoundError(f"There is no {path}.")
    with fs.open(root, "rb") as file:
        try:
            major = np.lib.format.read_magic(file)[0]
            read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is no uid file: it cannot be read as an array ({error}).") from None
        _check_kind(path, dtype, shape)
        missing = file.tell() + shape[0] * dtype.itemsize - fs.size(root)
    if missing > 0:
        raise ValueError(f"{path} is no uid file: it is cut short, {missing} bytes are missing. Fetch it again.")


def _check_kind(path: Path | str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != UID or len(shape) != 1:
        raise ValueError(f"{path} is no uid file: it holds {dtype} of shape {shape}, but uids are {UID} of shape (n,).")


def block_of(uids: np.ndarray, first: int, last: int) -> np.ndarray:
    """Some uids, of an array or of a whole memory map, past which they are read, so that RAM does not fill with it."""
    if not isinstance(uids, np.memmap) or uids.filename is None:
        return np.asarray(uids[first:last])
    return np.fromfile(uids.filename, UID, last - first, offset=uids.offset + first * UID.itemsize)


def first_unsorted(uids: np.ndarray) -> int | None:
    """The first entry that is lower than the one before it, or None."""
    for first in range(0, max(0, len(uids) - 1), BLOCK):
        block = block_of(uids, first, min(first + BLOCK + 1, len(uids)))
        high, low = block["f0"], block["f1"]
        wrong = (high[1:] < high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] < low[:-1]))
        if wrong.any():
            return first + int(wrong.argmax()) + 1
    return None


class UidFilter:
    """Which samples of a loader stand in a uid file: to train on a subset without copying a single tar.

    >>> webdataset.WebDataset(urls).select(UidFilter("subset.npy"))    # doctest: +SKIP

    It takes a WebDataset sample, whose uid stands in its `json` (bytes, text or a dict) or is its `__key__` up to a
    `-`, or a uid as 32 hex digits. A local file is a memory map, which workers share; a remote one is read. A uid that
    stands twice passes once here; `count` says how often it stands.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._high, self._low = _halves(map_sorted_uids(path))  # refuses what is unsorted

    def __call__(self, sample: Mapping[str, Any] | str) -> bool:
        return self.count(sample) > 0

    def __getstate__(self) -> dict[str, Any]:
        """The path alone: a worker maps the file for itself, instead of being sent a copy."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._high, self._low = _halves(map_uids(self.path))

    def count(self, sample: Mapping[str, Any] | str) -> int:
        """How often the sample stands in the file.

        Raises:
            ValueError: if the sample holds no uid.
        """
        uid = _uid_of(sample)
        high, low = int(uid[:16], 16), int(uid[16:], 16)
        first = bisect_left(self._high, high)
        last = bisect_right(self._high, high, first)
        return bisect_right(self._low, low, first, last) - bisect_left(self._low, low, first, last)


def _halves(uids: np.ndarray) -> tuple[memoryview, memoryview]:
    """The first and the last halves of uids, for `bisect`: one at a time, plain numbers are quicker than arrays."""
    uids = np.asarray(uids)
    return uids["f0"].data, uids["f1"].data


def _uid_of(sample: Mapping[str, Any] | str) -> str:
    if isinstance(sample, str):
        uid: Any = sample
    elif "json" in sample:
        content = sample["json"]
        if isinstance(content, str | bytes):
            with suppress(ValueError):
                content = json.loads(content)
        uid = content.get("uid") if isinstance(content, Mapping) else None
    else:
        uid = str(sample.get("__key__")).partition("-")[0]
    if not isinstance(uid, str) or not _HEX.fullmatch(uid):
        name = sample if isinstance(sample, str) else sample.get("__key__")
        raise ValueError(
            f"The sample {name!r} has no uid of 32 hex digits (found {uid!r}). It must stand in its json as 'uid', as "
            "in DataComp's tars, or be its __key__ up to a '-', as in resharded ones. Filter before json is dropped."
        )
    return uid
