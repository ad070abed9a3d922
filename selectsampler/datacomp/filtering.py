"""From the files of a pool to a uid file: one filter after another, each keeping an exact fraction of the pool."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from selectsampler import __version__
from selectsampler.datacomp import SCORES
from selectsampler.datacomp.baselines import basic_filter, image_based_filter, nearest_centroids, text_based_filter
from selectsampler.datacomp.pool import Pool, Shard, ShardError, open_pool
from selectsampler.datacomp.ranks import first_on_its_machine, from_first, join
from selectsampler.datacomp.scoring import (
    Run,
    ShrunkPoolError,
    first_without_direction,
    score_by_shard,
    score_s_clip_loss,
)
from selectsampler.datacomp.targets import read_centroids, read_fitting_target, read_words
from selectsampler.datacomp.uids import DUPLICATES, UID, check_local, contains, read_uids, write_uids
from selectsampler.distributed import process_rank
from selectsampler.scores.norm_sim import norm_sim, norm_sim_2, second_moment
from selectsampler.scores.s_clip_loss import check_temperature
from selectsampler.store import bytes_of, digest_json, digest_tensors

__all__ = ["Filtered", "Stage", "choose", "filter_pool"]

OPENAI_TEMPERATURE = (
    0.01  # 1 / exp(logit_scale) as stored in OpenAI's ViT-B/32 and ViT-L/14, which DataComp's features are of
)

MASKS = ("basic", "text-based", "image-based")
TARGETED = ("norm-sim", "text-based", "image-based")


@dataclass(frozen=True)
class Stage:
    """One filter: what it scores by, and what it keeps.

    >>> paper = [Stage("s-clip-loss", keep="0.3"), Stage("norm-sim", keep="0.2", target="imagenet.npy")]

    Args:
        score: `s-clip-loss`; `norm-sim`, of survivors only, against `target`; `clip-score`, the parquet's similarity;
            or DataComp's yes-or-no filters `basic`, `text-based` (words in `target`) and `image-based` (images in
            `target`, clusters in `centroids`), which keep what they keep.
        keep: a fraction of the whole pool, in [0, 1], taken as the exact decimal it is written as: the best of what
            the stages before have left.
        threshold: instead of keep: everything that scores at least this.
        target: a file or folder of image features (`.npy`, `.npz`, `.safetensors`), or a file with a word a line.
        p: of norm-sim, 2 or infinity.
        centroids: (C, D) `.npy`.
    """

    score: str
    keep: str | float | None = None
    threshold: float | None = None
    target: str | None = None
    p: float = math.inf
    centroids: str | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}, but it must be one of {', '.join(SCORES)}.")
        if self.score in MASKS:
            if self.keep is not None or self.threshold is not None:
                raise ValueError(f"{self.score} says yes or no: it takes neither keep nor threshold.")
        elif (self.keep is None) == (self.threshold is None):
            raise ValueError(f"{self.score} needs either keep, a fraction of the pool, or threshold, a lowest score.")
        if self.keep is not None and not 0 <= _fraction(self.keep) <= 1:
            raise ValueError(f"keep is {self.keep}, but it must be a fraction of the pool in [0, 1].")
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("threshold is NaN, which no score reaches: give the lowest score to keep.")
        if self.target is not None and self.score not in TARGETED:
            raise ValueError(f"{self.score} takes no target: of {', '.join(TARGETED)} only.")
        if self.centroids is not None and self.score != "image-based":
            raise ValueError(f"{self.score} takes no centroids: of image-based only.")
        if self.p != math.inf and self.score != "norm-sim":
            raise ValueError(f"{self.score} takes no p: of norm-sim only.")
        if self.score in TARGETED and self.target is None:
            raise ValueError(f"{self.score} needs a target: a file or folder of features, or of words for text-based.")
        if self.score == "image-based" and self.centroids is None:
            raise ValueError("image-based needs centroids: a .npy file of (C, D) cluster centres.")
        if self.p not in (2, math.inf):
            raise ValueError(f"p is {self.p}, but NormSim is defined here for p=2 and p=float('inf').")


@dataclass(frozen=True)
class Filtered:
    """What a pool was filtered down to: uids in the order of the pool, duplicates as it has them; and how."""

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
        within: a uid file; only these can be kept, as if it were the first stage. Fractions stay fractions of the pool.
        duplicates: of uids, as `write_uids` takes it.
        keys: write the allow-list `.keys.txt`.
        skip_broken: go on without shards that cannot be read, and list them in the provenance.
        work: where parts are kept; by default a folder beside the output. Removed at the end unless given.
        scratch: where members of remote or deflated npz are written out, so that they can be mapped. By default a
            folder in `work`, for the groups at hand only; given, they are kept, and read once instead of once a
            repetition: as much disk as the embeddings take. Ranks of one machine may share it.
        threads: parts computed side by side; by default as many as torch uses. Each takes about 128 MiB.
        device: `auto`, `cpu` or `cuda`.
        progress: show a bar with an estimate on a terminal.

    Returns:
        What is kept, on rank 0; None on other ranks.

    Raises:
        ShardError: naming a shard that cannot be used, unless skip_broken.
        ValueError: if an argument is out of range, or a stage asks for more than its predecessors left.
    """
    if arch not in ("l14", "b32"):
        raise ValueError(f"arch is {arch!r}, but DataComp's pools hold 'l14' and 'b32'.")
    if not stages:
        raise ValueError("There are no stages: name at least one score.")
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}, but batches must not come from a single shard: give at least 2.")
    threads = torch.get_num_threads() if threads is None else threads
    for name, value in (("batch_size", batch_size), ("repeats", repeats), ("threads", threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but it must be at least 1.")
    if duplicates not in DUPLICATES:
        raise ValueError(f"duplicates is {duplicates!r}, but it must be one of {', '.join(DUPLICATES)}.")
    for name, path in (("output", output), ("work", work), ("scratch", scratch)):
        check_local(path, name=name)
    temperature = OPENAI_TEMPERATURE if temperature is None else temperature
    check_temperature(temperature)
    if output is not None and Path(output).suffix != ".npy":
        raise ValueError(f"{output}: a uid file is written as .npy.")
    run_on = _device(device)
    own_group = join()
    try:
        members = sorted({name for stage in stages for name in _members(stage, arch)})
        columns = sorted({"uid", *(name for stage in stages for name in _columns(stage, arch))})
        pool = from_first(lambda: open_pool(folder, members=members, columns=columns, skip_broken=skip_broken))
        place = Path(work) if work is not None else Path(f"{output or 'pool'}.work")
        kept_members = None if scratch is None else Path(scratch)
        run = Run(place, threads, run_on, progress, kept_members)
        s_clip_loss = {
            "temperature": temperature,
            "batch_size": batch_size,
            "repeats": repeats,
            "seed": seed,
            "group_size": group_size,
        }
        _check_keeps(stages, pool.rows)
        _check_inputs(pool, stages, arch)
        filtering = _Filtering(run, arch, s_clip_loss, within)
        while True:
            try:
                filtered = filtering(pool, stages)
                break
            except ShrunkPoolError as problem:
                if not skip_broken:
                    name, reason = next(iter(problem.broken.items()))
                    raise ShardError(name, f"{reason} (skip_broken goes on without it.)") from None
                pool = pool.without(problem.broken)

        def write() -> None:
            if filtered is not None and output is not None:
                write_uids(output, filtered.uids, duplicates=duplicates, provenance=filtered.provenance, keys=keys)

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

    def __call__(self, pool: Pool, stages: Sequence[Stage]) -> Filtered | None:
        candidates = np.ones(pool.rows, dtype=bool)
        records: list[dict[str, Any]] = []
        if self.within is not None:
            candidates = self._apply(pool, candidates, self._within(pool, candidates), None, records)
        for stage in stages:
            scores, details = self._score(pool, stage, candidates)
            candidates = self._apply(pool, candidates, scores, stage, records, details)
        if process_rank() > 0:
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
        return Filtered(_uids_of(pool, candidates), provenance)

    def _score(self, pool: Pool, stage: Stage, candidates: np.ndarray) -> tuple[np.ndarray | None, dict[str, Any]]:
        if stage.score == "s-clip-loss":
            image, text = f"{self.arch}_img", f"{self.arch}_txt"
            return score_s_clip_loss(pool, self.run, image=image, text=text, **self.s_clip_loss)
        compute, key = _SCORERS[stage.score](pool, stage, self.arch, self.run.device)
        scores = score_by_shard(pool, self.run, candidates, compute, key=[stage.score, *key], description=stage.score)
        return scores, {}

    def _within(self, pool: Pool, candidates: np.ndarray) -> np.ndarray | None:
        kept = read_uids(self.within, sort=True)  # type: ignore[arg-type]

        def compute(shard: Shard, mask: np.ndarray) -> np.ndarray:
            blocks = [contains(kept, block["uid"]) > 0 for block in pool.columns(shard, ["uid"])]
            return np.concatenate(blocks).astype(np.float32)

        key = ["within", digest_json([len(kept), _digest(kept)])]
        return score_by_shard(pool, self.run, candidates, compute, key=key, description="within")

    def _apply(
        self,
        pool: Pool,
        candidates: np.ndarray,
        scores: np.ndarray | None,
        stage: Stage | None,
        records: list[dict[str, Any]],
        details: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """The candidates that a stage keeps, decided by rank 0 and told to all."""

        def decide() -> tuple[np.ndarray, dict[str, Any]]:
            if scores is None:
                raise RuntimeError("Rank 0 decides, but holds no scores: the ranks have fallen out of step.")
            if stage is None or stage.score in MASKS:
                kept = candidates & (scores > 0)
            elif stage.threshold is not None:
                kept = candidates & (scores >= np.float32(stage.threshold))
            else:
                kept = choose(scores, int(_fraction(stage.keep) * pool.rows), candidates)
            described = {"score": "within", "file": str(self.within)} if stage is None else _described(stage)
            lowest = float(scores[kept].min()) if kept.any() else None
            record = {**described, **(details or {}), "kept": int(kept.sum()), "lowest_score": lowest}
            return np.packbits(kept), record

        packed, record = from_first(decide)
        records.append(record)
        return np.unpackbits(packed, count=pool.rows).astype(bool)


def choose(scores: np.ndarray, count: int, candidates: np.ndarray) -> np.ndarray:
    """(N,), bool: the `count` candidates with the highest scores; ties go to the lower row.

    >>> choose(np.array([0.5, 0.9, 0.5, 0.1], dtype=np.float32), 2, np.array([True, True, True, True]))
    array([ True,  True, False, False])

    Raises:
        ValueError: if there are fewer candidates than that.
    """
    available = int(candidates.sum())
    _check_available(count, available)
    if count == 0:
        return np.zeros_like(candidates)
    among = scores[candidates]
    among.partition(available - count)
    limit = among[available - count]
    kept = candidates & (scores > limit)
    ties = np.flatnonzero(candidates & (scores == limit))
    kept[ties[: count - int(kept.sum())]] = True
    return kept


def _check_available(count: int, available: int) -> None:
    if count > available:
        raise ValueError(
            f"{count} samples are asked for, but the stages before left {available}. Fractions are of the whole "
            "pool, so they must not grow from stage to stage."
        )


def _check_keeps(stages: Sequence[Stage], rows: int) -> None:
    """Refuse now what `choose` would refuse after hours: more than an earlier stage leaves."""
    available = rows
    for stage in stages:
        if stage.keep is not None:
            count = int(_fraction(stage.keep) * rows)
            _check_available(count, available)
            available = count


def _check_inputs(pool: Pool, stages: Sequence[Stage], arch: str) -> None:
    """Read what the stages will read beside the pool, and let it go, so that its faults show before the first part."""
    for stage in stages:
        if stage.score == "text-based":
            read_words(str(stage.target))
        elif stage.target is not None:
            _target_of(pool, stage, arch)
        if stage.centroids is not None:
            _centroids_of(pool, stage, arch)


def _target_of(pool: Pool, stage: Stage, arch: str) -> Tensor:
    member = f"{arch}_img"
    return torch.from_numpy(read_fitting_target(str(stage.target), member, pool.shards[0].members[member].dim))


def _centroids_of(pool: Pool, stage: Stage, arch: str) -> Tensor:
    member = f"{arch}_img"
    return torch.from_numpy(read_centroids(str(stage.centroids), member, pool.shards[0].members[member].dim))


Scorer = tuple[Callable[[Shard, np.ndarray], np.ndarray], list[Any]]


def _norm_sim(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    features = _target_of(pool, stage, arch).to(device)
    key = [str(stage.p), digest_tensors({"target": features})]
    moment = second_moment(features, name="target") if stage.p == 2 else None

    def score(images: Tensor) -> Tensor:
        return norm_sim(images, features) if moment is None else norm_sim_2(images, moment)

    return _of_images(pool, f"{arch}_img", score, device), key


def _image_based(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    centroids, features = _centroids_of(pool, stage, arch).to(device), _target_of(pool, stage, arch).to(device)
    wanted = nearest_centroids(features, centroids).unique()
    key = [digest_tensors({"centroids": centroids, "wanted": wanted})]
    return _of_images(
        pool, f"{arch}_img", lambda images: image_based_filter(images, centroids, wanted).float(), device
    ), key


def _of_images(
    pool: Pool, member: str, score: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Shard, np.ndarray], np.ndarray]:
    """A function of a shard's candidates that streams their image features through `score`."""

    def compute(shard: Shard, mask: np.ndarray) -> np.ndarray:
        scores, first = [np.zeros(0, dtype=np.float32)], 0
        if not mask.any():
            return scores[0]
        for block in pool.blocks(shard, member):
            images = block[mask[first : first + len(block)]]
            if len(images):
                try:
                    scores.append(score(torch.from_numpy(images).to(device)).cpu().numpy())
                except ValueError as error:
                    place = first_without_direction(torch.from_numpy(images))
                    if place is None:
                        raise
                    row = first + int(np.flatnonzero(mask[first : first + len(block)])[place])
                    raise ShardError(shard.name, f"row {row} of {member} is zero or not finite.") from error
            first += len(block)
        return np.concatenate(scores)

    return compute


def _clip_score(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    name = f"clip_{arch}_similarity_score"
    return _of_columns(pool, [name], lambda columns: columns[name]), [name]


def _basic(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    names = ["text", "original_width", "original_height"]
    return _of_columns(pool, names, lambda columns: basic_filter(*(columns[name] for name in names))), []  # type: ignore[arg-type]


def _text_based(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    words = read_words(str(stage.target))
    return _of_columns(pool, ["text"], lambda columns: text_based_filter(columns["text"], words)), [words]  # type: ignore[arg-type]


def _of_columns(
    pool: Pool, names: Sequence[str], values: Callable[[Mapping[str, np.ndarray]], np.ndarray]
) -> Callable[[Shard, np.ndarray], np.ndarray]:
    def compute(shard: Shard, mask: np.ndarray) -> np.ndarray:
        try:
            scores = np.concatenate([values(block) for block in pool.columns(shard, names)]).astype(np.float32)
        except (ValueError, AttributeError, TypeError) as error:
            raise error if isinstance(error, ShardError) else ShardError(shard.name, f"{error}") from None
        if not np.isfinite(scores).all():
            row = int((~np.isfinite(scores)).argmax())
            raise ShardError(shard.name, f"row {row} of {names[0]} is empty or not finite.")
        return scores[mask]

    return compute


_SCORERS: dict[str, Callable[[Pool, Stage, str, torch.device], Scorer]] = {
    "norm-sim": _norm_sim,
    "clip-score": _clip_score,
    "basic": _basic,
    "text-based": _text_based,
    "image-based": _image_based,
}


def _members(stage: Stage, arch: str) -> list[str]:
    needed = {"s-clip-loss": ["img", "txt"], "norm-sim": ["img"], "image-based": ["img"]}.get(stage.score, [])
    return [f"{arch}_{kind}" for kind in needed]


def _columns(stage: Stage, arch: str) -> list[str]:
    needed = {
        "clip-score": [f"clip_{arch}_similarity_score"],
        "basic": ["text", "original_width", "original_height"],
        "text-based": ["text"],
    }
    return needed.get(stage.score, [])


def _uids_of(pool: Pool, kept: np.ndarray) -> np.ndarray:
    """(n,), `UID`, in the order of the pool."""
    found, row = [np.empty(0, dtype=UID)], 0
    for shard in pool.shards:
        mask = kept[row : row + shard.rows]
        found += [block["uid"] for block in pool.columns(shard, ["uid"], mask)]
        row += shard.rows
    return np.concatenate(found)


def _described(stage: Stage) -> dict[str, Any]:
    described = {name: value for name, value in asdict(stage).items() if value is not None}
    described["p"] = str(stage.p)
    return {name: str(value) if name == "keep" else value for name, value in described.items()}


def _fraction(keep: str | float | None) -> Fraction:
    try:
        return Fraction(str(keep))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"keep is {keep!r}, but it must be a fraction in [0, 1].") from None


def _digest(uids: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(bytes_of(uids.view(np.uint8))).hexdigest()


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
