"""The order of an epoch: as a list it is a walk through permutations; large ones are drawn in buckets."""

from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import selectsampler.order
from selectsampler.order import EpochOrder

SQUARES = torch.arange(7) ** 2


@given(
    seed=st.integers(0, 3),
    epoch=st.integers(0, 4),
    shuffle=st.booleans(),
    epoch_size=st.one_of(st.none(), st.integers(6, 40)),
    replicas=st.integers(1, 6),
    drop_last=st.booleans(),
    data=st.data(),
)
@settings(deadline=None, max_examples=200)
def test_any_stretch_of_a_ranks_order_is_that_of_the_walk(seed, epoch, shuffle, epoch_size, replicas, drop_last, data):
    length = epoch_size or len(SQUARES)
    passes = range(epoch * length // 7, (epoch + 1) * length // 7 + 1)
    walk = {n: EpochOrder(SQUARES, seed, n, shuffle=shuffle)[0:7].tolist() for n in passes}
    of_all = [walk[place // 7][place % 7] for place in range(epoch * length, (epoch + 1) * length)]
    for rank in range(replicas):
        count = length // replicas if drop_last else -(-length // replicas)
        expected = [of_all[(row * replicas + rank) % length] for row in range(count)]
        options = {"epoch_size": epoch_size, "num_replicas": replicas, "rank": rank, "drop_last": drop_last}
        order = EpochOrder(SQUARES, seed, epoch, shuffle=shuffle, **options)
        assert len(order) == count
        start = data.draw(st.integers(0, count - 1))
        stop = start + data.draw(st.integers(0, 2 * count))
        assert order[start:stop].tolist() == [expected[row % count] for row in range(start, stop)]


@pytest.fixture
def in_buckets(monkeypatch):
    """Permutations as those of 2 ** 24 and more are drawn."""
    monkeypatch.setattr(selectsampler.order, "LARGE", 0)


def test_a_large_order_is_a_permutation_that_follows_from_seed_and_epoch(in_buckets):
    indices = torch.arange(5000) * 3
    orders = {(seed, epoch): EpochOrder(indices, seed, epoch)[0:5000] for seed in (0, 1) for epoch in (0, 1)}
    assert all(torch.equal(order.sort().values, indices) for order in orders.values())
    assert len({tuple(order.tolist()) for order in orders.values()}) == 4
    assert torch.equal(EpochOrder(indices, 1, 0)[0:5000], orders[1, 0])


def test_a_large_order_is_the_same_wherever_it_is_looked_at_first(in_buckets):
    indices = torch.arange(5000)
    whole = EpochOrder(indices)[0:5000]
    order = EpochOrder(indices)
    for start in (4990, 10, 2500, 4, 4980):
        assert torch.equal(order[start : start + 10], whole[start : start + 10])
    assert torch.equal(order[0:5000], whole)


def test_a_large_order_shuffles_no_more_than_the_buckets_that_are_looked_at(in_buckets, monkeypatch):
    shuffled = []
    randperm = torch.randperm
    monkeypatch.setattr(
        torch, "randperm", lambda size, **options: [shuffled.append(size), randperm(size, **options)][1]
    )
    order = EpochOrder(torch.arange(100_000))
    order[99_990:100_000], order[99_980:99_990]
    assert len(shuffled) == 1
    assert shuffled[0] < 600  # of 100,000 in 256 buckets


def test_all_permutations_of_a_large_order_are_equally_likely(in_buckets):
    drawn = Counter(tuple(EpochOrder(torch.arange(4), seed)[0:4].tolist()) for seed in range(2400))
    assert set(drawn) == set(permutations(range(4)))
    assert sum((count - 100) ** 2 / 100 for count in drawn.values()) < 49.7  # chi-squared, 23 degrees: 1 in 1,000


def test_passes_that_are_over_are_forgotten():
    order = EpochOrder(SQUARES, epoch_size=70)
    whole = order[0:70].tolist()
    assert len(order._passes) == 2
    assert order[0:7].tolist() == whole[:7]
