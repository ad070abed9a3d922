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

Where a paper leaves a choice: EL2N and forgetting keep the hardest. CCS is told how many labels are wrong, and drops
that many of the hardest (a tenth at least), as its paper tunes that share to the data. Herding, k-center and moderate
look at CLIP's image features, cleanlab at the cross-validated probabilities of a linear head on them. The oracle draws
among right labels and undamaged images, of which there may be fewer than asked for.
"""

import argparse
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import baselines
import numpy as np
import torch
from common import linear_head
from quality_data import CifarHalf, Digits, clock, is_damage
from quality_tables import unpack, write_tables
from selectsampler.recipes import noise
from selectsampler.recipes.cifar import fastest_precision
from selectsampler.recipes.experiment import device_name
from torch import Tensor
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.optimizers import top_k
from selectsampler.reselect import SelectFn
from selectsampler.store import replace_atomically
from selectsampler.validation import resolve_budget

T = TypeVar("T")
HEAD_STRENGTH = 0.01  # inverse penalty of cleanlab's linear head


class Group:
    """A setting and seed: what its methods share is made once, and how long that took is known.

    Args:
        data: images, embeddings and training, with the damage of the setting.
        setting: as quality_data.py lists them.
        seed: of noise, choices, networks and orders.

    Attributes:
        labels: (N,), int64, noisy.
        right: (N,), bool: the label is right and the image undamaged.
    """

    def __init__(self, data: Any, setting: str, seed: int) -> None:
        self.data, self.setting, self.seed = data, setting, seed
        clean = setting == "none" or is_damage(setting)
        classes = int(data.truth.max()) + 1
        self.labels = data.truth if clean else noise.apply(setting, data.truth, classes=classes, seed=seed)
        self.right = (self.labels == data.truth) & ~data.damaged
        self.order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(self.labels)))
        self._made: dict[str, tuple[Any, float]] = {}

    def once(self, name: str, make: Callable[[], T]) -> tuple[T, float]:
        """What `make` makes, the first time, and the seconds that it took."""
        if name not in self._made:
            start = clock()
            made = make()
            self._made[name] = made, clock() - start
        return self._made[name]


@dataclass
class Choice:
    """What a method is asked for: a share of a group's samples; `seconds` tells what its stages take."""

    group: Group
    keep: str
    visits: int = 0  # the whole training's
    visited: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    _counted: set[str] = field(default_factory=set)

    @property
    def population(self) -> int:
        return len(self.group.labels)

    @property
    def count(self) -> int:
        return resolve_budget(self.keep, None, self.population)

    @property
    def seed(self) -> int:
        return self.group.seed

    @property
    def labels(self) -> Tensor:
        return self.group.labels

    def stage(self, stage: str, name: str, make: Callable[[], T]) -> T:
        """What the group makes once; its seconds count for this stage."""
        made, took = self.group.once(name, make)
        if name not in self._counted:
            self._counted.add(name)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + took
        return made

    @property
    def embeddings(self) -> ss.Embeddings:
        """CLIP's, with the labels as given."""
        embeddings = self.group.data.embeddings
        self.seconds["embed"] = self.group.data.embed_seconds
        return embeddings.with_labels(self.labels)

    @property
    def directions(self) -> Tensor:
        """(N, D), float32: CLIP's image features at unit length."""
        return normalize(self.embeddings.image.float(), dim=1)


@dataclass(frozen=True)
class Plan:
    """What is trained on: a sampler, and what changes its selection between epochs."""

    sampler: ss.SelectSampler
    select_fn: SelectFn | None = None


def fixed(choose: Callable[[Choice], Tensor]) -> Callable[[Choice], Plan]:
    """A method that selects once."""

    def plan(choice: Choice) -> Plan:
        return Plan(ss.SelectSampler(choose(choice), seed=choice.seed))

    return plan


def by_preset(name: str) -> Callable[[Choice], Tensor]:
    """Adapt, score and select by these arguments."""

    def choose(choice: Choice) -> Tensor:
        embeddings, preset, seed = choice.embeddings, getattr(ss.presets, name), choice.seed
        adapted = choice.stage("adapt", f"{name} adapted", lambda: ss.adapt(embeddings, seed=seed, **preset["adapt"]))
        scores = choice.stage("score", f"{name} scores", lambda: ss.score(adapted, **preset["score"]))
        selection = choice.stage(
            "select",
            f"{name} {choice.keep}",
            lambda: ss.select(scores, choice.keep, seed=seed, **preset["select"]),
        )
        return selection.indices

    return choose


def el2n_scores(choice: Choice) -> Tensor:
    """EL2N by networks that are trained for a few epochs on everything."""
    group, data = choice.group, choice.group.data

    def make() -> Tensor:
        updates = data.proxies.early * choice.population // data.protocol.batch_size
        probabilities = []
        for number in range(data.proxies.networks):
            seed = 1000 * (number + 1) + group.seed
            sampler = ss.SelectSampler(range(choice.population), seed=seed)
            model, _ = data.train(group.labels, sampler, updates, seed=seed, description=f"EL2N {number + 1}")
            probabilities.append(data.logits(model).softmax(dim=1))
        return baselines.el2n(torch.stack(probabilities), group.labels)

    return choice.stage("proxy", "EL2N", make)


def dynamics(choice: Choice) -> baselines.TrainingDynamics:
    """How a network learns and forgets each sample while it is trained on everything."""
    group, data = choice.group, choice.group.data

    def make() -> baselines.TrainingDynamics:
        watched = baselines.TrainingDynamics(group.labels)
        updates = data.proxies.whole * choice.population // data.protocol.batch_size
        sampler = ss.SelectSampler(range(choice.population), seed=1000 + group.seed)
        data.train(
            group.labels, sampler, updates, seed=1000 + group.seed, on_logits=watched.update, description="dynamics"
        )
        return watched

    return choice.stage("proxy", "dynamics", make)


def herding(choice: Choice) -> Tensor:
    features = choice.directions
    return choice.stage(
        "select", f"herding {choice.keep}", lambda: baselines.herding(features, choice.labels, choice.count)
    )


def k_center(choice: Choice) -> Tensor:
    features = choice.directions
    return choice.stage(
        "select",
        f"k-center {choice.keep}",
        lambda: baselines.k_center_greedy(features, choice.labels, choice.count, seed=choice.seed),
    )


def moderate(choice: Choice) -> Tensor:
    features = choice.directions
    return choice.stage(
        "select", f"moderate {choice.keep}", lambda: baselines.moderate(features, choice.labels, choice.count)
    )


def ccs(choice: Choice) -> Tensor:
    difficulty, left = -dynamics(choice).area_under_margin(), 1 - choice.count / choice.population
    share = min(max(float((~choice.group.right).float().mean()), 0.1), left)
    return baselines.coverage_centric(difficulty, choice.count, hardest_share=share, seed=choice.seed)


def cleanlab(choice: Choice) -> Tensor:
    features = choice.directions
    posterior = choice.stage(
        "score", "head", lambda: linear_head(features, choice.labels, choice.seed, strength=HEAD_STRENGTH)
    )
    return choice.stage(
        "select",
        f"cleanlab {choice.keep}",
        lambda: baselines.confident_learning(posterior, choice.labels, choice.count),
    )


def zero_shot(choice: Choice) -> Tensor:
    embeddings = choice.embeddings
    return top_k(choice.stage("score", "zero-shot", lambda: baselines.zero_shot_probability(embeddings)), choice.count)


def oracle(choice: Choice) -> Tensor:
    order = choice.group.order
    return order[choice.group.right[order]][: choice.count]


def rs2(choice: Choice) -> Plan:
    return Plan(baselines.repeated_random(choice.population, choice.count, seed=choice.seed))


def infobatch(choice: Choice) -> Plan:
    def annealing() -> bool:
        return choice.visited >= (1 - baselines.ANNEALED) * choice.visits

    sampler = ss.SelectSampler(range(choice.population), seed=choice.seed)
    return Plan(sampler, baselines.infobatch(choice.population, annealing=annealing, seed=choice.seed))


METHODS: dict[str, Callable[[Choice], Plan]] = {
    "full": fixed(lambda choice: torch.arange(choice.population)),
    "random": fixed(lambda choice: choice.group.order[: choice.count]),
    "RS2": rs2,
    "InfoBatch": infobatch,
    "EL2N": fixed(lambda choice: baselines.hardest(el2n_scores(choice), choice.count, seed=choice.seed)),
    "forgetting": fixed(
        lambda choice: baselines.hardest(dynamics(choice).forgetting(), choice.count, seed=choice.seed)
    ),
    "herding": fixed(herding),
    "k-center": fixed(k_center),
    "moderate": fixed(moderate),
    "CCS": fixed(ccs),
    "cleanlab": fixed(cleanlab),
    "zero-shot": fixed(zero_shot),
    "paper": fixed(by_preset("paper")),
    "ours": fixed(by_preset("default")),
    "oracle": fixed(oracle),
}
TRAVELLING = ("RS2", "InfoBatch")  # other samples each epoch, so that shares are those of the visits
UNDER_DAMAGE = ("full", "random", "moderate", "zero-shot", "paper", "ours", "oracle")
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
    share = 1.0 if run.budget == "updates" else choice.count / choice.population
    updates = max(1, round(protocol.updates * share))
    choice.visits = updates * protocol.batch_size
    plan = METHODS[run.method](choice)
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


def code() -> str:
    """What tells one state of the package from another: a digest of its source."""
    folder = Path(ss.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
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
        add("--keep", nargs="+", default=["0.3", "0.5", "0.7"], help="(%(default)s)")
        add("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="(%(default)s)")
        add("--seeds", type=int, default=5, help="(%(default)s)")
        add("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="do every N-th setting and seed, from I")
        add("--redo", nargs="+", choices=METHODS, default=[], metavar="METHOD", help="forget these methods' runs first")
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
    except ValueError as error:
        raise SystemExit(f"quality.py: {error}") from None


if __name__ == "__main__":
    main()
