"""Does selecting help, and which selection? Fourteen methods under label noise and damage, at equal epochs and updates.

    python benchmarks/quality.py digits --runs runs/
    python benchmarks/quality.py cifar --runs runs/ --data cifar10.zip --clip local-dir:cifar-clip --cache-dir cache/
    python benchmarks/quality.py tables --runs runs/ --out benchmarks/results
    python benchmarks/quality.py unpack --runs runs/ --joined benchmarks/results/quality-cifar.json

Every setting, method, ratio and seed is a run, and leaves one JSON in `--runs`: accuracy, what is left of wrong labels
and damage, class balance, updates, visits, seconds of each stage, versions, machine. Interrupted, the same command goes
on with what is missing, seed by seed; `--shard 0/2` and `--shard 1/2` share the work between two processes; `--redo
ours` does one method again. `tables` joins the runs of a data set into one JSON, a table and two pictures;
`unpack` makes runs of such a JSON again, to go on from those that are committed.

`updates`: every subset is trained for as many updates as everything is. `epochs`: for as many epochs, so that a subset
takes fewer updates. Noise, network and order of a seed are the same for all methods. Networks that a method trains to
judge samples count as `proxy`. What methods of one setting and seed share is made once, and counted for each of them.
"""

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quality_data import CifarHalf, Digits, clock, is_damage
from quality_methods import METHODS, TRAVELLING, UNDER_DAMAGE, Choice, Group
from quality_tables import unpack, write_tables
from selectsampler.recipes import cifar
from selectsampler.recipes.cifar import fastest_precision
from selectsampler.recipes.experiment import device_name
from torch import Tensor

import selectsampler as ss
from selectsampler.store import replace_atomically

BUDGETS = ("updates", "epochs")


@dataclass(frozen=True)
class Run:
    """What one JSON is of."""

    setting: str
    method: str
    keep: str
    budget: str
    seed: int

    def path(self, folder: Path) -> Path:
        words = (self.setting.replace(":", "-"), self.method, self.keep, self.budget, str(self.seed))
        return folder / ("__".join(words) + ".json")


def runs_of(setting: str, seed: int, arguments: argparse.Namespace) -> Iterator[Run]:
    """The runs of a group. Where the ratio makes no difference there is one, of everything."""
    for budget in arguments.budgets:
        for method in arguments.methods:
            if is_damage(setting) and method not in UNDER_DAMAGE:
                continue
            for keep in ratios(method, setting, budget, arguments.keep):
                yield Run(setting, method, keep, budget, seed)


def ratios(method: str, setting: str, budget: str, keep: Sequence[str]) -> Sequence[str]:
    """The ratios that a method has to be run at."""
    everything = budget == "updates"
    if method == "full":
        return ["1"] if everything else []  # epochs and updates are the same
    if method == "RS2":
        return [] if everything else keep  # with as many updates it is training on everything
    if method == "InfoBatch":
        return ["1"] if everything else keep
    return [] if (method, setting) == ("oracle", "none") else keep  # which would be random


def perform(run: Run, group: Group) -> dict[str, Any]:
    """Choose, train and test: what a JSON holds."""
    data, protocol = group.data, group.data.protocol
    choice = Choice(group, run.keep)
    plan = METHODS[run.method](choice)
    samples = choice.count if run.method in TRAVELLING else len(plan.sampler)  # of the oracle it may be fewer
    share = 1.0 if run.budget == "updates" else samples / choice.population
    updates = max(1, round(protocol.updates * share))
    choice.visits = updates * protocol.batch_size
    losses = ss.LossTracker(choice.population, momentum=0.0)
    reselect = None
    if plan.select_fn is not None:
        reselect = ss.Reselect(plan.sampler, plan.select_fn, allow_resize=True, losses=losses)

    def on_losses(indices: Tensor, values: Tensor) -> Tensor:
        choice.visited += len(indices)
        losses.update(indices, values)
        return values * plan.sampler.selection.weights_for(indices).to(values.device)

    start = clock()
    _, accuracy = data.train(
        group.labels,
        plan.sampler,
        updates,
        seed=group.seed,
        on_epoch_start=None if reselect is None else reselect.on_epoch_start,
        on_losses=on_losses,
        description=f"{run.method} {run.keep}",
    )
    choice.seconds["train"] = clock() - start
    seconds = {stage: round(took, 3) for stage, took in choice.seconds.items()}
    visits = losses.seen if run.method in TRAVELLING else torch.zeros(choice.population)
    if run.method not in TRAVELLING:
        visits[plan.sampler.selection.indices] = 1
    counts = {"samples": int((visits > 0).sum()), "updates": updates, "visits": choice.visited}
    return vars(run) | {"accuracy": accuracy} | shares(visits.float(), group) | counts | {"seconds": seconds}


def shares(visits: Tensor, group: Group) -> dict[str, float]:
    """What of the visits goes to wrong labels and to damaged images, and the smallest class's over the largest's."""
    truth = group.data.truth
    of_class = torch.zeros(int(truth.max()) + 1).index_add_(0, truth, visits)
    parts = {"noise_left": group.labels != truth, "damaged_left": group.data.damaged}
    left = {name: round(float(visits[part].sum() / visits.sum()), 5) for name, part in parts.items()}
    return left | {"balance": round(float(of_class.min() / of_class.max()), 4)}


def work(arguments: argparse.Namespace) -> None:
    """Do this shard's runs that are not there."""
    code()  # of what was loaded, whatever is edited while it runs
    first = Digits() if arguments.command == "digits" else CifarHalf(arguments)
    unknown = set(arguments.settings or ()) - set(first.settings)
    if unknown:
        raise ValueError(
            f"There is no setting {', '.join(sorted(unknown))} of {first.name}: {', '.join(first.settings)}."
        )
    folder = arguments.runs / first.name
    folder.mkdir(parents=True, exist_ok=True)
    settings = arguments.settings or first.settings
    groups = [(seed, setting) for seed in range(arguments.seeds) for setting in settings]
    number, of = arguments.shard
    mine = {group: list(runs_of(group[1], group[0], arguments)) for group in groups[number::of]}
    for run in (run for runs in mine.values() for run in runs if run.method in arguments.redo):
        run.path(folder).unlink(missing_ok=True)
    check_experiment(folder, first.experiment)
    opened: dict[str | None, Any] = {None: first}
    for (seed, setting), runs in mine.items():
        missing = [run for run in runs if not run.path(folder).exists()]
        if not missing:
            continue
        damage = setting if is_damage(setting) else None
        if damage not in opened:
            opened[damage] = first.with_damage(damage)
        group = Group(opened[damage], setting, seed)
        for run in missing:
            result = perform(run, group) | made_with() | {"experiment": first.experiment | {"code": code()}}
            save(run.path(folder), result)
            tell(run.path(folder), result)


def check_experiment(folder: Path, experiment: dict[str, Any]) -> None:
    """Runs on other data, or by another protocol, are not gone on with.

    Raises:
        ValueError: naming the first run that is.
    """
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text()).get("experiment", experiment)
        differing = [name for name in experiment if found.get(name) != experiment[name]]
        if differing:
            raise ValueError(f"{path} was made with other {', '.join(differing)}: name another folder for --runs.")


@cache
def code() -> str:
    """What tells one state of package, recipes and methods from another: a digest of their source, read once."""
    folders = (Path(ss.__file__).parent, Path(cifar.__file__).parent)
    own = [
        Path(__file__).with_name(f"{name}.py") for name in ("baselines", "common", "quality_data", "quality_methods")
    ]
    digest = hashlib.sha256()
    for path in [*(path for folder in folders for path in sorted(folder.rglob("*.py"))), *own]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a run, whole or not at all."""
    with replace_atomically(path) as file:
        file.write(json.dumps(result, indent=1).encode() + b"\n")


def tell(path: Path, result: dict[str, Any]) -> None:
    """Say what came out of a run."""
    took = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result["seconds"].items())
    print(f"{path.stem}: {100 * result['accuracy']:.2f} % ({took})", flush=True)


def restore(joined: Path, runs: Path) -> None:
    """Write the runs that a joined JSON holds, but for those that are there."""
    folder = runs / joined.stem.removeprefix("quality-")
    folder.mkdir(parents=True, exist_ok=True)
    found = unpack(joined)
    missing = [row for row in found if not run_of(row).path(folder).exists()]
    for row in missing:
        save(run_of(row).path(folder), row)
    print(f"{len(missing)} of {len(found)} runs written to {folder}")


def run_of(row: dict[str, Any]) -> Run:
    """What run a JSON is of."""
    return Run(*(row[name] for name in ("setting", "method", "keep", "budget", "seed")))


def made_with() -> dict[str, Any]:
    """Versions and machine."""
    names = ("torch", "timm", "open_clip_torch", "numpy", "scikit-learn", "cleanlab")
    versions = {"python": platform.python_version(), "selectsampler": ss.__version__}
    precision = fastest_precision(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    machine = {"device": device_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    machine["precision"] = str(precision).removeprefix("torch.")
    return {"versions": versions | {name: version(name) for name in names}, "machine": machine}


def share_of(text: str) -> str:
    """A share of the data, `0.50` written as `0.5`: a run of it has one name."""
    try:
        share = Decimal(text).normalize()
    except InvalidOperation:
        share = Decimal(0)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share in (0, 1]: write 0.3 for 30 %.")
    return f"{share:f}"


def shard_of(text: str) -> tuple[int, int]:
    """The two numbers of `0/2`."""
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard: write 0/2 for the first of two.")
    return int(number), int(of)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `words` stand for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("digits", "cifar"):
        add = commands.add_parser(name).add_argument
        add("--runs", type=Path, required=True, help="folder, a JSON a run")
        add("--settings", nargs="+", metavar="SETTING", help="(all)")
        add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="(all)")
        add("--keep", nargs="+", type=share_of, default=["0.3", "0.5", "0.7"], help="(%(default)s)")
        add("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="(%(default)s)")
        add("--seeds", type=int, default=5, help="(%(default)s)")
        add("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="do every N-th setting and seed, from I")
        add("--redo", nargs="+", choices=METHODS, default=[], metavar="METHOD", help="forget these runs first")
        if name == "cifar":
            add("--data", type=Path, required=True, help="CIFAR-10, as recipes/cifar.py takes it")
            add("--clip", required=True, help="the CLIP model")
            add("--cache-dir", type=Path, help="keeps embeddings")
            add("--per-class", type=int, default=2500, help="images a class (%(default)s)")
    add = commands.add_parser("tables").add_argument
    add("--runs", type=Path, required=True, help="folder that the runs are in")
    add("--out", type=Path, required=True, help="folder for quality-DATA.json, .md and .png")
    add = commands.add_parser("unpack").add_argument
    add("--runs", type=Path, required=True, help="folder that the runs go to")
    add("--joined", type=Path, required=True, help="quality-DATA.json, as `tables` writes it")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse_arguments()
    try:
        if arguments.command == "tables":
            write_tables(arguments.runs, arguments.out, list(METHODS))
        elif arguments.command == "unpack":
            restore(arguments.joined, arguments.runs)
        else:
            work(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"quality.py: {error}") from None


if __name__ == "__main__":
    main()
