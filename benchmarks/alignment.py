"""Does alignment find wrong labels? Does adaptation help where CLIP is off its domain, and harm where it is not?

    python benchmarks/alignment.py --data cifar10.zip --clip local-dir:cifar-clip --out results.json

For every domain (images as they are, colours inverted), share of symmetric label noise and seed: the AUROC by which
semantic alignment tells right labels from wrong ones, without adaptation, with the paper's InfoNCE adapters (trained on
the noisy labels) and with cross-fitted ones. Only files 0000 to 2499 of each class of CIFAR-10's training set are used:
the CLIP that the committed results were made with was pretrained on the others.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from selectsampler.recipes.data import ZippedImageFolder
from selectsampler.recipes.noise import symmetric
from sklearn.metrics import roc_auc_score
from torch.nn.functional import normalize

import selectsampler as ss

METHODS = ("none", "info_nce", "cross_fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a zip of an image folder")
    parser.add_argument("--clip", required=True, help="the CLIP model")
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes; the table goes beside it as .md")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.2, 0.4, 0.6], help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--per-class", type=int, default=2500, help="images a class, of the pool (%(default)s)")
    parser.add_argument("--cache-dir", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All AUROCs, zero-shot accuracies and seconds."""
    rows: list[dict[str, Any]] = []
    zero_shot: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for domain, change in (("as they are", None), ("colours inverted", ImageOps.invert)):
        pool = ZippedImageFolder(
            arguments.data,
            "cifar10/train",
            accept=lambda name: int(Path(name).stem) < arguments.per_class,
            change=change,
        )
        start = time.perf_counter()
        fingerprint = f"{arguments.data.stat().st_size} {arguments.per_class} {domain}"
        embeddings = ss.embed(
            pool, arguments.clip, class_names=pool.classes, cache_dir=arguments.cache_dir, fingerprint=fingerprint
        )
        seconds[f"embed, {domain}"] = time.perf_counter() - start
        posterior = normalize(embeddings.image.float(), dim=1) @ normalize(embeddings.text, dim=1).T
        zero_shot[domain] = float((posterior.argmax(dim=1) == embeddings.labels).float().mean())
        for noise in arguments.noise:
            for seed in range(arguments.seeds):
                rows += measure_noise(embeddings, domain, noise, seed)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "selectsampler": ss.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return {
        "images": len(pool),
        "zero_shot": zero_shot,
        "seconds": seconds,
        "versions": versions,
        "machine": machine,
        "rows": rows,
    }


def measure_noise(embeddings: ss.Embeddings, domain: str, noise: float, seed: int) -> list[dict[str, Any]]:
    """One row a method, at one share of symmetric noise."""
    noisy = symmetric(embeddings.labels, noise, classes=len(embeddings.class_names), seed=seed)
    right = (noisy == embeddings.labels).numpy()
    rows = []
    for method in METHODS:
        start = time.perf_counter()
        adapted = ss.adapt(embeddings.with_labels(noisy), method=method, seed=seed)
        took = time.perf_counter() - start
        alignment = ss.score(adapted)["semantic_alignment"]
        auroc = float(roc_auc_score(right, alignment.numpy()))
        row = {"domain": domain, "noise": noise, "seed": seed, "method": method}
        rows.append(row | {"auroc": auroc, "adapt_seconds": took})
        print(rows[-1], flush=True)
    return rows


def table(results: dict[str, Any]) -> str:
    """The rows as a table, mean and standard deviation over the seeds."""
    shot = ", ".join(f"{domain} {100 * value:.2f} %" for domain, value in results["zero_shot"].items())
    lines = [
        f"{results['images']:,} images; zero-shot accuracy: {shot}.",
        "AUROC of right over wrong labels by semantic alignment (mean ± standard deviation of the seeds):",
        "",
        "| images | noise | " + " | ".join(METHODS) + " |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    settings = dict.fromkeys((row["domain"], row["noise"]) for row in results["rows"])
    for domain, noise in settings:
        cells = []
        for method in METHODS:
            values = [
                row["auroc"]
                for row in results["rows"]
                if (row["domain"], row["noise"], row["method"]) == (domain, noise, method)
            ]
            cells.append(f"{np.mean(values):.4f} ± {np.std(values):.4f}")
        lines.append(f"| {domain} | {noise:.0%} | " + " | ".join(cells) + " |")
    lines += ["", "Seconds of adapting: " + ", ".join(f"{m} {seconds_of(results, m):.1f}" for m in METHODS) + "."]
    return "\n".join(lines) + "\n"


def seconds_of(results: dict[str, Any], method: str) -> float:
    return float(np.median([row["adapt_seconds"] for row in results["rows"] if row["method"] == method]))


if __name__ == "__main__":
    main()
