"""Scores of a pool that is too large for memory: part by part, in threads and ranks, every part kept.

A part is a file whose name says what made it, so that a run that died goes on, on any number of ranks. Parts are
computed on one thread each and in the same shapes wherever they are, so that any number of ranks gives equal bits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shutil import rmtree
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectsampler.datacomp.pool import Pool, Shard, ShardError
from selectsampler.datacomp.ranks import collect, everyone, first_on_its_machine, split_by_size
from selectsampler.distributed import process_count, process_rank
from selectsampler.precision import full_precision
from selectsampler.progress import progress_bar
from selectsampler.store import FORMAT, digest_json, read_tensors, write_tensors

__all__ = [
    "Part",
    "Room",
    "Run",
    "ShrunkPoolError",
    "check_uids",
    "compute_parts",
    "one_thread_each",
    "read_part",
    "score_by_shard",
    "sweep",
]


class ShrunkPoolError(Exception):
    """Shards turned out to be broken while they were read; every rank raises it with all of them."""

    def __init__(self, broken: Mapping[str, str]) -> None:
        super().__init__(f"{len(broken)} shards are broken: {dict(broken)}")
        self.broken = dict(broken)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShrunkPoolError, (self.broken,)


@dataclass(frozen=True)
class Run:
    """Where and how parts are computed; nothing here changes a score, but for the device's rounding."""

    work: Path
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: bool = True
    scratch: Path | None = None  # members that cannot be mapped are kept here, written out, for all repetitions
    stopped: Event = field(
        default_factory=Event
    )  # set where the run ends early, so that threads do not finish their parts


@dataclass(frozen=True)
class Part:
    """One file of scores: its name, how many it holds, and how they are made."""

    name: str
    rows: int
    compute: Callable[[], Tensor]


@dataclass(frozen=True)
class Room:
    """Parts that read the same files: `prepare` comes before the first and `close` after the last."""

    parts: Sequence[Part]
    prepare: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


def score_by_shard(
    pool: Pool,
    run: Run,
    candidates: np.ndarray,
    compute: Callable[[Shard, np.ndarray], np.ndarray],
    *,
    key: Sequence[object],
    description: str,
) -> np.ndarray | None:
    """Scores of the candidates (N,) bool, shard by shard: (N,) float32 on rank 0, where the others count as -inf.

    Args:
        pool: the pool.
        run: where and how.
        candidates: which rows are scored.
        compute: takes a shard and the mask of its candidates, and gives the float32 scores of these.
        key: what else the scores depend on, as JSON values.
        description: for the progress bar.
    """
    offsets = pool.offsets
    parts = []
    for number, shard in enumerate(pool.shards):
        mask = candidates[offsets[number] : offsets[number + 1]]
        name = digest_json([*key, FORMAT, shard.identity, np.packbits(mask).tobytes().hex(), run.device.type])[:24]
        parts.append(Part(name, shard.rows, lambda s=shard, m=mask: torch.from_numpy(compute(s, m))))  # type: ignore[misc]
    compute_parts([Room(parts)], run, description=description)
    if process_rank() > 0:
        return None
    scores = np.full(pool.rows, -np.inf, dtype=np.float32)
    for number, part in enumerate(parts):
        mask = candidates[offsets[number] : offsets[number + 1]]
        scores[offsets[number] : offsets[number + 1]][mask] = read_part(run, part.name).numpy()
    return scores


def check_uids(pool: Pool, run: Run) -> None:
    """Read every uid once, each rank its share, before anything is scored: nobody can be kept without.

    Raises:
        ShrunkPoolError: on every rank, if a shard holds something else.
    """

    def check(shard: Shard) -> Tensor:
        for _ in pool.columns(shard, ["uid"]):  # refuses what is no uid
            pass
        return torch.ones(1)

    parts = [
        Part(digest_json(["uids", FORMAT, shard.identity])[:24], shard.rows, partial(check, shard))
        for shard in pool.shards
    ]
    compute_parts([Room(parts)], run, description="uids")


def compute_parts(rooms: Sequence[Room], run: Run, *, description: str) -> None:
    """Compute what no rank has yet, each rank its share, and bring rank 0 what it lacks.

    Raises:
        ShrunkPoolError: on every rank, if a shard is broken; parts that do not need it are finished first.
    """
    parts = [part for room in rooms for part in room.parts]
    there = set().union(*everyone(_present(run, parts)))
    rows = {part.name: part.rows for part in parts}
    mine = _share(rooms, there)
    done = sum(rows[name] for name in there)
    broken: dict[str, str] = {}
    show = run.progress and process_rank() == 0
    total = done + sum(rows[name] for name in mine)
    with progress_bar(description, total, unit="row", initial=done, show=show) as bar, one_thread_each():
        for room in rooms:
            some = [part for part in room.parts if part.name in mine]
            if some:
                _compute_room(Room(some, room.prepare, room.close), run, bar.update, broken)
    everywhere = {name: reason for found in everyone(broken) for name, reason in found.items()}
    if everywhere:
        raise ShrunkPoolError(everywhere)
    names = [part.name for part in parts]
    collect(
        names,
        _present(run, parts),
        read=lambda name: read_part(run, name),
        write=lambda name, scores: _write(run, name, scores),
    )
    everyone(None)  # rank 0 has collected: nobody writes a part any more
    if first_on_its_machine():
        sweep(run, [], names)


def _compute_room(room: Room, run: Run, advance: Callable[[int], object], broken: dict[str, str]) -> None:
    """Compute the parts of one room in threads; a broken shard is noted, and what does not need it goes on."""
    executor = ThreadPoolExecutor(max(1, run.threads))
    try:
        room.prepare()
        futures = {executor.submit(_finish, part, run): part for part in room.parts}
        for future in as_completed(futures):
            try:
                future.result()
            except ShardError as problem:
                broken[problem.shard] = problem.reason
            advance(futures[future].rows)
    except ShardError as problem:
        broken[problem.shard] = problem.reason
    except BaseException:
        run.stopped.set()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        room.close()


def _share(rooms: Sequence[Room], there: set[str]) -> set[str]:
    """The names of the missing parts that this rank takes: neighbours, so that it reads few files, or else by size."""
    missing = [part for room in rooms for part in room.parts if part.name not in there]
    rank, ranks = process_rank(), process_count()
    if len(rooms) == 1:
        return {missing[item].name for item in split_by_size([part.rows for part in missing], ranks)[rank]}
    middles = np.cumsum([part.rows for part in missing]) - np.array([part.rows for part in missing]) / 2
    total = sum(part.rows for part in missing)
    return {part.name for part, middle in zip(missing, middles, strict=True) if int(middle * ranks // total) == rank}


def _finish(part: Part, run: Run) -> None:
    _write(run, part.name, part.compute())


def _path(run: Run, name: str) -> Path:
    return run.work / f"{name}.safetensors"


def _present(run: Run, parts: Sequence[Part]) -> set[str]:
    return {part.name for part in parts if _readable(run, part.name)}


def _readable(run: Run, name: str) -> bool:
    try:
        read_part(run, name)
    except (FileNotFoundError, ValueError):  # a damaged part is made anew
        return False
    return True


def read_part(run: Run, name: str) -> Tensor:
    """(n,), float32: the scores that a part left in the run's folder, ValueError where the file is not whole."""
    return read_tensors(_path(run, name), kind="pool part")[0]["scores"]


def _write(run: Run, name: str, scores: Tensor) -> None:
    write_tensors(_path(run, name), {"scores": scores.float()}, {"kind": "pool part", "format": FORMAT})


def sweep(run: Run, scratch_names: Sequence[str], parts: Sequence[str]) -> None:
    """Remove what killed runs left of these groups and parts in a folder that other runs may use as well."""
    scratches, names = set(scratch_names), set(parts)
    for path in list(run.work.iterdir()) if run.work.is_dir() else []:
        if path.name.rpartition("-")[0] in scratches:
            rmtree(path, ignore_errors=True)
        elif path.name.endswith(".partial") and path.name[1:].partition(".")[0] in names:
            path.unlink(missing_ok=True)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Products on one thread: how many there are changes the rounding, and parts are computed side by side anyway."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with full_precision():
            yield
    finally:
        torch.set_num_threads(threads)
