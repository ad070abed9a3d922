"""Scores of one shard's candidates, for the stages that need nothing of other shards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectsampler.datacomp.baselines import basic_filter, image_based_filter, nearest_centroids, text_based_filter
from selectsampler.datacomp.pool import Pool, Shard, ShardError
from selectsampler.datacomp.scoring import first_without_direction
from selectsampler.datacomp.stages import Stage
from selectsampler.datacomp.targets import read_centroids, read_fitting_target, read_words
from selectsampler.datacomp.uids import check_uid_file
from selectsampler.scores.norm_sim import norm_sim, norm_sim_2, second_moment
from selectsampler.store import digest_tensors

__all__ = ["candidate_images", "check_inputs", "scorer_of"]

Compute = Callable[[Shard, np.ndarray], np.ndarray]


def scorer_of(pool: Pool, stage: Stage, arch: str, device: torch.device) -> tuple[Compute, list[Any]]:
    """A function of a shard and the mask of its candidates that gives their float32 scores; and what else these
    depend on, as JSON values."""
    compute, key = _SCORERS[stage.score](pool, stage, arch, device)
    return compute, [stage.score, *key]


def check_inputs(pool: Pool, stages: Sequence[Stage], arch: str, within: Path | str | None) -> None:
    """Read what the stages will read beside the pool, and let it go, so that its faults show before the first part."""
    if within is not None:
        check_uid_file(within)
    for stage in stages:
        if stage.score == "text-based":
            read_words(str(stage.target))
        elif stage.target is not None:
            _target_of(pool, stage, arch)
        if stage.centroids is not None:
            _centroids_of(pool, stage, arch)


def candidate_images(
    pool: Pool, shard: Shard, member: str, mask: np.ndarray, use: Callable[[np.ndarray], Tensor]
) -> Iterator[Tensor]:
    """What `use` makes of each block (b, D) of a shard's candidates, streamed.

    Raises:
        ShardError: naming the row of a feature that is zero or not finite, where `use` refuses it.
    """
    first = 0
    for block in pool.blocks(shard, member) if mask.any() else ():
        inside = mask[first : first + len(block)]
        images = block[inside]
        if len(images):
            try:
                yield use(images)
            except ValueError as error:
                place = first_without_direction(torch.from_numpy(images))
                if place is None:
                    raise
                row = first + int(np.flatnonzero(inside)[place])
                raise ShardError(shard.name, f"row {row} of {member} is zero or not finite.") from error
        first += len(block)


def _target_of(pool: Pool, stage: Stage, arch: str) -> Tensor:
    member = f"{arch}_img"
    return torch.from_numpy(read_fitting_target(str(stage.target), member, pool.shards[0].members[member].dim))


def _centroids_of(pool: Pool, stage: Stage, arch: str) -> Tensor:
    member = f"{arch}_img"
    return torch.from_numpy(read_centroids(str(stage.centroids), member, pool.shards[0].members[member].dim))


def _norm_sim(pool: Pool, stage: Stage, arch: str, device: torch.device) -> tuple[Compute, list[Any]]:
    features = _target_of(pool, stage, arch).to(device)
    key = [str(stage.p), digest_tensors({"target": features})]
    moment = second_moment(features, name="target") if stage.p == 2 else None

    def score(images: Tensor) -> Tensor:
        return norm_sim(images, features) if moment is None else norm_sim_2(images, moment)

    return _of_images(pool, f"{arch}_img", score, device), key


def _image_based(pool: Pool, stage: Stage, arch: str, device: torch.device) -> tuple[Compute, list[Any]]:
    centroids, features = _centroids_of(pool, stage, arch).to(device), _target_of(pool, stage, arch).to(device)
    wanted = nearest_centroids(features, centroids).unique()
    key = [digest_tensors({"centroids": centroids, "wanted": wanted})]

    def score(images: Tensor) -> Tensor:
        return image_based_filter(images, centroids, wanted).float()

    return _of_images(pool, f"{arch}_img", score, device), key


def _of_images(pool: Pool, member: str, score: Callable[[Tensor], Tensor], device: torch.device) -> Compute:
    def of_block(images: np.ndarray) -> Tensor:
        return score(torch.from_numpy(images).to(device)).cpu()

    def compute(shard: Shard, mask: np.ndarray) -> np.ndarray:
        return torch.cat([torch.empty(0), *candidate_images(pool, shard, member, mask, of_block)]).numpy()

    return compute


def _clip_score(pool: Pool, stage: Stage, arch: str, device: torch.device) -> tuple[Compute, list[Any]]:
    (name,) = stage.columns(arch)
    return _of_columns(pool, [name], lambda columns: columns[name]), [name]


def _basic(pool: Pool, stage: Stage, arch: str, device: torch.device) -> tuple[Compute, list[Any]]:
    names = stage.columns(arch)
    return _of_columns(pool, names, lambda columns: basic_filter(*(columns[name] for name in names))), []  # type: ignore[arg-type]


def _text_based(pool: Pool, stage: Stage, arch: str, device: torch.device) -> tuple[Compute, list[Any]]:
    words = read_words(str(stage.target))
    return _of_columns(pool, ["text"], lambda columns: text_based_filter(columns["text"], words)), [words]  # type: ignore[arg-type]


def _of_columns(pool: Pool, names: Sequence[str], values: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> Compute:
    def compute(shard: Shard, mask: np.ndarray) -> np.ndarray:
        try:
            scores = np.concatenate([values(block) for block in pool.columns(shard, names)]).astype(np.float32)
        except (ValueError, TypeError) as error:
            raise error if isinstance(error, ShardError) else ShardError(shard.name, f"{error}") from None
        if not np.isfinite(scores).all():
            row = int((~np.isfinite(scores)).argmax())
            raise ShardError(shard.name, f"row {row} of {names[0]} is empty or not finite.")
        return scores[mask]

    return compute


_SCORERS: dict[str, Callable[[Pool, Stage, str, torch.device], tuple[Compute, list[Any]]]] = {
    "norm-sim": _norm_sim,
    "clip-score": _clip_score,
    "basic": _basic,
    "text-based": _text_based,
    "image-based": _image_based,
}
