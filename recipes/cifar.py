"""Train on the part of CIFAR that CLIP trusts, beside all of it, a random part, and a part whose labels are right.

    python recipes/cifar.py --data cifar10.zip --clip ViT-B-32/openai --noise symmetric:0.4 --keep 0.5

That is the field's protocol: a ResNet-18 for 32 x 32 pixels, 200 epochs of each method's own selection in batches of
128, SGD at 0.1 with Nesterov momentum 0.9 and weight decay 5e-4, times 0.2 at epochs 60, 120 and 160, crop and flip;
bfloat16 and torch.compile on a GPU. It was not run to its end here: there was no GPU.

`--quick` is for two cores: the first 2,500 images of each class, a network of 0.46 M parameters, and 500 updates of 128
for every method, so that all visit as many samples. Run once (seed 0) with `--noise symmetric:0.4 --keep 0.5` and a
small CLIP pretrained on the other half of CIFAR-10, on one of an Intel Xeon's two cores (torch 2.14.1, in float32;
other work ran on the other), it took 6 minutes and 20 seconds (benchmarks/results/cifar-quick.json):

    trained on     test accuracy  wrong labels  samples  select    train
    full                 54.22 %        40.0 %    25000     0.0 s    95.0 s
    random               53.24 %        40.3 %    12500     0.0 s    68.0 s
    ours                 71.46 %         2.8 %    12500    70.2 s    68.2 s
    oracle               70.58 %         0.0 %    12500     0.0 s    70.7 s

`select` is embedding (56.1 s), scoring (14.0 s) and selecting. The oracle draws among right labels. One seed cannot
tell ours from the oracle.
Every seed draws its own noise, subset, network and order; damage is the same for all. With `--report FILE.json` a run
that was interrupted goes on with what is missing.
"""

import argparse
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from selectsampler.recipes.data import ZippedImageFolder
from selectsampler.recipes.experiment import (
    Experiment,
    accuracy_table,
    command,
    complete,
    damage,
    first_of_each_class,
    open_report,
    parse,
    positive,
    setting_of,
    with_arguments,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

import selectsampler as ss
from selectsampler.progress import progress_bar

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's pixels
SHIFT = 4  # pixels by which a crop may be off centre

Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Protocol:
    """How a network is trained. The defaults are what the field compares CIFAR selections with.

    Args:
        model: `quick_resnet`, `resnet18_cifar`, `resnet50_cifar` (timm's with a 3 x 3 stem of stride 1 and without
            max-pooling) or any name of timm.
        epochs: passes through the selection, in batches of `batch_size`; a shorter last batch is dropped.
        updates: the number of updates instead of epochs, so that subsets of every size are trained equally long.
        batch_size, learning_rate, momentum, weight_decay: of SGD with Nesterov's momentum.
        schedule: `steps` multiplies the learning rate by 0.2 after 30, 60 and 80 % of the updates (epochs 60, 120 and
            160 of 200); `one_cycle` raises it over the first fifth and lowers it to zero, both linearly.
    """

    model: str = "resnet18_cifar"
    epochs: int = 200
    updates: int | None = None
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "steps"

    def count(self, samples: int) -> int:
        """How many updates training on so many samples takes."""
        return self.epochs * (samples // self.batch_size) if self.updates is None else self.updates

    def rate(self, progress: float) -> float:
        """The learning rate when this share of the updates is done, from 0 to 1."""
        if self.schedule == "steps":
            return self.learning_rate * 0.2 ** sum(progress >= milestone for milestone in (0.3, 0.6, 0.8))
        return self.learning_rate * min(progress / 0.2, (1 - progress) / 0.8)


QUICK_PER_CLASS = 2500
QUICK = Protocol(model="quick_resnet", updates=500, learning_rate=0.4, schedule="one_cycle")


@dataclass(frozen=True, eq=False)
class Cifar:
    """Images decoded once and kept on one device.

    Args:
        images: (N, H, W, 3), uint8, to select from and train on.
        labels: (N,), int64, as they came.
        test_images: (T, H, W, 3), uint8.
        test_labels: (T,), int64.
        class_names: C names.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: list[str]

    def to(self, device: torch.device) -> "Cifar":
        """The same on another device."""
        tensors = (self.images, self.labels, self.test_images, self.test_labels)
        return Cifar(*(tensor.to(device) for tensor in tensors), self.class_names)


@dataclass(frozen=True)
class Trained:
    """What a training came to: test accuracy in [0, 1], updates, visits (repeats counted), seconds, network."""

    accuracy: float
    updates: int
    visits: int
    seconds: float
    model: nn.Module


def load(path: Path, *, first_per_class: int | None = None, corrupt: str | None = None) -> tuple[Cifar, Tensor]:
    """Decode torchvision's CIFAR folder, an image folder with `train` and `test` in it, or a zip of one.

    Args:
        path: of the folder or zip.
        first_per_class: takes only so many training images of each class, the first in the data set's order.
        corrupt: `KIND:SEVERITY:SHARE`, damages that share of the training images; always the same, so that all seeds
            share the embeddings.

    Returns:
        The data, and (N,), bool: which training images are damaged.

    Raises:
        ValueError: if there is nothing of the kind at `path`, or the images are not all of one size.
    """
    training, test = open_splits(path)
    if list(training.classes) != list(test.classes):
        odd = sorted(set(training.classes) ^ set(test.classes))
        raise ValueError(
            f"{path}: {odd[0]!r}, for one, is a class of training or test only. Both need the same classes."
        )
    training, _ = first_of_each_class(training, first_per_class)
    training, damaged = damage(training, corrupt)
    return Cifar(*decode(training), *decode(test), list(test.classes)), damaged


def open_splits(path: Path) -> tuple[Any, Any]:
    """Training and test set, as data sets of (PIL image, label)."""
    if path.is_file():
        return zipped_splits(path)
    for kind in (CIFAR10, CIFAR100):
        if (path / kind.base_folder).is_dir():
            try:
                return kind(path, train=True), kind(path, train=False)
            except RuntimeError as error:
                raise ValueError(f"{path / kind.base_folder}: {error} Download it again.") from None
    if (path / "train").is_dir() and (path / "test").is_dir():
        return ImageFolder(path / "train"), ImageFolder(path / "test")
    raise ValueError(
        f"{path} holds no CIFAR: give the folder that torchvision downloads to, or a folder or zip with train/CLASS/ "
        "and test/CLASS/ in it."
    )


def zipped_splits(path: Path) -> tuple[Any, Any]:
    """Training and test set in a zip of an image folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(name) for name in archive.namelist() if not name.startswith("__MACOSX/")]
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is no zip file: unpack other archives, and give the folder.") from None
    folders = {name.parents[1] for name in names if len(name.parents) > 2 and name.parents[1].name in ("train", "test")}
    roots = [folder for split in ("train", "test") for folder in folders if folder.name == split]
    if [root.name for root in roots] != ["train", "test"]:
        found = ", ".join(sorted(map(str, folders))) or "none"
        raise ValueError(f"{path} must hold one folder train/CLASS/ and one test/CLASS/, but of such it holds {found}.")
    training, test = (ZippedImageFolder(path, str(root), accept=not_hidden) for root in roots)
    return training, test


def not_hidden(name: str) -> bool:
    """Whether a file is an image and not what macOS keeps beside it."""
    return not Path(name).name.startswith(".")


def decode(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """All images, (N, H, W, 3), uint8, and labels, (N,), int64."""
    pairs = [dataset[index] for index in range(len(dataset))]
    images = [np.asarray(image) for image, _ in pairs]
    if len({image.shape for image in images}) > 1:
        raise ValueError("The images differ in size, but a batch needs one: CIFAR's are all 32 x 32.")
    return torch.from_numpy(np.stack(images)), torch.tensor([label for _, label in pairs])


class Pixels(Dataset):
    """Decoded images as a data set of (PIL image, label), as `ss.embed` takes it."""

    def __init__(self, data: Cifar) -> None:
        self.data = data.images.numpy()
        self.targets = data.labels
        self.classes = data.class_names
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), int(self.targets[index])


def train(
    data: Cifar,
    labels: Tensor,
    sampler: ss.SelectSampler,
    protocol: Protocol = QUICK,
    *,
    seed: int,
    on_epoch_start: Callable[[int], None] | None = None,
    on_logits: Callable[[Tensor, Tensor], None] | None = None,
    on_losses: Losses | None = None,
    description: str = "train",
) -> Trained:
    """Train a network from scratch on what the sampler yields, in its order, and test it.

    >>> sampler = ss.SelectSampler(selection, seed=0)                                    # doctest: +SKIP
    >>> train(data, noisy_labels, sampler, QUICK, seed=0).accuracy                       # doctest: +SKIP
    0.71

    With a selection that follows the training:

    >>> losses = ss.LossTracker(len(noisy_labels))                                       # doctest: +SKIP
    >>> reselect = ss.Reselect(sampler, select_fn, losses=losses, allow_resize=True)     # doctest: +SKIP
    >>> def on_losses(indices, values):
    ...     losses.update(indices, values)
    ...     return values * sampler.selection.weights_for(indices)
    >>> train(data, noisy_labels, sampler, seed=0, on_epoch_start=reselect.on_epoch_start, on_losses=on_losses)
    ... # doctest: +SKIP

    Args:
        data: on the device that shall train; `torch.compile` is used on CUDA only, bfloat16 where it is fast.
        labels: (N,), int64, to train on.
        sampler: of indices of `data.images`; an epoch gives as many whole batches as it holds.
        protocol: model, length and optimizer.
        seed: of the network's start and of crops and flips. The order is the sampler's own.
        on_epoch_start: called with the epoch's number before each; by default `sampler.set_epoch`.
        on_logits: called with the indices (B,) and logits (B, C) of every batch before its update, on the CPU.
        on_losses: called with the indices (B,) on the CPU and the losses (B,) of every batch; what it returns is
            averaged and minimised.
        description: beside the progress bar.
    """
    start = time.perf_counter()
    device = data.images.device
    torch.manual_seed(seed)
    model = create_model(protocol.model, len(data.class_names)).to(device, memory_format=torch.channels_last)
    if device.type == "cuda":
        model = torch.compile(model)
    augmentation = torch.Generator().manual_seed(seed)
    updates = fit(
        model,
        lambda rows: as_input(crop_and_flip(data.images[rows], augmentation)),
        labels.to(device),
        sampler,
        protocol,
        on_epoch_start=on_epoch_start,
        on_logits=on_logits,
        on_losses=on_losses,
        description=description,
    )
    accuracy = float((logits_of(model, data.test_images).argmax(dim=1) == data.test_labels).float().mean())
    return Trained(accuracy, updates, updates * protocol.batch_size, time.perf_counter() - start, model)


def fit(
    model: nn.Module,
    inputs: Callable[[Tensor], Tensor],
    labels: Tensor,
    sampler: ss.SelectSampler,
    protocol: Protocol,
    *,
    on_epoch_start: Callable[[int], None] | None = None,
    on_logits: Callable[[Tensor, Tensor], None] | None = None,
    on_losses: Losses | None = None,
    description: str = "train",
) -> int:
    """Train any network by a protocol, and return the number of updates.

    Args:
        model: on the device of `labels`; trained in place.
        inputs: what the network sees of these rows (B,) of the data set, augmented as it may be.
        labels: (N,), int64.
        sampler, protocol, on_epoch_start, on_logits, on_losses, description: as `train` takes them.
    """
    device = labels.device
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=protocol.momentum, weight_decay=protocol.weight_decay, nesterov=True
    )
    updates = protocol.count(len(sampler))
    if len(sampler) < protocol.batch_size or updates < 1:
        raise ValueError(
            f"The selection has {len(sampler)} samples, less than one batch of {protocol.batch_size}: give a smaller "
            "--batch-size."
        )
    model.train()
    with progress_bar(description, updates, unit="update") as bar:
        for step, indices in enumerate(batches(sampler, updates, protocol.batch_size, on_epoch_start)):
            optimizer.param_groups[0]["lr"] = protocol.rate(step / updates)
            rows = indices.to(device)
            with mixed_precision(device):
                logits = model(inputs(rows))
            if on_logits is not None:
                on_logits(indices, logits.detach().float().cpu())
            losses = cross_entropy(logits.float(), labels[rows], reduction="none")
            losses = losses if on_losses is None else on_losses(indices, losses)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            bar.update()
    return updates


def mixed_precision(device: torch.device) -> torch.autocast:
    """Autocast to `fastest_precision`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=fastest_precision(device) == torch.bfloat16)


def fastest_precision(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU that multiplies it faster than float32.

    One thread of an AMD EPYC with avx512_bf16 trains `quick_resnet` 1.55 times as fast by it (300 updates: 22.6 s of
    the processor in place of 35.3 s), to the same accuracy: 47.1, 62.3 and 47.3 % in place of 47.4, 62.3 and 47.0 %.
    An Intel Xeon needs AMX for that: with avx512_bf16 alone it is 0.65 times as fast (190 ms an update, not 124).
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    by_vectors = known.get("avx512_bf16") and "Intel" not in known.get("cpu_name", "")
    fast = device.type == "cuda" or known.get("amx_bf16") or by_vectors
    return torch.bfloat16 if fast else torch.float32


def batches(
    sampler: ss.SelectSampler, count: int, batch_size: int, on_epoch_start: Callable[[int], None] | None = None
) -> Iterator[Tensor]:
    """`count` batches of indices, (batch_size,), epoch after epoch; a shorter last batch of an epoch is dropped."""
    epoch = 0
    while count > 0:
        (on_epoch_start or sampler.set_epoch)(epoch)
        whole = len(sampler) // batch_size
        if whole == 0:  # a selection that changed while the network trained
            raise ValueError(f"The selection has {len(sampler)} samples, less than one batch of {batch_size}.")
        yield from torch.tensor(list(sampler)).split(batch_size)[: min(whole, count)]
        count -= whole
        epoch += 1


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels each way, black where nothing was, and mirrored half of the time.

    Args:
        images: (B, H, W, 3), uint8.
        generator: on the CPU, so that every device augments alike.
    """
    count, height, width, _ = images.shape
    shift = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    rows = (torch.arange(height) + shift[0]).to(images.device)
    columns = (torch.where(mirrored, width - 1 - columns, columns) + shift[1]).to(images.device)
    padded = pad(images, (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
    return padded[torch.arange(count, device=images.device)[:, None, None], rows[:, :, None], columns[:, None]]


def as_input(images: Tensor) -> Tensor:
    """(B, 3, H, W), float32, normalised and channels last in memory, of (B, H, W, 3), uint8."""
    mean, std = (torch.tensor(values, device=images.device) for values in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


@torch.inference_mode()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the network says of images (N, H, W, 3), uint8, as they are: (N, C), float32."""
    model.eval()
    with mixed_precision(images.device):
        return torch.cat([model(as_input(batch)).float() for batch in images.split(500)])


def create_model(name: str, classes: int) -> nn.Module:
    """A network with random weights, by the names of `Protocol.model`."""
    if name == "quick_resnet":
        return quick_resnet(classes)
    timm_name, small = name.removesuffix("_cifar"), name.endswith("_cifar")
    try:
        model = timm.create_model(timm_name, num_classes=classes)
        if model.pretrained_cfg.get("fixed_input_size", False):
            model = timm.create_model(timm_name, num_classes=classes, img_size=32)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"timm has no model {timm_name!r} for 32 x 32 pixels: {error}") from None
    if not small:
        return model
    if not hasattr(model, "conv1") or not hasattr(model, "maxpool"):
        raise ValueError(f"{name!r}: only ResNets have a form for 32 x 32 pixels; give {timm_name!r} as it is.")
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # made for 224 x 224: the stem would shrink 32 to 8
    model.maxpool = nn.Identity()
    return model


def quick_resnet(classes: int) -> nn.Module:
    """A residual network for 32 x 32 pixels of 0.46 M parameters: a CPU core trains 1,100 to 2,000 images a second."""
    return nn.Sequential(
        convolution(3, 32, kernel=4, stride=2),
        convolution(32, 64),
        nn.MaxPool2d(2),
        Residual(convolution(64, 64), convolution(64, 64)),
        convolution(64, 128),
        nn.MaxPool2d(2),
        Residual(convolution(128, 128), convolution(128, 128)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        Calm(128, classes),
    )


def convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Module:
    """A convolution with batch normalisation and ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Residual(nn.Sequential):
    """Adds what its layers make of the input to the input."""

    def forward(self, features: Tensor) -> Tensor:
        return features + super().forward(features)


class Calm(nn.Linear):
    """A linear layer whose output, and so its gradient, is divided by 8: a high learning rate does not upset it."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) / 8


def main() -> None:
    """Run what the command line says, and print the table."""
    command("cifar.py", lambda: table(run(parse_arguments())))


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `words` stand for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="torchvision's CIFAR folder, an image folder, or a zip of one")
    add("--noise", metavar="KIND:RATE", help="label noise: symmetric, asymmetric, pair, instance; human:FILE:KIND")
    add("--keep", default="0.5", help="share of the training set to train on (%(default)s)")
    add(
        "--first-per-class",
        type=positive,
        metavar="K",
        help="take the first K training images of each class only, as a pool that the CLIP was not pretrained on",
    )
    add("--model", help="resnet18_cifar (the default), resnet50_cifar, quick_resnet, or any model of timm")
    return parse(parser, words, Protocol(), QUICK, quick_per_class=QUICK_PER_CLASS)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Do every run that the report lacks, and return the report."""
    protocol = with_arguments(QUICK if arguments.quick else Protocol(), arguments)
    experiment = CifarExperiment(arguments, protocol)
    report = open_report(arguments.report, experiment.setting, packages=(torch, ss))
    create_model(protocol.model, len(experiment.class_names))  # says what is wrong with its name
    return complete(report, arguments, experiment.run, prepare=experiment.prepare)


class CifarExperiment(Experiment):
    """The data set of one command line, decoded once, and networks trained on parts of it."""

    def __init__(self, arguments: argparse.Namespace, protocol: Protocol) -> None:
        data, damaged = load(arguments.data, first_per_class=arguments.first_per_class, corrupt=arguments.corrupt)
        super().__init__(
            arguments, Pixels(data), data.labels, damaged, data.class_names, batch_size=protocol.batch_size
        )
        self.protocol = protocol
        self.setting = setting_of(arguments) | asdict(protocol)
        self.on_device = data.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def noise_features(self) -> Tensor:
        """(N, S), float32: standardised pixels, as the paper of part-dependent noise takes them."""
        return as_input(self.on_device.images.cpu()).flatten(1)

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """Choose, train and test: a row of the report."""
        labels = self.labels(seed)
        indices, seconds = self.choose(method, labels, seed)
        sampler = ss.SelectSampler(indices, seed=seed)
        trained = train(self.on_device, labels, sampler, self.protocol, seed=seed, description=f"{method}, seed {seed}")
        return {
            "method": method,
            "seed": seed,
            "accuracy": trained.accuracy,
            **self.composition(indices, labels),
            "updates": trained.updates,
            "visits": trained.visits,
            "seconds": seconds | {"train": trained.seconds},
        }


def table(report: dict[str, Any]) -> str:
    """The report as a person reads it: a line a method, and what selecting took."""
    setting = report["setting"]
    text = accuracy_table(report, data=setting["data"], model=setting["model"], accuracy="test accuracy")
    for method in dict.fromkeys(row["method"] for row in report["runs"]):
        own = [row["seconds"] for row in report["runs"] if row["method"] == method]
        stages = [stage for stage in own[0] if stage != "train"]
        if stages:
            took = ", ".join(f"{stage} {np.mean([each[stage] for each in own]):.1f} s" for stage in stages)
            text += f"\n\nselecting by {method}: {took}"
    return text


if __name__ == "__main__":
    main()
