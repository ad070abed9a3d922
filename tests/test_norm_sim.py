"""NormSim and NormSim_2-D against their definitions in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from selectsampler.optimizers import norm_sim_dynamic
from selectsampler.scores import norm_sim


def random_features(samples: int, dim: int = 16, *, seed: int = 0) -> Tensor:
    return torch.randn(samples, dim, generator=torch.Generator().manual_seed(seed))


def survivors_by_definition(features: Tensor, k: int, rounds: int) -> list[int]:
    features, alive = normalize(features.double(), dim=1), torch.arange(len(features))
    for round_ in range(1, rounds + 1):
        stay = len(features) - (len(features) - k) * round_ // rounds
        scores = (features[alive] @ features[alive].T).norm(dim=1)
        alive = alive[scores.argsort(descending=True)[:stay]]
    return sorted(alive.tolist())


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize(("samples", "targets"), [(1, 1), (9, 1), (50, 300), (5000, 20), (20, 5000)])
def test_norm_sim_equals_its_definition(p, samples, targets):
    images, target = random_features(samples), 3 * random_features(targets, seed=1)
    cosines = normalize(images.double(), dim=1) @ normalize(target.double(), dim=1).T
    expected = cosines.norm(p=p, dim=1).float()
    assert_close(norm_sim(images, target, p=p), expected, atol=1e-5, rtol=1e-5)
    assert_close(norm_sim(images.half(), target.half(), p=p), expected, atol=1e-2, rtol=1e-2)


def test_norm_sim_finds_the_planted_neighbours_of_the_target():
    target = random_features(200, 64, seed=1)
    pool = random_features(3000, 64)
    planted = torch.arange(0, 3000, 30)
    pool[planted] = target[torch.arange(100)] + 0.2 * random_features(100, 64, seed=2)
    assert norm_sim(pool, target).topk(100).indices.sort().values.tolist() == planted.tolist()


@pytest.mark.parametrize(
    ("images", "target", "p", "message"),
    [
        (torch.ones(3, 4), torch.ones(0, 4), 2, "target_features is empty"),
        (torch.ones(3, 4), torch.ones(2, 5), 2, "dimension 5"),
        (torch.ones(3, 4), torch.ones(2, 4), 1, "p is 1"),
        (
            torch.cat([torch.ones(5000, 4), torch.zeros(1, 4)]),
            torch.ones(2, 4),
            math.inf,
            r"image_features\[5000\] is zero",
        ),
    ],
)
def test_what_does_not_fit_is_named(images, target, p, message):
    with pytest.raises(ValueError, match=message):
        norm_sim(images, target, p=p)


@settings(deadline=None, max_examples=60)
@given(samples=st.integers(3, 200), share=st.floats(0, 1), rounds=st.integers(1, 60), seed=st.integers(0, 99))
def test_survivors_equal_the_plain_definition_in_exact_size(samples, share, rounds, seed):
    features = random_features(samples, 6, seed=seed)
    k = 3 + int(share * (samples - 3))  # of two samples both score the same
    assert norm_sim_dynamic(features, k, rounds=rounds).tolist() == survivors_by_definition(features, k, rounds)


@pytest.mark.parametrize("rounds", [3, 40, 700])
def test_downdating_stays_with_the_definition_over_many_rounds(rounds):
    features = random_features(700, 24)
    assert norm_sim_dynamic(features, 100, rounds=rounds).tolist() == survivors_by_definition(features, 100, rounds)


@pytest.mark.parametrize(("samples", "dim", "k"), [(20_000, 16, 100), (4_000, 64, 20)])  # scores anew, downdated
def test_of_many_samples_and_small_steps_exactly_the_definitions_survive(samples, dim, k):
    features = random_features(samples, dim)
    units, alive = normalize(features.double(), dim=1), torch.arange(samples)
    for round_ in range(1, 401):
        stay = samples - (samples - k) * round_ // 400
        kept = (((x := units[alive]) @ (x.T @ x)) * x).sum(dim=1).topk(stay).indices
        alive = alive[kept.sort().values]
    assert torch.equal(norm_sim_dynamic(features, k, rounds=400), alive)


def test_exact_ties_are_broken_by_the_seed_alone():
    features = torch.ones(100, 4)
    first = norm_sim_dynamic(features, 10, seed=3)
    assert len(first) == 10
    assert torch.equal(first, norm_sim_dynamic(features, 10, seed=3))
    assert not torch.equal(first, norm_sim_dynamic(features, 10, seed=4))


@pytest.mark.parametrize(
    ("arguments", "message"), [({"k": 0}, "k is 0"), ({"k": 6}, "k is 6"), ({"k": 2, "rounds": 0}, "rounds is 0")]
)
def test_sizes_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        norm_sim_dynamic(torch.ones(5, 3), **arguments)
