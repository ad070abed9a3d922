"""What every stage costs, beside its floor and beside what people would use instead, in one run.

    python benchmarks/speed.py --out benchmarks/results/speed.json --data cifar10.zip --clip local-dir:cifar-clip

Stages run one after another, each in a process of its own; what already stands in the file, measured in the same way,
is not measured again. Ours and its peers take turns, and a ratio is the median over the rounds of the ratio within a
round, so that a machine that others use as well disturbs it little. The table goes beside the JSON as .md.

diversity      SDS in a class of 5,000 x 512, k = 99, float32: faiss-cpu, scikit-learn, torch.cdist; floor: the product
selection      1,281,167 samples, 1,000 quotas: argpartition and torch.topk (without quotas), straight-through
sampler        an epoch of 896,817 indices, iterated: torch's RandomSampler and DistributedSampler
embedding      CIFAR images through a small CLIP (--data, --clip): all but the encoder, the encoder alone, a plain loop
adaptation     cross_fit of 50,000 x 512, 100 classes: cross-validated logistic regression, cleanlab on top of it
coverage       group selection of 250 of 1,000 x 64: apricot's facility location; and of half of 50,000 x 512
pipeline       adapt, score, select 50,000 x 512 by default, and by cross_fit and the paper's scores: growth with N
memory         score by the paper's scores and select, of 1.28 million samples (D = 64, float16) of 1,000 classes
memory_trust   the same by default, with trust: it takes long, and only runs where --stages names it
s_clip_loss    a batch of 16,384 pairs, D = 768: the product, the direct three-buffer computation

On a GPU, where there is one: diversity (1,000 classes of 1,281), s_clip_loss (32,768 pairs in float16), pipeline. Peers
that are not installed (`pip install selectsampler[benchmarks]`) are left out and named.
"""

import argparse
import ctypes
import gc
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.adaptation import DEFAULTS
from selectsampler.embeddings.damaging import DAMAGES
from selectsampler.embeddings.statistics import STATISTICS
from selectsampler.optimizers import apportion, group, straight_through, top_k
from selectsampler.precision import fast_products
from selectsampler.scores import s_clip_loss, sample_diversity, semantic_alignment

Tasks = dict[str, Callable[[], Any]]
Result = dict[str, Any]


# --- measuring


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    described = {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described | {"load_average": os.getloadavg()[0]}


def timed(task: Callable[[], Any], *, trim: bool = False) -> tuple[float, float, float]:
    """Seconds on the clock, seconds of all cores together, and peak MiB above what was held before.

    Memory that earlier tasks gave back is still this process's, unless trimmed: else the peak comes out too low.
    """
    if trim:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    started, started_on_cores = time.perf_counter(), time.process_time()
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, on_cores = time.perf_counter() - started, time.process_time() - started_on_cores
    extra = status("VmHWM") - before
    if torch.cuda.is_available():
        extra = max(extra, (torch.cuda.max_memory_allocated() - allocated) / 2**20)
    return seconds, on_cores, extra


def status(key: str) -> float:
    """MiB of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


def take_turns(tasks: Tasks, rounds: int, *, warm_up: bool = True) -> dict[str, Result]:
    """Every task once a round; a round before the first to warm up. Memory is that of the first round."""
    rows: dict[str, Result] = {name: {"seconds": [], "core_seconds": []} for name in tasks}
    first = -1 if warm_up else 0
    for number in range(first, rounds):
        for name, task in tasks.items():
            seconds, on_cores, extra = timed(task, trim=number == first)
            if number == first:
                rows[name]["extra_mib"] = extra
            if number >= 0:
                rows[name]["seconds"].append(seconds)
                rows[name]["core_seconds"].append(on_cores)
    for row in rows.values():
        row["median_seconds"] = statistics.median(row["seconds"])
    return rows


def ratio(rows: dict[str, Result], name: str, other: str) -> float:
    """The median over the rounds of what one task took over what another took."""
    return statistics.median(a / b for a, b in zip(rows[name]["seconds"], rows[other]["seconds"], strict=True))


def scaled(row: Result, factor: float) -> Result:
    """What a task takes that repeats another one."""
    times = {key: [factor * value for value in row[key]] for key in ("seconds", "core_seconds")}
    return row | times | {"median_seconds": factor * row["median_seconds"]}


def wanted(what: str, value: float, limit: float, *, at_least: bool = False) -> Result:
    met = value >= limit if at_least else value <= limit
    return {"what": what, "value": value, "wanted": f"{'>=' if at_least else '<='} {limit:g}", "met": bool(met)}


def installed(*names: str) -> list[str]:
    return [name for name in names if find_spec(name) is not None]


# --- stages: each returns its tasks' times, the name of its floor, and what was wanted


def floors(options: argparse.Namespace) -> Result:
    """Rates of this machine that the other stages are held against."""
    a, b = torch.randn(4096, 512), torch.randn(512, 4096)
    block, copy = torch.randn(32 * 2**20), torch.empty(32 * 2**20)
    jpegs = some_jpegs(options, 1000)
    rows = take_turns(
        {
            "matrix product": lambda: a @ b,
            "copy of 128 MiB": lambda: copy.copy_(block),
            "decode of 1,000 JPEGs": lambda: [decoded(data) for data in jpegs],
        },
        options.repeats,
    )
    rates = {
        "gflop_s": 2 * 4096 * 4096 * 512 / rows["matrix product"]["median_seconds"] / 1e9,
        "gib_s": 0.25 / rows["copy of 128 MiB"]["median_seconds"],  # read and written
        "images_s": len(jpegs) / rows["decode of 1,000 JPEGs"]["median_seconds"],
    }
    return {"tasks": rows, "rates": rates}


def diversity(options: argparse.Namespace) -> Result:
    classes, size, dim, k = (1000, 1281, 512, 99) if options.gpu else (1, 5000, 512, 99)
    features = torch.randn(classes * size, dim, generator=torch.Generator().manual_seed(0), device="cpu")
    features = features.cuda() if options.gpu else features
    labels = torch.arange(classes, device=features.device).repeat_interleave(size)
    by_class = features.view(classes, size, dim)
    tasks: Tasks = {
        "matrix product": lambda: [part @ part.T for part in by_class],
        "selectsampler": lambda: sample_diversity(features, labels, k),
        "torch.cdist": lambda: [torch.cdist(p, p).topk(k + 1, largest=False)[0][:, 1:].mean(1) for p in by_class],
    }
    if not options.gpu:
        tasks |= neighbour_peers(features.numpy(), k)
    rows = take_turns(tasks, options.repeats)
    criteria = [wanted("times the product", ratio(rows, "selectsampler", "matrix product"), 2 if options.gpu else 1.05)]
    if "faiss" in rows:
        criteria.append(wanted("times faiss-cpu", ratio(rows, "selectsampler", "faiss"), 0.90))
    return {"tasks": rows, "floor": "matrix product", "criteria": criteria}


def neighbour_peers(points: np.ndarray, k: int) -> Tasks:
    tasks: Tasks = {}
    if installed("sklearn"):
        from sklearn.neighbors import NearestNeighbors

        brute = NearestNeighbors(n_neighbors=k + 1, algorithm="brute")
        tasks["scikit-learn"] = lambda: brute.fit(points).kneighbors(points)[0][:, 1:].mean(axis=1)
    if installed("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())

        def search() -> np.ndarray:
            index = faiss.IndexFlatL2(points.shape[1])
            index.add(points)
            return np.sqrt(np.maximum(index.search(points, k + 1)[0][:, 1:], 0)).mean(axis=1)

        tasks["faiss"] = search
    return tasks


def selection(options: argparse.Namespace) -> Result:
    samples, classes = options.samples or 1_281_167, 1000
    generator = torch.Generator().manual_seed(0)
    utility = torch.rand(samples, generator=generator, dtype=torch.float64)
    groups = torch.randint(classes, (samples,), generator=generator)
    k = samples * 7 // 10
    quotas = apportion(torch.bincount(groups, minlength=classes), k)
    terms = (utility / utility.mean())[None].float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a few steps do not suffice
        steps = len(straight_through(terms, k, progress=False).loss_curve)
        rows = take_turns(
            {
                "reading it once": lambda: (utility.sum(), groups.sum()),
                "selectsampler": lambda: top_k(utility, k, groups=groups, quotas=quotas),
                "selectsampler, no quotas": lambda: top_k(utility, k),
                "argpartition, no quotas": lambda: np.argpartition(utility.numpy(), samples - k),
                "torch.topk, no quotas": lambda: utility.topk(k),
                "straight-through, 50 steps": lambda: straight_through(terms, k, max_steps=50, progress=False),
            },
            options.repeats,
        )
    rows[f"straight-through, its {steps:,} steps (50 timed)"] = whole = scaled(
        rows["straight-through, 50 steps"], steps / 50
    )
    seconds = rows["selectsampler"]["median_seconds"]
    criteria = [
        wanted("seconds", seconds, 0.06),
        wanted("times straight-through", seconds / whole["median_seconds"], 0.01),
    ]
    return {"tasks": rows, "floor": "reading it once", "criteria": criteria}


def lot(options: argparse.Namespace) -> Result:
    """The default way to select, quotas by trust, beside the exact optimum of the same scores."""
    samples, classes = options.samples or 1_281_167, 1000
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(samples, generator=generator) < 0.2
    trust, intactness = (torch.rand(samples, generator=generator) ** 0.05 for _ in range(2))  # most of them near 1
    trust = torch.where(wrong, 1 - trust, trust)
    diversity = trust * torch.rand(samples, generator=generator)
    columns = {"trust": trust, "intactness": intactness, "trusted_diversity": diversity}
    labels = torch.randint(classes, (samples,), generator=generator)
    scores = ss.Scores(columns, labels=labels, class_names=[str(number) for number in range(classes)])
    rows = take_turns(
        {
            "selectsampler": lambda: ss.select(scores, 0.5, progress=False),
            "selectsampler, method exact": lambda: ss.select(scores, 0.5, method="exact", progress=False),
        },
        options.repeats,
    )
    return {"tasks": rows, "criteria": [wanted("MiB beyond scores", rows["selectsampler"]["extra_mib"], 300)]}


def sampler(options: argparse.Namespace) -> Result:
    from torch.utils.data import DistributedSampler, RandomSampler

    population, samples = 1_281_167, options.samples or 896_817
    chosen = torch.randperm(population, generator=torch.Generator().manual_seed(0))[:samples]
    ours = ss.SelectSampler(ss.Selection(chosen, population))
    shuffled, distributed = RandomSampler(range(samples)), DistributedSampler(range(samples), num_replicas=1, rank=0)
    epochs = {id(one): 0 for one in (ours, distributed)}

    def epoch(one: Any) -> None:
        if hasattr(one, "set_epoch"):
            epochs[id(one)] += 1
            one.set_epoch(epochs[id(one)])
        deque(one, maxlen=0)

    indices = torch.arange(samples)
    rows = take_turns(
        {
            "a list of indices": lambda: deque(indices.tolist(), maxlen=0),
            "selectsampler": lambda: epoch(ours),
            "RandomSampler": lambda: epoch(shuffled),
            "DistributedSampler": lambda: epoch(distributed),
        },
        options.repeats,
    )
    criteria = [
        wanted("times RandomSampler", ratio(rows, "selectsampler", "RandomSampler"), 0.6),
        wanted("times DistributedSampler", ratio(rows, "selectsampler", "DistributedSampler"), 1.0),
    ]
    return {"tasks": rows, "floor": "a list of indices", "criteria": criteria}


class NoEncoder(nn.Module):
    """Stands where a CLIP model does, and costs nothing: what is left is everything but the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return pixels[:, 0, :16, 0]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return tokens[:, :16].float() + 1


def embedding(options: argparse.Namespace) -> Result:
    import open_clip
    from selectsampler.recipes.data import ZippedImageFolder

    if options.data is None or options.clip is None:
        return {"skipped": "needs --data and --clip"}
    count = options.samples or 1500
    images = ZippedImageFolder(
        options.data, "cifar10/train", accept=lambda name: int(Path(name).stem) < max(1, count // 10)
    )
    model, preprocess = open_clip.create_model_from_pretrained(options.clip, return_transform=True)
    tokenizer = open_clip.get_tokenizer(options.clip)
    model.eval()
    jpegs = some_jpegs(options, len(images))
    batches = torch.stack([preprocess(decoded(data)) for data in jpegs]).split(256)

    def through(encoder: nn.Module, workers: int) -> None:
        clip = (encoder, preprocess, tokenizer)
        ss.embed(images, clip, class_names=images.classes, num_workers=workers, progress=False, device="cpu")

    @torch.no_grad()
    def plain() -> list[Tensor]:
        pictures = [torch.stack([preprocess(decoded(data)) for data in jpegs[i : i + 256]]) for i in starts]
        return [model.encode_image(batch) for batch in pictures]

    @torch.no_grad()
    def encoder_alone() -> list[Tensor]:
        return [model.encode_image(batch) for batch in batches]

    starts = range(0, len(jpegs), 256)
    rows = take_turns(
        {
            "encoder alone": encoder_alone,
            "all but the encoder": lambda: through(NoEncoder(), 0),
            "selectsampler": lambda: through(model, 0),
            "all but the encoder, workers": lambda: through(NoEncoder(), options.workers),
            "selectsampler, workers": lambda: through(model, options.workers),
            "plain loop": plain,
        },
        options.repeats,
    )
    parts = ("encoder alone", "all but the encoder")
    slower = max(parts, key=lambda name: rows[name]["median_seconds"])
    criteria = [wanted("of the rate of the slower part", ratio(rows, slower, "selectsampler"), 0.9, at_least=True)]
    cores = min(options.threads, os.cpu_count() or 1)
    busy = sum(statistics.median(rows[name]["core_seconds"]) for name in parts) / cores  # no schedule is shorter
    share = busy / rows["selectsampler"]["median_seconds"]
    criteria.append(wanted("of the rate at which all cores are busy with both parts", share, 0.9, at_least=True))
    rates = {name: len(images) / row["median_seconds"] for name, row in rows.items()}
    return {"tasks": rows, "floor": slower, "criteria": criteria, "images_s": rates}


def some_jpegs(options: argparse.Namespace, count: int) -> list[bytes]:
    """CIFAR's where they are there, else made ones of that size."""
    if options.data is not None:
        with zipfile.ZipFile(options.data) as archive:
            names = sorted(name for name in archive.namelist() if name.startswith("cifar10/train/") and "." in name)
            return [archive.read(name) for name in names[:: max(1, len(names) // count)][:count]]
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    files = []
    for picture in pixels:
        Image.fromarray(picture).resize((32, 32)).save(file := io.BytesIO(), "JPEG")
        files.append(file.getvalue())
    return files


def decoded(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def ten_products(a: Tensor, b: Tensor) -> list[Tensor]:
    """As adapters are multiplied while they are trained."""
    with fast_products():
        return [a @ b for _ in range(10)]


def adaptation(options: argparse.Namespace) -> Result:
    samples, dim, classes, folds = options.samples or 50_000, 512, 100, 5
    embeddings = made_embeddings(samples, dim, classes)
    steps, batch = (DEFAULTS["cross_fit"][name] for name in ("steps", "batch_size"))
    operations = folds * steps * (2 * 2 * (batch + classes) * dim * dim + 3 * 2 * batch * classes * dim)
    a, b = torch.randn(4096, dim), torch.randn(dim, 4096)
    products = operations / (2 * 4096 * 4096 * dim)
    tasks: Tasks = {
        "ten matrix products": lambda: ten_products(a, b),
        "selectsampler": lambda: ss.adapt(embeddings, method="cross_fit", progress=False),
    }
    if not installed("sklearn"):
        return {"tasks": take_turns(tasks, options.repeats), "criteria": []}
    from sklearn.linear_model import LogisticRegression

    features, labels = normalize(embeddings.image.float(), dim=1).numpy(), embeddings.labels.numpy()
    fold_of = np.random.default_rng(0).permutation(samples) % folds
    turn = iter(range(10**6))
    probabilities = np.zeros((samples, classes), dtype=np.float32)

    def one_fold() -> None:
        held_out = fold_of == next(turn) % folds
        model = LogisticRegression().fit(features[~held_out], labels[~held_out])
        probabilities[held_out] = model.predict_proba(features[held_out])

    name = "scikit-learn, one fold"
    rows = take_turns({**tasks, name: one_fold}, max(folds, options.repeats), warm_up=False)
    rows["scikit-learn, five folds"] = scaled(rows[name], folds)
    rows["its matrix products"] = scaled(rows.pop("ten matrix products"), products / 10)
    if installed("cleanlab"):
        from cleanlab.filter import find_label_issues

        judge: Tasks = {
            "cleanlab, given the probabilities": lambda: find_label_issues(labels, probabilities, n_jobs=1),
            "alignment, given the adapters": lambda: semantic_alignment(
                embeddings.image, embeddings.text, embeddings.labels
            ),
        }
        rows |= take_turns(judge, options.repeats)
    criteria = [
        wanted("times cross-validated regression", ratio(rows, "selectsampler", "scikit-learn, five folds"), 0.2),
        wanted("seconds", rows["selectsampler"]["median_seconds"], 10),
    ]
    return {"tasks": rows, "floor": "its matrix products", "criteria": criteria}


def made_embeddings(samples: int, dim: int, classes: int, *, noise: float = 0.2) -> ss.Embeddings:
    """Classes of equal size around their prompts, a share of the labels wrong; made block by block, in float16."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(samples) % classes
    image = torch.empty(samples, dim, dtype=torch.float16)
    for rows in torch.arange(samples).split(65_536):
        image[rows] = (prompts[labels[rows]] + 1.5 * torch.randn(len(rows), dim, generator=generator)).half()
    wrong = torch.rand(samples, generator=generator) < noise
    labels[wrong] = torch.randint(classes, (int(wrong.sum()),), generator=generator)
    names = [f"class {number}" for number in range(classes)]
    return ss.Embeddings(image, prompts, labels, names)


def with_statistics(embeddings: ss.Embeddings) -> ss.Embeddings:
    """The same with made image statistics and twins, as many as `embed` notes, for intactness."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(0, len(embeddings), 4)
    of_images, of_twins = (torch.randn(n, len(STATISTICS), generator=generator) for n in (len(embeddings), len(rows)))
    twins = torch.stack([rows, torch.arange(len(rows)) % len(DAMAGES)], dim=1)
    return replace(embeddings, image_statistics=of_images, twins=twins, twin_statistics=of_twins)


def coverage(options: argparse.Namespace) -> Result:
    samples, dim = options.samples or 1000, 64
    features = normalize(torch.randn(samples, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    utility, k = torch.zeros(samples), samples // 4
    tasks: Tasks = {
        "matrix product": lambda: features @ features.T,
        "selectsampler": lambda: group(utility, features, k, progress=False),
    }
    if installed("apricot"):
        from apricot import FacilityLocationSelection

        points = features.numpy().astype(np.float64)
        tasks["apricot"] = lambda: FacilityLocationSelection(k, metric="cosine", verbose=False).fit(points)
    rows = take_turns(tasks, options.repeats)
    whole = made_embeddings(options.samples or 50_000, 512, 10)
    nothing, half = torch.zeros(len(whole)), len(whole) // 2
    large: Tasks = {
        "selectsampler, half of 50,000 x 512, ten classes": lambda: group(
            nothing, whole.image, half, labels=whole.labels, progress=False
        )
    }
    rows |= take_turns(large, 1, warm_up=False)
    criteria = [wanted("seconds of 50,000", rows[next(iter(large))]["median_seconds"], 60)]
    return {"tasks": rows, "floor": "matrix product", "criteria": criteria}


def chain(embeddings: ss.Embeddings) -> ss.Selection:
    """Adapt, score and select as `SelectSampler.from_dataset` does."""
    steps = ss.presets.default
    adapted = ss.adapt(embeddings, progress=False, **steps["adapt"])
    scores = ss.score(adapted, progress=False, **steps["score"])
    return ss.select(scores, keep=0.7, progress=False, **steps["select"])


def paper_chain(embeddings: ss.Embeddings, **adapting: Any) -> ss.Selection:
    """The same with adapters and the paper's two scores."""
    adapted = ss.adapt(embeddings, progress=False, **adapting)
    scores = ss.score(adapted, progress=False, columns=("semantic_alignment", "sample_diversity"))
    return ss.select(scores, keep=0.7, progress=False)


def pipeline(options: argparse.Namespace) -> Result:
    largest, size = options.samples or 50_000, 500
    device = "cuda" if options.gpu else "cpu"
    quarter, whole = (with_statistics(made_embeddings(n, 512, n // size)).to(device) for n in (largest // 4, largest))
    tasks: Tasks = {
        "by default": lambda: chain(whole),
        "by default, a quarter of them": lambda: chain(quarter),
        "cross_fit, the paper's scores": lambda: paper_chain(whole),
        "no adapters, the paper's scores": lambda: paper_chain(whole, method="none"),
        "no adapters, the paper's scores, a quarter of them": lambda: paper_chain(quarter, method="none"),
    }
    rows = take_turns(tasks, options.repeats, warm_up=False)
    seconds = ("by default", "cross_fit, the paper's scores")
    criteria = [wanted(f"seconds, {name}", rows[name]["median_seconds"], 15) for name in seconds]
    for name in ("by default", "no adapters, the paper's scores"):
        growth = math.log(ratio(rows, name, f"{name}, a quarter of them")) / math.log(4)
        criteria.append(wanted(f"growth exponent in N, {name}", growth, 1.05))
    return {"tasks": rows, "criteria": criteria}


def memory(options: argparse.Namespace) -> Result:
    return memory_of(options, lambda embeddings: paper_chain(embeddings, method="none"))


def memory_with_trust(options: argparse.Namespace) -> Result:
    return memory_of(options, chain)


def memory_of(options: argparse.Namespace, choose: Callable[[ss.Embeddings], ss.Selection]) -> Result:
    choose(made_embeddings(2000, 64, 10))  # loads what the first call loads
    embeddings = made_embeddings(options.samples or 1_281_000, 64, 1000)
    rows = take_turns({"selectsampler": lambda: choose(embeddings)}, 1, warm_up=False)
    return {"tasks": rows, "criteria": [wanted("MiB beyond features", rows["selectsampler"]["extra_mib"], 300)]}


def s_clip(options: argparse.Namespace) -> Result:
    samples, dim = (32768, 768) if options.gpu else (options.samples or 16384, 768)
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(samples, dim, generator=generator), dim=1) for _ in range(2))
    if options.gpu:
        image, text = image.cuda().half(), text.cuda().half()
    near = normalize(image + 0.5 * text, dim=1)  # cosines up to 0.9, for which one shift for all must be found
    tasks: Tasks = {
        "matrix product": lambda: image @ text.T,
        "selectsampler": lambda: s_clip_loss(image, text, temperature=0.01, batch_size=samples),
        "selectsampler, cosines up to 0.9": lambda: s_clip_loss(image, near, temperature=0.01, batch_size=samples),
        "direct": lambda: direct(image, text, 0.01),
    }
    rows = take_turns(tasks, options.repeats)
    difference = float((tasks["selectsampler"]() - tasks["direct"]()).abs().max())
    criteria = [
        wanted("times the product", ratio(rows, "selectsampler", "matrix product"), 1 / 0.6 if options.gpu else 1.2),
        wanted("extra MiB", rows["selectsampler"]["extra_mib"], 256 if options.gpu else 64),
    ]
    return {"tasks": rows, "floor": "matrix product", "criteria": criteria, "difference_from_direct": difference}


def direct(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """The definition as it is usually written, with B x B buffers."""
    logits = (image @ text.T).float() / temperature
    weights = logits.exp()
    return temperature * (logits.diag() - (weights.sum(dim=1).log() + weights.sum(dim=0).log()) / 2)


STAGES: dict[str, Callable[[argparse.Namespace], Result]] = {
    "floors": floors,
    "diversity": diversity,
    "selection": selection,
    "lot": lot,
    "sampler": sampler,
    "embedding": embedding,
    "adaptation": adaptation,
    "coverage": coverage,
    "pipeline": pipeline,
    "memory": memory,
    "memory_trust": memory_with_trust,
    "s_clip_loss": s_clip,
}
UNLESS_NAMED = ("memory_trust",)  # stages that are left out
ON_GPU = ("diversity", "pipeline", "s_clip_loss")
PEERS = ("sklearn", "faiss", "cleanlab", "apricot")


# --- the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON; the table goes beside it as .md")
    usual = [stage for stage in STAGES if stage not in UNLESS_NAMED]
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=usual, help="(all but memory_trust)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each process (%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="of the embedding's loader (%(default)s)")
    parser.add_argument("--samples", type=int, help="another size of the stages, to try them out")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as a zip of an image folder, for the embedding")
    parser.add_argument("--clip", help="the CLIP model of the embedding")
    parser.add_argument("--again", action="store_true", help="measure what stands in the file as well")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--gpu", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        print(json.dumps(STAGES[options.one](options)))
        return
    results = json.loads(options.out.read_text()) if options.out.exists() else {"stages": {}}
    for stage in stages_to_run(options):
        settings = {"repeats": options.repeats, "threads": options.threads, "samples": options.samples}
        known = results["stages"].get(stage)
        if known and known.get("settings") == settings and "skipped" not in known and not options.again:
            continue
        started = time.perf_counter()
        result = in_a_process(stage)
        result |= {"settings": settings, "took": time.perf_counter() - started, "machine": machine()}
        results["stages"][stage] = result
        results["missing_peers"] = [name for name in PEERS if not installed(name)]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(results))
        print(f"{stage}: {result['took']:.0f} s", flush=True)
    print(table(results))


def stages_to_run(options: argparse.Namespace) -> list[str]:
    on_gpu = [f"{stage}, GPU" for stage in options.stages if stage in ON_GPU] if torch.cuda.is_available() else []
    return [*options.stages, *on_gpu]


def in_a_process(stage: str) -> Result:
    """A stage in a process of its own, with the arguments of this one."""
    name, _, gpu = stage.partition(", ")
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name, *(["--gpu"] if gpu else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The stage {stage} failed; what was measured before it stands in the file.")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(results: Result) -> str:
    """All tasks, then what was wanted."""
    stages = results["stages"]
    lines = [
        "| stage | what | seconds, median (range) | times its floor | ours is | extra MiB |",
        "|---|---|---|---|---|---|",
    ]
    for stage, result in stages.items():
        if "skipped" in result:
            lines.append(f"| {stage} | {result['skipped']} | | | | |")
        for name, row in result.get("tasks", {}).items():
            lines.append(f"| {stage} | " + " | ".join(task_cells(result, name, row)) + " |")
    lines += ["", "| stage | ours | measured | wanted | met |", "|---|---|---|---|---|"]
    for stage, result in stages.items():
        for row in result.get("criteria", []):
            cells = (row["what"], f"{row['value']:.3g}", row["wanted"], "yes" if row["met"] else "**no**")
            lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    notes = [
        f"{value:,.0f} {name.replace('_s', '/s')}" for name, value in stages.get("floors", {}).get("rates", {}).items()
    ]
    machines = {json.dumps({**r["machine"], "load_average": None}) for r in stages.values() if "machine" in r}
    threads = sorted({result["settings"]["threads"] for result in stages.values() if "settings" in result})
    lines += ["", f"Rates of this machine: {', '.join(notes) or 'not measured'}. Threads: {threads}."]
    lines += [", ".join(f"{key} {value}" for key, value in json.loads(one).items() if value) + "." for one in machines]
    if results.get("missing_peers"):
        lines.append(f"Not installed, and left out: {', '.join(results['missing_peers'])}.")
    return "\n".join(lines) + "\n"


def task_cells(result: Result, name: str, row: Result) -> list[str]:
    rows, floor = result["tasks"], result.get("floor")
    spread = f"{row['median_seconds']:.4g} ({min(row['seconds']):.4g}-{max(row['seconds']):.4g})"
    over_floor = f"{row['median_seconds'] / rows[floor]['median_seconds']:.2f}" if floor in rows else ""
    ours = rows.get("selectsampler")
    is_peer = ours is not None and not name.startswith("selectsampler") and name != floor
    share = f"{ours['median_seconds'] / row['median_seconds']:.3g} of it" if ours is not None and is_peer else ""
    return [name, spread, over_floor, share, f"{row['extra_mib']:.0f}"]


if __name__ == "__main__":
    main()
