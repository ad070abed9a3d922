"""Does trust find wrong labels of every kind, is it calibrated, and does it know how many there are?

    python benchmarks/trust.py --data cifar10.zip --clip local-dir:cifar-clip --out benchmarks/results/trust.json

Files 0000 to 2499 of each class of CIFAR-10's training set (the CLIP that the committed results were made with was
pretrained on the others), as they are and with inverted colours, where that CLIP is off its domain. AUROC of right over
wrong labels: by the zero-shot posterior of the label, by a cross-validated linear head trained on the labels as given,
and trust; trust's expected calibration error in 15 bins, with a picture of the bins (mean trust against the share of
right labels, all seeds together); the noise rate that it estimates, and how far the rows of its transition matrix lie
from the true ones (total variation, 0 to 1, mean of the classes). `mixed` noise is symmetric over asymmetric,
`instance` noise follows the very features that trust sees, `confusable` noise is that of a poor observer, who sees
cheap image statistics only. `one way` is of two classes that look alike: 20 or 40 % of the cats are labelled dog. In
`long tail` classes have 2,500 to 13 images, with all labels right and with 20 % wrong. Interrupted, the same command
goes on with what is missing.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interval, linear_head, pool
from PIL import ImageOps
from selectsampler.recipes import noise
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.scores import label_trust

DOMAINS = {"as they are": None, "colours inverted": ImageOps.invert}
NOISES = ("none", "symmetric:0.1", "symmetric:0.2", "symmetric:0.4", "symmetric:0.6", "asymmetric:0.4", "pair:0.3",
          "mixed:0.2", "instance:0.2", "instance:0.4", "confusable:0.2", "confusable:0.4")  # fmt: skip
PARTS = ("one way:0.2", "one way:0.4", "long tail", "long tail:0.2")  # of the images as they are
TAIL = (2500, 13, 24, 43, 77, 137, 245, 440, 780, 1400)  # images a class
EVIDENCE = ("zero-shot", "linear head", "trust")
BINS, FEWEST = 15, 30  # of trust; samples of a bin that is drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a zip of an image folder")
    parser.add_argument("--clip", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; .md and .png go beside it")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="(%(default)s)")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    results["rows"] = [row for row in results["rows"] if "transition_error" in row]  # others are of before
    done = {(row["images"], row["noise"], row["seed"]) for row in results["rows"]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for images, change in DOMAINS.items():
        dataset = pool(arguments.data, change=change)
        embeddings = ss.embed(dataset, arguments.clip, class_names=dataset.classes, cache_dir=arguments.cache_dir)
        for seed in range(arguments.seeds):
            for spec in settings_of(images):
                if (images, spec, seed) not in done:
                    row = {"images": images, "noise": spec, "seed": seed, **measure(embeddings, spec, seed)}
                    results["rows"].append(row)
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(results))
    plot(results, arguments.out.with_suffix(".png"))
    print(table(results))


def settings_of(images: str) -> tuple[str, ...]:
    return NOISES if DOMAINS[images] else NOISES + PARTS


def part(embeddings: ss.Embeddings, spec: str, seed: int) -> ss.Embeddings:
    """Some of the classes, or some images of each."""
    classes = [3, 5] if spec.startswith("one way") else list(range(len(embeddings.class_names)))
    sizes = [2500] * len(classes) if spec.startswith("one way") else TAIL
    random = np.random.default_rng([seed, 11])
    rows = torch.cat(
        [
            torch.from_numpy(random.permutation((embeddings.labels == label).nonzero()[:, 0].numpy())[:size])
            for label, size in zip(classes, sizes, strict=True)
        ]
    )
    number = torch.full((len(embeddings.class_names),), -1)
    number[classes] = torch.arange(len(classes))
    names = [embeddings.class_names[label] for label in classes]
    return ss.Embeddings(
        embeddings.image[rows],
        embeddings.text[classes],
        number[embeddings.labels[rows]],
        names,
        temperature=embeddings.temperature,
    )


def measure(embeddings: ss.Embeddings, spec: str, seed: int) -> dict[str, Any]:
    """All figures of one noise and seed."""
    if spec in PARTS:
        embeddings = part(embeddings, spec, seed)
    truth = embeddings.labels
    directions = normalize(embeddings.image.float(), dim=1)
    labels = truth
    if spec.startswith("one way"):
        labels = noise.asymmetric(truth, float(spec.partition(":")[2]), mapping={0: 1}, seed=seed)
    elif spec.startswith("long tail"):
        rate = float(spec.partition(":")[2] or 0)
        labels = noise.symmetric(truth, rate, classes=len(TAIL), seed=seed)
    elif spec != "none":
        standard = (directions - directions.mean(dim=0)) / directions.std(dim=0)
        if spec.startswith("confusable"):
            labels = confusable(truth, embeddings.image_statistics, float(spec.partition(":")[2]), seed)
        elif spec.startswith("mixed"):
            rate = spec.partition(":")[2]
            labels = noise.apply(f"asymmetric:{rate}", truth, classes=len(embeddings.class_names), seed=seed)
            labels = noise.apply(f"symmetric:{rate}", labels, classes=len(embeddings.class_names), seed=seed + 1000)
        else:
            labels = noise.apply(spec, truth, classes=len(embeddings.class_names), seed=seed, features=standard)
    right = labels == truth
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that this CLIP does not know: inverted, there are some
        trust = label_trust(
            embeddings.image, embeddings.text, labels, temperature=embeddings.temperature, seed=seed, progress=False
        )
    seconds = time.perf_counter() - start
    zero_shot = (directions @ normalize(embeddings.text.float(), dim=1).T / embeddings.temperature).softmax(dim=1)
    scores = {
        "zero-shot": zero_shot.gather(1, labels[:, None])[:, 0],
        "linear head": linear_head(directions, labels, seed, strength=0.01).gather(1, labels[:, None])[:, 0],
        "trust": trust.probability,
    }
    auroc = None if right.all() else {name: roc_auc_score(right, score) for name, score in scores.items()}
    return {
        "auroc": auroc,
        "calibration_error": calibration_error(trust.probability, right),
        "bins": calibration_bins(trust.probability, right),
        "estimated": trust.noise_rate,
        "transition_error": transition_error(trust.transition, truth, labels),
        "true": float((~right).float().mean()),
        "seconds": seconds,
    }


def confusable(truth: Tensor, statistics: Tensor, rate: float, seed: int) -> Tensor:
    """Wrong labels as of a poor observer: on images that he is unsure of, and as what he takes them for."""
    observer = linear_head(statistics.float(), truth, seed, strength=0.1)
    random = np.random.default_rng([seed, 9])
    own = observer.gather(1, truth[:, None])[:, 0].numpy()
    # k draws without replacement, with odds (1 - p(truth))^2, by the largest of log odds + Gumbel noise
    rows = np.argsort(-2 * np.log(1 - own + 1e-9) - random.gumbel(size=len(truth)))[: round(rate * len(truth))]
    wrong = observer.numpy()[rows].astype(np.float64)
    wrong[np.arange(len(rows)), truth.numpy()[rows]] = 0
    cumulated = (wrong / wrong.sum(axis=1, keepdims=True)).cumsum(axis=1)
    labels = truth.clone()
    labels[torch.from_numpy(rows)] = torch.from_numpy((cumulated < random.random((len(rows), 1))).sum(axis=1))
    return labels


def transition_error(transition: Tensor, truth: Tensor, labels: Tensor) -> float:
    """Total variation between the estimated and the true distribution of the labels of a class, mean of the classes."""
    true = noise.transition_matrix(truth, labels, len(transition))
    return float((transition.cpu() - true).abs().sum(dim=1).mean() / 2)


def calibration_bins(probability: Tensor, right: Tensor, bins: int = BINS) -> list[list[float]]:
    """Of each bin of trust: samples, their sum of trust, and right labels among them."""
    which = (probability.double() * bins).long().clamp(max=bins - 1)
    parts = (torch.ones_like(which), probability, right)
    sums = [torch.zeros(bins, dtype=torch.float64).index_add_(0, which, part.double()) for part in parts]
    return torch.stack(sums, dim=1).tolist()


def calibration_error(probability: Tensor, right: Tensor) -> float:
    """Mean over samples of |mean probability - share of right labels| of their bin."""
    return sum(abs(trust - hits) for _, trust, hits in calibration_bins(probability, right)) / len(right)


def plot(results: dict[str, Any], path: Path) -> None:
    """The reliability curve of every setting: the share of right labels against mean trust, a bin a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6))
    for column, images in enumerate(DOMAINS):
        axes = figure.add_subplot(1, len(DOMAINS), 1 + column)
        axes.plot([0, 1], [0, 1], "k:")
        for spec in NOISES:
            here = [row for row in results["rows"] if (row["images"], row["noise"]) == (images, spec)]
            own = [row["bins"] for row in here if "bins" in row]
            if own and spec != "none":
                count, trust, hits = np.sum(own, axis=0).T
                seen = count >= FEWEST
                axes.plot(trust[seen] / count[seen], hits[seen] / count[seen], ".-", label=spec)
        axes.set_title(images)
        axes.set_xlabel("mean trust of a bin")
        axes.set_ylabel("share of right labels")
    figure.axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def table(results: dict[str, Any]) -> str:
    """Mean and 95 % interval (Student's t over the seeds) of every figure."""
    seeds = 1 + max(row["seed"] for row in results["rows"])
    seconds = np.median([row["seconds"] for row in results["rows"]])
    lines = [
        f"25,000 images, {seeds} seeds, mean ± 95 % interval. Trust takes {seconds:.0f} s (median, torch "
        f"{torch.__version__.split('+')[0]}).",
        "",
        "| images | labels | AUROC zero-shot | linear head | trust | calibration error | noise: true | estimated | "
        "transition matrix off by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for images in DOMAINS:
        for spec in settings_of(images):
            rows = [row for row in results["rows"] if (row["images"], row["noise"]) == (images, spec)]
            if not rows:
                continue
            known = rows[0]["auroc"] is not None
            cells = [interval([row["auroc"][name] for row in rows], 4) if known else "-" for name in EVIDENCE]
            cells.append(interval([row["calibration_error"] for row in rows], 3))
            cells.append(f"{np.mean([row['true'] for row in rows]):.3f}")
            cells += [interval([row[name] for row in rows], 3) for name in ("estimated", "transition_error")]
            lines.append(f"| {images} | {spec} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
