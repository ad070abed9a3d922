"""What selecting from ImageNet costs, and what it saves, counted up from the rates of every stage on this machine.

    python recipes/imagenet_cost.py --data imagenet/ --clip ViT-B-32 --keep 0.7

Measured on one core of an AMD EPYC (torch 2.15, CPU seconds, since others used the machine; JPEGs of 500 x 375 pixels
and 92 KB; ViT-B/32 in float32 with random weights), in images a second: decode 534, CLIP's preprocessing 373,
statistics and damaged twins 98, encode 8.6, select 6 million, decode and augment for training 294, train a ResNet-50 at
160 pixels 9.0. Scoring was measured with 100 classes (1,800 a second after 26 s) and worked out for 1,000: 1,150 a
second after 262 s. For 1,281,167 images, 100 epochs, keep 0.7, that comes to

    embed                          41.38 h
    score                           0.38 h
    select                          0.00 h
    train on the selection      2,767.95 h
    train on all                3,954.22 h

so that selecting costs 3.5 % of the training that it saves. No GPU was at hand. On one, put its own `encode` and
`train` into `cost`: embedding takes N * max(14.8 ms / workers, 1 / encode), an epoch keep * N * max(3.4 ms / workers,
1 / train).
Where cores are the bottleneck, embedding is as dear as 4.3 epochs of training on all, most of it statistics.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from selectsampler.recipes.imagenet import PRESENT, Images, Protocol, create_model, create_optimizer, load
from timm.data import create_transform
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

import selectsampler as ss
from selectsampler.embeddings.damaging import twin_of
from selectsampler.embeddings.statistics import STATISTICS, image_statistics

IMAGENET = 1_281_167  # training images
CLASSES, CLASS_SIZE = 1000, 1281


@dataclass(frozen=True)
class Rates:
    """Images a second of each stage on one machine, as `measure` finds them; on CPUs of one core.

    Args:
        decode, preprocess, statistics: of one process, on the way into CLIP (damaged twins are part of statistics).
        encode: of CLIP's image tower.
        score: of the part of scoring that goes with the number of images, at 1,000 classes of 1,281.
        score_start: seconds of scoring that do not depend on the number of images.
        select: of the draw under a quota for each class.
        augment: of one process that decodes and augments for training.
        train: of forward, backward and update.
    """

    decode: float
    preprocess: float
    statistics: float
    encode: float
    score: float
    score_start: float
    select: float
    augment: float
    train: float


def cost(rates: Rates, images: int, *, keep: float, epochs: int, workers: int) -> dict[str, float]:
    """Seconds of each stage for a data set of so many images.

    >>> rates = Rates(decode=100, preprocess=100, statistics=100, encode=50, score=1000, score_start=10, select=1000,
    ...               augment=50, train=20)
    >>> cost(rates, 1000, keep=0.5, epochs=10, workers=2)
    {'embed': 20.0, 'score': 11.0, 'select': 1.0, 'train on the selection': 250.0, 'train on all': 500.0}

    While CLIP, or the network, works on one batch, `workers` processes prepare the next: a stage takes as long as the
    slower of the two. With the rates of another machine put in (a GPU's `encode` and `train`, its cores' `decode` to
    `augment`), this is the cost there.

    Args:
        rates: of the machine.
        images: N.
        keep: the share of them that is selected.
        epochs: passes through what is trained on.
        workers: processes that prepare images, each on a core of its own.
    """
    prepare = (1 / rates.decode + 1 / rates.preprocess + 1 / rates.statistics) / workers
    visit = max(1 / rates.augment / workers, 1 / rates.train)
    return {
        "embed": images * max(prepare, 1 / rates.encode),
        "score": rates.score_start + images / rates.score,
        "select": images / rates.select,
        "train on the selection": keep * images * epochs * visit,
        "train on all": images * epochs * visit,
    }


def cost_table(rates: Rates, images: int, keep: float, protocol: Protocol, workers: int) -> str:
    """The rates, and what they come to."""
    stages = cost(rates, images, keep=keep, epochs=protocol.epochs, workers=workers)
    selecting = sum(stages[stage] for stage in ("embed", "score", "select"))
    saved = stages["train on all"] - stages["train on the selection"]
    lines = [
        f"rates: {', '.join(f'{name} {rate:,.1f}' for name, rate in asdict(rates).items())}",
        f"{images:,} images, {workers} workers, {protocol.epochs} epochs of {protocol.model} at {protocol.train_size}, "
        f"keep {keep}:",
        *(f"    {stage:<24}{took / 3600:>12,.2f} h" for stage, took in stages.items()),
        f"Selecting costs {selecting / 3600:,.2f} h, {100 * selecting / saved:.2g} % of the training that it saves.",
    ]
    return "\n".join(lines)


def measure(data: Images, clip_name: str, protocol: Protocol) -> Rates:
    """Measure every stage on some images, one process each.

    The speed of CLIP and of the network does not depend on their weights: these are random, unless `clip_name` is a
    `local-dir:` or `hf-hub:`.
    """
    rows = np.random.default_rng(0).permutation(len(data.labels))[:128].tolist()
    decode, images = rate_of(lambda row: data.training[row][0], rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = clip_name if ":" in clip_name else clip_name.split("/")[0]
    clip, _, preprocess = open_clip.create_model_and_transforms(name, device=device)
    augment = create_transform(protocol.train_size, is_training=True, auto_augment=protocol.augmentation)
    augmenting, _ = rate_of(augment, images)
    preprocessing, pixels = rate_of(preprocess, images)
    statistics, _ = rate_of(statistics_of, images)
    scoring, start, selecting = rates_of_selecting(features=clip.visual.output_dim)
    return Rates(
        decode=decode,
        preprocess=preprocessing,
        statistics=statistics,
        encode=rate_of_encoding(clip, torch.stack(pixels[:64]), device),
        score=scoring,
        score_start=start,
        select=selecting,
        augment=1 / (1 / decode + 1 / augmenting),
        train=rate_of_training(protocol, device),
    )


def seconds() -> float:
    """A clock: of this process's own work, so that others on the machine do not count; of the wall if a GPU works."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def rate_of(function: Callable[[Any], Any], inputs: Sequence[Any]) -> tuple[float, list[Any]]:
    """How many a second a function does, after one to warm up, and what it gives."""
    function(inputs[0])
    start = seconds()
    outputs = [function(value) for value in inputs]
    return len(inputs) / (seconds() - start), outputs


def statistics_of(image: Any) -> None:
    """What `embed` does to an image beside CLIP's preprocessing."""
    twin = twin_of(image)
    for seen in (image,) if twin is None else (image, twin[1]):
        image_statistics(np.asarray(seen))


@torch.inference_mode()
def rate_of_encoding(clip: nn.Module, pixels: Tensor, device: torch.device) -> float:
    """Images a second through CLIP's image tower, precision as `embed` has it."""
    pixels = pixels.to(device)

    def encode(_: int) -> None:
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            clip.encode_image(pixels).sum().item()  # waits for a GPU

    return len(pixels) * rate_of(encode, range(3))[0]


def rate_of_training(protocol: Protocol, device: torch.device) -> float:
    """Images a second of forward, backward and update on random pixels; small batches on a CPU."""
    torch.manual_seed(0)
    size = protocol.batch_size if device.type == "cuda" else 32
    model = create_model(protocol, CLASSES).to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if device.type == "cuda" else model
    optimizer, _ = create_optimizer(model, protocol, 1000)
    pixels = torch.rand(size, 3, protocol.train_size, protocol.train_size, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    targets = torch.rand(size, CLASSES, device=device)

    def update(_: int) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(pixels)
        loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=PRESENT)(logits.float(), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for a GPU

    return size * rate_of(update, range(4))[0]


def rates_of_selecting(*, features: int) -> tuple[float, float, float]:
    """Images a second of scoring, the seconds it takes to start, and images a second of selecting.

    Scoring is timed on two numbers of random features, of some classes that have ImageNet's size each among all 1,000:
    most of it goes with images times classes, diversity with images times the size of a class.
    """
    few, many = (seconds_of_scoring(some * CLASS_SIZE, features=features) for some in (2, 100))
    rate = 98 * CLASS_SIZE / max(many - few, 1e-9)
    generator = torch.Generator().manual_seed(0)
    columns = {name: torch.rand(IMAGENET, generator=generator) for name in ("trust", "intactness", "trusted_diversity")}
    scores = ss.Scores(
        columns, labels=torch.arange(IMAGENET) % CLASSES, class_names=[f"class {number}" for number in range(CLASSES)]
    )
    start = seconds()
    ss.select(scores, "0.5")
    return rate, max(0.0, few - 2 * CLASS_SIZE / rate), IMAGENET / (seconds() - start)


def seconds_of_scoring(samples: int, *, features: int) -> float:
    """Seconds of `ss.score` by the default preset, for features around their class prompts, as CLIP's are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) // CLASS_SIZE
    text = torch.randn(CLASSES, features, generator=generator)
    twins = torch.arange(0, samples, 6)
    embeddings = ss.Embeddings(
        image=(text[labels] + 2 * torch.randn(samples, features, generator=generator)).half(),
        text=text,
        labels=labels,
        class_names=[f"class {number}" for number in range(CLASSES)],
        image_statistics=torch.rand(samples, len(STATISTICS), generator=generator),
        twins=torch.stack([twins, twins // 6 % 5], dim=1),
        twin_statistics=torch.rand(len(twins), len(STATISTICS), generator=generator),
    )
    start = seconds()
    ss.score(embeddings, **ss.presets.default["score"])
    return seconds() - start


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder with train/WNID/*.JPEG and val/WNID/*.JPEG")
    add("--clip", default="ViT-B-32", help="architecture of open_clip (%(default)s), local-dir:PATH or hf-hub:ORG/NAME")
    add("--images", type=int, default=IMAGENET, help="how many to count up (%(default)s)")
    add("--keep", type=float, default=0.7, help="share of them that is selected (%(default)s)")
    add("--model", default=Protocol.model, help="any model of timm (%(default)s)")
    add("--epochs", type=int, default=Protocol.epochs, help="(%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode images (%(default)s)")
    given = parser.parse_args()
    protocol = replace(Protocol(), model=given.model, epochs=given.epochs)
    try:
        rates = measure(load(given.data), given.clip, protocol)
    except ValueError as error:
        raise SystemExit(f"imagenet_cost.py: {error}") from None
    print(cost_table(rates, given.images, given.keep, protocol, given.workers))


if __name__ == "__main__":
    main()
