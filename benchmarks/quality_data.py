"""What quality.py trains on: digits in seconds, the half of CIFAR-10 that its CLIP has not seen in half a minute.

A setting is `none`, label noise (`symmetric:0.4`, `asymmetric:0.4`) or damaged images (`fog:3:0.2`: kind, severity,
share). Seconds are those of the processor, so that other work on the machine does not count, but on a GPU the clock's.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from selectsampler.recipes import cifar, digits
from selectsampler.recipes.corruptions import PAPER_KINDS
from torch import Tensor, nn
from torch.utils.data import Subset

import selectsampler as ss

__all__ = ["CIFAR", "DIGITS", "CifarHalf", "Digits", "Proxies", "clock", "is_damage"]

clock: Callable[[], float] = time.perf_counter if torch.cuda.is_available() else time.process_time


@dataclass(frozen=True)
class Proxies:
    """How long the networks are trained that EL2N, forgetting and CCS look at, in epochs of everything."""

    networks: int = 3  # of EL2N
    early: int = 2  # epochs of these, as they are asked before they fit all
    whole: int = 6  # epochs of the one whose training is watched


DIGITS = cifar.Protocol(model="digits_network", updates=150, batch_size=64, learning_rate=0.05, schedule="one_cycle")
CIFAR = replace(cifar.QUICK, updates=1000)  # with 300, easy samples win even where all labels are right


class Digits:
    """800 of scikit-learn's digits with the CLIP of the demo, which has seen 599 others; 398 to test on."""

    name = "digits"
    settings = ("none", "symmetric:0.2", "symmetric:0.4", "symmetric:0.6")
    protocol = DIGITS
    proxies = Proxies(early=3, whole=12)
    experiment: ClassVar[dict[str, Any]] = {"data": "digits", "protocol": asdict(DIGITS)}

    def __init__(self) -> None:
        pretrain, self.training, test = digits.load_splits()
        self.clip = digits.pretrain_clip(pretrain)
        self.pixels, self.test_pixels = (
            torch.from_numpy(part.images).float()[:, None] / 127.5 - 1 for part in (self.training, test)
        )
        self.truth, self.test_labels = self.training.targets, test.targets
        self.damaged = torch.zeros(len(self.truth), dtype=torch.bool)
        self.embed_seconds = 0.0

    def with_damage(self, kind: str | None) -> "Digits":
        """Itself: digits are not damaged here."""
        if kind is not None:
            raise ValueError(f"Digits of 8 x 8 pixels are not damaged: there is no setting {kind!r}.")
        return self

    @cached_property
    def embeddings(self) -> ss.Embeddings:
        """Of all, with the true labels."""
        start = clock()
        embeddings = ss.embed(self.training, self.clip, class_names=digits.NAMES)
        self.embed_seconds = clock() - start
        return embeddings

    def train(
        self, labels: Tensor, sampler: ss.SelectSampler, updates: int, *, seed: int, **hooks: Any
    ) -> tuple[nn.Module, float]:
        """A network trained on what the sampler yields, and its test accuracy in [0, 1]."""
        torch.manual_seed(seed)
        model = digits_network()
        protocol = replace(DIGITS, updates=updates)
        cifar.fit(model, lambda rows: self.pixels[rows], labels, sampler, protocol, **hooks)
        answers = logits(model, self.test_pixels).argmax(dim=1)
        return model, float((answers == self.test_labels).float().mean())

    def logits(self, model: nn.Module) -> Tensor:
        """(N, C), float32: what the network says of all samples to select from."""
        return logits(model, self.pixels)


def digits_network() -> nn.Module:
    """Two convolutions and a linear layer (0.02 M parameters): 150 updates of 64 take half a second."""
    return nn.Sequential(
        cifar.convolution(1, 32),
        nn.MaxPool2d(2),
        cifar.convolution(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 2 * 2, len(digits.NAMES)),
    )


@torch.inference_mode()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """(N, C), float32, of a network at rest."""
    return model.eval()(pixels)


class CifarHalf:
    """The first 2,500 CIFAR-10 images of each class: the CLIP of the committed results was pretrained on the others."""

    name = "cifar"
    settings = (
        *("none", "symmetric:0.2", "symmetric:0.4", "asymmetric:0.4"),
        *(f"{kind}:3:0.2" for kind in PAPER_KINDS),
    )
    protocol = CIFAR
    proxies = Proxies()

    def __init__(self, arguments: argparse.Namespace, damage: str | None = None) -> None:
        self.arguments = arguments
        data, self.damaged = cifar.load(arguments.data, first_per_class=arguments.per_class, corrupt=damage)
        self.data = data.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.truth = data.labels
        self.images = cifar.Pixels(data)
        clip = str(arguments.clip)  # wherever it lies
        if clip.startswith("local-dir:"):
            clip = f"local-dir:{Path(clip).name}"
        made_of = {"data": arguments.data.name, "per_class": arguments.per_class, "clip": clip}
        self.experiment = made_of | {"protocol": asdict(CIFAR)}

    def with_damage(self, kind: str | None) -> "CifarHalf":
        """The same images, some of them damaged; itself for None."""
        return self if kind is None else CifarHalf(self.arguments, kind)

    @cached_property
    def embeddings(self) -> ss.Embeddings:
        """Of all, with the true labels."""
        return self.embed(self.images, cache_dir=self.arguments.cache_dir)

    def embed(self, images: Any, *, cache_dir: Path | None = None) -> ss.Embeddings:
        """Of these images, by the CLIP of the command line."""
        return ss.embed(images, self.arguments.clip, class_names=self.images.classes, cache_dir=cache_dir)

    @cached_property
    def embed_seconds(self) -> float:
        """What embedding all takes without a cache, from two parts of it, as opening the CLIP takes time too."""
        few, many = len(self.truth) // 20, len(self.truth) // 10
        took = []
        for size in (few, many):
            start = clock()
            self.embed(Subset(self.images, range(size)))
            took.append(clock() - start)
        return (took[1] - took[0]) * len(self.truth) / (many - few)

    def train(
        self, labels: Tensor, sampler: ss.SelectSampler, updates: int, *, seed: int, **hooks: Any
    ) -> tuple[nn.Module, float]:
        """A network trained on what the sampler yields, and its test accuracy in [0, 1]."""
        trained = cifar.train(self.data, labels, sampler, replace(CIFAR, updates=updates), seed=seed, **hooks)
        return trained.model, trained.accuracy

    def logits(self, model: nn.Module) -> Tensor:
        """(N, C), float32: what the network says of all samples to select from."""
        return cifar.logits_of(model, self.data.images).cpu()


def is_damage(setting: str) -> bool:
    """Whether a setting damages images; else it changes labels, or nothing."""
    return setting.count(":") == 2
