"""Checks of what others made: do a pool's similarities follow from its embeddings, is a uid file fit to search?"""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from selectsampler.datacomp.pool import Pool, Shard, ShardError, archs_of, open_pool
from selectsampler.datacomp.uid_files import count_uids
from selectsampler.datacomp.uids import first_unsorted, map_uids
from selectsampler.progress import progress_bar
from selectsampler.scores.s_clip_loss import inverse_lengths

__all__ = ["verify_pool", "verify_uids"]


def verify_pool(
    folder: Path | str,
    *,
    arch: str | None = None,
    tolerance: float = 2e-3,
    threads: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Recompute every cosine of a pool from its npz and compare it with the parquet's similarity column.

    >>> verify_pool("metadata")["problems"]    # doctest: +SKIP
    {}

    Args:
        folder: local or any fsspec URL.
        arch: `l14` or `b32`; by default each that some npz of the pool holds.
        tolerance: how far they may be apart. Storing embeddings in float16 alone moves a cosine by up to 5e-4.
        threads: shards read side by side.
        progress: show a bar on a terminal.

    Returns:
        {"rows": N, "archs": {arch: {shard: {"rows", "mean_difference", "largest_difference"}}},
        "problems": {"shard (arch)": sentence}}.

    Raises:
        ValueError: if tolerance is negative or not finite, no shard can be used, or arch is not given and no npz holds
            embeddings of a known one.
    """
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}, but it must be a finite number of at least 0.")
    report: dict[str, Any] = {"rows": 0, "archs": {}, "problems": {}}
    for one in [arch] if arch is not None else archs_of(folder):
        rows, shards, problems = _verify_arch(folder, one, tolerance, threads, progress=progress)
        report["rows"] = max(rows, report["rows"])
        report["archs"][one] = shards
        report["problems"] |= {f"{name} ({one})": problem for name, problem in problems.items()}
    return report


def verify_uids(path: Path | str) -> dict[str, Any]:
    """What a uid file holds and whether DataComp's readers can search it.

    Returns:
        {"uids", "distinct", "most_repeated", "problems": [sentences]}; without problems it is fit to train on.
    """
    problems = []
    with TemporaryDirectory() as folder:
        try:
            uids = map_uids(path, Path(folder))
        except ValueError as error:
            return {"uids": 0, "distinct": 0, "most_repeated": 0, "problems": [str(error)]}
        place = first_unsorted(uids)
        if place is not None:
            problem = f"It is not sorted: entry {place} is lower than the one before it. Readers would lose samples."
            problems.append(problem)
        distinct, most = count_uids(uids)
    return {"uids": len(uids), "distinct": distinct, "most_repeated": most, "problems": problems}


def _verify_arch(
    folder: Path | str, arch: str, tolerance: float, threads: int, *, progress: bool
) -> tuple[int, dict[str, Any], dict[str, str]]:
    members, column = [f"{arch}_img", f"{arch}_txt"], f"clip_{arch}_similarity_score"
    pool = open_pool(folder, members=members, columns=["uid", column], skip_broken=True)
    problems: dict[str, str] = dict(pool.broken)
    shards: dict[str, dict[str, Any]] = {}
    with (
        progress_bar(f"verify {arch}", pool.rows, unit="row", show=progress) as bar,
        ThreadPoolExecutor(threads) as executor,
    ):
        found = executor.map(lambda shard: _verify_shard(pool, shard, members, column), pool.shards)
        for shard, result in zip(pool.shards, found, strict=True):
            bar.update(shard.rows)
            if isinstance(result, str):
                problems[shard.name] = result
                continue
            worst = result.pop("worst_row")
            shards[shard.name] = result
            if result["largest_difference"] > tolerance:
                problems[shard.name] = (
                    f"{column} differs from the cosine of its embeddings by up to {result['largest_difference']:.2g} "
                    f"(in row {worst}, tolerance {tolerance:.2g}). Are rows or models mixed up?"
                )
    return pool.rows, shards, problems


def _verify_shard(pool: Pool, shard: Shard, members: list[str], column: str) -> dict[str, Any] | str:
    try:
        stated = np.concatenate([block[column] for block in pool.columns(shard, [column])]).astype(np.float64)
        largest, total, worst, first = 0.0, 0.0, 0, 0
        for image, text in zip(*(pool.blocks(shard, member) for member in members), strict=True):
            images, texts = torch.from_numpy(image.copy()), torch.from_numpy(text.copy())
            lengths = inverse_lengths(images, name=members[0]) * inverse_lengths(texts, name=members[1])
            cosines = ((images.float() * texts.float()).sum(dim=1) * lengths).double().numpy()
            difference = np.abs(cosines - stated[first : first + len(cosines)])
            if not np.isfinite(difference).all():
                return f"{column} holds NaN in row {first + int((~np.isfinite(difference)).argmax())}."
            if difference.max() > largest:
                largest, worst = float(difference.max()), first + int(difference.argmax())
            total, first = total + float(difference.sum()), first + len(cosines)
    except ValueError as error:
        return error.reason if isinstance(error, ShardError) else str(error)
    mean = total / max(1, shard.rows)
    return {"rows": shard.rows, "mean_difference": mean, "largest_difference": largest, "worst_row": worst}
