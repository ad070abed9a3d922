"""s-CLIPLoss of a pool that is too large for memory: batches from groups of shards, drawn anew each repetition."""

from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectsampler.datacomp.files import is_of_size
from selectsampler.datacomp.parts import Part, Room, Run, compute_parts, read_part, sweep
from selectsampler.datacomp.pool import Pool, Shard, ShardError
from selectsampler.datacomp.ranks import first_on_its_machine
from selectsampler.distributed import process_rank
from selectsampler.scores.s_clip_loss import batch_sizes, s_clip_loss_of_batch, shuffled
from selectsampler.store import FORMAT, digest_json

__all__ = ["first_without_direction", "group_shards", "score_s_clip_loss"]

PART_ROWS = 32_768  # at least a batch; what a kill costs a thread, at most


def group_shards(shards: int, size: int, *, seed: tuple[int, ...]) -> list[list[int]]:
    """Shards dealt into groups of at least `size` (all, if there are fewer), drawn anew for each seed.

    >>> [len(group) for group in group_shards(10, 4, seed=(0, 0))]
    [5, 5]
    """
    order = shuffled(shards, seed=seed)
    return [sorted(group.tolist()) for group in np.array_split(order, max(1, shards // size))]


def score_s_clip_loss(
    pool: Pool,
    run: Run,
    *,
    image: str,
    text: str,
    temperature: float,
    batch_size: int,
    repeats: int,
    seed: int,
    group_size: int,
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """s-CLIPLoss of every row of a pool: (N,) float32 on rank 0, None on others; and how.

    In repetition k the shards are dealt into groups, seeded by (seed, k), and the rows of a group into batches, seeded
    by (seed, k, group). So a sample may meet any other of the pool, and a rank reads no shards but its groups'.

    Batches differ by at most one sample within a group. A group of n batches has them larger than B - B / n, so that
    between groups they differ by less than B / n of the group with fewest. `batch_sizes` in the details lists them.
    """
    names = sorted([*(shard.name for shard in pool.shards), *pool.broken])
    by_name = {shard.name: number for number, shard in enumerate(pool.shards) if shard.rows}
    groups: list[_Group] = []
    for repeat in range(repeats):
        dealt = group_shards(len(names), group_size, seed=(seed, repeat))
        for number, members in enumerate(
            _merge_small([[by_name[names[i]] for i in m if names[i] in by_name] for m in dealt])
        ):
            groups.append(_Group(pool, run, (image, text), members, (seed, repeat, number), batch_size, temperature))
    rooms = [Room(group.parts(), group.prepare, group.close) for group in groups]
    compute_parts(rooms, run, description="s-CLIPLoss")
    if first_on_its_machine():
        sweep(run, [group.scratch_name for group in groups], [])
    details = {
        "batch_sizes": sorted({size for group in groups for size in group.sizes}),
        "group_shards": sorted({len(group.shards) for group in groups}),
    }
    if process_rank() > 0:
        return None, details
    total, offsets = np.zeros(pool.rows, dtype=np.float32), pool.offsets
    for group, room in zip(groups, rooms, strict=True):
        scores = group.assemble(room.parts)
        for number, first, last in zip(group.shards, group.offsets[:-1], group.offsets[1:], strict=True):
            total[offsets[number] : offsets[number + 1]] += scores[first:last]
    total /= np.float32(repeats)
    return total, details


class _Group:
    """Some shards whose rows are dealt into batches together."""

    def __init__(
        self,
        pool: Pool,
        run: Run,
        members: tuple[str, str],
        shards: Sequence[int],
        seed: tuple[int, ...],
        batch_size: int,
        temperature: float,
    ) -> None:
        self.pool, self.run, self.members, self.shards = pool, run, members, list(shards)
        self.seed, self.temperature = seed, temperature
        self.offsets = np.cumsum([0, *(pool.shards[number].rows for number in shards)])
        self.sizes = batch_sizes(int(self.offsets[-1]), batch_size)
        self.starts = np.cumsum([0, *self.sizes])
        identities = [pool.shards[number].identity for number in shards]
        self.key = [
            "s-clip-loss",
            FORMAT,
            list(members),
            temperature,
            batch_size,
            list(seed),
            identities,
            run.device.type,
        ]
        self.scratch_name = f"scratch-{digest_json(self.key)[:16]}"
        self._order: np.ndarray | None = None
        self._scratch: Path | None = None

    def parts(self) -> list[Part]:
        """The batches, a few to a file."""
        step = max(1, PART_ROWS // max(self.sizes))
        parts = []
        for first in range(0, len(self.sizes), step):
            batches = range(first, min(first + step, len(self.sizes)))
            rows = int(self.starts[batches.stop] - self.starts[first])
            name = digest_json([self.key, first, batches.stop])[:24]
            parts.append(Part(name, rows, lambda batches=batches: self._score(batches)))  # type: ignore[misc]
        return parts

    def prepare(self) -> None:
        """Draw the order, and write members that cannot be mapped to files of their own, for as long as needed.

        The others are read through once, in the first repetition, as nobody compares the checksum of a memory map; it
        is then that they come into the page cache.
        """
        self._order = shuffled(int(self.offsets[-1]), seed=self.seed)
        members = [(self.pool.shards[number], member) for number in self.shards for member in self.members]
        packed = [(shard, member) for shard, member in members if shard.members[member].offset is None]
        if packed:
            # a rank's own, as it is removed at the end; and the same after a kill, so that nothing is left behind
            self._scratch = self.run.scratch or self.run.work / f"{self.scratch_name}-{process_rank()}"
        with ThreadPoolExecutor(max(1, self.run.threads)) as executor:
            list(executor.map(lambda one: self._inflate(*one), packed))
            if self.seed[1] == 0:
                list(executor.map(lambda one: self._check(*one), (one for one in members if one not in packed)))

    def close(self) -> None:
        """Forget what `prepare` made."""
        self._order = None
        if self._scratch is not None and self._scratch != self.run.scratch:
            rmtree(self._scratch, ignore_errors=True)
        self._scratch = None

    def _inflated(self, shard: Shard, member: str) -> Path | None:
        """Where a member lies that cannot be mapped in place, or None: its name says what it holds."""
        header = shard.members[member]
        if header.offset is not None or self._scratch is None:
            return None
        return self._scratch / f"{shard.name}-{member}-{header.rows}-{header.crc:08x}"

    def _inflate(self, shard: Shard, member: str) -> None:
        path = self._inflated(shard, member)
        header = shard.members[member]
        if path is not None and not is_of_size(path, header.rows * header.row_bytes):
            self.pool.inflate(shard, member, path)

    def _check(self, shard: Shard, member: str) -> None:
        for _ in self.pool.blocks(shard, member):  # which compares the checksum at the end
            if self.run.stopped.is_set():
                raise CancelledError

    def assemble(self, parts: Sequence[Part]) -> np.ndarray:
        """(n,), float32: the scores of the group's rows in their own order, from its parts."""
        order = shuffled(int(self.offsets[-1]), seed=self.seed)
        for start, stop in zip(self.starts[:-1], self.starts[1:], strict=True):
            order[start:stop].sort()
        scores = np.empty(len(order), dtype=np.float32)
        first = 0
        for part in parts:
            scores[order[first : first + part.rows]] = read_part(self.run, part.name).numpy()
            first += part.rows
        return scores

    def _score(self, batches: range) -> Tensor:
        if self._order is None:
            raise RuntimeError("The group was not prepared.")
        scores = []
        for batch in batches:
            if self.run.stopped.is_set():
                raise CancelledError
            rows = np.sort(self._order[self.starts[batch] : self.starts[batch + 1]])
            image, text = (torch.from_numpy(self._gather(member, rows)).to(self.run.device) for member in self.members)
            try:
                scores.append(s_clip_loss_of_batch(image, text, temperature=self.temperature).cpu())
            except ValueError:
                self._blame(rows, image, text)
                raise
        return torch.cat(scores)

    def _gather(self, member: str, rows: np.ndarray) -> np.ndarray:
        """(n, D): rows of the group, ascending, of one member."""
        bounds = np.searchsorted(rows, self.offsets)
        found = []
        for place, number in enumerate(self.shards):
            inside = rows[bounds[place] : bounds[place + 1]] - self.offsets[place]
            shard = self.pool.shards[number]
            found.append(self.pool.rows_of(shard, member, inside, self._inflated(shard, member)))
        return np.concatenate(found)

    def _blame(self, rows: np.ndarray, image: Tensor, text: Tensor) -> None:
        """Name the shard and the row of a feature that cannot be used."""
        for member, features in zip(self.members, (image, text), strict=True):
            place_of_bad = first_without_direction(features)
            if place_of_bad is not None:
                row = int(rows[place_of_bad])
                place = int(np.searchsorted(self.offsets, row, "right")) - 1
                name = self.pool.shards[self.shards[place]].name
                raise ShardError(name, f"row {row - int(self.offsets[place])} of {member} is zero or not finite.")


def _merge_small(groups: list[list[int]]) -> list[list[int]]:
    """Groups that broken shards left with fewer than two go to the one before them: no shard is a group of its own."""
    merged: list[list[int]] = []
    for group in groups:
        if merged and (len(group) < 2 or len(merged[-1]) < 2):
            merged[-1] = sorted(merged[-1] + group)
        elif group:
            merged.append(group)
    return merged


def first_without_direction(features: Tensor) -> int | None:
    """The first of (n, D) features that is zero or not finite, or None."""
    lengths = features.float().norm(dim=1).cpu()
    bad = (~((lengths > 0) & lengths.isfinite())).nonzero()[:, 0]
    return int(bad[0]) if len(bad) else None
