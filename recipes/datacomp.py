"""Filter an image-text pool as arXiv 2405.19547 does at DataComp's medium scale.

    python recipes/datacomp.py --pool metadata --target imagenet.npy --out subsets

OpenAI's ViT-L/14: the best 30 % of the pool by s-CLIPLoss (temperature 0.01, batches of 32,768, 10 repetitions), of
these the best 20 % of the pool by NormSim_inf against the training images of the downstream tasks, whose ViT-L/14
features you give as --target. The uid file goes to DataComp's resharder, or to a loader through `UidFilter`.

Without --pool, a pool of 40,000 pairs is made and filtered instead, so that it is known what should be kept (seed 0,
two CPU cores, less than a minute):

    kept of each kind                good  near_target      generic   mismatched
    clip-score                      33.4%        33.3%        16.6%         0.0%
    s-clip-loss                     39.2%        42.8%         0.3%         0.0%
    clip-score, norm-sim            27.8%        47.6%        20.8%         0.0%
    s-clip-loss, norm-sim           34.1%        61.2%         1.4%         0.0%
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from selectsampler.datacomp import Stage, contains, filter_pool, read_pool

KINDS = ("good", "near_target", "generic", "mismatched")
SHARES = (0.4, 0.1, 0.2, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pool", help="folder of NAME.parquet and NAME.npz, local or any fsspec URL; none: one is made"
    )
    parser.add_argument(
        "--target", help="ViT-L/14 features of the downstream tasks' training images (.npy or a folder)"
    )
    parser.add_argument("--out", type=Path, default=Path("datacomp"), help="folder for the uid files (%(default)s)")
    parser.add_argument("--within", help="uid file of another filter to combine with, as DFN's or HYPE's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.pool is None:
        compare_on_a_made_pool(arguments.out, seed=arguments.seed)
    elif arguments.target is None:
        parser.error("--pool needs --target: the features that NormSim compares with.")
    else:
        filter_pool(
            arguments.pool,
            [Stage("s-clip-loss", keep="0.3"), Stage("norm-sim", keep="0.2", target=arguments.target)],
            arguments.out / "s-clip-loss-norm-sim.npy",
            arch="l14",
            batch_size=32768,
            repeats=10,
            seed=arguments.seed,
            within=arguments.within,
        )


def compare_on_a_made_pool(folder: Path, *, seed: int) -> None:
    """What each filter keeps of a pool whose pairs are of known kinds: 20 % of the pool, whoever chooses."""
    target = make_pool(folder / "metadata", shards=8, rows=5000, dim=128, seed=seed)
    filters = {
        "clip-score": [Stage("clip-score", keep="0.2")],
        "s-clip-loss": [Stage("s-clip-loss", keep="0.2")],
        "clip-score, norm-sim": [Stage("clip-score", keep="0.3"), Stage("norm-sim", keep="0.2", target=target)],
        "s-clip-loss, norm-sim": [Stage("s-clip-loss", keep="0.3"), Stage("norm-sim", keep="0.2", target=target)],
    }
    kinds = kinds_of(folder / "metadata")
    print(f"{'kept of each kind':24}" + "".join(f"{kind:>13}" for kind in KINDS))
    for name, stages in filters.items():
        path = folder / f"{name.replace(', ', '-')}.npy"
        kept = filter_pool(folder / "metadata", stages, path, batch_size=4096, repeats=2, seed=seed)
        if kept is None:  # another rank than the first
            continue
        shares = {kind: float((contains(np.sort(kept.uids), uids) > 0).mean()) for kind, uids in kinds.items()}
        print(f"{name:24}" + "".join(f"{shares[kind]:13.1%}" for kind in KINDS))
        path.with_suffix(".kinds.json").write_text(json.dumps(shares, indent=1) + "\n")


def make_pool(
    folder: Path, *, shards: int, rows: int, dim: int, targets: int = 500, seed: int = 0, arch: str = "l14"
) -> str:
    """Write a pool of DataComp's format whose pairs are of the kinds above; gives the path of the target's features.

    Images share a direction, as CLIP's do. A good caption lies near its image, a mismatched one near another image, and
    a generic one ("image 12", "sale") near the direction that all images share, so that it fits each of them fairly
    well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng((seed, 0))
    shared = _unit(generator.normal(size=dim)).astype(np.float32)
    directions = _unit(shared + _unit(generator.normal(size=(200, dim)).astype(np.float32)))
    path = folder.parent / f"{folder.name}-target.npy"
    np.save(path, _images(directions[:10], targets, generator).astype(np.float16))
    captions = _unit(0.9 * shared + _unit(generator.normal(size=(20, dim)).astype(np.float32)))
    for shard in range(shards):
        _write_shard(folder / f"{shard:08d}", rows, directions, captions, np.random.default_rng((seed, 1, shard)), arch)
    return str(path)


def _write_shard(
    path: Path, rows: int, directions: np.ndarray, captions: np.ndarray, generator: np.random.Generator, arch: str
) -> None:
    kinds = generator.choice(len(KINDS), size=rows, p=SHARES)
    near, generic, mismatched = (kinds == KINDS.index(kind) for kind in ("near_target", "generic", "mismatched"))
    image = _images(directions[10:], rows, generator)
    image[near] = _images(directions[:10], int(near.sum()), generator)
    aim = image.copy()
    aim[mismatched] = image[generator.integers(rows, size=int(mismatched.sum()))]
    text = _unit(0.45 * aim + _unit(generator.standard_normal((rows, image.shape[1]), dtype=np.float32)))
    text[generic] = captions[generator.integers(len(captions), size=int(generic.sum()))]
    image, text = image.astype(np.float16), text.astype(np.float16)
    digits = generator.integers(0, 256, size=(rows, 16), dtype=np.uint8).tobytes().hex()
    table = {
        "uid": [digits[32 * row : 32 * row + 32] for row in range(rows)],
        "text": [f"a caption of kind {KINDS[kind]}" for kind in kinds],
        "url": ["https://example.org/image.jpg"] * rows,
        "original_width": generator.integers(150, 1000, size=rows),
        "original_height": generator.integers(150, 1000, size=rows),
        f"clip_{arch}_similarity_score": np.einsum("nd,nd->n", image, text, dtype=np.float32),
    }
    parquet.write_table(pyarrow.table(table), path.with_suffix(".parquet"))
    np.savez(path.with_suffix(".npz"), **{f"{arch}_img": image, f"{arch}_txt": text})


def kinds_of(folder: Path) -> dict[str, np.ndarray]:
    """The uids of each kind of a made pool."""
    shards = [(shard["uid"], shard["text"]) for _, shard in read_pool(folder, ["uid", "text"])]
    uids, texts = (np.concatenate(column) for column in zip(*shards, strict=True))
    return {kind: uids[[text.endswith(kind) for text in texts]] for kind in KINDS}


def _images(directions: np.ndarray, rows: int, generator: np.random.Generator) -> np.ndarray:
    noise = _unit(generator.standard_normal((rows, directions.shape[1]), dtype=np.float32))
    return _unit(directions[generator.integers(len(directions), size=rows)] + 0.8 * noise)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


if __name__ == "__main__":
    main()
