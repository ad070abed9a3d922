"""Sample diversity against exact neighbours in float64, also where it is hard: near-duplicates, odd classes."""

import numpy as np
import pytest
import torch
from helpers import random_features
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.testing import assert_close

from selectsampler.scores import default_neighbours, diversity, sample_diversity

CLOSE = {"rtol": 1e-5, "atol": 0.0}


def slow_diversity(features: Tensor, labels: Tensor, k: int, among: Tensor | None = None) -> Tensor:
    """The definition, a class at a time; the tree takes distances by differences, in float64."""
    points, classes = features.double().numpy(), labels.numpy()
    allowed = np.ones(len(classes), dtype=bool) if among is None else among.numpy()
    means = np.zeros(len(classes), dtype=np.float32)
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        others = rows[allowed[rows]]
        if len(others):
            tree = NearestNeighbors(n_neighbors=min(k + 1, len(others)), algorithm="kd_tree").fit(points[others])
            for row, nearest in zip(rows, tree.kneighbors(points[rows])[0], strict=True):
                nearest = nearest[1:] if allowed[row] else nearest[:k]  # the first is the sample itself, or its equal
                means[row] = nearest.mean() if len(nearest) else 0
    return torch.from_numpy(means)


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("seed", [0, 1])
def test_diversity_is_the_mean_distance_to_the_k_nearest_of_the_class_in_any_storage_order(k, seed):
    features, _, labels = random_features(samples=120, classes=4, seed=seed)
    assert_close(sample_diversity(features, labels, k), slow_diversity(features, labels, k), **CLOSE)


def test_each_class_of_an_unbalanced_data_set_has_its_own_neighbours_and_lonely_samples_have_none():
    features, _, _ = random_features(samples=60, classes=1)
    labels = torch.tensor([0] * 40 + [2] * 15 + [3] * 3 + [5] + [7])[torch.randperm(60)]
    scores = sample_diversity(features, labels, 5)
    assert_close(scores, slow_diversity(features, labels, 5), **CLOSE)
    assert scores[(labels == 5) | (labels == 7)].tolist() == [0, 0]


def test_a_class_with_fewer_than_k_others_uses_all_of_them():
    points = torch.tensor([[0.0], [1.0], [5.0]])
    labels = torch.zeros(3, dtype=torch.int64)
    assert sample_diversity(points, labels, k=100).tolist() == [3.0, 2.5, 4.5]
    assert torch.equal(sample_diversity(points, labels, k=2), sample_diversity(points, labels, k=100))


@pytest.mark.parametrize("k", [1, 3, 50])
def test_only_samples_in_among_count_as_neighbours_but_every_sample_has_a_score(k):
    features, _, labels = random_features(samples=90, classes=5)
    among = torch.rand(90, generator=torch.Generator().manual_seed(1)) < 0.4
    among[labels == 2] = False
    scores = sample_diversity(features, labels, k, among=among)
    assert_close(scores, slow_diversity(features, labels, k, among), **CLOSE)
    assert not scores[labels == 2].any()
    assert scores[(labels != 2) & ~among].all()


def test_among_all_is_among_none_at_all_left_out():
    features, _, labels = random_features(samples=50, classes=3)
    everyone = torch.ones(50, dtype=torch.bool)
    assert torch.equal(sample_diversity(features, labels, 4, among=everyone), sample_diversity(features, labels, 4))


@pytest.mark.parametrize("k", [1, 3, 9])
def test_exact_duplicates_are_at_a_distance_of_exactly_zero(k):
    features, _, _ = random_features(samples=40, classes=1, dim=64)
    features = torch.cat([features, features[:10]])
    labels = torch.zeros(50, dtype=torch.int64)
    scores = sample_diversity(features, labels, k)
    assert_close(scores, slow_diversity(features, labels, k), **CLOSE)
    assert (scores[torch.cat([torch.arange(10), torch.arange(40, 50)])] == 0).all() == (k == 1)


def test_a_class_of_one_image_many_times_has_no_diversity():
    features, labels = torch.randn(1, 64).expand(20, 64), torch.zeros(20, dtype=torch.int64)
    assert sample_diversity(features, labels, 3).tolist() == [0.0] * 20


@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("k", [1, 2, 12])
def test_pairs_of_near_duplicates_keep_their_digits(distance, k):
    features, _, labels = random_features(samples=60, classes=2, dim=128)
    twins = features + distance * torch.randn(60, 128, generator=torch.Generator().manual_seed(1))
    features, labels = torch.cat([features, twins]), labels.repeat(2)
    assert_close(sample_diversity(features, labels, k), slow_diversity(features, labels, k), **CLOSE)


@pytest.mark.parametrize("distance", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_the_nearest_are_found_even_in_a_crowd_of_near_duplicates(distance, k):
    features, _, _ = random_features(samples=80, classes=1, dim=64)
    features[40:] = features[:1] + distance * features[40:]
    labels = torch.zeros(80, dtype=torch.int64)
    assert_close(sample_diversity(features, labels, k), slow_diversity(features, labels, k), **CLOSE)


def test_near_duplicates_keep_their_digits_beside_a_neighbour_that_is_a_little_farther():
    features, _, _ = random_features(samples=60, classes=1, dim=64)
    features[:12] = features[0] + 1e-7 * features[:12]
    features[12] = features[0] + 1e-4 * features[12]
    labels = torch.zeros(60, dtype=torch.int64)
    assert_close(sample_diversity(features, labels, 12), slow_diversity(features, labels, 12), **CLOSE)


def test_an_offset_that_dwarfs_all_distances_costs_no_digits():
    features, _, labels = random_features(samples=60, classes=3)
    features = 1000 + 0.01 * features
    assert_close(sample_diversity(features, labels, 4), slow_diversity(features, labels, 4), **CLOSE)


@pytest.mark.parametrize("workspace", [1, 100, 1000])
def test_borders_of_blocks_change_nothing(monkeypatch, workspace):
    features, _, labels = random_features(samples=100, classes=3)
    labels[50:] = labels[:50]
    features[50:] = features[:50] + 1e-4 * features[50:]  # so that the second, exact pass crosses borders as well
    monkeypatch.setattr(diversity, "WORKSPACE", workspace)
    assert_close(sample_diversity(features, labels, 2), slow_diversity(features, labels, 2), **CLOSE)


@pytest.mark.parametrize("block", [1, 7, 33, 100])
def test_distances_mirrored_at_the_diagonal_are_those_computed(monkeypatch, block):
    features, _, labels = random_features(samples=100, classes=3)
    expected = slow_diversity(features, labels, 5)
    monkeypatch.setattr(diversity, "BLOCK", block)
    assert_close(sample_diversity(features, labels, 5), expected, **CLOSE)
    monkeypatch.setattr(diversity, "WORKSPACE", 300)  # too little to keep what is to be mirrored
    assert_close(sample_diversity(features, labels, 5), expected, **CLOSE)


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_that_are_twins_of_each_other_are_rounded_alike_and_still_keep_their_digits(seed):
    features, _, _ = random_features(samples=402, classes=1, dim=128, seed=seed)
    centres = torch.stack([features[0], -features[0]])
    crowds = centres.repeat(150, 1) * (1 + 1e-7 * torch.arange(300)[:, None])
    features, labels = torch.cat([crowds, centres.repeat(200, 1) + 0.16 * features[2:]]), torch.zeros(700).long()
    assert_close(sample_diversity(features, labels, 100), slow_diversity(features, labels, 100), rtol=2e-6, atol=0)


def test_features_in_clusters_as_clip_makes_them_need_no_second_look_in_float64(monkeypatch):
    features, centres, labels = random_features(samples=500, classes=5, dim=128)
    features, labels = 0.3 * features + centres[labels], torch.zeros(500, dtype=torch.int64)
    monkeypatch.setattr(diversity, "_mean_nearest_exactly", lambda *_: 1 / 0)
    assert_close(sample_diversity(features, labels, 49), slow_diversity(features, labels, 49), **CLOSE)


def test_half_precision_features_are_taken_at_face_value_and_scores_are_float32():
    features, _, labels = random_features(samples=40, classes=2)
    scores = sample_diversity(features.half(), labels, 3)
    assert scores.dtype == torch.float32
    assert_close(scores, slow_diversity(features.half(), labels, 3), **CLOSE)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(1, 40), classes=st.integers(1, 5), k=st.integers(1, 12))
def test_diversity_follows_its_definition_whatever_the_classes(seed, samples, classes, k):
    features, _, labels = random_features(samples, min(classes, samples), dim=3, seed=seed)
    assert_close(sample_diversity(features, labels, k), slow_diversity(features, labels, k), **CLOSE)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), power=st.integers(-8, 8))
def test_diversity_follows_the_samples_and_the_length_of_features(seed, power):
    features, _, labels = random_features(samples=30, classes=3, seed=seed)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    scores = sample_diversity(features, labels, 4)
    assert_close(sample_diversity(features[order], labels[order], 4), scores[order], **CLOSE)
    assert_close(sample_diversity(features * 2.0**power, labels, 4), scores * 2.0**power, **CLOSE)


@pytest.mark.parametrize("precision", ["high", "medium", "highest"])
def test_products_are_in_true_float32_and_the_callers_precision_comes_back(monkeypatch, precision):
    features, _, labels = random_features(samples=40, classes=2)
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "mm", remember := RememberPrecision(torch.mm))
    torch.set_float32_matmul_precision(precision)
    try:
        sample_diversity(features, labels, 3)
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cuda.matmul.allow_tf32 == (precision != "highest")
    finally:
        torch.set_float32_matmul_precision(before)
    assert remember.reduced == {False}


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_the_newer_switches_for_tf32_are_understood_as_well():
    features, _, labels = random_features(samples=40, classes=2)
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        sample_diversity(features, labels, 3)
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


def test_the_callers_precision_comes_back_after_an_error_too(monkeypatch):
    features, _, labels = random_features(samples=40, classes=2)
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "mm", lambda *_, **__: 1 / 0)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(ZeroDivisionError):
            sample_diversity(features, labels, 3)
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


class RememberPrecision:
    """A matrix product that notes whether it was allowed less than float32."""

    def __init__(self, product) -> None:
        self.product = product
        self.reduced = set()

    def __call__(self, *tensors, **options) -> Tensor:
        cuda, mkldnn = torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)
        if hasattr(cuda, "fp32_precision"):
            self.reduced |= {switch.fp32_precision not in ("ieee", "none") for switch in (cuda, mkldnn)}
        else:
            self.reduced.add(torch.get_float32_matmul_precision() != "highest")
        return self.product(*tensors, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0, but at least one"),
        ({"labels": torch.tensor([0, -1, 0])}, r"labels\[1\] is -1"),
        ({"labels": torch.tensor([0, 0])}, "2 labels for 3 samples"),
        ({"among": torch.tensor([1, 0, 1])}, "among must be a bool tensor"),
        ({"image_features": torch.tensor([[0.0], [torch.nan], [1.0]])}, "row 1 first"),
        ({"image_features": torch.tensor([0.0, 1.0, 2.0])}, r"shape \(N, D\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"image_features": torch.rand(3, 1), "labels": torch.tensor([0, 0, 0]), "k": 1}
    with pytest.raises(ValueError, match=message):
        sample_diversity(**arguments | change)


def test_the_default_k_is_a_tenth_of_the_mean_class_within_one_and_ninety_nine():
    labels = [torch.arange(classes).repeat(size) for classes, size in ((10, 5000), (100, 500), (3, 40), (5, 2), (1, 1))]
    assert [default_neighbours(of) for of in labels] == [99, 49, 3, 1, 1]
