"""Each baseline selects what the definition in its paper says, here written out in the slowest way."""

import itertools

import numpy as np
import pytest
import torch
from helpers import random_embeddings, random_features
from torch.testing import assert_close

from selectsampler import LossTracker, Selection
from selectsampler.optimizers import apportion
from selectsampler.reselect import TrainingState

pytest.importorskip("cleanlab", reason="benchmarks need selectsampler[benchmarks]")
import baselines


@pytest.fixture
def made():
    images, _, labels = random_features(samples=60, classes=4, dim=5, seed=3)
    return images, labels


def class_by_class(labels, count):
    """Rows of each class, and how many of them are to be chosen."""
    quotas = apportion(labels.bincount(), count)
    return [((labels == label).nonzero()[:, 0].tolist(), int(quota)) for label, quota in enumerate(quotas)]


def test_the_hardest_are_the_highest_and_ties_are_broken_by_the_seed():
    scores = torch.tensor([1.0, torch.inf, 0.0, 1.0, 1.0, torch.inf])
    chosen = {tuple(baselines.hardest(scores, 3, seed=seed).tolist()) for seed in range(30)}
    assert chosen == {(0, 1, 5), (1, 3, 5), (1, 4, 5)}


def test_el2n_is_the_mean_length_of_the_errors_of_networks():
    probabilities = torch.rand(3, 7, 4, generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    expected = [
        np.mean([np.linalg.norm(network[row].numpy() - np.eye(4)[label]) for network in probabilities])
        for row, label in enumerate(labels)
    ]
    assert_close(baselines.el2n(probabilities, labels), torch.tensor(expected, dtype=torch.float32))


def test_forgetting_counts_falls_from_right_to_wrong_and_never_learned_is_infinite():
    right = {0: [0, 1, 0, 1, 0, 0], 1: [1, 1, 1, 1, 1, 1], 2: [0, 0, 0, 0, 0, 0], 3: [0, 0, 1, 1, 1, 0]}
    watched = baselines.TrainingDynamics(torch.zeros(4, dtype=torch.int64))
    for visit in range(6):
        for rows in (torch.tensor([3, 0]), torch.tensor([1, 2])):
            watched.update(rows, torch.tensor([[1.0, 0.0] if right[int(row)][visit] else [0.0, 1.0] for row in rows]))
    assert watched.forgetting().tolist() == [2, 0, torch.inf, 1]


def test_the_area_under_the_margin_is_the_mean_over_visits_of_own_logit_less_largest_other():
    watched = baselines.TrainingDynamics(torch.tensor([2, 0]))
    watched.update(torch.tensor([0, 1]), torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 4.0]]))
    watched.update(torch.tensor([0]), torch.tensor([[0.0, 1.0, 6.0]]))
    assert watched.area_under_margin().tolist() == [(-1 + 5) / 2, 1]


def test_herding_takes_what_brings_the_mean_nearest_to_the_class_mean(made):
    features, labels = made
    expected = []
    for rows, quota in class_by_class(labels, 23):
        mean, chosen = features[rows].mean(dim=0), []
        for _ in range(quota):
            left = [row for row in rows if row not in chosen]
            chosen.append(min(left, key=lambda row: float((features[[*chosen, row]].mean(dim=0) - mean).norm())))
        expected += chosen
    assert baselines.herding(features, labels, 23).tolist() == sorted(expected)


def test_k_center_takes_what_is_farthest_from_those_chosen(made):
    features, labels = made

    def greedily(rows, quota, start):
        chosen = [start]
        while len(chosen) < quota:
            left = [row for row in rows if row not in chosen]
            chosen.append(max(left, key=lambda row: float((features[chosen] - features[row]).norm(dim=1).min())))
        return set(chosen)

    chosen = baselines.k_center_greedy(features, labels, 23, seed=0)
    for label, (rows, quota) in enumerate(class_by_class(labels, 23)):
        assert set(chosen[labels[chosen] == label].tolist()) in [greedily(rows, quota, start) for start in rows]
    assert chosen.tolist() != baselines.k_center_greedy(features, labels, 23, seed=1).tolist()


def test_moderate_takes_what_is_nearest_to_the_median_distance(made):
    features, labels = made
    distance = [
        float((features[row] - features[labels == label].mean(dim=0)).norm()) for row, label in enumerate(labels)
    ]
    order = sorted(range(60), key=lambda row: abs(distance[row] - np.median(distance)))
    assert baselines.moderate(features, labels, 17).tolist() == sorted(order[:17])


def test_ccs_drops_the_hardest_and_takes_equally_many_from_each_range_of_difficulty():
    difficulty = torch.tensor([*np.linspace(0, 0.9, 40), *np.linspace(1, 1.9, 5), *np.linspace(2, 3, 15), *[9.0] * 6])
    order = torch.randperm(66, generator=torch.Generator().manual_seed(0))
    chosen = baselines.coverage_centric(difficulty[order], 27, hardest_share=6 / 66, strata=3, seed=0)
    kept = difficulty[order][chosen]
    assert len(chosen.unique()) == 27
    assert [int(((kept >= low) & (kept < low + 0.95)).sum()) for low in (0, 1)] == [11, 5], "the middle range has but 5"
    assert int((kept >= 2).sum()) == 11
    assert kept.max() <= 3


@pytest.mark.parametrize("count", range(1, 55, 6))
def test_ccs_keeps_the_budget_exactly(count):
    difficulty = torch.randn(60, generator=torch.Generator().manual_seed(count)).exp()
    assert len(baselines.coverage_centric(difficulty, count, hardest_share=0.1, seed=1).unique()) == count


def test_confident_learning_keeps_what_cleanlab_finds_no_issue_with_by_label_quality():
    random = np.random.default_rng(0)
    truth = torch.from_numpy(random.integers(3, size=300))
    labels = torch.where(torch.from_numpy(random.random(300) < 0.2), (truth + 1) % 3, truth)
    logits = 3 * torch.nn.functional.one_hot(truth, 3) + torch.from_numpy(random.normal(size=(300, 3)))
    posterior = logits.softmax(dim=1)
    confidence = posterior.gather(1, labels[:, None])[:, 0]
    few = baselines.confident_learning(posterior, labels, 100)
    assert few.tolist() == confidence.topk(100).indices.sort().values.tolist()
    issues = torch.from_numpy(baselines.find_label_issues(labels.numpy(), posterior.numpy()))
    assert 30 < int(issues.sum()) < 100
    kept = baselines.confident_learning(posterior, labels, 300 - int(issues.sum()))
    assert kept.tolist() == (~issues).nonzero()[:, 0].tolist()


def test_zero_shot_probability_is_the_softmax_of_cosines_over_temperature():
    embeddings = random_embeddings(20, 4, temperature=0.2)
    for row, probability in enumerate(baselines.zero_shot_probability(embeddings)):
        image, text = embeddings.image[row], embeddings.text
        cosines = torch.stack([image @ prompt / (image.norm() * prompt.norm()) for prompt in text])
        assert_close(probability, (cosines / 0.2).softmax(dim=0)[embeddings.labels[row]])


def test_rs2_repeats_no_sample_before_all_were_seen():
    sampler = baselines.repeated_random(40, 10, seed=2)
    seen = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        seen += list(sampler)
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]


def test_infobatch_prunes_half_of_the_easy_doubles_their_weight_and_rests_at_both_ends():
    losses = LossTracker(1000, momentum=0.0)
    losses.update(torch.arange(1000), torch.arange(1000.0))
    state = TrainingState(Selection(range(1000), 1000), losses)
    annealing = iter([False, True])
    select = baselines.infobatch(1000, annealing=lambda: next(annealing), seed=0)
    first, pruned, last = (select(epoch, state) for epoch in range(3))
    assert len(first) == len(last) == 1000
    easy = pruned.indices < 500
    assert len(pruned) - int(easy.sum()) == 500
    assert int(easy.sum()) == pytest.approx(250, abs=40)
    assert pruned.weights_for(pruned.indices).tolist() == torch.where(easy, 2.0, 1.0).tolist()


def test_every_choice_is_that_of_its_seed(made):
    features, labels = made
    choices = [
        lambda seed: baselines.k_center_greedy(features, labels, 20, seed=seed),
        lambda seed: baselines.coverage_centric(features[:, 0], 20, hardest_share=0.1, seed=seed),
        lambda seed: baselines.hardest(labels.float(), 20, seed=seed),
    ]
    for choose, seed in itertools.product(choices, range(3)):
        assert torch.equal(choose(seed), choose(seed))
