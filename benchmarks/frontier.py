"""Wrong labels left against diversity and coverage: the paper, zero-shot, ours and what clean labels would allow.

    python benchmarks/frontier.py --data cifar10.zip --clip local-dir:cifar-clip --out benchmarks/results/frontier.json

Files 0000 to 2499 of each class of CIFAR-10's training set (the CLIP that the committed results were made with was
pretrained on the others). For each noise, share kept and seed every method selects under the same quotas, by class as
labelled. Noise: the share of wrong labels among the kept. Diversity: mean SDS (k = 49, directions, true classes) of the
kept right-labelled samples over that of all right-labelled. Coverage: mean distance of every right-labelled sample to
its nearest kept right-labelled one of its class, over that of a random right-labelled subset of the same size (lower is
better). Hard: of the quarter of each class's right-labelled samples to which CLIP gives their class the least zero-shot
probability, the share that stays. Trust and oracle are curves over the weight of diversity, read off where their
diversity is the paper's or zero-shot's; `covering` is a curve too, trust with a weight for diversity and 1.25 times of
it for coverage, by `method="group"`. `ours` is the draw that `select` makes by default, by trust and trusted diversity
alone and under those quotas. `presets.default` and `presets.paper` are what a user gets: all of their scores, their own
quotas or none. The certificate is that of pure coverage (no utility) of what is trusted: how far below its upper bound
the greedy subset lies, over how far below a random one does. The oracle is a linear head cross-fitted on the true
labels, whose posterior goes through the same transition matrix and the same diversity.
"""

import argparse
import json
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import half_width, interval, linear_head, pool
from selectsampler.recipes import noise
from torch import Tensor
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.optimizers import apportion, group, top_k
from selectsampler.scores import label_trust, sample_diversity, semantic_alignment

NOISES = ("symmetric:0.2", "symmetric:0.4", "asymmetric:0.4")
KEPT = (0.3, 0.5)
WEIGHTS = (0.0, 0.003, 0.006, 0.008, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)
COVERING_WEIGHTS = (0.0, 0.0065, 0.0085, 0.0125, 0.02, 0.035, 0.05)  # of diversity
COVERAGE = 1.25  # its weight, for one of diversity: of 1, 1.25 and 1.5, on seeds 0 to 4, the best of both
DIVERSE = 0.02  # a weight of diversity to show beside the default
CURVES = {"trust": WEIGHTS, "oracle": WEIGHTS, "covering": COVERING_WEIGHTS}
POINTS = tuple(f"{curve} {weight}" for curve, weights in CURVES.items() for weight in weights)
SINGLE = ("random", "the paper", "zero-shot", "ours", "presets.default", "presets.paper")
NAMES = (*SINGLE, *POINTS)
PRINTED = (*SINGLE[:4], *(f"{curve} {DIVERSE}" for curve in CURVES), *SINGLE[4:])
Point = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a zip of an image folder")
    parser.add_argument("--clip", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; .md and .png go beside it")
    parser.add_argument("--cache-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="(%(default)s)")
    arguments = parser.parse_args()
    dataset = pool(arguments.data)
    embeddings = ss.embed(dataset, arguments.clip, class_names=dataset.classes, cache_dir=arguments.cache_dir)
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    made_with = {"torch": torch.__version__, "machine": platform.machine(), "threads": torch.get_num_threads()}
    rows = {(row["noise"], row["kept"], row["seed"]): row for row in results["rows"]}
    for row in rows.values():  # points of before lack the hard
        row["points"] = {n: point for n, point in row["points"].items() if n not in SINGLE or "hard" in point}
    for seed in range(arguments.seeds):
        for spec in NOISES:
            found = {kept: rows.get((spec, kept, seed), {"points": {}}) for kept in KEPT}
            if all(row["points"].keys() >= set(NAMES) for row in found.values()):
                continue
            rows |= {(spec, row["kept"], seed): row for row in measure(embeddings, spec, seed, found)}
            results |= made_with | {"rows": list(rows.values())}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{spec}, seed {seed}: done", flush=True)
    arguments.out.with_suffix(".md").write_text(table(results))
    plot(results, arguments.out.with_suffix(".png"))
    print(table(results))


def measure(
    embeddings: ss.Embeddings, spec: str, seed: int, found: dict[float, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every method's points under one noise and seed, for each share kept; those `found` are not made again."""
    truth = embeddings.labels
    labels = noise.apply(spec, truth, classes=len(embeddings.class_names), seed=seed)
    start = time.perf_counter()
    trust = label_trust(
        embeddings.image, embeddings.text, labels, temperature=embeddings.temperature, seed=seed, progress=False
    )
    seconds = time.perf_counter() - start
    rate = {"estimated": trust.noise_rate, "true": float((labels != truth).float().mean())}
    methods, judge = Methods(embeddings, labels, trust, seed), Judge(embeddings, labels, seed)
    rows = []
    for kept in KEPT:
        row = {"noise": spec, "kept": kept, "seed": seed, "trust_seconds": seconds, "noise_rate": rate} | found[kept]
        known = row["points"]
        row["points"] = {n: known[n] if n in known else judge(methods.select(n, kept)) for n in NAMES}
        if kept == KEPT[0] and "certificate" not in row:
            quotas = apportion(torch.bincount(labels), int(kept * len(labels)))
            row["certificate"] = certificate(embeddings.image, labels, trust.probability, quotas, seed)
        rows.append(row)
    return rows


class Methods:
    """What each method of `NAMES` selects under one noise and seed."""

    def __init__(self, embeddings: ss.Embeddings, labels: Tensor, trust: Any, seed: int) -> None:
        self.labels, self.seed = labels, seed
        self.utilities = utilities(embeddings, labels, trust, seed)
        diversity = relative_diversity(embeddings, labels, trust.probability)
        columns = {"trust": trust.probability, "trusted_diversity": diversity}
        self.scores = ss.Scores(columns, labels=labels, image_features=embeddings.image)
        self.by_preset = cache(lambda name: preset_scores(embeddings.with_labels(labels), name, seed))

    def select(self, name: str, kept: float) -> Tensor:
        """The indices of what a method keeps."""
        if name in self.utilities:
            count = int(kept * len(self.labels))
            quotas = apportion(torch.bincount(self.labels), count)
            return top_k(self.utilities[name].double(), count, groups=self.labels, quotas=quotas)
        scores, options = self.scores, {"balance": "given"}
        if name.startswith("presets."):
            preset = name.removeprefix("presets.")
            scores, options = self.by_preset(preset), getattr(ss.presets, preset)["select"]
        elif name.startswith("covering "):
            weight = float(name.removeprefix("covering "))
            weights = {"trust": 1.0, "trusted_diversity": weight}
            options |= {"method": "group", "score_weights": weights, "coverage_weight": COVERAGE * weight}
        return ss.select(scores, str(kept), seed=self.seed, progress=False, **options).indices


def preset_scores(embeddings: ss.Embeddings, name: str, seed: int) -> ss.Scores:
    """What a preset selects by."""
    steps = getattr(ss.presets, name)
    adapted = ss.adapt(embeddings, seed=seed, progress=False, **steps["adapt"])
    return ss.score(adapted, seed=seed, progress=False, **steps["score"])


def certificate(features: Tensor, labels: Tensor, trust: Tensor, quotas: Tensor, seed: int) -> float:
    """(bound - value) / (bound - value of a random subset), of pure coverage of what is trusted."""
    weights, count = trust * (trust >= 0.5), int(quotas.sum())
    nothing = torch.zeros(len(labels))
    options = {"labels": labels, "groups": labels, "quotas": quotas}
    result = group(nothing, features, count, weights=weights, coverage_weight=1.0, progress=False, **options)
    chance = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed))
    random = top_k(chance, count, groups=labels, quotas=quotas)
    directions, value = normalize(features.float(), dim=1), 0.0
    for label in range(len(quotas)):
        kept, rows = random[labels[random] == label], (labels == label).nonzero()[:, 0]
        cosine = torch.cat([(part @ directions[kept].T).amax(dim=1) for part in directions[rows].split(2048)])
        value += float((weights[rows] * (1 - (2 - 2 * cosine).clamp(min=0).sqrt() / 2)).sum())
    return (result.bound - result.objective) / (result.bound - value)


def utilities(embeddings: ss.Embeddings, labels: Tensor, trust: Any, seed: int) -> dict[str, Tensor]:
    """What each method maximises, (N,) each."""
    directions, prompts = normalize(embeddings.image.float(), dim=1), normalize(embeddings.text.float(), dim=1)
    columns = {
        "semantic_alignment": semantic_alignment(embeddings.image, embeddings.text, labels),
        "sample_diversity": sample_diversity(directions, labels, 49),
    }
    zero_shot = (directions @ prompts.T / embeddings.temperature).softmax(dim=1)
    random = torch.from_numpy(np.random.default_rng([seed, 7]).random(len(labels)))
    result = {
        "random": random,
        "the paper": ss.Scores(columns).utility({"semantic_alignment": 1.0, "sample_diversity": 0.1}),
        "zero-shot": zero_shot.gather(1, labels[:, None])[:, 0],
    }
    clean = linear_head(directions, embeddings.labels, seed, strength=1.0) * trust.transition.T[labels]
    oracle = clean.gather(1, labels[:, None])[:, 0] / clean.sum(dim=1)
    for name, probability in (("trust", trust.probability), ("oracle", oracle)):
        relative = relative_diversity(embeddings, labels, probability)
        result |= {f"{name} {weight}": probability + weight * relative for weight in WEIGHTS}
    return result


def relative_diversity(embeddings: ss.Embeddings, labels: Tensor, probability: Tensor) -> Tensor:
    """(N,): trusted diversity, by these probabilities that a label is right."""
    directions, trusted = normalize(embeddings.image.float(), dim=1), probability >= 0.5
    diversity = sample_diversity(directions, labels, 49, among=trusted)
    return probability * diversity / diversity[trusted].mean()


class Judge:
    """Noise, diversity and coverage of a selection, by the true labels."""

    def __init__(self, embeddings: ss.Embeddings, labels: Tensor, seed: int) -> None:
        self.directions = normalize(embeddings.image.float(), dim=1)
        self.truth, self.right = embeddings.labels, labels == embeddings.labels
        self.sds = sample_diversity(self.directions, self.truth, 49)
        self.order = torch.from_numpy(np.random.default_rng([seed, 9]).permutation(len(labels)))
        self.random: dict[int, float] = {}
        prompts = normalize(embeddings.text.float(), dim=1)
        own = (self.directions @ prompts.T / embeddings.temperature).log_softmax(dim=1)[range(len(labels)), self.truth]
        self.hard = torch.zeros_like(self.right)
        for label in self.truth.unique():
            rows = (self.right & (self.truth == label)).nonzero()[:, 0]
            self.hard[rows[own[rows].argsort()[: len(rows) // 4]]] = True

    def __call__(self, selected: Tensor) -> Point:
        right = self.right[selected]
        kept, size = selected[right], len(selected)
        if size not in self.random:
            self.random[size] = self._distance(self.order[self.right[self.order]][:size])
        return {
            "noise": 100 * float(1 - right.float().mean()),
            "diversity": float(self.sds[kept].mean() / self.sds[self.right].mean()),
            "coverage": self._distance(kept) / self.random[size],
            "hard": 100 * float(self.hard[selected].sum() / self.hard.sum()),
        }

    def _distance(self, kept: Tensor) -> float:
        total = 0.0
        for label in range(int(self.truth.max()) + 1):
            covered = self.directions[(self.truth == label) & self.right]
            by = self.directions[kept[self.truth[kept] == label]]
            nearest = torch.cat([(part @ by.T).amax(dim=1) for part in covered.split(2048)])
            total += float((2 - 2 * nearest).clamp(min=0).sqrt().sum())
        return total / int(self.right.sum())


def at(points: dict[str, Point], curve: str, diversity: float, figure: str) -> float:
    """A curve's figure where its diversity is this one; its end where it does not reach it."""
    along = sorted((points[f"{curve} {w}"]["diversity"], points[f"{curve} {w}"][figure]) for w in CURVES[curve])
    return float(np.interp(diversity, *zip(*along, strict=True)))


def at_equal_diversity(points: list[dict[str, Point]]) -> list[str]:
    """The cells of one noise and share kept, of these points a seed."""

    def noise_at(base: str, curves: tuple[str, ...]) -> dict[str, list[float]]:
        return {base: [p[base]["noise"] for p in points]} | {
            curve: [at(p, curve, p[base]["diversity"], "noise") for p in points] for curve in curves
        }

    def cells(base: str, noise: dict[str, list[float]]) -> list[str]:
        spread = np.mean([p[base]["diversity"] for p in points])
        return [f"{interval(noise[base])} at {spread:.2f}", *(interval(noise[c]) for c in noise if c != base)]

    paper = noise_at("the paper", ("trust", "oracle", "covering"))
    closed = [gap_closed(paper["the paper"], paper[curve], paper["oracle"]) for curve in ("trust", "covering")]
    covers = [interval([p["the paper"]["coverage"] for p in points])]
    for curve in ("trust", "covering"):
        covers.append(interval([at(p, curve, p["the paper"]["diversity"], "coverage") for p in points]))
    zero_shot = cells("zero-shot", noise_at("zero-shot", ("trust", "oracle")))
    return [*cells("the paper", paper), *closed, *zero_shot, *covers]


def gap_closed(paper: list[float], curve: list[float], oracle: list[float]) -> str:
    """(mean paper - mean curve) / (mean paper - mean oracle), and its 95 % interval as of a ratio of paired means."""
    gaps, gains = np.subtract(paper, oracle), np.subtract(paper, curve)
    if gaps.mean() <= 0:
        return "-"
    closed = gains.mean() / gaps.mean()
    if len(gaps) < 2:
        return f"{closed:.0%}"
    return f"{100 * closed:.0f} ± {100 * half_width((gains - closed * gaps) / gaps.mean()):.0f} %"


def table(results: dict[str, Any]) -> str:
    """Noise at equal diversity, coverage, and the default's point."""
    seeds = 1 + max(row["seed"] for row in results["rows"])
    lines = [
        f"{seeds} seeds; mean ± 95 % interval. Noise in %, at the diversity of the paper's score (d) and of the "
        "zero-shot probability (d').",
        "",
        "| noise | kept | the paper, at d | trust at d | oracle at d | covering at d | gap closed: trust | covering | "
        "zero-shot, at d' | trust at d' | oracle at d' | coverage at d: the paper's | trust's | covering's |",
        "|---|---|" + "---|" * 12,
    ]
    cells = [(spec, kept) for spec in NOISES for kept in KEPT]
    for spec, kept in cells:
        points = [row["points"] for row in results["rows"] if (row["noise"], row["kept"]) == (spec, kept)]
        lines.append("| " + " | ".join([spec, f"{kept:.0%}", *at_equal_diversity(points)]) + " |")
    ratios = {
        spec: [r["certificate"] for r in results["rows"] if r["noise"] == spec and "certificate" in r]
        for spec in NOISES
    }
    lines += ["", "Pure coverage at 30 %, (bound - value) / (bound - value of a random subset): "]
    lines[-1] += ", ".join(f"{spec} {interval(values, 3)}" for spec, values in ratios.items()) + "."
    lines += [
        "",
        "Noise in % / diversity / coverage / (of single methods) hard that stay in %; see benchmarks/frontier.py:",
        "",
    ]
    lines += ["| noise | kept | " + " | ".join(PRINTED) + " |", "|---|---|" + "---|" * len(PRINTED)]
    for spec, kept in cells:
        points = [row["points"] for row in results["rows"] if (row["noise"], row["kept"]) == (spec, kept)]
        figures = [
            " / ".join(f"{np.mean([p[name][f] for p in points]):.2f}" for f in ("noise", "diversity", "coverage"))
            + (f" / {np.mean([p[name]['hard'] for p in points]):.0f}" if name in SINGLE else "")
            for name in PRINTED
        ]
        lines.append(f"| {spec} | {kept:.0%} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Noise against diversity (above) and coverage (below), a panel a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(NOISES) * len(KEPT) + 2, 7), layout="constrained")
    cells = [(spec, kept) for spec in NOISES for kept in KEPT]
    for column, (spec, kept) in enumerate(cells):
        points = [row["points"] for row in results["rows"] if (row["noise"], row["kept"]) == (spec, kept)]

        def mean(name: str, of: str, points: list[dict[str, Point]] = points) -> float:
            return float(np.mean([p[name][of] for p in points]))

        for row, other in enumerate(("diversity", "coverage")):
            axes = figure.add_subplot(2, len(cells), 1 + column + row * len(cells))
            for curve, weights in CURVES.items():
                names = [f"{curve} {weight}" for weight in weights]
                axes.plot([mean(n, other) for n in names], [mean(n, "noise") for n in names], ".-", label=curve)
            for name in SINGLE[1:]:
                axes.plot([mean(name, other)], [mean(name, "noise")], "o", label=name)
            axes.set_yscale("log")
            axes.set_xlabel(other)
            axes.set_title(f"{spec}, keep {kept:.0%}")
    figure.axes[0].set_ylabel("wrong labels left, %")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
