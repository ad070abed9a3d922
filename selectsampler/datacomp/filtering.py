"""From the files of a pool to a uid file: one filter after another, each keeping an exact fraction of the pool."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from selectsampler import __version__
from selectsampler.datacomp.dynamic import norm_sim_dynamic_of_pool
from selectsampler.datacomp.files import check_local
from selectsampler.datacomp.parts import Run, ShrunkPoolError, check_uids, score_by_shard, sweep
from selectsampler.datacomp.pool import Pool, Shard, ShardError, open_pool
from selectsampler.datacomp.ranks import first_on_its_machine, from_first, join
from selectsampler.datacomp.scorers import check_inputs, scorer_of
from selectsampler.datacomp.scoring import score_s_clip_loss
from selectsampler.datacomp.stages import MASKS, Stage, check_available, check_keeps
from selectsampler.datacomp.targets import digests_of
from selectsampler.datacomp.uid_files import DUPLICATES, check_output, sorted_map, write_uids
from selectsampler.datacomp.uids import UID, contains
from selectsampler.distributed import process_rank
from selectsampler.scores.s_clip_loss import check_temperature
from selectsampler.store import digest_json

__all__ = ["Filtered", "choose", "filter_pool"]

OPENAI_TEMPERATURE = (
    0.01  # 1 / exp(logit_scale) as stored in OpenAI's ViT-B/32 and ViT-L/14, which DataComp's features are of
)


@dataclass(frozen=True)
class Filtered:
    """What a pool was filtered down to: uids in the order of the pool, duplicates as it has them; and how.

    Where a uid file was written, the provenance has how many uids that holds as `written`.
    """

    uids: np.ndarray
    provenance: Mapping[str, Any]


def filter_pool(
    folder: Path | str,
    stages: Sequence[Stage],
    output: Path | str | None = None,
    *,
    arch: str = "l14",
    temperature: float | None = None,
    batch_size: int = 32768,
    repeats: int = 10,
    seed: int = 0,
    group_size: int = 8,
    within: Path | str | None = None,
    duplicates: str = "keep",
    keys: bool = True,
    skip_broken: bool = False,
    work: Path | str | None = None,
    scratch: Path | str | None = None,
    threads: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Filtered | None:
    """Filter a pool of DataComp's format and write the uid file that its tools take.

    >>> stages = [Stage("s-clip-loss", keep=0.3), Stage("norm-sim", keep=0.2, target="imagenet.npy")]
    >>> filter_pool("metadata", stages, "subset.npy")                                            # doctest: +SKIP

    In RAM it holds at most 24 bytes a pool sample, and embeddings of a few batches. Under torchrun every rank takes its
    share; rank 0 writes. The same arguments give the same file on any number of ranks and threads (of one kind of
    processor). Finished parts stay in `work` until the uid file stands, so that the same call goes on after a crash.

    Args:
        folder: local or any fsspec URL.
        stages: applied one after another.
        output: the uid file, `.npy`; beside it come `.json`, its provenance, and `.keys.txt`. None: nothing is written.
        arch: `l14` or `b32`: which embeddings and which similarity column.
        temperature: of the model whose embeddings these are; by default 0.01, which OpenAI's models store.
        batch_size: B of s-CLIPLoss, at most; one size up to one sample within a group, larger than B - B / n where a
            group has n batches. The provenance lists the sizes.
        repeats: K of s-CLIPLoss.
        seed: of the batches of s-CLIPLoss.
        group_size: how many shards, at least, are dealt into batches together; drawn anew each repetition. It does not
            depend on the number of ranks, and changes scores slightly. Their files should fit in the page cache.
        within: a uid file, local or any fsspec URL; only these can be kept, as if it were the first stage.
            Fractions stay fractions of the pool.
        duplicates: of uids, as `write_uids` takes it: what `refuse` refuses is found when the uid file is written.
        keys: write the allow-list `.keys.txt`.
        skip_broken: go on without shards that cannot be read, and list them in the provenance.
        work: where parts are kept; by default a folder beside the output. Removed at the end unless given.
        scratch: where members of remote or deflated npz are written out, so that they can be mapped. By default a
            folder in `work`, for the groups at hand only; given, they are kept, and read once instead of once a
            repetition: as much disk as the embeddings take. Ranks of one machine may share it.
        threads: parts computed side by side; by default as many as torch uses. Each takes about 128 MiB.
        device: `auto`, `cpu` or `cuda`.
        progress: show a bar with an estimate on a terminal, and elsewhere a line a minute.

    Returns:
        What is kept, on rank 0; None on other ranks.

    Raises:
        ShardError: naming a shard that cannot be used, unless skip_broken.
        ValueError: if an argument is out of range, or a stage asks for more than its predecessors left.
    """
    s_clip_loss = {
        "temperature": OPENAI_TEMPERATURE if temperature is None else temperature,
        "batch_size": batch_size,
        "repeats": repeats,
        "seed": seed,
        "group_size": group_size,
    }
    threads = torch.get_num_threads() if threads is None else threads
    _check_numbers(s_clip_loss, threads=threads)
    _check_choices(stages, arch, output, duplicates, work=work, scratch=scratch)
    place = Path(work) if work is not None else Path(f"{output or 'pool'}.work")
    run = Run(place, threads, _device(device), progress, None if scratch is None else Path(scratch))
    own_group = join()
    try:
        pool = _open(folder, stages, arch, skip_broken=skip_broken)
        check_keeps(stages, pool.rows)
        check_inputs(pool, stages, arch, within)
        filtered = _Filtering(run, arch, s_clip_loss, within).of_whole_shards(pool, stages, skip_broken=skip_broken)

        def write() -> None:
            nonlocal filtered
            if filtered is not None and output is not None:
                path, provenance = Path(output), filtered.provenance
                file = write_uids(path, filtered.uids, duplicates=duplicates, provenance=provenance, keys=keys)
                record = {**provenance, "duplicates": duplicates, "written": len(file)}
                filtered = Filtered(filtered.uids, record)

        from_first(write)  # no rank goes on before the uid file stands: until then its parts are what a crash leaves
        if work is None and first_on_its_machine():
            _remove(place)
        return filtered
    finally:
        if own_group:
            dist.destroy_process_group()


class _Filtering:
    """The stages applied to one pool, as far as it is known to be whole."""

    def __init__(self, run: Run, arch: str, s_clip_loss: dict[str, Any], within: Path | str | None) -> None:
        self.run, self.arch, self.s_clip_loss, self.within = run, arch, s_clip_loss, within

    def of_whole_shards(self, pool: Pool, stages: Sequence[Stage], *, skip_broken: bool) -> Filtered | None:
        """What the stages leave; from the start without shards that turn out to be broken, if they may be skipped."""
        while True:
            try:
                return self(pool, stages)
            except ShrunkPoolError as problem:
                if not skip_broken:
                    name, reason = next(iter(problem.broken.items()))
                    raise ShardError(name, f"{reason} (skip_broken goes on without it.)") from None
                pool = pool.without(problem.broken)

    def __call__(self, pool: Pool, stages: Sequence[Stage]) -> Filtered | None:
        check_uids(pool, self.run)
        candidates = np.ones(pool.rows, dtype=bool)
        records: list[dict[str, Any]] = []
        if self.within is not None:
            described, inputs = {"score": "within", "file": str(self.within)}, [self.within]
            candidates = _agreed(self._within(pool, candidates, self.within), described, inputs, records, pool.rows)
        for stage in stages:
            inputs = [path for path in (stage.target, stage.centroids) if path is not None]
            self._check_left(stage, pool.rows, candidates)
            candidates = _agreed(self._kept(pool, stage, candidates), stage.described(), inputs, records, pool.rows)
        uids = _uids_of(pool, candidates)
        if uids is None:
            return None
        provenance = {
            "selectsampler": __version__,
            "pool": pool.folder,
            "arch": self.arch,
            "rows": pool.rows,
            "shards": [shard.identity for shard in pool.shards],
            "broken": dict(pool.broken),
            "s_clip_loss": self.s_clip_loss,
            "device": self.run.device.type,
            "stages": records,
        }
        return Filtered(uids, provenance)

    def _check_left(self, stage: Stage, rows: int, candidates: np.ndarray) -> None:
        """Refuse now, and not after all is scored, what another filter's file or a threshold left too few of."""
        count = stage.count(rows)
        if count is not None:
            left_by = "the stages before" if self.within is None else f"{self.within} (within) and the stages before"
            check_available(count, int(candidates.sum()), left_by=left_by)

    def _kept(self, pool: Pool, stage: Stage, candidates: np.ndarray) -> "Decision":
        """How rank 0 finds which candidates a stage keeps; what takes all ranks is done when this returns."""
        count = stage.count(pool.rows)
        if stage.score == "norm-sim-dynamic":
            survivors = norm_sim_dynamic_of_pool(
                pool, self.run, candidates, count or 0, member=stage.members(self.arch)[0], rounds=stage.rounds or 1
            )
            return lambda: (survivors, {})
        if stage.score == "s-clip-loss":
            image, text = stage.members(self.arch)
            scores, details = score_s_clip_loss(pool, self.run, image=image, text=text, **self.s_clip_loss)
        else:
            compute, key = scorer_of(pool, stage, self.arch, self.run.device)
            details = {}
            scores = score_by_shard(pool, self.run, candidates, compute, key=key, description=stage.score)
        return lambda: _best(stage, count, scores, candidates, details)

    def _within(self, pool: Pool, candidates: np.ndarray, path: Path | str) -> "Decision":
        digest = digest_json(list(digests_of(path).values()))
        name = f"scratch-{digest[:16]}"
        scratch = self.run.work / f"{name}-{process_rank()}"

        def compute(shard: Shard, mask: np.ndarray) -> np.ndarray:
            blocks = [contains(allowed, block["uid"]) > 0 for block in pool.columns(shard, ["uid"])]
            return np.concatenate(blocks).astype(np.float32)

        try:
            scratch.mkdir(parents=True, exist_ok=True)
            allowed = sorted_map(path, scratch)
            key = ["within", digest]
            scores = score_by_shard(pool, self.run, candidates, compute, key=key, description="within")
        finally:
            rmtree(scratch, ignore_errors=True)
        if first_on_its_machine():
            sweep(self.run, [name], [])  # what a killed run of more ranks left
        return lambda: (_held(scores) > 0, {})


Decision = Callable[[], tuple[np.ndarray, dict[str, Any]]]
"""On rank 0: which rows are kept, (N,) bool, and what else there is to say of it."""


def _agreed(
    decide: Decision,
    described: Mapping[str, Any],
    inputs: Sequence[Path | str],
    records: list[dict[str, Any]],
    rows: int,
) -> np.ndarray:
    """(N,), bool: what rank 0 decides to keep, told to all; its record has the digests of the files it went by."""

    def packed() -> tuple[np.ndarray, dict[str, Any]]:
        kept, details = decide()
        digests = {name: digest for path in inputs for name, digest in digests_of(path).items()}
        named = {"sha256": digests} if digests else {}
        return np.packbits(kept), {**described, **named, **details, "kept": int(kept.sum())}

    bits, record = from_first(packed)
    records.append(record)
    return np.unpackbits(bits, count=rows).view(bool)


def _best(
    stage: Stage, count: int | None, scores: np.ndarray | None, candidates: np.ndarray, details: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    scores = _held(scores)
    if stage.score in MASKS:
        kept = candidates & (scores > 0)
    elif count is None:
        kept = candidates & (scores >= np.float32(stage.threshold))
    else:
        kept = choose(scores, count, candidates)
    return kept, {**details, "lowest_score": float(scores[kept].min()) if kept.any() else None}


def _held(scores: np.ndarray | None) -> np.ndarray:
    if scores is None:
        raise RuntimeError("Rank 0 decides, but holds no scores: the ranks have fallen out of step.")
    return scores


def choose(scores: np.ndarray, count: int, candidates: np.ndarray) -> np.ndarray:
    """(N,), bool: the `count` candidates with the highest scores; ties go to the lower row.

    >>> choose(np.array([0.5, 0.9, 0.5, 0.1], dtype=np.float32), 2, np.array([True, True, True, True]))
    array([ True,  True, False, False])

    Raises:
        ValueError: if there are fewer candidates than that.
    """
    available = int(candidates.sum())
    check_available(count, available)
    if count == 0:
        return np.zeros_like(candidates)
    among = scores[candidates]
    among.partition(available - count)
    limit = among[available - count]
    kept = candidates & (scores > limit)
    ties = np.flatnonzero(candidates & (scores == limit))
    kept[ties[: count - int(kept.sum())]] = True
    return kept


def _open(folder: Path | str, stages: Sequence[Stage], arch: str, *, skip_broken: bool) -> Pool:
    """The pool, as rank 0 finds it, with what the stages read of it."""
    members = sorted({name for stage in stages for name in stage.members(arch)})
    columns = sorted({"uid", *(name for stage in stages for name in stage.columns(arch))})
    return from_first(lambda: open_pool(folder, members=members, columns=columns, skip_broken=skip_broken))


def _uids_of(pool: Pool, kept: np.ndarray) -> np.ndarray | None:
    """(n,), `UID`, in the order of the pool, on rank 0; None on others, who hear of a shard that is gone by now."""
    uids = np.empty(int(kept.sum()) if process_rank() == 0 else 0, dtype=UID)

    def read() -> None:
        row = found = 0
        for shard in pool.shards:
            try:
                for block in pool.columns(shard, ["uid"], kept[row : row + shard.rows]):
                    uids[found : found + len(block["uid"])] = block["uid"]
                    found += len(block["uid"])
            except ShardError as problem:
                raise ShrunkPoolError({problem.shard: problem.reason}) from problem
            row += shard.rows

    from_first(read)
    return uids if process_rank() == 0 else None


def _check_numbers(s_clip_loss: Mapping[str, Any], *, threads: int) -> None:
    if s_clip_loss["group_size"] < 2:
        raise ValueError(
            f"group_size is {s_clip_loss['group_size']}, but batches must not come from a single shard: give 2 or more."
        )
    least = {"batch_size": 1, "repeats": 1, "seed": 0, "threads": 1}
    for name, lowest in least.items():
        value = threads if name == "threads" else s_clip_loss[name]
        if value < lowest:
            raise ValueError(f"{name} is {value}, but it must be at least {lowest}.")
    check_temperature(s_clip_loss["temperature"])


def _check_choices(
    stages: Sequence[Stage], arch: str, output: Path | str | None, duplicates: str, **folders: Path | str | None
) -> None:
    if arch not in ("l14", "b32"):
        raise ValueError(f"arch is {arch!r}, but DataComp's pools hold 'l14' and 'b32'.")
    if isinstance(stages, Stage):
        raise ValueError(f"stages is a single Stage, but must be a list: give [Stage({stages.score!r}, ...)].")
    if not stages:
        raise ValueError("There are no stages: name at least one score.")
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates is {duplicates!r}, but it must be one of {', '.join(DUPLICATES)}.")
    for name, path in folders.items():
        check_local(path, name=name)
    if output is not None:
        check_output(output)


def _device(name: str) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise ValueError(f"device is {name!r}, but it must be 'auto', 'cpu' or 'cuda'.")
    if kind == "cpu":
        return torch.device("cpu")
    if int(number or 0) >= count:
        raise ValueError(f"device is {name!r}, but torch finds {count} CUDA devices here. Pass device='cpu'.")
    return torch.device("cuda", int(number or os.environ.get("LOCAL_RANK", "0")) % count)


def _remove(work: Path) -> None:
    """Remove the parts, what a killed run left of them, and their folder if nothing else lies there."""
    for path in [*work.glob("*.safetensors"), *work.glob(".*.partial")]:
        path.unlink(missing_ok=True)
    for folder in work.glob("scratch-*"):
        rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # something else lies there, or another machine was faster
        work.rmdir()
