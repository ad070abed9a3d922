"""How the cost of every stage grows with samples, dimensions, classes and ranks, and what whole data sets come to.

    python benchmarks/growth.py --out benchmarks/results/growth.json --data cifar10.zip --clip local-dir:cifar-clip

One thing grows at a time, the others stay at 50,000 samples, 512 dimensions, 100 classes; features are made (classes
around their prompts, a fifth of the labels wrong). Seconds are medians over rounds; the exponent is the slope of the
logarithms. `ranks` embeds images in processes of one thread each under torchrun. What stands in the file is not
measured again. Beside the JSON go a table (.md) and a picture (.png).

What whole data sets come to is worked out: every stage's seconds as the products that it is made of (samples times
dimensions, classes, neighbours or batch), at the rate measured here for the largest case; passes of encoders and
training by their operations, at the rate of a matrix product measured here. Hours are those of this machine; shares
hold for any on which all stages gain alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import machine, made_embeddings, timed
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.scores import label_trust, norm_sim, s_clip_loss, sample_diversity, semantic_alignment

BASE = {"samples": 50_000, "dim": 512, "classes": 100}
GROWING: dict[str, tuple[int, ...]] = {
    "samples": (12_500, 25_000, 50_000, 100_000),
    "samples, classes of 500": (12_500, 25_000, 50_000, 100_000),
    "dim": (128, 256, 512, 1024),
    "classes": (10, 50, 100, 500),
}
PAIRS = (4_096, 8_192, 16_384)
TARGETS, IMAGENET = 10_000, 1_281_167  # images that NormSim is measured with, and worked out for

EMBED = """
import sys, time
import torch, torch.distributed as dist
import selectsampler as ss
from selectsampler.recipes.data import ZippedImageFolder
from torch.utils.data import Subset
torch.set_num_threads(1)
dist.init_process_group("gloo")
data = ZippedImageFolder(sys.argv[1], "cifar10/train")
part = Subset(data, range(0, len(data), len(data) // int(sys.argv[3])))
options = {"class_names": data.classes, "cache_dir": sys.argv[4], "progress": False}
ss.embed(Subset(data, range(512)), sys.argv[2], **options)
dist.barrier()
start = time.perf_counter()
ss.embed(part, sys.argv[2], **options)
dist.barrier()
if dist.get_rank() == 0:
    print(len(part) / (time.perf_counter() - start))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON; table and picture go beside it")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a zip of an image folder, for the ranks")
    parser.add_argument("--clip", help="the CLIP model of the ranks")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stages(made_embeddings(1000, 16, 2), 1)  # loads what the first call loads
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"curves": {}}
    for name, measure in curves(options).items():
        if name not in results["curves"]:
            results["curves"][name] = measure()
            results["machine"] = machine() | {"threads": options.threads}
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            print(name, json.dumps(results["curves"][name]), flush=True)
    options.out.with_suffix(".md").write_text(table(results))
    plot(results, options.out.with_suffix(".png"))
    print(table(results))


def curves(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is measured: name -> stage -> value -> seconds."""
    wanted: dict[str, Callable[[], Any]] = {
        name: lambda name=name: selecting(name, options.rounds)  # type: ignore[misc]
        for name in GROWING
    }
    wanted["pairs of a batch"] = lambda: pairs(options.rounds)
    wanted["sampled"] = lambda: sampling(options.rounds)
    wanted["rates"] = lambda: {"gflop_s": matrix_rate(options.rounds)}
    if options.data is not None and options.clip is not None:
        wanted["ranks"] = lambda: ranks(options)
    return wanted


def selecting(growing: str, rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of scoring and selecting as one of their sizes grows."""
    found: dict[str, dict[int, float]] = {}
    for value in GROWING[growing]:
        sizes = BASE | {growing.partition(",")[0]: value}
        if growing.endswith("500"):
            sizes["classes"] = value // 500
        embeddings = made_embeddings(sizes["samples"], sizes["dim"], sizes["classes"])
        for stage, seconds in stages(embeddings, rounds).items():
            found.setdefault(stage, {})[value] = seconds
    return found


def stages(embeddings: ss.Embeddings, rounds: int) -> dict[str, float]:
    """Seconds of each stage of the default, and of the paper's scores."""
    image, text, labels = embeddings.image, embeddings.text, embeddings.labels
    directions, classes = normalize(image.float(), dim=1), len(text)
    k = min(99, len(labels) // classes - 1)
    trusted: list[Any] = []
    seconds = [
        timed(lambda: trusted.append(label_trust(image, text, labels, progress=False)))[0] for _ in range(rounds)
    ]
    scores = ss.Scores({"trust": trusted[0].probability}, labels=labels, class_names=embeddings.class_names)
    tasks: dict[str, Callable[[], Any]] = {
        "alignment": lambda: semantic_alignment(image, text, labels),
        "diversity": lambda: sample_diversity(directions, labels, k),
        "select": lambda: ss.select(scores, 0.5, progress=False),
    }
    return {"trust": statistics.median(seconds)} | {name: median(task, rounds) for name, task in tasks.items()}


def pairs(rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of the scores of image-text pairs, as a batch grows."""
    found: dict[str, dict[int, float]] = {"s-CLIPLoss": {}, "NormSim": {}}
    generator = torch.Generator().manual_seed(0)
    targets = normalize(torch.randn(TARGETS, 768, generator=generator), dim=1)
    for size in PAIRS:
        image, prompt = (normalize(torch.randn(size, 768, generator=generator), dim=1) for _ in range(2))
        loss = {"temperature": 0.01, "batch_size": size, "repeats": 1}
        found["s-CLIPLoss"][size] = median(lambda i=image, p=prompt, o=loss: s_clip_loss(i, p, **o), rounds)
        found["NormSim"][size] = median(lambda i=image: norm_sim(i, targets), rounds)
    return found


def sampling(rounds: int) -> dict[str, dict[int, float]]:
    """Seconds of an epoch's first index and of all of them, as the selection grows."""
    found: dict[str, dict[int, float]] = {"first index": {}, "all indices": {}}
    for size in (1_000_000, 4_000_000, 16_000_000):
        sampler = ss.SelectSampler(range(size))
        found["first index"][size] = median(lambda s=sampler: next(iter(s)), rounds)
        found["all indices"][size] = median(lambda s=sampler: sum(1 for _ in s), rounds)
    return found


def ranks(options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Images a second embedded by one and by two processes of one thread."""
    found: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "embed.py"
        program.write_text(EMBED)
        for number in (1, 2):
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}", str(program)]
            arguments = [str(options.data), options.clip, "10000", f"{folder}/{number}"]
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"Embedding on {number} ranks failed: {done.stderr}")
            found[number] = float(done.stdout.strip().splitlines()[-1])
    return {"images a second, embedded": found}


def matrix_rate(rounds: int) -> float:
    a, b = torch.randn(4096, 1024), torch.randn(1024, 4096)
    return 2 * 4096 * 4096 * 1024 / median(lambda: a @ b, rounds) / 1e9


def median(task: Callable[[], Any], rounds: int) -> float:
    """Seconds; the first call warms up."""
    task()
    return statistics.median(timed(task)[0] for _ in range(rounds))


# --- whole data sets

GIGA_ENCODE, GIGA_TRAIN = 8.7, 24.5  # operations: ViT-B/32 forward; ResNet-50 at 224 pixels, forward and backward
DATA_SETS = {  # samples, classes, epochs, operations in 10^9 of one image trained on and of one encoded
    "CIFAR-10 (ResNet-18, 200 epochs)": (50_000, 10, 200, 3.3, GIGA_ENCODE),
    "ImageNet-1k (ResNet-50, 90 epochs)": (1_281_167, 1_000, 90, GIGA_TRAIN, GIGA_ENCODE),
    "ImageNet-21k (ResNet-50, 90 epochs)": (14_197_122, 21_841, 90, GIGA_TRAIN, GIGA_ENCODE),
}
POOLS = {  # pairs; CLIP ViT-B/32 trained on as many samples as the pool has, its text tower included
    "DataComp medium (its features are given)": 128_000_000,
    "DataComp large (its features are given)": 1_280_000_000,
}
GIGA_CLIP = 3 * (8.7 + 6.0)


def costs(results: dict[str, Any]) -> list[tuple[str, float, float, float, float]]:
    """(data set, hours of embedding, of scoring and selecting, of training on all; their share of that)."""
    rate = results["curves"]["rates"]["gflop_s"] * 3600
    measured = {stage: last(curve) for stage, curve in results["curves"]["samples"].items()}
    largest = max(GROWING["samples"])
    rows = []
    for name, (samples, classes, epochs, train, encode) in DATA_SETS.items():
        by_class = samples * (samples / classes) / (largest * (largest / BASE["classes"]))
        scoring = measured["diversity"] * by_class + (measured["alignment"] + measured["select"]) * samples / largest
        scoring += marginal(results["curves"]["samples"]["trust"]) * samples * max(1.0, classes / BASE["classes"])
        embed, training = samples * encode / rate, samples * epochs * train / rate
        rows.append((name, embed, scoring / 3600, training, (embed + scoring / 3600) / training))
    batch = max(PAIRS)
    pair = {stage: last(curve) / batch for stage, curve in results["curves"]["pairs of a batch"].items()}
    for name, samples in POOLS.items():
        scoring = (
            (pair["s-CLIPLoss"] * 32_768 / batch * 10 + 0.3 * pair["NormSim"] * IMAGENET / TARGETS) * samples / 3600
        )
        training = samples * GIGA_CLIP / rate
        rows.append((name, 0.0, scoring, training, scoring / training))
    return rows


def last(curve: dict[Any, float]) -> float:
    return list(curve.values())[-1]


def marginal(curve: dict[Any, float]) -> float:
    """Seconds a sample more takes, by the two largest: without what is spent whatever their number."""
    (before, less), (size, more) = list(curve.items())[-2:]
    return (more - less) / (float(size) - float(before))


def exponent(curve: dict[Any, float]) -> float:
    """Slope of the logarithms."""
    x, y = np.log([float(value) for value in curve]), np.log(list(curve.values()))
    return float(np.polyfit(x, y, 1)[0])


def table(results: dict[str, Any]) -> str:
    """Curves with their exponents, and whole data sets."""
    lines = ["Seconds (medians); the exponent is the slope of their logarithms.", ""]
    lines += ["| what grows | stage | " + "measured |" + " exponent |", "|---|---|---|---|"]
    for name, curve in results["curves"].items():
        for stage, values in curve.items() if name != "rates" else ():
            cells = ", ".join(f"{int(value):,}: {seconds:.4g}" for value, seconds in values.items())
            lines.append(f"| {name} | {stage} | {cells} | {exponent(values):.2f} |")
    lines += ["", "Hours on this machine, worked out (see benchmarks/growth.py):", ""]
    lines += ["| data set | embed | score and select | train on all | share of it |", "|---|---|---|---|---|"]
    for name, embed, scoring, training, share in costs(results):
        lines.append(f"| {name} | {embed:,.2f} | {scoring:,.2f} | {training:,.0f} | {100 * share:.2f} % |")
    described = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return (
        "\n".join([*lines, "", f"Matrix product: {results['curves']['rates']['gflop_s']:.0f} gflop/s. {described}."])
        + "\n"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel for everything that grows, both axes logarithmic."""
    from matplotlib.figure import Figure

    names = [name for name in results["curves"] if name not in ("rates", "ranks")]
    figure = Figure(figsize=(4 * len(names), 4))
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place)
        for stage, values in results["curves"][name].items():
            x = [float(value) for value in values]
            axes.loglog(x, list(values.values()), "o-", label=f"{stage} ({exponent(values):.2f})")
        axes.set_xlabel(name)
        axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
