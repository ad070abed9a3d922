"""Does a selection that follows the training beat repeated random sampling and InfoBatch at equal sample visits?

    python benchmarks/dynamic.py --data cifar10.zip --clip local-dir:cifar-clip --out benchmarks/results/dynamic.json

Files 0000 to 2499 of each class of CIFAR-10's training set (the CLIP that the committed results were made with was
pretrained on the others), 20 % symmetric label noise, the quick network of recipes/cifar.py in one learning-rate cycle.
Every method but `full` visits as many samples as 40 % of full training does, in batches of 128; visits are counted as
batches are trained on. Seeds draw the noise, the network, the augmentation and the order; methods of one seed share
them, so that differences are paired. Each finished run is in the file before the next begins: interrupted, the same
command goes on with what is missing.

The committed seconds are those of one thread on a machine whose two cores other work used as well: they show what each
stage costs beside the others, not how methods differ.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import baselines
import numpy as np
import torch
from scipy import stats
from selectsampler.recipes import cifar, noise
from torch import Tensor
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.reselect import SelectFn, trusted_and_hard

EPOCHS = 10  # of full training
TRUSTED = 0.1  # at least this probable is the label of a sample of the static trusted pool


@dataclass
class Run:
    """One training: what a method may look at, and where it leaves what it did.

    Args:
        labels: (N,), int64, noisy.
        adapted: CLIP's embeddings, adapted to the noisy labels.
        trust: (N,), in [0, 1]: the probability of each label by the adapters that did not see it.
        epoch_size: samples between two selections, whole batches: 40 % of N.
        visits: samples to visit in all.
        seed: of everything.
    """

    labels: Tensor
    adapted: ss.Adapted
    trust: Tensor
    epoch_size: int
    visits: int
    seed: int
    losses: ss.LossTracker = field(init=False)
    visited: int = 0
    reselecting: float = 0.0

    def __post_init__(self) -> None:
        self.losses = ss.LossTracker(len(self.labels), momentum=0.5)

    def sampler(self, selection: Any, **options: Any) -> ss.SelectSampler:
        """A sampler in this run's order."""
        return ss.SelectSampler(selection, seed=self.seed, **options)


Plan = tuple[ss.SelectSampler, SelectFn | None]


def full(run: Run) -> Plan:
    """All samples, epoch after epoch; 2.5 times the visits of the others."""
    run.visits = EPOCHS * (len(run.labels) // cifar.QUICK.batch_size) * cifar.QUICK.batch_size
    return run.sampler(range(len(run.labels))), None


def rs2(run: Run) -> Plan:
    """Repeated random sampling."""
    return baselines.repeated_random(len(run.labels), run.epoch_size, seed=run.seed), None


def infobatch(run: Run) -> Plan:
    """InfoBatch as published: nothing is pruned at the end."""
    run.losses = ss.LossTracker(len(run.labels), momentum=0.0)
    prune = baselines.infobatch(
        len(run.labels), annealing=lambda: run.visited >= (1 - baselines.ANNEALED) * run.visits, seed=run.seed
    )
    return run.sampler(range(len(run.labels))), prune


def static(run: Run) -> Plan:
    """The default selection, made once."""
    scores = ss.score(run.adapted, **ss.presets.default["score"])
    return run.sampler(ss.select(scores, count=run.epoch_size, **ss.presets.default["select"])), None


def trusted_rs2(run: Run) -> Plan:
    """Repeated random sampling among the samples whose labels CLIP trusts, decided once."""
    return run.sampler((run.trust >= TRUSTED).nonzero()[:, 0], epoch_size=run.epoch_size), None


def dynamic(run: Run) -> Plan:
    """Ours: selected again every epoch by trust and loss."""
    start = run.trust.topk(run.epoch_size).indices  # replaced before the first epoch
    classes = len(run.adapted.embeddings.class_names)
    select_fn = trusted_and_hard(run.trust, run.epoch_size, classes=classes, seed=run.seed)
    return run.sampler(ss.Selection(start, len(run.trust))), select_fn


METHODS: dict[str, Callable[[Run], Plan]] = {
    "dynamic": dynamic,
    "rs2": rs2,
    "infobatch": infobatch,
    "trusted_rs2": trusted_rs2,
    "static": static,
    "full": full,
}
WITH_CLIP = ("dynamic", "trusted_rs2", "static")
STAGES = ("embedding", "adaptation", "scoring", "reselection", "training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10, as recipes/cifar.py takes it")
    parser.add_argument("--clip", required=True, help="the CLIP model")
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes; the table goes beside it as .md")
    parser.add_argument("--noise", default="symmetric:0.2", help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="(all)")
    parser.add_argument("--per-class", type=int, default=2500, help="images a class, of the pool (%(default)s)")
    parser.add_argument("--cache-dir", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments)
    print(table(results))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do what the file at `--out` lacks, and return all of it."""
    setting = {"noise": arguments.noise, "images_per_class": arguments.per_class, "epochs": EPOCHS}
    results = open_results(arguments.out, setting)
    data, _ = cifar.load(arguments.data, first_per_class=arguments.per_class)
    start = time.perf_counter()
    embeddings = ss.embed(
        cifar.Pixels(data), arguments.clip, class_names=data.class_names, cache_dir=arguments.cache_dir
    )
    results.setdefault("embedding_seconds", time.perf_counter() - start)  # a later run may find them in the cache
    done = {(row["method"], row["seed"]) for row in results["rows"]}
    for seed in range(arguments.seeds):
        labels = noise.apply(arguments.noise, data.labels, classes=len(data.class_names), seed=seed)
        missing = [method for method in arguments.method if (method, seed) not in done]
        if not missing:
            continue
        start = time.perf_counter()
        adapted = ss.adapt(embeddings.with_labels(labels), seed=seed)
        adapting = time.perf_counter() - start
        for method in missing:
            row = run_one(method, data, adapted, seed)
            if method in WITH_CLIP:
                stages = {"embedding": results["embedding_seconds"], "adaptation": adapting}
                row["seconds"] = stages | row["seconds"]
            results["rows"].append(row)
            print({name: value for name, value in row.items() if name != "wrong_labels"}, flush=True)
            save_results(arguments.out, results)
    return results


def run_one(method: str, data: cifar.Cifar, adapted: ss.Adapted, seed: int) -> dict[str, Any]:
    """Train one network, and count what it was given."""
    labels, batch_size = adapted.embeddings.labels, cifar.QUICK.batch_size
    start = time.perf_counter()
    epoch_size = 2 * (len(labels) // batch_size) // 5 * batch_size
    run = Run(labels, adapted, label_posterior(adapted), epoch_size, visits=EPOCHS * epoch_size, seed=seed)
    sampler, select_fn = METHODS[method](run)
    scoring = time.perf_counter() - start
    reselect = None if select_fn is None else ss.Reselect(sampler, select_fn, allow_resize=True, losses=run.losses)
    wrong, shares = labels != data.labels, []

    def on_epoch_start(epoch: int) -> None:
        begun = time.perf_counter()
        sampler.set_epoch(epoch) if reselect is None else reselect.on_epoch_start(epoch)
        run.reselecting += time.perf_counter() - begun

    def on_losses(indices: Tensor, losses: Tensor) -> Tensor:
        run.visited += len(indices)
        shares.append(float(wrong[indices].float().mean()))
        run.losses.update(indices, losses)
        return losses * sampler.selection.weights_for(indices)

    protocol = replace(cifar.QUICK, updates=run.visits // batch_size)
    trained = cifar.train(
        data, labels, sampler, protocol, seed=seed, on_epoch_start=on_epoch_start, on_losses=on_losses
    )
    return {
        "method": method,
        "seed": seed,
        "accuracy": trained.accuracy,
        "visits": run.visited,
        "updates": trained.updates,
        "distinct": int((run.losses.seen > 0).sum()),
        "wrong_labels": float(np.mean(shares)),
        "seconds": {
            "scoring": scoring,
            "reselection": run.reselecting,
            "training": trained.seconds - run.reselecting,
        },
    }


def label_posterior(adapted: ss.Adapted) -> Tensor:
    """(N,), float32: how probable each label is by the adapters that did not see it, over all class prompts."""
    trust = torch.zeros(len(adapted))
    for (rows, image, text), temperature in zip(adapted.by_fold(), adapted.provenance["temperatures"], strict=True):
        logits = normalize(image, dim=1) @ normalize(text, dim=1).T / temperature
        labels = adapted.embeddings.labels[rows]
        trust[rows] = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return trust


def open_results(path: Path, setting: dict[str, Any]) -> dict[str, Any]:
    """What is in the file so far, or a new start.

    Raises:
        ValueError: if the file was made with another setting.
    """
    if path.exists():
        results = json.loads(path.read_text())
        if results["setting"] != setting:
            raise ValueError(f"{path} was made with {results['setting']}, not {setting}: name another file.")
        return results
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine["threads"] = torch.get_num_threads()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "selectsampler": ss.__version__}
    return {"setting": setting, "machine": machine, "versions": versions, "rows": []}


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write the JSON, whole or not at all, and the table beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)
    path.with_suffix(".md").write_text(table(results) + "\n")


def interval(values: list[float]) -> float:
    """Half the 95 % interval of the mean by Student's t; nan for a single value."""
    count = len(values)
    return float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else float("nan")


def table(results: dict[str, Any]) -> str:
    """Mean and 95 % interval of each method, and of the paired difference to ours; seconds are means."""
    setting, machine = results["setting"], results["machine"]
    by_method = {method: {row["seed"]: row for row in results["rows"] if row["method"] == method} for method in METHODS}
    lines = [
        f"CIFAR-10, {setting['images_per_class']:,} images of each class, noise {setting['noise']}; quick_resnet, "
        f"{machine['threads']} thread(s) of {machine['processor']}, torch {results['versions']['torch']}.",
        "Test accuracy in %: mean ± 95 % interval (Student's t over the seeds); differences are paired by seed.",
        "Distinct samples were visited at least once; wrong labels are their share of the visits; seconds are means.",
        "",
        "| method | seeds | accuracy | dynamic is better by | visits | updates | distinct | wrong labels |"
        + "".join(f" {stage} |" for stage in STAGES),
        "|---|---|---|---|---|---|---|---|" + "---|" * len(STAGES),
    ]
    for method, rows in by_method.items():
        if not rows:
            continue
        accuracy = [100 * row["accuracy"] for row in rows.values()]
        gains = [
            100 * (by_method["dynamic"][seed]["accuracy"] - row["accuracy"])
            for seed, row in rows.items()
            if seed in by_method["dynamic"] and method != "dynamic"
        ]
        gain = f"{np.mean(gains):+.2f} ± {interval(gains):.2f}" if gains else ""
        counts = [
            f"{round(np.mean([row[name] for row in rows.values()])):,}" for name in ("visits", "updates", "distinct")
        ]
        wrong = np.mean([row["wrong_labels"] for row in rows.values()])
        seconds = [np.mean([row["seconds"].get(stage, 0.0) for row in rows.values()]) for stage in STAGES]
        cells = [method, str(len(rows)), f"{np.mean(accuracy):.2f} ± {interval(accuracy):.2f}", gain, *counts]
        cells += [f"{wrong:.1%}", *(f"{took:.1f} s" for took in seconds)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
