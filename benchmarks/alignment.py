"""Is an adapter trained on wrong labels worse than none? Is a class better described by its prompt or by its images?

    python benchmarks/alignment.py --data cifar10.zip --clip local-dir:cifar-clip --out results/alignment.json

Files 0000 to 2499 of each class of CIFAR-10's training set (the CLIP that the committed results were made with was
pretrained on the others), as they are and with inverted colours, where that CLIP is off its domain, at 0 to 60 %
symmetric label noise. Every method gives a cosine of each image with each class: with its prompt, without adapters,
with the paper's InfoNCE adapters (trained on the noisy labels) or with the cross-fitted ones that did not see the
image's label; or with the mean direction of the images given that label, the image itself left out, weighted alike or
by trust. Measured are the AUROC of right over wrong labels by the cosine with the label's class (semantic alignment),
and how often the class with the highest cosine is the true one. Interrupted, the same command goes on with what is
missing.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interval, pool
from PIL import ImageOps
from selectsampler.recipes.noise import symmetric
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.scores import label_trust

DOMAINS = {"as they are": None, "colours inverted": ImageOps.invert}
NOISES = (0.0, 0.1, 0.2, 0.4, 0.6)


def with_prompts(embeddings: ss.Embeddings, method: str, seed: int) -> Tensor:
    """(N, C): cosines of adapted images and adapted prompts."""
    adapted = ss.adapt(embeddings, method=method, seed=seed, progress=False)
    cosines = torch.empty(len(embeddings), len(embeddings.class_names))
    for rows, image, text in adapted.by_fold():
        cosines[rows] = normalize(image, dim=1) @ normalize(text, dim=1).T
    return cosines


def with_means(embeddings: ss.Embeddings, weights: Tensor) -> Tensor:
    """(N, C): cosines with the weighted mean direction of the images given each label, the image itself left out."""
    directions, labels = normalize(embeddings.image.float(), dim=1), embeddings.labels
    weighted = weights[:, None] * directions
    sums = torch.zeros(len(embeddings.class_names), directions.shape[1]).index_add_(0, labels, weighted)
    of_others = (directions * normalize(sums[labels] - weighted, dim=1)).sum(dim=1)
    return (directions @ normalize(sums, dim=1).T).scatter_(1, labels[:, None], of_others[:, None])


def trust(embeddings: ss.Embeddings, seed: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that this CLIP does not know: inverted, there are some
        return label_trust(
            embeddings.image,
            embeddings.text,
            embeddings.labels,
            temperature=embeddings.temperature,
            seed=seed,
            progress=False,
        ).probability


METHODS: dict[str, Callable[[ss.Embeddings, int], Tensor]] = {
    "none": lambda embeddings, seed: with_prompts(embeddings, "none", seed),
    "info_nce": lambda embeddings, seed: with_prompts(embeddings, "info_nce", seed),
    "cross_fit": lambda embeddings, seed: with_prompts(embeddings, "cross_fit", seed),
    "mean image": lambda embeddings, seed: with_means(embeddings, torch.ones(len(embeddings))),
    "mean image by trust": lambda embeddings, seed: with_means(embeddings, trust(embeddings, seed)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a zip of an image folder")
    parser.add_argument("--clip", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; the tables go beside it as .md")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    done = {(row["images"], row["noise"], row["seed"], row["method"]) for row in results["rows"]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for images, change in DOMAINS.items():
        dataset = pool(arguments.data, change=change)
        embeddings = ss.embed(dataset, arguments.clip, class_names=dataset.classes, cache_dir=arguments.cache_dir)
        for seed in range(arguments.seeds):
            for noise in NOISES:
                for method in METHODS:
                    if (images, noise, seed, method) not in done:
                        row = {"images": images, "noise": noise, "seed": seed, "method": method}
                        results["rows"].append(row | measure(embeddings, noise, seed, method))
                        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(tables(results["rows"]))
    print(tables(results["rows"]))


def measure(embeddings: ss.Embeddings, noise: float, seed: int, method: str) -> dict[str, Any]:
    """AUROC and accuracy of one method at one share of wrong labels, with the seconds it took."""
    truth = embeddings.labels
    labels = symmetric(truth, noise, classes=len(embeddings.class_names), seed=seed)
    start = time.perf_counter()
    cosines = METHODS[method](embeddings.with_labels(labels), seed)
    seconds = time.perf_counter() - start
    right, alignment = labels == truth, cosines.gather(1, labels[:, None])[:, 0]
    return {
        "auroc": None if right.all() else float(roc_auc_score(right, alignment)),
        "accuracy": float((cosines.argmax(dim=1) == truth).float().mean()),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """Mean and 95 % interval (Student's t over the seeds) of both figures."""
    seeds = 1 + max(row["seed"] for row in rows)
    seconds = {name: np.median([row["seconds"] for row in rows if row["method"] == name]) for name in METHODS}
    lines = [
        f"25,000 images, {seeds} seeds, mean ± 95 % interval; symmetric label noise. Seconds of each method on "
        f"{rows[0]['threads']} thread (median, torch {rows[0]['torch'].split('+')[0]}): "
        + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        + ".",
        "",
        "AUROC of right over wrong labels by the cosine of an image with the class of its label:",
        "",
        *table(rows, "auroc", lambda values: interval(values, 4)),
        "",
        "Accuracy in %: how often the class of the highest cosine is the true one:",
        "",
        *table(rows, "accuracy", lambda values: interval([100 * value for value in values])),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], figure: str, cell: Callable[[list[float]], str]) -> list[str]:
    """Lines of one figure: a row for each domain and noise, a column for each method."""
    lines = ["| images | noise | " + " | ".join(METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
    for images, noise in dict.fromkeys((row["images"], row["noise"]) for row in rows):
        here = [row for row in rows if (row["images"], row["noise"]) == (images, noise)]
        values = [[row[figure] for row in here if row["method"] == method] for method in METHODS]
        cells = [cell(some) if some and some[0] is not None else "-" for some in values]
        lines.append(f"| {images} | {noise:.0%} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
