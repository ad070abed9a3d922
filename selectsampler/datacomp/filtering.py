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
from selectsampler.datacomp.scoring import Run, ShrunkPoolError, score_by_shard, score_s_clip_loss
from selectsampler.datacomp.uids import UID, contains, read_uids, write_uids
from selectsampler.distributed import process_rank
from selectsampler.scores.norm_sim import norm_sim, norm_sim_2, second_moment
from selectsampler.scores.s_clip_loss import check_temperature
from selectsampler.store import bytes_of, digest_json, digest_tensors

__all__ = ["Filtered", "Stage", "choose", "filter_pool", "read_target"]

OPENAI_TEMPERATURE = (
    0.01  # 1 / exp(logit_scale) as stored in OpenAI's ViT-B/32 and ViT-L/14, which DataComp's features are of
)

MASKS = ("basic", "text-based", "image-based")


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
        if self.score in ("norm-sim", "text-based", "image-based") and self.target is None:
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
        batch_size: B of s-CLIPLoss.
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
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but it must be at least 1.")
    temperature = OPENAI_TEMPERATURE if temperature is None else temperature
    check_temperature(temperature)
    if output is not None and Path(output).suffix != ".npy":
        raise ValueError(f"{output}: a uid file is written as .npy.")
    own_group = join()
    try:
        members = sorted({name for stage in stages for name in _members(stage, arch)})
        columns = sorted({"uid", *(name for stage in stages for name in _columns(stage, arch))})
        pool = from_first(lambda: open_pool(folder, members=members, columns=columns, skip_broken=skip_broken))
        place = Path(work) if work is not None else Path(f"{output or 'pool'}.work")
        kept_members = None if scratch is None else Path(scratch)
        run = Run(place, threads or torch.get_num_threads(), _device(device), progress, kept_members)
        s_clip_loss = {
            "temperature": temperature,
            "batch_size": batch_size,
            "repeats": repeats,
            "seed": seed,
            "group_size": group_size,
        }
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
    if count > available:
        raise ValueError(
            f"{count} samples are asked for, but the stages before left {available}. Fractions are of the whole "
            "pool, so they must not grow from stage to stage."
        )
    if count == 0:
        return np.zeros_like(candidates)
    among = scores[candidates]
    among.partition(available - count)
    limit = among[available - count]
    kept = candidates & (scores > limit)
    ties = np.flatnonzero(candidates & (scores == limit))
    kept[ties[: count - int(kept.sum())]] = True
    return kept


def read_target(path: Path | str, member: str) -> np.ndarray:
    """(T, D): image features of a target, from a file or from all files of a folder, in the order of their names.

    Args:
        path: `.npy` of (T, D); `.npz` with `member` or one array only; `.safetensors` of `Embeddings.save`, or with one
            tensor only; or a folder of such files, as a DataComp pool is one.
        member: the array to take of an `.npz` with several.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if a file holds no (T, D) floats, or dimensions differ.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no target {path}.")
    files = (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz", ".safetensors"))
    )
    if not files:
        raise ValueError(f"The target {path} holds no .npy, .npz or .safetensors file.")
    arrays = [_read_features(file, member) for file in files]
    for file, array in zip(files, arrays, strict=True):
        if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"{file} holds {array.dtype} of shape {array.shape}, but a target is floats of shape (T, D)."
            )
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def _read_features(path: Path, member: str) -> np.ndarray:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            name = next((name for name in ("image", member) if name in names), names[0] if len(names) == 1 else None)
            if name is None:
                raise ValueError(f"{path} holds {', '.join(names)}, but neither 'image' nor {member!r}.")
            return file.get_tensor(name)
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    with np.load(path, allow_pickle=False) as archive:
        names = archive.files
        name = member if member in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"{path} holds {', '.join(names)}, but not {member!r}.")
        return archive[name]


Scorer = tuple[Callable[[Shard, np.ndarray], np.ndarray], list[Any]]


def _norm_sim(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    features = torch.from_numpy(read_target(str(stage.target), f"{arch}_img")).to(device)
    dim = pool.shards[0].members[f"{arch}_img"].dim
    if features.shape[1] != dim:
        raise ValueError(
            f"The target has dimension {features.shape[1]}, but {arch}_img has {dim}: was it another model?"
        )
    key = [str(stage.p), digest_tensors({"target": features})]
    moment = second_moment(features, name="target") if stage.p == 2 else None

    def score(images: Tensor) -> Tensor:
        return norm_sim(images, features) if moment is None else norm_sim_2(images, moment)

    return _of_images(pool, f"{arch}_img", score, device), key


def _image_based(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    centroids = torch.from_numpy(np.load(str(stage.centroids), allow_pickle=False)).to(device)
    features = torch.from_numpy(read_target(str(stage.target), f"{arch}_img")).to(device)
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
                    raise ShardError(shard.name, f"{member} from row {first} on: {error}") from None
            first += len(block)
        return np.concatenate(scores)

    return compute


def _clip_score(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    name = f"clip_{arch}_similarity_score"

    def values(columns: Mapping[str, np.ndarray]) -> np.ndarray:
        if not np.isfinite(columns[name]).all():
            raise ValueError(f"{name} holds NaN")
        return columns[name]

    return _of_columns(pool, [name], values), [name]


def _basic(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    names = ["text", "original_width", "original_height"]
    return _of_columns(pool, names, lambda columns: basic_filter(*(columns[name] for name in names))), []  # type: ignore[arg-type]


def _text_based(pool: Pool, stage: Stage, arch: str, device: torch.device) -> Scorer:
    words = sorted({line.strip() for line in Path(str(stage.target)).read_text(encoding="utf-8").splitlines()} - {""})
    return _of_columns(pool, ["text"], lambda columns: text_based_filter(columns["text"], words)), [words]  # type: ignore[arg-type]


def _of_columns(
    pool: Pool, names: Sequence[str], values: Callable[[Mapping[str, np.ndarray]], np.ndarray]
) -> Callable[[Shard, np.ndarray], np.ndarray]:
    def compute(shard: Shard, mask: np.ndarray) -> np.ndarray:
        try:
            return np.concatenate([values(block) for block in pool.columns(shard, names)]).astype(np.float32)[mask]
        except (ValueError, AttributeError, TypeError) as error:
            raise error if isinstance(error, ShardError) else ShardError(shard.name, f"{error}") from None

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
    except ValueError:
        raise ValueError(f"keep is {keep!r}, but it must be a fraction in [0, 1].") from None


def _digest(uids: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(bytes_of(uids.view(np.uint8))).hexdigest()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)


def _remove(work: Path) -> None:
    """Remove the parts, what a killed run left of them, and their folder if nothing else lies there."""
    for path in [*work.glob("*.safetensors"), *work.glob(".*.partial")]:
        path.unlink(missing_ok=True)
    for folder in work.glob("scratch-*"):
        rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # something else lies there, or another machine was faster
        work.rmdir()
