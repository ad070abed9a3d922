"""Groups that may take any number within a range: against every subset there is."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectsampler.optimizers import prices, top_k, top_k_in_ranges


def best_of_all(utility, k, groups, lowest, highest):
    """The highest sum of any subset within the ranges, or None."""
    sums = []
    for subset in combinations(range(len(utility)), k):
        counts = torch.bincount(groups[list(subset)], minlength=len(lowest))
        if (counts >= lowest).all() and (counts <= highest).all():
            sums.append(float(utility[list(subset)].double().sum()))
    return max(sums, default=None)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_subset_within_the_ranges_is_worth_more(data):
    samples = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(0, samples))
    utility = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=samples, max_size=samples))).float()
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=samples, max_size=samples)))
    lowest = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=3, max_size=3)))
    highest = lowest + torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3)))
    best = best_of_all(utility, k, groups, lowest, highest)
    ranges = {"groups": groups, "lowest": lowest, "highest": highest}
    if best is None:
        with pytest.raises(ValueError, match=r"Group \d is to give|ranges allow"):
            top_k_in_ranges(utility, k, **ranges)
        return
    chosen = top_k_in_ranges(utility, k, **ranges)
    assert len(chosen.unique()) == k
    assert chosen.tolist() == sorted(chosen.tolist())
    assert float(utility[chosen].double().sum()) == best
    for group, price in enumerate(prices(utility, k, **ranges).tolist()):
        free = (lowest.clone(), highest.clone())
        free[0][group], free[1][group] = 0, samples
        assert price == best_of_all(utility, k, groups, *free) - best


def test_prices_are_those_of_the_groups_that_are_asked_for():
    utility, groups = torch.rand(40, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    ranges = {"groups": groups, "lowest": torch.tensor([8, 0, 0, 0]), "highest": torch.tensor([10, 10, 0, 1])}
    every = prices(utility, 19, **ranges)
    assert (every > 0).sum() >= 2
    for group in range(4):
        one = prices(utility, 19, **ranges, of=[group])
        assert one[group] == every[group]
        assert one.count_nonzero() == (every[group] > 0)


def test_ranges_of_one_number_are_quotas():
    utility = torch.rand(60, generator=torch.Generator().manual_seed(0))
    groups, quotas = torch.arange(60) % 3, torch.tensor([5, 0, 9])
    expected = top_k(utility, 14, groups=groups, quotas=quotas)
    assert torch.equal(top_k_in_ranges(utility, 14, groups=groups, lowest=quotas, highest=quotas), expected)


def test_ties_go_to_the_lower_index():
    chosen = top_k_in_ranges(
        torch.zeros(6), 3, groups=torch.arange(6) % 2, lowest=torch.tensor([0, 2]), highest=torch.tensor([6, 6])
    )
    assert chosen.tolist() == [0, 1, 3]
