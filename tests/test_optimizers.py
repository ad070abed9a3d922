"""The solvers against every subset there is, apportionment against fractions."""

from fractions import Fraction
from itertools import combinations, permutations

import helpers  # noqa: F401, sets the number of threads
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectsampler.optimizers import apportion, chances, draw, safe_limit, straight_through, top_k


def best_subset(values: list[float], k: int, groups: list[int], quotas: list[int]) -> list[int]:
    """Of all subsets with the quotas the one of the highest sum; of equals the first in lexicographic order."""
    fitting = [
        subset
        for subset in combinations(range(len(values)), k)
        if [sum(groups[i] == group for i in subset) for group in range(len(quotas))] == quotas
    ]
    return list(max(fitting, key=lambda subset: (sum(values[i] for i in subset), [-i for i in subset])))


# whole numbers, so that sums are exact and ties are many
small_integers = st.lists(st.integers(-3, 3), min_size=1, max_size=9)


@settings(max_examples=100, deadline=None)
@given(values=small_integers, data=st.data())
def test_top_k_is_the_best_of_all_subsets_and_ties_go_to_the_lower_index(values, data):
    k = data.draw(st.integers(0, len(values)))
    chosen = top_k(torch.tensor(values).float(), k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == best_subset(values, k, [0] * len(values), [k])


@settings(max_examples=100, deadline=None)
@given(values=small_integers, data=st.data())
def test_top_k_with_quotas_is_the_best_of_all_subsets_that_keep_them(values, data):
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    quotas = [data.draw(st.integers(0, groups.count(group))) for group in range(5)]  # group 4 is empty
    chosen = top_k(torch.tensor(values).float(), sum(quotas), groups=torch.tensor(groups), quotas=torch.tensor(quotas))
    assert chosen.tolist() == best_subset(values, sum(quotas), groups, quotas)


def test_top_k_tells_float64_utilities_apart_that_float32_would_confuse():
    assert top_k(torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64), 1).tolist() == [1]


def test_more_groups_than_sixteen_bits_hold_keep_their_quotas():
    groups = torch.tensor([1, 65_536, 65_536, 70_000])  # in sixteen bits 65,536 is 0
    quotas = torch.zeros(70_001, dtype=torch.int64).index_fill(0, torch.tensor([65_536, 70_000]), 1)
    assert top_k(torch.tensor([9.0, 1.0, 2.0, 0.0]), 2, groups=groups, quotas=quotas).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 5}, "k is 5, but it must lie between 0 and the 4 samples"),
        ({"k": -1}, "k is -1"),
        ({"utility": torch.tensor([0.0, torch.inf, 1.0, 2.0])}, r"utility\[1\] is inf"),
        ({"utility": torch.arange(4)}, "utility must be a floating point tensor"),
        ({"quotas": None}, "groups and quotas go together"),
        ({"groups": None}, "groups and quotas go together"),
        ({"quotas": torch.tensor([1, 2])}, "sum to k = 2, but they sum to 3"),
        ({"quotas": torch.tensor([-1, 3])}, r"quotas\[0\] is -1"),
        ({"quotas": torch.tensor([0, 2, 0]), "groups": torch.tensor([0, 0, 1, 2])}, r"quotas\[1\] is 2, .* has 1"),
        ({"quotas": torch.tensor([1.0, 1.0])}, "whole numbers"),
        ({"groups": torch.tensor([0, 1, 2, 1])}, r"\[2\] is 2"),
        ({"groups": torch.tensor([0, 1, 1])}, "for 4 samples"),
    ],
)
def test_top_k_names_what_does_not_fit(change, message):
    arguments = {
        "utility": torch.rand(4),
        "k": 2,
        "groups": torch.tensor([0, 0, 1, 1]),
        "quotas": torch.tensor([1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        top_k(**arguments | change)


def largest_remainder(weights: list[int], total: int) -> list[int]:
    """Hamilton's method in exact fractions."""
    ideal = [Fraction(weight * total, sum(weights)) for weight in weights]
    quotas = [share.numerator // share.denominator for share in ideal]
    by_remainder = sorted(range(len(weights)), key=lambda i: (quotas[i] - ideal[i], i))
    for i in by_remainder[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas


positive_weights = st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any)


@settings(max_examples=100, deadline=None)
@given(values=small_integers, seed=st.integers(0, 99), data=st.data())
def test_a_draw_is_worth_as_much_as_the_best_of_all_subsets(values, seed, data):
    groups = data.draw(st.lists(st.integers(0, 3), min_size=len(values), max_size=len(values)))
    quotas = [data.draw(st.integers(0, groups.count(group))) for group in range(4)]
    utility, k = torch.tensor(values).float(), sum(quotas)
    chosen = draw(utility, k, groups=torch.tensor(groups), quotas=torch.tensor(quotas), seed=seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert torch.bincount(torch.tensor(groups)[chosen], minlength=4).tolist() == quotas
    assert utility[chosen].sum() == sum(values[i] for i in best_subset(values, k, groups, quotas))


def test_a_draw_takes_every_one_of_equals_equally_often():
    drawn = torch.zeros(20)
    for seed in range(2000):
        drawn[draw(torch.zeros(20), 5, seed=seed)] += 1
    assert drawn.sum() == 2000 * 5
    assert ((drawn - 500).abs() < 5 * (2000 * 0.25 * 0.75) ** 0.5).all()


def test_a_weighted_lot_draws_one_after_another_in_proportion_to_the_weights():
    weights, rounds = [1.0, 2.0, 5.0, 1.0], 4000
    expected = torch.zeros(4)
    for first, second in permutations(range(4), 2):
        chance = weights[first] / 9 * weights[second] / (9 - weights[first])
        expected[[first, second]] += chance
    drawn = torch.zeros(4)
    for seed in range(rounds):
        drawn[draw(torch.zeros(4), 2, weights=torch.tensor(weights), seed=seed)] += 1
    assert ((drawn / rounds - expected).abs() < 4 * 0.5 / rounds**0.5).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_chances_are_how_often_a_sample_is_drawn(weighted):
    generator = torch.Generator().manual_seed(0)
    utility = (3 * torch.rand(60, generator=generator)).floor()
    weights = torch.rand(60, generator=generator) + 0.5 if weighted else None
    options = {"weights": weights, "groups": torch.arange(60) % 2, "quotas": torch.tensor([5, 20])}
    drawn = torch.zeros(60)
    for seed in range(2000):
        drawn[draw(utility, 25, **options, seed=seed)] += 1
    expected = chances(utility, 25, **options)
    assert expected.sum() == pytest.approx(25)
    assert ((drawn / 2000 - expected).abs() < 0.05).all()


@pytest.mark.parametrize("k", [20, 100, 180])
def test_with_weights_as_many_are_safe_as_leave_the_risk_on_average_over_draws(k):
    generator = torch.Generator().manual_seed(k)
    probability, weights = (torch.rand(200, generator=generator) for _ in range(2))
    weights = (weights + 1.5 - probability) ** 3  # the doubtful are drawn more often
    groups = torch.arange(200) % 2
    options = {"weights": weights, "groups": groups, "quotas": torch.tensor([k // 4, k - k // 4]).clamp(max=100)}
    k = int(options["quotas"].sum())
    allowed = float((1 - probability[top_k(probability, k, groups=groups, quotas=options["quotas"])]).sum()) + 0.1 * k

    def wrong(limit):
        utility = torch.where(probability >= limit, 1.0, probability)
        return sum(float((1 - probability[draw(utility, k, **options, seed=seed)]).sum()) for seed in range(300)) / 300

    limits = probability.unique()
    found = int((limits == safe_limit(probability, k, 0.1, **options)).nonzero())
    assert wrong(float(limits[found])) < allowed + 0.02 * k
    assert found == 0 or wrong(float(limits[max(0, found - 8)])) > allowed - 0.02 * k
    even = {"groups": groups, "quotas": options["quotas"]}
    alike = safe_limit(probability, k, 0.1, weights=torch.full((200,), 3.0), **even)
    assert alike == safe_limit(probability, k, 0.1, **even)


@pytest.mark.parametrize(
    ("k", "more", "message"),
    [
        (4, {}, "k is 4, but it must lie between 0 and the 3 samples"),
        (1, {"groups": torch.zeros(3, dtype=torch.int64)}, "go together"),
        (2, {"groups": torch.tensor([0, 0, 1]), "quotas": torch.tensor([0, 2])}, "above its group's size"),
        (1, {"groups": torch.tensor([0, 0, 1]), "quotas": torch.tensor([1, 1])}, "sum to k = 1"),
    ],
)
def test_chances_and_limits_are_refused_for_what_cannot_be_drawn(k, more, message):
    with pytest.raises(ValueError, match=message):
        chances(torch.zeros(3), k, **more)
    with pytest.raises(ValueError, match=message):
        safe_limit(torch.ones(3), k, 0.1, **more)
    assert chances(torch.zeros(3), 0).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="utility"):
        chances(torch.tensor([0.0, torch.nan]), 1)


def test_a_weight_that_is_not_positive_is_named():
    for call in (lambda weights: draw(torch.zeros(2), 1, weights=weights),
                 lambda weights: safe_limit(torch.ones(2), 1, 0.1, weights=weights)):  # fmt: skip
        with pytest.raises(ValueError, match=r"weights\[1\] is 0\.0, but a lot needs a positive weight"):
            call(torch.tensor([1.0, 0.0]))


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(0, 16), min_size=1, max_size=9),
    risk=st.sampled_from([0.0, 0.0625, 0.25, 1.0]),
    data=st.data(),
)
def test_as_many_are_safe_as_the_risk_allows(values, risk, data):
    groups = data.draw(st.lists(st.integers(0, 1), min_size=len(values), max_size=len(values)))
    members = [
        sorted((v / 16 for v, g in zip(values, groups, strict=True) if g == own), reverse=True) for own in (0, 1)
    ]
    quotas = [data.draw(st.integers(0, len(own))) for own in members]
    k = sum(quotas)

    def wrong(limit):
        drawn_from = [max(q, sum(p >= limit for p in own)) for own, q in zip(members, quotas, strict=True)]
        parts = zip(members, quotas, drawn_from, strict=True)
        return sum(q * sum(1 - p for p in own[:n]) / n for own, q, n in parts if n)

    allowed = wrong(2.0) + risk * k + 1e-6  # above all: the safest
    lowest = min([value / 16 for value in values if wrong(value / 16) <= allowed]) if k else 1.0
    found = safe_limit(torch.tensor(values) / 16, k, risk, groups=torch.tensor(groups), quotas=torch.tensor(quotas))
    assert found == lowest
    if groups == [0] * len(values):
        assert safe_limit(torch.tensor(values) / 16, k, risk) == lowest


@settings(deadline=None)
@given(weights=positive_weights, total=st.integers(0, 5000))
def test_apportionment_is_by_largest_remainder_exact_and_nowhere_one_off_the_ideal(weights, total):
    quotas = apportion(torch.tensor(weights), total).tolist()
    assert quotas == largest_remainder(weights, total)
    assert sum(quotas) == total
    assert all(abs(quota - Fraction(w * total, sum(weights))) < 1 for quota, w in zip(quotas, weights, strict=True))


@settings(deadline=None)
@given(weights=positive_weights, data=st.data())
def test_capacities_are_kept_and_what_exceeds_them_goes_to_the_others(weights, data):
    limits = [data.draw(st.integers(0, 300)) for _ in weights]
    total = data.draw(st.integers(0, sum(limit for limit, weight in zip(limits, weights, strict=True) if weight)))
    quotas = apportion(torch.tensor(weights), total, capacities=torch.tensor(limits)).tolist()
    assert sum(quotas) == total
    assert all(quota <= limit for quota, limit in zip(quotas, limits, strict=True))
    # a group below its capacity has at least the whole part of the share that it would have without capacities
    shares = [weight * total // sum(weights) for weight in weights]
    assert all(q == limit or q >= share for q, limit, share in zip(quotas, limits, shares, strict=True))


def test_capacities_that_nobody_reaches_change_nothing():
    assert apportion(torch.tensor([5, 3, 1]), 100, capacities=torch.tensor([60, 60, 60])).tolist() == [56, 33, 11]


def test_what_a_full_group_cannot_take_is_shared_out_in_proportion():
    assert apportion(torch.tensor([6, 2, 1]), 18, capacities=torch.tensor([3, 99, 99])).tolist() == [3, 10, 5]


def test_equal_remainders_go_to_the_lower_group():
    assert apportion(torch.ones(4), 6).tolist() == [2, 2, 1, 1]


def test_remainders_are_compared_as_fractions_where_floats_would_tie():
    weights = torch.tensor([3, 10**17 + 1, 10**17, 10**17 - 1])  # the last three round to one float
    assert apportion(weights, 1).tolist() == [0, 1, 0, 0]
    assert apportion(weights.flip(0), 1).tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("weights", "total", "capacities", "message"),
    [
        ([1.0, -2.0], 3, None, r"weights\[1\] is -2\.0"),
        ([1.0, torch.nan], 3, None, r"weights\[1\] is nan"),
        ([1.0, torch.inf], 3, None, r"weights\[1\] is inf"),
        ([0, 0], 3, None, "3 cannot be shared out"),
        ([1, 1], -1, None, "-1 cannot be shared out"),
        ([1, 1], 5, [2, 2], "5 cannot be shared out: groups with a positive weight take 4 at most"),
        ([1, 0], 3, [2, 9], "take 2 at most"),
    ],
)
def test_apportion_says_why_it_cannot(weights, total, capacities, message):
    with pytest.raises(ValueError, match=message):
        apportion(torch.tensor(weights), total, capacities=None if capacities is None else torch.tensor(capacities))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_the_straight_through_optimizer_ends_in_the_top_k(seed, keep):
    generator = torch.Generator().manual_seed(seed)
    terms = torch.rand(2, 400, generator=generator) * torch.tensor([[2.0], [0.2]])
    result = straight_through(terms, round(keep * 400))
    assert result.indices.tolist() == top_k(terms.sum(dim=0), round(keep * 400)).tolist()
    assert result.converged
    assert result.gap == pytest.approx(0, abs=1e-6)
    assert 2 * abs(result.converged_size - keep * 400) / 400 < 1e-3


def test_the_loss_curve_starts_with_all_samples_selected_and_falls():
    terms = torch.rand(2, 300, generator=torch.Generator().manual_seed(0))
    terms *= torch.tensor([[1.0], [0.1]]) / terms.mean(dim=1, keepdim=True)
    curve = straight_through(terms, 100).loss_curve
    assert curve[0] == pytest.approx(-1.1 + 2 * 200 / 300, abs=1e-5)  # the mean utility, and the penalty
    assert curve[-1] < curve[0]


def test_utilities_that_outweigh_the_size_penalty_keep_the_optimizer_from_converging_and_it_says_so():
    utility = 10 + torch.rand(1, 100, generator=torch.Generator().manual_seed(0))
    result = straight_through(utility, 30, max_steps=500)
    assert (result.converged, result.converged_size, len(result.indices)) == (False, 100, 30)


def test_the_first_steps_are_those_of_autograd_and_sgd():
    terms = torch.rand(1, 50, generator=torch.Generator().manual_seed(0)) * 3
    w = torch.full((50,), 0.01, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(300):
        x = torch.sigmoid(100 * w)
        selected = (x > 0.5).float().detach() + x - x.detach()  # straight-through
        loss = -(selected * terms[0]).mean() + 2 * (selected.sum() - 20).abs() / 50
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    curve = straight_through(terms, 20, max_steps=300).loss_curve
    assert curve == pytest.approx(losses[: len(curve)], abs=1e-5)
    assert len(set(curve)) > 5


def test_an_optimizer_that_is_stopped_early_says_so_and_still_keeps_the_size():
    result = straight_through(torch.rand(1, 400, generator=torch.Generator().manual_seed(0)), 100, max_steps=3)
    assert not result.converged
    assert (len(result.loss_curve), len(result.indices), result.converged_size) == (3, 100, 400)


def test_an_optimizer_whose_start_is_within_its_tolerance_selects_blindly_and_the_gap_tells():
    result = straight_through(torch.arange(4000.0)[None] / 2000, 3999)  # the worst is the first
    assert (result.converged_size, len(result.loss_curve), result.indices[0]) == (4000, 1, 0)
    assert result.gap == pytest.approx(1.9995 / (3999 * 4000 / 4000), rel=1e-3)


@pytest.mark.parametrize(
    ("terms", "k", "message"),
    [
        (torch.rand(1, 4), 0, "k is 0, but it must lie between 1 and the 4 samples"),
        (torch.rand(1, 4), 5, "k is 5"),
        (torch.tensor([[0.0, 1.0], [torch.nan, 1.0]]), 1, r"utility_terms\[1\]\[0\] is nan"),
    ],
)
def test_the_straight_through_optimizer_names_what_does_not_fit(terms, k, message):
    with pytest.raises(ValueError, match=message):
        straight_through(terms, k)
