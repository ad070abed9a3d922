"""Group selection against every subset there is, its greedy against the definition, its bound, and what it is for."""

import importlib
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from helpers import random_features, shared
from hypothesis import given, settings
from hypothesis import strategies as st
from selectsampler.recipes.data import ZippedImageFolder
from selectsampler.recipes.noise import symmetric
from torch import Tensor
from torch.nn.functional import normalize

import selectsampler as ss
from selectsampler.optimizers import coverage, coverage_bound, group, top_k

group_module = importlib.import_module("selectsampler.optimizers.group")  # the function has the same name


def definition(utility, features, labels, weights, coverage_weight) -> Callable[[Tensor], Tensor]:
    """(M, k) subsets -> (M,) F of each."""
    points = normalize(features.double(), dim=1)
    similarity = 1 - (points[:, None] - points[None]).norm(dim=2) / 2
    similarity[(labels[:, None] != labels[None]) | (weights[:, None] == 0)] = 0
    nowhere = torch.zeros(1, len(labels), dtype=torch.float64)  # what covers every sample where a class keeps none

    def objective(subsets: Tensor) -> Tensor:
        kept = torch.cat([similarity[subsets], nowhere.expand(len(subsets), 1, -1)], dim=1)
        return utility.double()[subsets].sum(dim=1) + coverage_weight * kept.amax(dim=1) @ weights.double()

    return objective


def best_of_all(problem, k, groups, quotas) -> float:
    """The highest F of any subset of the size and quotas."""
    subsets = torch.tensor(list(combinations(range(len(problem[0])), k)), dtype=torch.int64)
    if quotas is not None:
        counts = (groups[subsets][:, :, None] == torch.arange(len(quotas))).sum(dim=1)
        subsets = subsets[(counts == torch.tensor(quotas)).all(dim=1)]
    return float(definition(*problem)(subsets).max())


def slow_greedy(problem, groups, quotas) -> list[int]:
    """Always the sample that adds most, of equals the lowest, until all quotas are met."""
    objective, room, taken = definition(*problem), list(quotas), []
    while sum(room):
        free = [i for i in range(len(problem[0])) if i not in taken and room[int(groups[i])]]
        values = (
            objective(torch.tensor([[*taken, i] for i in free])).mul(10**6).round()
        )  # equal up to rounding is equal
        taken.append(free[int(values.argmax())])
        room[int(groups[taken[-1]])] -= 1
    return taken


@st.composite
def problems(draw, samples=8, lowest=-4):
    """Few distinct points and whole utilities, so that duplicates and ties are many; groups of any kind, or none."""
    n = draw(st.integers(1, samples))
    each = lambda entry: draw(st.lists(entry, min_size=n, max_size=n))  # noqa: E731
    angles = torch.tensor(each(st.sampled_from([0.0, 0.5, 0.6, 1.5, 2.0, 3.1])))
    features = (
        torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor(each(st.sampled_from([1.0, 2.0])))[:, None]
    )
    utility = torch.tensor(each(st.integers(lowest, 4))) / 4
    labels = torch.tensor(each(st.integers(0, 2)))
    weights = torch.tensor(each(st.sampled_from([0.0, 0.25, 1.0, 1.0])))
    problem = (utility, features, labels, weights, draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])))
    kind = draw(st.sampled_from(["none", "labels", "coarse", "fine", "across"]))
    if kind == "none":
        return problem, draw(st.integers(0, n)), None, None
    other = torch.tensor(each(st.integers(0, 1)))
    groups = {"labels": labels, "coarse": labels // 2, "fine": 2 * labels + other, "across": other}[kind]
    quotas = [draw(st.integers(0, int((groups == g).sum()))) for g in range(6)]
    return problem, sum(quotas), groups, quotas


def solve(problem, k, groups, quotas):
    utility, features, labels, weights, coverage_weight = problem
    quotas = None if quotas is None else torch.tensor(quotas)
    options = {"labels": labels, "weights": weights, "coverage_weight": coverage_weight, "progress": False}
    return group(utility, features, k, groups=groups, quotas=quotas, **options)


@settings(max_examples=200, deadline=None)
@given(case=problems(), fewest=st.sampled_from([1, 2, 16]))
def test_no_subset_of_the_size_and_quotas_exceeds_the_bound_and_the_objective_is_that_of_the_definition(case, fewest):
    problem, k, groups, quotas = case
    with pytest.MonkeyPatch.context() as patch:  # few near candidates a sample, as in large data sets
        patch.setattr(coverage_bound, "FEWEST", fewest)
        patch.setattr(coverage_bound, "PER_KEPT", 0)
        result = solve(*case)
    assert result.objective == pytest.approx(float(definition(*problem)(result.indices[None])), abs=1e-5)
    assert best_of_all(problem, k, groups, quotas) <= result.bound + 1e-5
    assert result.objective <= result.bound


@settings(max_examples=100, deadline=None)
@given(case=problems(lowest=0))
def test_without_negative_utilities_greedy_reaches_its_guaranteed_share_of_the_optimum(case):
    problem, k, groups, quotas = case
    share = 1 - 1 / math.e if quotas is None else 1 / 2
    assert solve(*case).objective >= share * best_of_all(problem, k, groups, quotas) - 1e-5


@settings(max_examples=200, deadline=None)
@given(case=problems(samples=12))
def test_the_order_is_that_of_plain_greedy_with_ties_to_the_lower_index_and_gains_add_up(case):
    problem, k, groups, quotas = case
    result = solve(*case)
    if quotas is None:
        groups, quotas = torch.zeros(len(problem[0]), dtype=torch.int64), [k]
    assert result.order.tolist() == slow_greedy(problem, groups, quotas)
    assert result.indices.tolist() == sorted(result.order.tolist())
    assert result.indices.dtype == torch.int64
    assert float(result.gains.sum()) == pytest.approx(result.objective, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("quotas", [None, [3, 4]])
def test_the_bound_lies_above_the_best_of_all_subsets_of_fourteen_and_close_to_it(seed, quotas):
    features, _, labels = random_features(samples=14, classes=1, dim=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    problem = (torch.rand(14, generator=generator) - 0.5, features, labels, torch.rand(14, generator=generator), 1.0)
    groups = None if quotas is None else torch.arange(14) % 2
    optimum, result = best_of_all(problem, 7, groups, quotas), solve(problem, 7, groups, quotas)
    assert optimum <= result.bound + 1e-5 <= 1.01 * optimum


def clusters(samples=600, classes=3, seed=0) -> tuple[Tensor, Tensor]:
    """(features, labels): some dense and some sparse places in every class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes * 20, 8, generator=generator)
    place = torch.randint(len(centres), (samples,), generator=generator)
    return centres[place] + 0.3 * torch.randn(samples, 8, generator=generator), place % classes


def test_the_bound_is_far_below_that_of_the_gains_given_the_greedy_subset():
    features, labels = clusters()
    problem = (torch.zeros(600), features, labels, torch.ones(600), 1.0)
    result, objective = solve(problem, 180, None, None), definition(*problem)
    others = [i for i in range(600) if i not in set(result.indices.tolist())]
    gains = objective(torch.tensor([[*result.indices.tolist(), i] for i in others])) - result.objective
    online = result.objective + float(gains.topk(180).values.sum())
    assert result.bound - result.objective < 0.2 * (online - result.objective)


def test_the_bound_holds_where_only_the_very_nearest_candidates_are_surveyed(monkeypatch):
    features, labels = clusters()
    problem = (torch.zeros(600), features, labels, torch.ones(600), 1.0)
    wide = solve(problem, 180, None, None)
    monkeypatch.setattr(coverage_bound, "FEWEST", 2)
    monkeypatch.setattr(coverage_bound, "PER_KEPT", 0)
    narrow = solve(problem, 180, None, None)
    assert narrow.bound >= wide.bound - 0.2 * (wide.bound - wide.objective)  # the least over all radii is nearly wide's


@pytest.mark.parametrize("groups", ["none", "labels", "across"])
def test_distances_computed_where_they_are_needed_change_nothing(groups, monkeypatch):
    features, labels = clusters()
    problem = (torch.rand(600, generator=torch.Generator().manual_seed(0)), features, labels, torch.ones(600), 1.0)
    kind, quotas = {"none": (None, None), "labels": (labels, [60] * 3), "across": (torch.arange(600) % 2, [90, 90])}[
        groups
    ]
    held = solve(problem, 180, kind, quotas)
    monkeypatch.setattr(group_module, "WORKSPACE", 0)
    monkeypatch.setattr(coverage, "TILE", 1000)
    computed = solve(problem, 180, kind, quotas)
    assert computed.order.tolist() == held.order.tolist()
    assert computed.bound == pytest.approx(held.bound, rel=1e-9)


def test_without_quotas_a_smaller_selection_is_the_beginning_of_a_larger_one():
    features, labels = clusters()
    problem = (torch.zeros(600), features, labels, torch.ones(600), 1.0)
    whole = solve(problem, 600, None, None)
    assert solve(problem, 50, None, None).order.tolist() == whole.order[:50].tolist()
    assert whole.bound == pytest.approx(whole.objective)
    assert whole.indices.tolist() == list(range(600))


def test_nothing_is_chosen_of_nothing_asked_for():
    features, labels = clusters(60)
    problem = (torch.ones(60), features, labels, torch.ones(60), 1.0)
    for result in (solve(problem, 0, None, None), solve(problem, 0, labels, [0, 0, 0])):
        assert (len(result.indices), result.objective, result.bound) == (0, 0.0, 0.0)


def test_a_class_of_one_sample_is_covered_by_it_or_not_at_all():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    result = group(torch.zeros(3), points, 2, labels=torch.tensor([0, 0, 5]))
    assert result.indices.tolist() == [0, 2]
    assert result.gains[1] == 1


@pytest.mark.parametrize("corners", [24, 30, 50])
def test_equal_gains_that_rounding_tells_apart_are_ties(corners):
    angles = torch.arange(corners, dtype=torch.float64) * 2 * math.pi / corners
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels, ones = torch.zeros(corners, dtype=torch.int64), torch.ones(corners)
    problem = (torch.full((corners,), 0.1), points, labels, 0.7 * ones, 0.3)
    assert solve(problem, 9, None, None).order.tolist() == slow_greedy(problem, labels, [9])


def test_one_copy_of_each_duplicate_comes_first_then_utility_decides():
    points = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [5.0, 0.0]])
    utility = torch.tensor([0.0, 0.0, 0.0, 0.01, 0.02])
    assert group(utility, points.half(), 3).order.tolist() == [4, 3, 0]


def test_wrong_samples_need_not_be_covered_and_cover_none():
    angles = torch.tensor([0.0, 0.1, 1.5, 1.6, 3.0])
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    assert group(torch.zeros(5), points, 2, weights=weights).indices.tolist() == [0, 2]
    assert group(torch.zeros(5), points, 4, weights=weights).order[3] == 1  # adds nothing: the lower index
    assert group(torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0]), points, 1, weights=weights).gains.tolist() == [9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_length_of_features_does_not_matter(dtype):
    features, labels = clusters(90)
    whole, lengths = features.to(dtype), 1 + torch.arange(90) % 4
    chosen = group(torch.zeros(90), whole, 30, labels=labels).indices
    assert group(torch.zeros(90), whole * (2.0 ** lengths[:, None]).to(dtype), 30, labels=labels).indices.equal(chosen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k is 5, but it must lie between 0 and the 4 samples"),
        ({"utility": torch.tensor([0.0, torch.inf, 1.0, 2.0])}, r"utility\[1\] is inf"),
        ({"quotas": torch.tensor([1, 2])}, "sum to k = 2, but they sum to 3"),
        ({"quotas": None, "groups": torch.zeros(4, dtype=torch.int64)}, "groups and quotas go together"),
        ({"labels": None}, "groups and quotas go together"),
        ({"image_features": torch.rand(3, 2)}, "image_features has 3 rows, but there are 4 samples"),
        ({"image_features": torch.tensor([[1.0], [0.0], [1.0], [1.0]])}, r"image_features\[1\] is zero"),
        ({"weights": torch.tensor([1.0, 1.5, 0.0, 1.0])}, r"weights\[1\] is 1.5, .* in \[0, 1\]"),
        ({"weights": torch.rand(3)}, "weights has 3 entries"),
        ({"coverage_weight": -1.0}, "coverage_weight is -1.0"),
        ({"labels": torch.tensor([0, 1, -1, 0]), "groups": torch.tensor([0, 0, 1, 1])}, r"labels\[2\] is -1"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {
        "utility": torch.rand(4),
        "image_features": torch.rand(4, 2) + 0.1,
        "k": 2,
        "labels": torch.tensor([0, 0, 1, 1]),
        "quotas": torch.tensor([1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        group(**arguments | change)


@pytest.fixture(scope="module")
def pool():
    """A fifth of CIFAR-10's pool, seen by a CLIP that never saw it."""
    archive, model = shared("data/cifar10.zip"), shared("models/cifar-clip")
    images = ZippedImageFolder(archive, "cifar10/train", accept=lambda name: int(Path(name).stem) < 500)
    return ss.embed(images, f"local-dir:{model}", class_names=images.classes, fingerprint="pool")


@pytest.mark.slow
def test_on_real_images_greedy_is_far_nearer_to_its_bound_than_a_random_subset(pool):
    chance = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    quotas = torch.full((10,), 150)
    random = top_k(chance, 1500, groups=pool.labels, quotas=quotas)
    result = group(torch.zeros(5000), pool.image, 1500, labels=pool.labels, quotas=quotas)
    value = coverage_of(pool.image, pool.labels, random)
    assert (result.bound - result.objective) / (result.bound - value) <= 0.1  # the whole pool: 0.046


@pytest.mark.slow
def test_on_real_images_it_covers_the_right_ones_better_than_top_k_at_equal_noise(pool):
    noisy = symmetric(pool.labels, 0.4, classes=10, seed=0)
    right = (noisy == pool.labels).float()
    logits = 100 * normalize(pool.image.float(), dim=1) @ normalize(pool.text.float(), dim=1).T
    utility = logits.softmax(dim=1).gather(1, noisy[:, None])[:, 0] + 10 * right  # neither keeps a wrong one
    quotas = torch.full((10,), 150)
    chosen = group(utility, pool.image, 1500, labels=noisy, weights=right, quotas=quotas).indices
    best = top_k(utility, 1500, groups=noisy, quotas=quotas)
    assert right[chosen].all()
    assert right[best].all()
    known = noisy.masked_fill(right == 0, 10)  # the wrong ones are no class's
    values = [coverage_of(pool.image, known, subset) for subset in (chosen, best)]
    distances = [int(right.sum()) - value for value in values]  # half the summed distance to the nearest kept one
    assert distances[0] < 0.8 * distances[1]


def coverage_of(features: Tensor, labels: Tensor, subset: Tensor) -> float:
    """The coverage of a subset that keeps some of every class below 10."""
    points, total = normalize(features.double(), dim=1), 0.0
    for label in range(10):
        kept = subset[labels[subset] == label]
        total += float((1 - torch.cdist(points[labels == label], points[kept]).amin(dim=1) / 2).sum())
    return total
