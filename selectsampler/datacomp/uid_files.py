"""Uid files written, sorted and merged in blocks: RAM does not grow with them."""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from selectsampler.datacomp.files import check_local
from selectsampler.datacomp.targets import digests_of
from selectsampler.datacomp.uids import UID, block_of, first_unsorted, format_uids, map_uids, order_of, sort_uids
from selectsampler.store import replace_atomically

__all__ = ["DUPLICATES", "check_output", "count_uids", "merge_uid_files", "merge_uids", "sorted_map", "write_uids"]

DUPLICATES = ("keep", "drop", "refuse")
BLOCK = 2**19  # uids of all files that are sorted or merged at once, at some 200 bytes each

_MERGES = {"union": np.maximum, "intersection": np.minimum, "sum": np.add}


def write_uids(
    path: Path | str,
    uids: np.ndarray,
    *,
    duplicates: str = "keep",
    provenance: Mapping[str, Any] | None = None,
    keys: bool = False,
) -> np.ndarray:
    """Write a uid file as DataComp's tools read it, atomically, and return it as a memory map.

    >>> write_uids("subset.npy", parse_uids(["ff" * 16, "00" * 16]))    # doctest: +SKIP

    Beside the uids given it takes 200 MiB of RAM: more than half a million that are not sorted are sorted on disk, next
    to the file.

    Args:
        path: ends in `.npy`. A `.json` and a `.keys.txt` beside it that this call does not write are removed: they are
            of what stood there before.
        uids: (n,), `UID`, in any order; they are sorted.
        duplicates: `keep`, a uid that stands twice is trained on twice; `drop`; or `refuse`, found while writing.
        provenance: written beside it as `.json`, how these were chosen, with `duplicates` and how many were `written`.
        keys: write `.keys.txt` beside it as well, every uid once in hex: an allow-list for loaders.

    Raises:
        ValueError: if the uids have another dtype or shape, or repeat although that is refused.
    """
    path = Path(path)
    check_output(path)
    if not isinstance(uids, np.ndarray) or uids.dtype != UID or uids.ndim != 1:
        given = f"{uids.dtype} of shape {uids.shape}" if isinstance(uids, np.ndarray) else f"a {type(uids).__name__}"
        raise ValueError(f"uids are {given}, but must be an array of {UID} of shape (n,): see parse_uids.")
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates is {duplicates!r}, but it must be one of {', '.join(DUPLICATES)}.")
    with _runs_folder(path) as folder:
        blocks = _checked(_merged([_runs(uids, folder)], "sum"), duplicates)
        described = None if provenance is None else {**provenance, "duplicates": duplicates}
        _write(path, blocks, described, keys=keys)
    return np.load(path, mmap_mode="r") if len(uids) else np.load(path)


def merge_uids(paths: Sequence[Path | str], how: str = "union") -> np.ndarray:
    """(n,), `UID`, sorted: the uids of several files together, whoever made them. `merge_uid_files` holds none in RAM.

    >>> merge_uids(["ours.npy", "dfn.npy"], how="intersection")    # doctest: +SKIP

    Args:
        paths: uid files, local or any fsspec URL; unsorted ones are taken as well.
        how: a uid stands in the result as often as in the file that has most of it (`union`), in the file that has
            fewest (`intersection`), or in all files together (`sum`). The last weights what several filters agree on.

    Raises:
        ValueError: if there is no file, one is no uid file, or `how` is something else.
    """
    _check_merge(paths, how)
    with TemporaryDirectory() as folder:
        runs = [_runs(map_uids(path, Path(folder)), Path(folder)) for path in paths]
        return np.concatenate([np.empty(0, dtype=UID), *(np.repeat(*counted) for counted in _merged(runs, how))])


def merge_uid_files(
    paths: Sequence[Path | str],
    output: Path | str,
    how: str = "union",
    *,
    keys: bool = False,
) -> int:
    """Merge uid files of any size into one, as `merge_uids` does, in 200 MiB of RAM; returns how many uids it holds.

    >>> merge_uid_files(["ours.npy", "dfn.npy"], "both.npy", how="intersection")    # doctest: +SKIP

    Files are read through memory maps; of a remote one a copy, and of one that is not sorted its sorted blocks, lie
    beside the output for as long as the merge takes. Beside the result comes `.json`: how, the files as often as
    they were given, and the sha256 of each; with `keys` also `.keys.txt`, every uid once.
    """
    _check_merge(paths, how)
    check_output(output)
    with _runs_folder(Path(output)) as folder:
        runs = [_runs(map_uids(path, folder), folder) for path in paths]
        digests = {name: digest for path in paths for name, digest in digests_of(path).items()}
        described = {"merge": how, "files": [str(path) for path in paths], "sha256": digests}
        return _write(Path(output), _merged(runs, how), described, keys=keys)


def sorted_map(path: Path | str, folder: Path) -> np.ndarray:
    """(n,), `UID`: a memory map of a uid file, or of a copy in the folder where it is remote or not sorted."""
    uids = map_uids(path, folder)
    if first_unsorted(uids) is None:
        return uids
    return write_uids(folder / "sorted.npy", uids)


def count_uids(uids: np.ndarray) -> tuple[int, int]:
    """How many distinct ones there are of uids in any order, and how often the most frequent one stands."""
    distinct = most = 0
    with TemporaryDirectory() as folder:
        for _, counts in _merged([_runs(uids, Path(folder))], "sum"):
            distinct, most = distinct + len(counts), max(most, int(counts.max(initial=0)))
    return distinct, most


def check_output(path: Path | str) -> None:
    """Refuse, before any work is done, what no uid file can be written as.

    Raises:
        ValueError: if it is a URL or a folder, does not end in `.npy`, or its folder cannot be written to.
    """
    check_local(path, name="output")
    if Path(path).suffix != ".npy":
        raise ValueError(f"{path}: a uid file is written as .npy, or numpy would add it to the name.")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder, but the uid file is written there: give another name.")
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {above} is {_hindrance(above)}.")


def _hindrance(above: Path) -> str:
    return "a folder that may not be written to" if above.is_dir() else "no folder"


def _check_merge(paths: Sequence[Path | str], how: str) -> None:
    if how not in _MERGES:
        raise ValueError(f"how is {how!r}, but it must be one of {', '.join(_MERGES)}.")
    if isinstance(paths, str | Path):
        raise ValueError(f"paths is {str(paths)!r}, but must be a list of uid files: give [{str(paths)!r}, ...].")
    if not paths:
        raise ValueError("There are no uid files to merge.")


@contextmanager
def _runs_folder(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class _Stretch:
    """Uids `first` to `last` of an array, which are sorted."""

    uids: np.ndarray
    first: int
    last: int


def _runs(uids: np.ndarray, folder: Path) -> list[_Stretch]:
    """The same uids in stretches that are each sorted: all if they are, else blocks, on disk if there are many."""
    if first_unsorted(uids) is None:
        return [_Stretch(uids, 0, len(uids))]
    if len(uids) <= BLOCK:
        return [_Stretch(sort_uids(block_of(uids, 0, len(uids))), 0, len(uids))]
    blocks = [(first, min(first + BLOCK, len(uids))) for first in range(0, len(uids), BLOCK)]
    with (folder / f"{uuid4().hex}.blocks").open("xb") as file:  # one for all: a process may not open thousands
        for first, last in blocks:
            sort_uids(block_of(uids, first, last)).tofile(file)
    mapped = np.memmap(file.name, UID, "r", shape=(len(uids),))
    return [_Stretch(mapped, first, last) for first, last in blocks]


Counted = tuple[np.ndarray, np.ndarray]
"""Distinct uids, sorted, and how often each stands there."""


class _Run:
    """Sorted uids that are taken once, from the lowest on; `window` is what comes next of them."""

    def __init__(self, stretch: _Stretch, size: int) -> None:
        self.uids, self.place, self.last, self.size = stretch.uids, stretch.first, stretch.last, size
        self._read()

    def end_of_window(self) -> np.void | None:
        """The last uid that was read, or None where it is the last of all."""
        return self.window[-1] if self.place + len(self.window) < self.last else None

    def take(self, limit: np.void | None) -> np.ndarray:
        """Everything up to the limit, which may reach beyond the window if it repeats there; None: all."""
        taken = []
        while len(self.window):
            end = len(self.window) if limit is None else int(np.searchsorted(self.window, limit, "right"))
            taken.append(self.window[:end])
            within = end < len(self.window)
            self.place += end
            self._read()
            if within:
                break
        return np.concatenate(taken) if taken else self.window

    def _read(self) -> None:
        self.window = block_of(self.uids, self.place, min(self.place + self.size, self.last))


def _merged(files: Sequence[Sequence[_Stretch]], how: str) -> Iterator[Counted]:
    """Files, each of one or several sorted runs, merged block by block in the order of uids."""
    size = max(1, BLOCK // sum(len(runs) for runs in files))
    opened = [[_Run(stretch, size) for stretch in runs] for runs in files]
    everything = [run for runs in opened for run in runs]
    while any(len(run.window) for run in everything):
        # up to the lowest end of a window that more follows, so that no uid comes in two blocks
        ends = [end for run in everything if (end := run.end_of_window()) is not None]
        limit = sort_uids(np.array(ends, dtype=UID))[0] if ends else None
        taken = ([run.take(limit) for run in runs] for runs in opened)
        yield _merge([_counted(p[0] if len(p) == 1 else sort_uids(np.concatenate(p))) for p in taken], how)


def _merge(files: Sequence[Counted], how: str) -> Counted:
    """What is counted in several files, together."""
    if len(files) == 1:
        return files[0]
    uids, counts = (np.concatenate(column) for column in zip(*files, strict=True))
    order = order_of(uids)
    everything, holders = _counted(uids[order])
    if not len(everything):
        return everything, holders
    counts = _MERGES[how].reduceat(counts[order], np.cumsum(holders) - holders)
    if how == "intersection":
        counts[holders < len(files)] = 0
    return everything[counts > 0], counts[counts > 0]


def _counted(ordered: np.ndarray) -> Counted:
    if not len(ordered):
        return ordered, np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    return ordered[starts], np.diff(np.append(starts, len(ordered)))


def _checked(blocks: Iterable[Counted], duplicates: str) -> Iterator[Counted]:
    for uids, counts in blocks:
        if duplicates == "refuse" and (counts > 1).any():
            first = int((counts > 1).argmax())
            raise ValueError(
                f"The uid {format_uids(uids[first : first + 1])[0]} stands {counts[first]} times. "
                "Pass duplicates='keep' or 'drop'."
            )
        yield uids, np.ones_like(counts) if duplicates == "drop" else counts


def _write(path: Path, blocks: Iterable[Counted], provenance: Mapping[str, Any] | None, *, keys: bool) -> int:
    """The uid file last, so that what lies beside it is there once it is, and nothing of another."""
    total = 0
    with replace_atomically(path) as file:
        _write_header(file, 0)
        if keys:
            with replace_atomically(path.with_suffix(".keys.txt")) as keys_file:
                total = _write_blocks(file, blocks, keys_file)
        else:
            total = _write_blocks(file, blocks, None)
        file.seek(0)
        _write_header(file, total)
        if provenance is not None:
            with replace_atomically(path.with_suffix(".json")) as beside:
                described = {**provenance, "written": total}
                beside.write((json.dumps(described, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
        for suffix, written in ((".json", provenance is not None), (".keys.txt", keys)):
            if not written:
                path.with_suffix(suffix).unlink(missing_ok=True)
    return total


def _write_blocks(file: BinaryIO, blocks: Iterable[Counted], keys_file: BinaryIO | None) -> int:
    total = 0
    for uids, counts in blocks:
        file.write(np.repeat(uids, counts).tobytes())
        total += int(counts.sum())
        for first in range(0, len(uids) if keys_file else 0, 65_536):
            keys_file.write("".join(f"{uid}\n" for uid in format_uids(uids[first : first + 65_536])).encode())  # type: ignore[union-attr]
    return total


def _write_header(file: BinaryIO, rows: int) -> None:
    """The header of numpy's format 1.0 in 128 bytes, however many rows there are, so that they can be counted later."""
    described = f"{{'descr': {UID.descr!r}, 'fortran_order': False, 'shape': ({rows},), }}"
    header = described.encode().ljust(117) + b"\n"
    file.write(np.lib.format.magic(1, 0) + struct.pack("<H", len(header)) + header)
