"""The methods that quality.py compares, and what those of one setting and seed share.

Where a paper leaves a choice: EL2N and forgetting keep the hardest. CCS is told how many labels are wrong, and drops
that many of the hardest (a tenth at least), as its paper tunes that share to the data. Herding, k-center and moderate
look at CLIP's image features, cleanlab at the cross-validated probabilities of a linear head on them. The oracle draws
among right labels and undamaged images, of which there may be fewer than asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import baselines
import numpy as np
import torch
from common import linear_head
from quality_data import clock, is_damage
from selectsampler.recipes import noise
from torch import Tensor
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.optimizers import top_k
from selectsampler.reselect import SelectFn
from selectsampler.validation import resolve_budget

__all__ = ["METHODS", "TRAVELLING", "UNDER_DAMAGE", "Choice", "Group", "Plan"]

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
