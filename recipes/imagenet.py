"""Train on the part of ImageNet that CLIP trusts, beside all of it, a random part, and a part whose labels are right.

    python recipes/imagenet.py --data imagenet/ --clip ViT-B-32/openai --noise symmetric:0.4 --keep 0.5 \\
        --cache-dir cache/ --report report.json

That is procedure A3 of "ResNet strikes back" (arXiv 2110.00476) in timm's own parts: a ResNet-50, 100 epochs of each
method's own selection at 160 pixels, LAMB at 8e-3 in batches of 2,048, a cosine after 5 % of warm-up, RandAugment,
mixup or CutMix, binary cross-entropy; tested at 224 pixels; bfloat16 and torch.compile on a GPU. It was not run to its
end: there was neither ImageNet nor a GPU. For several GPUs there is recipes/timm/imagenet.yaml.

`--quick` is for two cores: the first 4 images of each class at 64 pixels, a network of 0.47 M parameters, 62 updates of
64 for every method. Run once through every stage (`--noise symmetric:0.4 --keep 0.5 --method full ours`, seed 0) on a
made folder of all 1,000 wnids with 4 + 1 JPEGs of 500 x 375 pixels and 92 KB each, enlarged from CIFAR-10
(tests/made_imagenet.py), with a small CLIP, on one thread of a processor with two cores that several other processes
shared (AMD EPYC, torch 2.14; benchmarks/results/imagenet-quick.json). It showed that all stages fit together, and
nothing of accuracy, for what is in these images has nothing to do with their labels (nearly all of scoring so few
images is the start of it, with 1,000 classes):

    trained on             top-1  wrong labels  samples    select     train
    full                  0.40 %        40.0 %     4000     0.0 s    71.2 s
    ours                  0.20 %        41.0 %     2000   391.3 s    92.3 s

    images a second: train 49, embed 21, score 20, select 11,042

What ImageNet itself would cost is counted up by recipes/imagenet_cost.py. With `--report FILE.json` a run that was
interrupted goes on after its last epoch, and a report with what is missing.
"""

import argparse
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from selectsampler.recipes.experiment import (
    Experiment,
    accuracy_table,
    check_setting,
    command,
    complete,
    damage,
    first_of_each_class,
    open_report,
    parse,
    positive,
    setting_of,
    timed,
    with_arguments,
)
from timm.data import ImageNetInfo, Mixup, create_loader, resolve_model_data_config
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

import selectsampler as ss
from selectsampler.progress import progress_bar
from selectsampler.store import replace_atomically


@dataclass(frozen=True)
class Protocol:
    """How a network is trained. The defaults are procedure A3 of "ResNet strikes back", arXiv 2110.00476.

    Args:
        model: any of timm; where its input size is fixed (vision transformers), it is made and tested at `train_size`.
        train_size, test_size: pixels; test images are scaled so that `crop_pct` of the shorter side is seen.
        epochs: passes through the selection, in batches of `batch_size`; a shorter last batch is dropped.
        updates: the number of updates instead of epochs, so that subsets of every size are trained equally long.
        batch_size: even, since mixup pairs images.
        optimizer, learning_rate, weight_decay: of timm; the rate is the highest.
        warmup: the share of the updates over which the rate rises, linearly, before it falls along a cosine.
        augmentation: timm's name of it; comes after a random crop and flip.
        mixup, cutmix: alphas; one of the two is applied to every batch; the loss is binary cross-entropy, for which
            each class with more than `PRESENT` of an image is in it.
    """

    model: str = "resnet50"
    train_size: int = 160
    test_size: int = 224
    crop_pct: float = 0.95
    epochs: int = 100
    updates: int | None = None
    batch_size: int = 2048
    optimizer: str = "lamb"
    learning_rate: float = 8e-3
    weight_decay: float = 0.02
    warmup: float = 0.05
    augmentation: str = "rand-m6-mstd0.5-inc1"
    mixup: float = 0.1
    cutmix: float = 1.0

    def count(self, samples: int) -> int:
        """How many updates training on so many samples takes."""
        return self.epochs * (samples // self.batch_size) if self.updates is None else self.updates


PRESENT = 0.2  # a mixed image holds every class whose share of it is above this: timm's --bce-target-thresh
QUICK_PER_CLASS = 4
QUICK = Protocol(model="test_resnet", train_size=64, test_size=64, updates=62, batch_size=64)


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one ImageNet folder.

    Args:
        training, validation: data sets of (PIL image, label).
        labels: (N,), int64, of the training images as they came.
        validation_labels: (V,), int64.
        damaged: (N,), bool: which training images are damaged.
        class_names: C names, in the order of the labels.
    """

    training: Dataset
    validation: Dataset
    labels: Tensor
    validation_labels: Tensor
    damaged: Tensor
    class_names: list[str]


@dataclass(frozen=True)
class Trained:
    """What a training came to: top-1 accuracy in [0, 1], updates, samples visited (repeats counted), seconds."""

    accuracy: float
    updates: int
    visits: int
    seconds: dict[str, float]


# The data


def load(path: Path, *, first_per_class: int | None = None, corrupt: str | None = None) -> Images:
    """Find the images of `train/WNID/` and `val/WNID/`; none is decoded.

    Args:
        path: of the folder with `train` and `val` in it, each with one folder of JPEGs a wnid; any part of the 1,000.
        first_per_class: takes only so many images of each class, the first by name, in training and validation.
        corrupt: `KIND:SEVERITY:SHARE`, damages that share of the training images; always the same, so that all seeds
            share the embeddings.

    Raises:
        ValueError: if a folder is missing or is no wnid of ImageNet, or training and validation differ in classes.
    """
    training, validation = open_split(path, "train"), open_split(path, "val")
    if training.classes != validation.classes:
        odd = sorted(set(training.classes) ^ set(validation.classes))
        raise ValueError(
            f"{path}: train has {len(training.classes)} classes and val has {len(validation.classes)}; {odd[0]}, for "
            "one, is in one of them only. Both need the same wnids."
        )
    names = class_names(training.classes)
    (training, labels), (validation, validation_labels) = (
        first_of_each_class(folder, first_per_class) for folder in (training, validation)
    )
    training, damaged = damage(training, corrupt)
    return Images(training, validation, labels, validation_labels, damaged, names)


def open_split(path: Path, split: str) -> ImageFolder:
    """One half of ImageNet as a data set of (PIL image, label), classes in the order of their wnids."""
    folder = path / split
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: give the folder that holds train/WNID/ and val/WNID/.")
    if not any(child.is_dir() for child in folder.iterdir()):
        raise ValueError(
            f"{folder} holds no folders, but one a wnid is needed, as {folder}/n01440764/. The validation images come "
            "as one flat folder: sort them by their ground truth first."
        )
    try:
        return ImageFolder(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {error}") from None


def class_names(wnids: Sequence[str]) -> list[str]:
    """open_clip's names of these classes of ImageNet.

    >>> class_names(["n01440764", "n02012849", "n03126707"])
    ['tench', 'crane bird', 'construction crane']

    open_clip gives the names by number alone; which wnid has which number, timm knows. Two of open_clip's names stand
    for two classes each: these four have the names of WordNet.

    Raises:
        ValueError: if one is no wnid of ImageNet.
    """
    synsets = ImageNetInfo()
    number = {wnid: index for index, wnid in enumerate(synsets.label_names())}
    strangers = [wnid for wnid in wnids if wnid not in number]
    if strangers:
        raise ValueError(
            f"{strangers[0]!r} is not one of ImageNet's 1,000 wnids ({len(strangers)} of {len(wnids)} folders are "
            "not), so that its name is not known. Name the folders by wnid; for other classes there is `selectsampler "
            "timm-train --select-class-names FILE`."
        )
    uses = Counter(open_clip.IMAGENET_CLASSNAMES)
    names = [open_clip.IMAGENET_CLASSNAMES[number[wnid]] for wnid in wnids]
    return [
        name if uses[name] == 1 else synsets.label_name_to_description(wnid)
        for name, wnid in zip(names, wnids, strict=True)
    ]


class Relabelled(Dataset):
    """Images with these labels in place of their own; timm's `create_loader` sets `transform`."""

    def __init__(self, images: Dataset, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index][0]
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


# Training


class Run:
    """A network in training on what a sampler yields, with all that its next epoch depends on.

    Args:
        data: the images.
        labels: (N,), int64, to train on.
        sampler: of indices of `data.training`.
        protocol: model, length, optimizer, augmentation.
        seed: of the network's start, of augmentation and mixup. The order is the sampler's own.
        workers: processes that decode and augment.
    """

    def __init__(
        self,
        data: Images,
        labels: Tensor,
        sampler: ss.SelectSampler,
        protocol: Protocol,
        *,
        seed: int,
        workers: int,
    ) -> None:
        self.protocol, self.sampler, self.seed = protocol, sampler, seed
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.per_epoch = len(sampler) // protocol.batch_size
        if self.per_epoch == 0:
            raise ValueError(
                f"The selection has {len(sampler)} samples, less than one batch of {protocol.batch_size}: give a "
                "smaller --batch-size."
            )
        self.updates = protocol.count(len(sampler))
        self.epoch, self.seconds = 0, 0.0
        torch.manual_seed(seed)
        classes = len(data.class_names)
        self.model = create_model(protocol, classes).to(self.device, memory_format=torch.channels_last)
        self.network = torch.compile(self.model) if self.device.type == "cuda" else self.model
        self.optimizer, self.schedule = create_optimizer(self.model, protocol, self.updates)
        self.mixup = Mixup(protocol.mixup, protocol.cutmix, label_smoothing=0.0, num_classes=classes)
        self.loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=PRESENT)
        self.loader, self.validation = create_loaders(self.model, data, labels, sampler, protocol, workers)

    @property
    def done(self) -> int:
        """How many updates were made, between epochs."""
        return min(self.epoch * self.per_epoch, self.updates)

    def train_epoch(self, advance: Callable[[], object]) -> None:
        """One pass, or what is left of the updates."""
        start = time.perf_counter()
        seed_everything(self.seed, self.epoch)
        self.sampler.set_epoch(self.epoch)
        self.model.train()
        batches = itertools.islice(self.loader, self.updates - self.done)
        for update, (images, labels) in enumerate(batches, start=self.done + 1):
            images, targets = self.mixup(images, labels)
            with self.mixed_precision():
                logits = self.network(images.contiguous(memory_format=torch.channels_last))
            loss = self.loss(logits.float(), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step_update(update)
            advance()
        self.epoch += 1
        self.seconds += time.perf_counter() - start

    @torch.inference_mode()
    def accuracy(self) -> float:
        """The share of validation images that the network puts into the right class."""
        self.model.eval()
        right = total = 0
        with progress_bar("validate", len(self.validation), unit="batch") as bar:
            for images, labels in self.validation:
                with self.mixed_precision():
                    answers = self.network(images.contiguous(memory_format=torch.channels_last)).argmax(dim=1)
                right += int((answers == labels).sum())
                total += len(labels)
                bar.update()
        return right / total

    def mixed_precision(self) -> torch.autocast:
        """bfloat16 on CUDA, float32 elsewhere."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def save(self, path: Path, setting: dict[str, Any]) -> None:
        """Write all that the next epoch depends on, whole or not at all."""
        state = {
            "setting": setting,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "sampler": self.sampler.state_dict(yielded=len(self.sampler)),  # workers may have read less, or ahead
        }
        with replace_atomically(path) as file:
            torch.save(state, file)

    def load(self, path: Path, setting: dict[str, Any]) -> None:
        """Go on after the epoch that `save` wrote.

        Raises:
            ValueError: if the file is of another setting.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        check_setting(path, state["setting"], setting)
        for name in ("model", "optimizer", "schedule", "sampler"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.seconds = state["epoch"], state["seconds"]


def train(
    data: Images,
    labels: Tensor,
    sampler: ss.SelectSampler,
    protocol: Protocol = QUICK,
    *,
    seed: int,
    workers: int = 0,
    checkpoint: Path | None = None,
    setting: dict[str, Any] | None = None,
    description: str = "train",
) -> Trained:
    """Train a network from scratch on what the sampler yields, in its order, and validate it.

    >>> sampler = ss.SelectSampler(selection, seed=0)                                    # doctest: +SKIP
    >>> train(load(Path("imagenet")), noisy_labels, sampler, Protocol(), seed=0).accuracy  # doctest: +SKIP
    0.78

    Args:
        data, labels, sampler, protocol, seed, workers: as `Run` has them.
        checkpoint: a file that is written after every epoch; if it is there, training goes on from it, on a CPU to the
            very weights of a run that was never stopped.
        setting: JSON values that a checkpoint must have been written with.
        description: beside the progress bar.

    Raises:
        ValueError: if the selection has less than one batch, or the checkpoint is of another setting.
    """
    run = Run(data, labels, sampler, protocol, seed=seed, workers=workers)
    setting = setting or {}
    if checkpoint is not None and checkpoint.exists():
        run.load(checkpoint, setting)
    with progress_bar(description, run.updates, unit="update", initial=run.done) as bar:
        while run.done < run.updates:
            run.train_epoch(bar.update)
            if checkpoint is not None:
                run.save(checkpoint, setting)
    seconds = {"train": run.seconds}
    with timed(seconds, "validate"):
        accuracy = run.accuracy()
    return Trained(accuracy, run.updates, run.updates * protocol.batch_size, seconds)


def create_model(protocol: Protocol, classes: int) -> nn.Module:
    """A network of timm with random weights."""
    size = {"img_size": protocol.train_size} if has_fixed_size(protocol.model) else {}
    try:
        return timm.create_model(protocol.model, num_classes=classes, **size)
    except RuntimeError as error:
        raise ValueError(f"timm has no model {protocol.model!r}: {error}") from None


def has_fixed_size(model: str) -> bool:
    """Whether timm's model takes images of the one size that it was made for."""
    configuration = timm.get_pretrained_cfg(model, allow_unregistered=True)
    return configuration is not None and configuration.fixed_input_size


def create_optimizer(model: nn.Module, protocol: Protocol, updates: int) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimizer, and its schedule, which counts updates."""
    optimizer = create_optimizer_v2(
        model, opt=protocol.optimizer, lr=protocol.learning_rate, weight_decay=protocol.weight_decay
    )
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=updates,
        warmup_epochs=round(protocol.warmup * updates),
        warmup_lr=1e-4,
        min_lr=1e-6,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return optimizer, schedule


def create_loaders(
    model: nn.Module, data: Images, labels: Tensor, sampler: ss.SelectSampler, protocol: Protocol, workers: int
) -> tuple[Any, Any]:
    """timm's loaders of training and validation batches, the former with `sampler`."""
    device = next(model.parameters()).device
    normal = resolve_model_data_config(model)
    options = {
        "batch_size": protocol.batch_size,
        "mean": normal["mean"],
        "std": normal["std"],
        "num_workers": workers,
        "persistent_workers": False,  # so that their random numbers follow from the epoch, after a resume as well
        "pin_memory": device.type == "cuda",
        "device": device,
    }
    training = create_loader(
        Relabelled(data.training, labels),
        input_size=protocol.train_size,
        is_training=True,
        auto_augment=protocol.augmentation,
        interpolation="random",
        **options,
    )
    validation = create_loader(
        Relabelled(data.validation, data.validation_labels),
        input_size=protocol.train_size if has_fixed_size(protocol.model) else protocol.test_size,
        interpolation=normal["interpolation"],
        crop_pct=protocol.crop_pct,
        **options,
    )
    return ss.with_sampler(training, sampler), validation


def seed_everything(seed: int, epoch: int) -> None:
    """Seed all that timm's augmentation, mixup and workers draw from, by (seed, epoch) alone."""
    number = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 - timm's mixup draws from it
    random.seed(number)


# The experiment


def main() -> None:
    """Run what the command line says, and print the table."""
    command("imagenet.py", lambda: table(run(parse_arguments())))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `words` stand for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="the folder with train/WNID/*.JPEG and val/WNID/*.JPEG")
    add("--noise", metavar="KIND:RATE", help="label noise: symmetric, pair or instance")
    add("--keep", default="0.7", help="share of the training set to train on (%(default)s)")
    add("--first-per-class", type=positive, metavar="K", help="take the first K images of each class only")
    add("--model", help="any model of timm (resnet50)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes that decode images (%(default)s)")
    return parse(parser, words, Protocol(), QUICK, quick_per_class=QUICK_PER_CLASS)


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """`QUICK` or the usual one, with what the command line changes."""
    protocol = with_arguments(QUICK if arguments.quick else Protocol(), arguments)
    if protocol.batch_size % 2:
        raise ValueError(f"--batch-size is {protocol.batch_size}, but mixup pairs images: it must be even.")
    return protocol


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do every run that the report lacks, and return the report."""
    experiment = ImageNetExperiment(arguments, protocol_of(arguments))
    report = open_report(arguments.report, experiment.setting, packages=(torch, timm, ss))
    create_model(experiment.protocol, len(experiment.class_names))  # says what is wrong with its name
    return complete(report, arguments, experiment.run, prepare=experiment.prepare)


class ImageNetExperiment(Experiment):
    """The images of one command line, and networks trained on parts of them, each to be gone on with."""

    def __init__(self, arguments: argparse.Namespace, protocol: Protocol) -> None:
        data = load(arguments.data, first_per_class=arguments.first_per_class, corrupt=arguments.corrupt)
        super().__init__(
            arguments,
            data.training,
            data.labels,
            data.damaged,
            data.class_names,
            batch_size=protocol.batch_size,
            workers=arguments.workers,
        )
        self.data, self.protocol = data, protocol
        self.setting = setting_of(arguments) | {"images": len(data.labels), **asdict(protocol)}

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Choose, train and validate: a row of the report."""
        labels = self.labels(seed)
        folder, setting = self.folder(method, seed), {**self.setting, "method": method, "seed": seed}
        selection = self.select(method, labels, folder, setting)
        trained = train(
            self.data,
            labels,
            ss.SelectSampler(selection, seed=seed),
            self.protocol,
            seed=seed,
            workers=self.workers,
            checkpoint=None if folder is None else folder / "last.pt",
            setting=setting,
            description=f"{method}, seed {seed}",
        )
        return {
            "method": method,
            "seed": seed,
            "accuracy": trained.accuracy,
            **self.composition(selection.indices, labels),
            "updates": trained.updates,
            "visits": trained.visits,
            "seconds": selection.provenance["seconds"] | trained.seconds,
        }

    def folder(self, method: str, seed: int) -> Path | None:
        """Where a run keeps its selection and checkpoint: beside the report, if there is one."""
        report = self.arguments.report
        return None if report is None else report.with_name(f"{report.stem}-runs") / f"{method}-{seed}"

    def select(self, method: str, labels: Tensor, folder: Path | None, setting: dict[str, Any]) -> ss.Selection:
        """What a method chooses; what an interrupted run chose already is chosen no second time."""
        path = None if folder is None else folder / "selection.safetensors"
        if path is not None and path.exists():
            selection = ss.Selection.load(path)
            check_setting(path, selection.provenance["setting"], setting)
            return selection
        indices, seconds = self.choose(method, labels, setting["seed"])
        selection = ss.Selection(indices, len(labels), provenance={"setting": setting, "seconds": seconds})
        if path is not None:
            selection.save(path)
        return selection


def table(report: dict[str, Any]) -> str:
    """The report as a person reads it: a line a method, and images a second of each stage."""
    setting = report["setting"]
    images, model = f"{setting['images']:,} images", f"{setting['model']} at {setting['train_size']}"
    text = accuracy_table(report, data=images, model=model, accuracy="top-1")
    return f"{text}\n\nimages a second: {stage_rates(report)}"


def stage_rates(report: dict[str, Any]) -> str:
    """How many images a second each stage did, median of the runs."""
    rates: dict[str, list[float]] = {}
    for row in report["runs"]:
        for stage, took in row["seconds"].items():
            images = row["visits"] if stage == "train" else report["setting"]["images"]
            if stage != "validate" and took > 0:
                rates.setdefault(stage, []).append(images / took)
    return ", ".join(f"{stage} {np.median(values):,.0f}" for stage, values in rates.items())


if __name__ == "__main__":
    main()
