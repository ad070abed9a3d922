"""NormSim_2-D of a pool that is too large for memory: its survivors are read from disk once or twice a round.

Second moments are summed as integers (multiples of 2^-30), and the round's limit is counted out digit by digit: in
neither does the order matter, so that any number of ranks and threads gives equal bits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from selectsampler.datacomp.files import is_of_size
from selectsampler.datacomp.parts import Run, ShrunkPoolError, one_thread_each, sweep
from selectsampler.datacomp.pool import Pool, ShardError
from selectsampler.datacomp.ranks import everyone, first_on_its_machine, from_first, split_by_size, total
from selectsampler.datacomp.scorers import candidate_images
from selectsampler.distributed import process_count, process_rank
from selectsampler.optimizers.norm_sim_dynamic import double_units, squared_norm_sim_2
from selectsampler.progress import progress_bar
from selectsampler.scores.s_clip_loss import inverse_lengths
from selectsampler.store import FORMAT, bytes_of, digest_json, read_tensors, replace_atomically, write_tensors

__all__ = ["norm_sim_dynamic_of_pool"]

BLOCK = 2048  # rows that are read and multiplied at once, in float64
PIECE = 64 * BLOCK  # rows that a thread takes at once
ONE = 2.0**30  # what 1 is in a second moment of integers; an entry of 2^33 samples still fits
KEEP_EVERY = 10  # rounds, what a kill costs at most

T = TypeVar("T")


def norm_sim_dynamic_of_pool(
    pool: Pool, run: Run, candidates: np.ndarray, count: int, *, member: str, rounds: int
) -> np.ndarray:
    """(N,), bool, on every rank: the `count` survivors of NormSim_2-D among the candidates (N,) bool.

    As `optimizers.norm_sim_dynamic`, except that of equal scores the higher rows go first. The candidates' features are
    copied to the work folder, so that a round reads nothing but them; the page cache holds what fits into RAM. Its own
    are 10 bytes a candidate, and some 64 MiB a thread. Every tenth round is kept.

    Raises:
        ShrunkPoolError: on every rank, if a shard is broken.
    """
    identities = [shard.identity for shard in pool.shards]
    chosen = digest_json([np.packbits(candidates).tobytes().hex(), count, rounds])
    key = digest_json(["norm-sim-dynamic", FORMAT, member, chosen, identities, run.device.type])
    scratch, path = f"scratch-{key[:16]}", run.work / f"{key[:24]}.safetensors"
    share = _Share(pool, run, candidates, member, run.work / f"{scratch}-{process_rank()}")
    state = from_first(lambda: _read_state(path))
    if state is None or state.round < rounds:
        with one_thread_each():
            share.extract()
            state = state or _State(0, np.packbits(candidates), share.moment(share.alive))
            state = _shrink(share, state, int(candidates.sum()), count, rounds, lambda state: _write_state(path, state))
    everyone(None)  # nobody reads features any more
    if first_on_its_machine():
        sweep(run, [scratch], [path.stem])
    return np.unpackbits(state.alive, count=pool.rows).view(bool)


@dataclass(frozen=True)
class _State:
    """What stands after a round: who survives (N bits of the pool), and their second moment, (D, D) int64."""

    round: int
    alive: np.ndarray
    moment: Tensor


def _shrink(
    share: "_Share", state: _State, samples: int, count: int, rounds: int, keep: Callable[[_State], None]
) -> _State:
    """From the state after some round to that after the last."""
    share.revive(state.alive)
    moment, left = state.moment, samples - (samples - count) * state.round // rounds
    show = share.run.progress and process_rank() == 0
    with progress_bar("norm-sim-dynamic", rounds, unit="round", initial=state.round, show=show) as bar:
        for round_ in range(state.round + 1, rounds + 1):
            stay = samples - (samples - count) * round_ // rounds
            if stay < left:
                share.score(moment)
                gone = share.lowest(left - stay)
                moment = moment - share.moment(gone)
                share.drop(gone)
                left = stay
            if round_ % KEEP_EVERY == 0 or round_ == rounds:
                state = _State(round_, share.survivors(), moment)
                if process_rank() == 0:
                    keep(state)
            bar.update()
    return state


class _Share:
    """The shards that a rank looks after: their candidates' features in files, who of them survives, and the scores."""

    def __init__(self, pool: Pool, run: Run, candidates: np.ndarray, member: str, folder: Path) -> None:
        self.pool, self.run, self.member, self.folder = pool, run, member, folder
        self.masks = [candidates[first:last] for first, last in pairwise(pool.offsets.tolist())]
        rows = [int(mask.sum()) for mask in self.masks]
        mine = split_by_size(rows, process_count())[process_rank()]
        self.alive = {number: np.ones(rows[number], dtype=bool) for number in mine if rows[number]}
        self.scores = {number: np.empty(rows[number], dtype=np.float64) for number in self.alive}

    def extract(self) -> None:
        """Copy the candidates' features to files, which a run that goes on finds."""
        broken: dict[str, str] = {}
        rows = sum(len(alive) for alive in self.alive.values())
        show = self.run.progress and process_rank() == 0
        with progress_bar("norm-sim-dynamic, copying", rows, unit="row", show=show) as bar:

            def copy(number: int) -> None:
                try:
                    self._copy(number)
                except ShardError as problem:
                    broken[problem.shard] = problem.reason
                bar.update(len(self.alive[number]))

            self._side_by_side(copy, self.alive)
        everywhere = {name: reason for found in everyone(broken) for name, reason in found.items()}
        if everywhere:
            rmtree(self.folder, ignore_errors=True)
            raise ShrunkPoolError(everywhere)

    def revive(self, alive: np.ndarray) -> None:
        """Set who survives, from N bits of the pool."""
        survivors = np.unpackbits(alive, count=self.pool.rows).view(bool)
        for number in self.alive:
            first, last = self.pool.offsets[number : number + 2]
            self.alive[number] = survivors[first:last][self.masks[number]]

    def survivors(self) -> np.ndarray:
        """N bits of the pool, on every rank."""
        survivors = np.zeros(self.pool.rows, dtype=bool)
        for found in everyone({number: np.packbits(alive) for number, alive in self.alive.items()}):
            for number, bits in found.items():
                first, last = self.pool.offsets[number : number + 2]
                mask = self.masks[number]
                survivors[first:last][mask] = np.unpackbits(bits, count=int(mask.sum())).view(bool)
        return np.packbits(survivors)

    def moment(self, rows: Mapping[int, np.ndarray]) -> Tensor:
        """(D, D), int64: the second moment of some rows of all ranks."""
        dim = self.pool.shards[0].members[self.member].dim
        moment, lock = torch.zeros(dim, dim, dtype=torch.int64), Lock()

        def add(piece: _Piece) -> None:
            for _, images in self._blocks(piece, rows[piece.shard]):
                units = double_units(images)
                part = (units.T @ units * ONE).round().to("cpu", torch.int64)
                with lock:
                    moment.add_(part)

        self._side_by_side(add, self._pieces())
        return total(moment)

    def score(self, moment: Tensor) -> None:
        """The squares of NormSim_2 of the survivors against their second moment."""
        scale = (moment.double() / ONE).to(self.run.device)

        def score(piece: _Piece) -> None:
            alive, scores = self.alive[piece.shard], self.scores[piece.shard]
            for rows, images in self._blocks(piece, alive):
                scores[rows][alive[rows]] = _rounded(squared_norm_sim_2(double_units(images), scale).cpu().numpy())

        self._side_by_side(score, self._pieces())

    def lowest(self, count: int) -> dict[int, np.ndarray]:
        """Which `count` survivors of all ranks score lowest; of equal scores, the higher rows.

        Scores are positive, everyone being a target of his own, so that their bits are in their order: three times 16
        bits of the limit come from counts of what each rank has, instead of the scores themselves.
        """
        bits = {number: scores.view(np.uint64) for number, scores in self.scores.items()}
        limit = below = 0
        for shift in (48, 32, 16):
            digit, fewer = self._digit(count - below, bits, shift, limit)
            limit, below = limit << 16 | digit, below + fewer
        limit <<= 16  # the last 16 are zero
        gone = {number: alive & (bits[number] < limit) for number, alive in self.alive.items()}
        ties = {number: np.flatnonzero(alive & (bits[number] == limit)) for number, alive in self.alive.items()}
        held = torch.zeros(len(self.pool.shards), dtype=torch.int64)
        for number, rows in ties.items():
            held[number] = len(rows)
        stay = int(total(held).sum()) - (count - below)
        before = (held.cumsum(0) - held).tolist()
        for number, rows in ties.items():
            gone[number][rows[max(0, stay - before[number]) :]] = True
        return gone

    def drop(self, gone: Mapping[int, np.ndarray]) -> None:
        """These survive no longer."""
        for number, rows in gone.items():
            self.alive[number] &= ~rows

    def _digit(self, count: int, bits: Mapping[int, np.ndarray], shift: int, above: int) -> tuple[int, int]:
        """The 16 bits from `shift` on of the `count`-th lowest of all ranks' with those bits above them, and how many
        have lower ones."""
        counts = np.zeros(2**16, dtype=np.int64)
        for number, alive in self.alive.items():
            digits = bits[number][alive] >> np.uint64(shift)
            digits = digits[digits >> np.uint64(16) == above] if shift < 48 else digits
            counts += np.bincount((digits & np.uint64(0xFFFF)).view(np.int64), minlength=2**16)
        counts = total(torch.from_numpy(counts)).numpy()
        reached = counts.cumsum()
        digit = int(np.searchsorted(reached, count))
        return digit, int(reached[digit] - counts[digit])

    def _pieces(self) -> Iterator["_Piece"]:
        for number, alive in self.alive.items():
            for first in range(0, len(alive), PIECE):
                yield _Piece(number, first, min(first + PIECE, len(alive)))

    def _blocks(self, piece: "_Piece", wanted: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """The wanted rows of a piece, block by block, and where the block lies among the shard's candidates."""
        header = self.pool.shards[piece.shard].members[self.member]
        with self._file(piece.shard).open("rb") as file:
            for first in range(piece.first, piece.last, BLOCK):
                rows = slice(first, min(first + BLOCK, piece.last))
                if wanted[rows].any():
                    file.seek(first * header.row_bytes)
                    content = np.fromfile(file, header.dtype, (rows.stop - first) * header.dim)
                    images = content.reshape(-1, header.dim)[wanted[rows]]
                    yield rows, torch.from_numpy(images).to(self.run.device)

    def _file(self, number: int) -> Path:
        return self.folder / self.pool.shards[number].name

    def _copy(self, number: int) -> None:
        shard = self.pool.shards[number]
        if is_of_size(self._file(number), len(self.alive[number]) * shard.members[self.member].row_bytes):
            return
        with replace_atomically(self._file(number)) as file:
            for images in candidate_images(self.pool, shard, self.member, self.masks[number], _checked):
                file.write(bytes_of(images))

    def _side_by_side(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        executor = ThreadPoolExecutor(max(1, self.run.threads))
        try:
            for _ in executor.map(work, items):
                pass
        finally:
            executor.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Piece:
    """Candidates `first` to `last` of a shard: what a thread takes at once."""

    shard: int
    first: int
    last: int


def _rounded(scores: np.ndarray) -> np.ndarray:
    """Without the last 16 bits, so that equal images score the same wherever they stand in a block."""
    return ((scores.view(np.uint64) + np.uint64(2**15)) >> np.uint64(16) << np.uint64(16)).view(np.float64)


def _checked(images: np.ndarray) -> Tensor:
    features = torch.from_numpy(images)
    inverse_lengths(features, name="image_features")
    return features


def _read_state(path: Path) -> _State | None:
    try:
        tensors = read_tensors(path, kind="pool part")[0]
    except (FileNotFoundError, ValueError):  # a damaged state counts as none
        return None
    return _State(int(tensors["round"]), tensors["alive"].numpy(), tensors["moment"])


def _write_state(path: Path, state: _State) -> None:
    tensors = {"round": torch.tensor(state.round), "alive": torch.from_numpy(state.alive), "moment": state.moment}
    write_tensors(path, tensors, {"kind": "pool part", "format": FORMAT})
