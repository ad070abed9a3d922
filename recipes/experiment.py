"""What the CIFAR and ImageNet recipes share: which methods choose what to train on, and the report of their runs.

A recipe brings the data, the network's training and its `Protocol`; it makes an `Experiment` of one command line and
lets `complete` do the runs that the report lacks.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from selectsampler.recipes import noise
from selectsampler.recipes.corruptions import Corrupted
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset, Subset

import selectsampler as ss
from selectsampler.store import replace_atomically
from selectsampler.validation import resolve_budget

Protocol = TypeVar("Protocol")  # a recipe's own: a frozen dataclass with what `with_arguments` may change


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method chooses from.

    Args:
        embeddings: gives the embeddings with the labels as they are, noise included.
        right: (N,), bool: the label is right and the image undamaged; for the oracle alone.
        keep: the share of samples to choose.
        seed: of the choice.
        seconds: where stages note how long they took.
    """

    embeddings: Callable[[], ss.Embeddings]
    right: Tensor
    keep: str
    seed: int
    seconds: dict[str, float]

    @property
    def order(self) -> Tensor:
        """All samples, shuffled."""
        return torch.from_numpy(np.random.default_rng([self.seed, 1]).permutation(len(self.right)))

    @property
    def count(self) -> int:
        """How many samples to choose."""
        return resolve_budget(self.keep, None, len(self.right))


def chosen_by(preset: dict[str, dict[str, Any]]) -> Callable[[Setting], Tensor]:
    """A method that adapts, scores and selects with these arguments, each step timed."""

    def choose(setting: Setting) -> Tensor:
        embeddings = setting.embeddings()
        with timed(setting.seconds, "adapt"):
            adapted = ss.adapt(embeddings, seed=setting.seed, **preset["adapt"])
        with timed(setting.seconds, "score"):
            scores = ss.score(adapted, **preset["score"])
        with timed(setting.seconds, "select"):
            return ss.select(scores, setting.keep, seed=setting.seed, **preset["select"]).indices

    return choose


METHODS: dict[str, Callable[[Setting], Tensor]] = {
    "full": lambda setting: torch.arange(len(setting.right)),
    "random": lambda setting: setting.order[: setting.count],
    "ours": chosen_by(ss.presets.default),
    "paper": chosen_by(ss.presets.paper),
    "oracle": lambda setting: setting.order[setting.right[setting.order]][: setting.count],
}


LOOKING = {"ours", "paper"}  # methods that choose by the embeddings


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note the seconds that a stage takes."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


# The data


def first_of_each_class(folder: Any, per_class: int | None) -> tuple[Dataset, Tensor]:
    """The first images of each class, in the data set's order, or all for None; and their labels, (N,), int64."""
    labels = np.array(folder.targets)
    if per_class is None:
        return folder, torch.from_numpy(labels)
    rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]))
    return Subset(folder, rows.tolist()), torch.from_numpy(labels[rows])


def damage(images: Dataset, spec: str | None) -> tuple[Dataset, Tensor]:
    """Damage a share of the images, always the same ones, so that all seeds share the embeddings.

    >>> damage([(image, 0)] * 10, "fog:3:0.2")[1].sum()                # doctest: +SKIP
    tensor(2)

    Args:
        images: N (PIL image, label).
        spec: `KIND:SEVERITY:SHARE`, as `Corrupted` takes them; None damages nothing.

    Returns:
        The data set, and (N,), bool: which images are damaged.

    Raises:
        ValueError: if `spec` cannot be read, or names no damage that there is.
    """
    if spec is None:
        return images, torch.zeros(len(images), dtype=torch.bool)
    try:
        kind, severity, share = spec.split(":")
        options = {"kind": kind, "severity": int(severity), "share": float(share)}
    except ValueError:
        raise ValueError(f"{spec!r} is no corruption: write KIND:SEVERITY:SHARE, as fog:3:0.2.") from None
    corrupted = Corrupted(images, **options, seed=0)
    return corrupted, torch.tensor([kind is not None for kind in corrupted.kinds])


class Experiment:
    """The data set of one command line with its noise and damage, embedded once it is needed.

    Args:
        arguments: as `parse` gives them.
        images: data set of (PIL image, label), as `ss.embed` takes it.
        truth: (N,), int64: the labels as they came.
        damaged: (N,), bool: which images are damaged.
        class_names: C names.
        batch_size: of the training.
        workers: processes that decode images for `ss.embed`.

    Raises:
        ValueError: if the noise, the share to keep, the batch size or the lack of --clip does not fit the data, before
            anything is embedded or trained.
    """

    def __init__(
        self,
        arguments: argparse.Namespace,
        images: Dataset,
        truth: Tensor,
        damaged: Tensor,
        class_names: list[str],
        *,
        batch_size: int,
        workers: int = 0,
    ) -> None:
        self.arguments, self.images, self.workers = arguments, images, workers
        self.truth, self.damaged, self.class_names = truth, damaged, class_names
        self.seconds: dict[str, float] = {}
        kept = resolve_budget(arguments.keep, None, len(truth))
        count = len(truth) if set(arguments.method) == {"full"} else kept
        if count < batch_size:
            raise ValueError(
                f"--keep {arguments.keep} of {len(truth)} images is {count}, less than one batch of {batch_size}: give "
                "a smaller --batch-size."
            )
        if LOOKING & set(arguments.method) and arguments.clip is None:
            raise ValueError(
                f"This needs --clip: {' and '.join(sorted(LOOKING & set(arguments.method)))} look at images."
            )
        if arguments.noise is not None:
            self._noisy(0, torch.ones(len(truth), 1))  # says what does not fit

    @cached_property
    def embeddings(self) -> ss.Embeddings:
        """Of all images, with the labels as they came."""
        if self.arguments.clip is None:
            raise ValueError("This needs --clip: the noise follows CLIP's features.")
        with timed(self.seconds, "embed"):
            return ss.embed(
                self.images,
                self.arguments.clip,
                class_names=self.class_names,
                labels=self.truth,
                num_workers=self.workers,
                cache_dir=self.arguments.cache_dir,
            )

    def labels(self, seed: int) -> Tensor:
        """(N,), int64: the labels to train on, with this seed's noise."""
        spec = self.arguments.noise
        if spec is None:
            return self.truth
        return self._noisy(seed, self.noise_features() if spec.startswith("instance") else None)

    def _noisy(self, seed: int, features: Tensor | None) -> Tensor:
        spec, names = self.arguments.noise, self.class_names
        return noise.apply(spec, self.truth, classes=len(names), seed=seed, features=features, class_names=names)

    def noise_features(self) -> Tensor:
        """(N, S), float32: what noise follows that depends on the image; CLIP's directions."""
        return normalize(self.embeddings.image.float(), dim=1)

    def prepare(self) -> None:
        """Embed before anything is trained: what is wrong with --clip, or with an image, shows at once."""
        _ = self.embeddings

    def choose(self, method: str, labels: Tensor, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The indices of what a method trains on, and the seconds of each stage that took it there."""
        seconds: dict[str, float] = {}
        right = (labels == self.truth) & ~self.damaged
        indices = METHODS[method](
            Setting(lambda: self.embeddings.with_labels(labels), right, self.arguments.keep, seed, seconds)
        )
        if seconds:  # the method looked at the embeddings
            seconds = {"embed": self.seconds["embed"]} | seconds
        return indices, seconds

    def composition(self, indices: Tensor, labels: Tensor) -> dict[str, Any]:
        """What is trained on, for a row of the report: samples, and the shares of wrong labels and damaged images."""
        wrong = labels != self.truth
        return {
            "samples": len(indices),
            "wrong_labels": float(wrong[indices].float().mean()),
            "damaged_images": float(self.damaged[indices].float().mean()),
        }


# The command line


def parse(
    parser: argparse.ArgumentParser,
    words: Sequence[str] | None,
    usual: Protocol,
    quick: Protocol,
    *,
    quick_per_class: int,
) -> argparse.Namespace:
    """Parse the arguments that all recipes take beside the recipe's own.

    Args:
        parser: with --data, --noise, --keep, --first-per-class and --model.
        words: stand for the command line; None takes the process's.
        usual, quick: the recipe's protocols, without --quick and with it.
        quick_per_class: what --quick makes of --first-per-class where that is not given.
    """
    add = parser.add_argument
    add("--clip", help="ARCH/TAG of open_clip, local-dir:PATH or hf-hub:ORG/NAME; for ours and paper")
    add("--corrupt", metavar="KIND:SEVERITY:SHARE", help="damaged images, as fog:3:0.2 or mixed:3:0.2")
    add("--method", nargs="+", choices=METHODS, default=["full", "random", "ours", "oracle"], help="(%(default)s)")
    add("--quick", action="store_true", help=f"{quick}, and --first-per-class {quick_per_class}")
    add("--epochs", type=positive, help=f"passes through each method's own selection ({usual.epochs})")
    add("--updates", type=positive, help="instead of --epochs: the same number of updates for every method")
    add("--batch-size", type=positive, help=f"({usual.batch_size})")
    add("--learning-rate", type=above_zero, help=f"the highest ({usual.learning_rate})")
    add("--seeds", type=positive, default=1, help="runs, each with its own noise, subset and training (%(default)s)")
    add("--report", type=Path, metavar="FILE.json", help="written after each run; what it holds already is not redone")
    add("--cache-dir", type=Path, help="keeps embeddings")
    arguments = parser.parse_args(words)
    if arguments.quick and arguments.first_per_class is None:
        arguments.first_per_class = quick_per_class
    return arguments


def positive(text: str) -> int:
    """A whole number from 1 on, of a command line."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on.")
    return int(text)


def above_zero(text: str) -> float:
    """A finite number above 0, of a command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0.")
    return number


def command(name: str, run: Callable[[], str]) -> None:
    """Print what a recipe has to say; what went wrong in a line, and Ctrl-C without a traceback."""
    try:
        print(run())
    except (ValueError, OSError) as error:
        raise SystemExit(f"{name}: {error}") from None
    except KeyboardInterrupt:
        print(f"\n{name}: stopped. With --report the same command goes on with what is missing.", file=sys.stderr)
        raise SystemExit(130) from None


def with_arguments(protocol: Protocol, arguments: argparse.Namespace) -> Protocol:
    """A recipe's protocol with what the command line changes.

    Raises:
        ValueError: if both epochs and updates are given.
    """
    names = ("model", "epochs", "updates", "batch_size", "learning_rate")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if "epochs" in given and "updates" in given:
        raise ValueError("Give --epochs or --updates, not both.")
    return replace(protocol, **({"updates": None} if "epochs" in given else {}) | given)


def setting_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What of the command line a report, and all that belongs to it, was made with; JSON values."""
    clip, spec = arguments.clip, arguments.noise
    if isinstance(clip, str) and clip.startswith("local-dir:"):
        clip = f"local-dir:{Path(clip).name}"  # wherever it lies
    if spec is not None and spec.startswith("human:"):
        path, _, column = spec.removeprefix("human:").rpartition(":")
        spec = f"human:{Path(path).name}:{column}"
    setting = {"data": arguments.data.name, "clip": clip if isinstance(clip, str) else None, "noise": spec}
    return setting | {name: getattr(arguments, name) for name in ("corrupt", "keep", "first_per_class")}


# The report


def check_setting(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """A file of another setting is not gone on with; a CLIP that one of the two did without is no difference."""
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if "clip" in differing and None in (found.get("clip"), wanted["clip"]):
        differing.remove("clip")
    if differing:
        raise ValueError(
            f"{path} was made with other arguments ({', '.join(differing)}): name another --report, or give the same "
            "arguments to go on with it."
        )


def open_report(path: Path | None, setting: dict[str, Any], packages: Sequence[ModuleType]) -> dict[str, Any]:
    """The report at `--report`, to go on with, or a new one, which notes the versions of these packages.

    Raises:
        ValueError: if the file is no report, or that of another setting.
    """
    if path is not None and path.exists():
        try:
            report = json.loads(path.read_text())
            found = report["setting"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no report of a recipe, or a damaged one: name another --report.") from None
        check_setting(path, found, setting)
        found["clip"] = found.get("clip") or setting.get("clip")
        return report
    machine = {"device": device_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version()} | {module.__name__: module.__version__ for module in packages}
    return {"setting": setting, "machine": machine, "versions": versions, "runs": []}


def device_name() -> str:
    """What trains: the GPU, or the processor by the name that torch has for it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    known = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
    return known.get("cpu_name") or platform.processor() or platform.machine()


def save_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write the report, whole or not at all."""
    if path is not None:
        with replace_atomically(path) as file:
            file.write((json.dumps(report, indent=1) + "\n").encode())


def complete(
    report: dict[str, Any],
    arguments: argparse.Namespace,
    run: Callable[[str, int], dict[str, Any]],
    *,
    prepare: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Do every run that the report lacks, and write the report after each.

    Args:
        report: as `open_report` gives it.
        arguments: as `parse` gives them.
        run: makes a row of the report of a method and a seed.
        prepare: called first where a method that looks at the embeddings is missing.
    """
    done = {(row["method"], row["seed"]) for row in report["runs"]}
    wanted = [(method, seed) for seed in range(arguments.seeds) for method in arguments.method]
    missing = [each for each in wanted if each not in done]
    if prepare is not None and any(method in LOOKING for method, _ in missing):
        prepare()
    for method, seed in missing:
        row = run(method, seed)
        report["runs"].append(row)
        stages = ", ".join(f"{stage} {took:.1f} s" for stage, took in row["seconds"].items())
        print(f"{method}, seed {seed}: {100 * row['accuracy']:.2f} % ({stages})", flush=True)
        save_report(arguments.report, report)
    return report


def accuracy_table(report: dict[str, Any], *, data: str, model: str, accuracy: str) -> str:
    """The report as a person reads it: mean ± standard deviation over the seeds.

    Args:
        report: as `complete` gives it.
        data, model, accuracy: what the recipe calls its data set, its network and its measure.
    """
    setting, runs = report["setting"], report["runs"]
    length = f"{setting['epochs']} epochs" if setting["updates"] is None else f"{setting['updates']} updates"
    lines = [
        "",
        f"{data}, noise {setting['noise']}, damage {setting['corrupt']}, keep {setting['keep']}; "
        f"{model}, {length} of batches of {setting['batch_size']}; mean ± standard deviation over the seeds",
        "",
        f"{'trained on':<12}{accuracy:>16}{'wrong labels':>14}{'damaged':>9}{'samples':>9}{'updates':>9}"
        f"{'select':>10}{'train':>10}{'seeds':>7}",
    ]
    for method in dict.fromkeys(row["method"] for row in runs):
        rows = [row for row in runs if row["method"] == method]
        percent = 100 * np.array([row["accuracy"] for row in rows])
        spread = f" ± {percent.std(ddof=1):.2f}" if len(rows) > 1 else ""
        wrong, damaged = (100 * np.mean([row[name] for row in rows]) for name in ("wrong_labels", "damaged_images"))
        training, validating = (
            np.mean([row["seconds"].get(stage, 0.0) for row in rows]) for stage in ("train", "validate")
        )
        selecting = np.mean([sum(row["seconds"].values()) for row in rows]) - training - validating
        lines.append(
            f"{method:<12}{f'{percent.mean():.2f}{spread} %':>16}{wrong:>12.1f} %{damaged:>7.1f} %"
            f"{rows[0]['samples']:>9}{rows[0]['updates']:>9}{selecting:>8.1f} s{training:>8.1f} s{len(rows):>7}"
        )
    return "\n".join(lines)
