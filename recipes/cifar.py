"""Train on the part of CIFAR that CLIP trusts.

python recipes/cifar.py --data cifar10.zip --clip ViT-B-32/openai --noise symmetric:0.4 --keep 0.5
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

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
    """What a training came to: test accuracy in [0, 1], updates, samples visited (repeats counted), seconds."""

    accuracy: float
    updates: int
    visits: int
    seconds: float


def train(
    data: Cifar,
    labels: Tensor,
    sampler: ss.SelectSampler,
    protocol: Protocol = QUICK,
    *,
    seed: int,
    on_epoch_start: Callable[[int], None] | None = None,
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
        data: on the device that shall train; mixed precision and `torch.compile` are used on CUDA only.
        labels: (N,), int64, to train on.
        sampler: of indices of `data.images`; an epoch gives as many whole batches as it holds.
        protocol: model, length and optimizer.
        seed: of the network's start and of crops and flips. The order is the sampler's own.
        on_epoch_start: called with the epoch's number before each; by default `sampler.set_epoch`.
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
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.0, momentum=protocol.momentum, weight_decay=protocol.weight_decay, nesterov=True
    )
    updates = protocol.count(len(sampler))
    augmentation = torch.Generator().manual_seed(seed)
    labels = labels.to(device)
    model.train()
    with progress_bar(description, updates, unit="update") as bar:
        for step, indices in enumerate(batches(sampler, updates, protocol.batch_size, on_epoch_start)):
            optimizer.param_groups[0]["lr"] = protocol.rate(step / updates)
            rows = indices.to(device)
            pixels = as_input(crop_and_flip(data.images[rows], augmentation))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(pixels)
            losses = cross_entropy(logits.float(), labels[rows], reduction="none")
            losses = losses if on_losses is None else on_losses(indices, losses)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            bar.update()
    accuracy = test(model, data.test_images, data.test_labels)
    return Trained(accuracy, updates, updates * protocol.batch_size, time.perf_counter() - start)


def batches(
    sampler: ss.SelectSampler, count: int, batch_size: int, on_epoch_start: Callable[[int], None] | None = None
) -> Iterator[Tensor]:
    """`count` batches of indices, (batch_size,), epoch after epoch; a shorter last batch of an epoch is dropped."""
    epoch = 0
    while count > 0:
        (on_epoch_start or sampler.set_epoch)(epoch)
        whole = len(sampler) // batch_size
        if whole == 0:
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
def test(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the network puts into the right class."""
    model.eval()
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.device.type == "cuda"):
        answers = [model(as_input(batch)).argmax(dim=1) for batch in images.split(500)]
    return float((torch.cat(answers) == labels).float().mean())


def create_model(name: str, classes: int) -> nn.Module:
    """A network with random weights, by the names of `Protocol.model`."""
    if name == "quick_resnet":
        return quick_resnet(classes)
    model = timm.create_model(name.removesuffix("_cifar"), num_classes=classes)
    if name.endswith("_cifar"):  # made for 224 x 224: the stem would shrink 32 x 32 to 8 x 8
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def quick_resnet(classes: int) -> nn.Module:
    """A residual network for 32 x 32 pixels of 0.46 M parameters that trains 1,400 images a second on one CPU core."""
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
