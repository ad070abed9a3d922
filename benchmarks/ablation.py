"""What each ingredient of the default selection is worth: wrong labels left, coverage, and accuracy of a network.

    python benchmarks/ablation.py --data cifar10.zip --clip local-dir:cifar-clip --out benchmarks/results/ablation.json

Files 0000 to 2499 of each class of CIFAR-10's training set (the CLIP that the committed results were made with was
pretrained on the others), the quick network of recipes/cifar.py, the same number of updates for every method. Noise,
network, augmentation and order are those of the seed and shared by its methods, so that differences to the paper's
selection are paired. Interrupted, the same command goes on with what is missing; a row tells machine, versions and
state of the code (those without are of early ones).
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interval, pool
from quality import code, made_with
from selectsampler.recipes import cifar, noise
from torch import Tensor
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.selection import DEFAULT_WEIGHTS

UPDATES = 1000
ALL = ("semantic_alignment", "sample_diversity", "trust", "trusted_diversity", "intactness")
PAPER = ss.presets.paper["select"]["score_weights"]


class Data:
    """One noise and seed: embeddings with these labels, and the scores that the methods share."""

    def __init__(self, embeddings: ss.Embeddings, spec: str, seed: int) -> None:
        self.truth, self.seed, self.kept = embeddings.labels, seed, 0.5
        labels = self.truth
        if spec != "none":
            labels = noise.apply(spec, self.truth, classes=len(embeddings.class_names), seed=seed)
        self.embeddings = embeddings.with_labels(labels)
        self.order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(labels)))
        self._scores: dict[str, ss.Scores] = {}

    @property
    def count(self) -> int:
        return int(self.kept * len(self.truth))

    def scores(self, adapters: str) -> ss.Scores:
        """All scores, by embeddings with such adapters, made once."""
        if adapters not in self._scores:
            adapted = ss.adapt(self.embeddings, method=adapters, seed=self.seed)
            self._scores[adapters] = ss.score(adapted, columns=ALL, scaling="min_max", seed=self.seed)
        return self._scores[adapters]

    def select(self, weights: dict[str, float], *, adapters: str = "info_nce", **options: Any) -> Tensor:
        """The paper's selection, but for what is given."""
        options = {"balance": None, "method": "exact", "image_features": self.embeddings.image} | options
        scores = self.scores(adapters)
        return ss.select(scores, str(self.kept), score_weights=weights, seed=self.seed, **options).indices

    def ours(self, *, without: Sequence[str] = (), **options: Any) -> Tensor:
        """The default selection, but for what is given; without some of the scores that it looks at."""
        scores = self.scores("none")
        kept = {name: values for name, values in scores.columns.items() if name not in without}
        return ss.select(replace(scores, columns=kept), str(self.kept), seed=self.seed, **options).indices

    def diverse(self, weight: float, **options: Any) -> Tensor:
        """Trusted diversity in the place of the lot."""
        weights = DEFAULT_WEIGHTS | {"trusted_diversity": weight}
        return self.ours(score_weights=weights, **{"method": "exact"} | options)

    def clean(self) -> Tensor:
        right = self.embeddings.labels == self.truth
        return self.order[right[self.order]][: self.count]


METHODS: dict[str, Callable[[Data], Tensor]] = {
    "random": lambda data: data.order[: data.count],
    "the paper": lambda data: data.select(PAPER),
    "the paper, no adapters": lambda data: data.select(PAPER, adapters="none"),
    "the paper, cross_fit adapters": lambda data: data.select(PAPER, adapters="cross_fit"),
    "the paper, quotas": lambda data: data.select(PAPER, balance="trusted"),
    "the paper, trust for alignment": lambda data: data.select({"trust": 1.0, "sample_diversity": 0.1}),
    "the paper, trusted diversity": lambda data: data.select({"semantic_alignment": 1.0, "trusted_diversity": 0.1}),
    "the paper, intactness": lambda data: data.select(PAPER | {"intactness": 1.0}),
    "the paper, coverage": lambda data: data.select(PAPER, method="group", coverage_weight=0.1),
    "ours": lambda data: data.ours(),
    "ours, no quotas": lambda data: data.ours(balance=None),
    "ours, no intactness": lambda data: data.ours(without=["intactness"]),
    "ours, one chance for all": lambda data: data.ours(without=["trusted_diversity"]),
    "ours, no risk": lambda data: data.ours(risk=0.0),
    "ours, twice the risk": lambda data: data.ours(risk=0.01),
    "ours, four times the risk": lambda data: data.ours(risk=0.02),
    "ours, diversity for the lot": lambda data: data.diverse(0.02),
    "ours, coverage for the lot": lambda data: data.ours(method="group"),
    "ours, diversity and coverage for the lot": lambda data: data.diverse(0.02, method="group", coverage_weight=0.04),
    "clean labels, random": Data.clean,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a zip of an image folder")
    parser.add_argument("--clip", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; the table goes beside it as .md")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--noise", nargs="+", default=["none", "symmetric:0.2", "symmetric:0.4"], help="(%(default)s)")
    parser.add_argument("--kept", nargs="+", type=float, default=[0.3, 0.5], help="(%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    arguments = parser.parse_args()
    images, _ = cifar.load(arguments.data, first_per_class=2500)
    dataset = pool(arguments.data)
    embeddings = ss.embed(dataset, arguments.clip, class_names=dataset.classes, cache_dir=arguments.cache_dir)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"updates": UPDATES, "rows": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        for spec in arguments.noise:
            data = Data(embeddings, spec, seed)
            for data.kept in arguments.kept:
                for row in measure(images, data, spec, arguments.methods, results["rows"]):
                    results["rows"].append(row)
                    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


def measure(images: Any, data: Data, spec: str, methods: list[str], rows: list[Any]) -> Any:
    """The rows that are missing, one after another."""
    here = (spec, data.kept, data.seed)
    done = {row["method"] for row in rows if (row["noise"], row["kept"], row["seed"]) == here}
    missing = [name for name in methods if name not in done]
    protocol = replace(cifar.QUICK, updates=UPDATES)
    for name in missing:
        start = time.perf_counter()
        selected = METHODS[name](data)
        selecting = time.perf_counter() - start
        sampler = ss.SelectSampler(selected, seed=data.seed)
        trained = cifar.train(images, data.embeddings.labels, sampler, protocol, seed=data.seed, description=name)
        right = (data.embeddings.labels == data.truth)[selected]
        yield {
            "noise": spec,
            "kept": data.kept,
            "seed": data.seed,
            "method": name,
            "accuracy": 100 * trained.accuracy,
            "wrong": 100 * float(1 - right.float().mean()),
            "coverage": coverage(data, selected[right]),
            "seconds": {"score and select": selecting, "train": trained.seconds},
            **made_with(),
            "code": code(),
        }


def coverage(data: Data, kept: Tensor) -> float:
    """Mean distance of the right-labelled samples to the nearest kept one of their class, directions of features."""
    directions = normalize(data.embeddings.image.float(), dim=1)
    right = data.embeddings.labels == data.truth
    total = 0.0
    for label in range(len(data.embeddings.class_names)):
        by = directions[kept[data.truth[kept] == label]]
        nearest = (directions[(data.truth == label) & right] @ by.T).amax(dim=1)
        total += float((2 - 2 * nearest).clamp(min=0).sqrt().sum())
    return total / int(right.sum())


def table(results: dict[str, Any]) -> str:
    """A row a method and setting: accuracy, how much better than the paper's, noise, coverage."""
    rows = results["rows"]
    lines = [
        f"Test accuracy in % after {results['updates']} updates of 128 (mean ± 95 % interval, Student's t; differences "
        "are paired by seed); wrong labels left in %; mean distance to the nearest kept sample (lower covers better).",
        "",
        "| noise | kept | method | seeds | accuracy | against the paper's | wrong labels | coverage |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for spec, kept in sorted({(row["noise"], row["kept"]) for row in rows}):
        here = [row for row in rows if (row["noise"], row["kept"]) == (spec, kept)]
        paper = {row["seed"]: row["accuracy"] for row in here if row["method"] == "the paper"}
        for name in METHODS:
            own = [row for row in here if row["method"] == name]
            if own:
                gains = [row["accuracy"] - paper[row["seed"]] for row in own if row["seed"] in paper]
                gain = interval(gains) if gains and name != "the paper" else ""
                wrong, distance = (np.mean([row[figure] for row in own]) for figure in ("wrong", "coverage"))
                lines.append(
                    f"| {spec} | {kept:.0%} | {name} | {len(own)} | {interval([row['accuracy'] for row in own])} | "
                    f"{'+' if gain and np.mean(gains) >= 0 else ''}{gain} | "
                    f"{wrong:.2f} | {distance:.3f} |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
