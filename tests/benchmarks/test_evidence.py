"""What the benchmarks of trust, frontier and damage measure is what their tables say."""

import damage
import frontier
import numpy as np
import pytest
import torch
import trust

import selectsampler as ss
from selectsampler.scores import semantic_alignment


def some_embeddings(samples=200, classes=4, dim=8):
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(classes, dim, generator=generator)
    labels = torch.arange(samples) % classes
    image = text[labels] + 0.5 * torch.randn(samples, dim, generator=generator)
    return ss.Embeddings(image, text, labels, [str(label) for label in range(classes)], temperature=0.1)


def test_the_calibration_error_is_the_mean_distance_of_trust_from_hits_in_bins():
    probability = torch.tensor([0.91, 0.91, 0.91, 0.91, 0.31, 0.31])
    right = torch.tensor([True, True, True, False, False, True])
    assert trust.calibration_error(probability, right) == pytest.approx((4 * 0.16 + 2 * 0.19) / 6, abs=1e-6)
    sure = torch.tensor([1.0, 1.0, 0.0])
    assert trust.calibration_error(sure, torch.tensor([True, True, False])) == 0


def test_the_error_of_a_transition_matrix_is_the_total_variation_of_its_rows():
    truth, labels = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    estimated = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert trust.transition_error(estimated, truth, labels) == pytest.approx(0.25 / 2)


def test_the_poor_observer_makes_exactly_the_share_wrong_and_every_label_another():
    embeddings = some_embeddings()
    labels = trust.confusable(embeddings.labels, embeddings.image, 0.3, seed=0)
    assert int((labels != embeddings.labels).sum()) == 60
    assert set(labels.tolist()) <= set(range(4))


def test_a_part_of_the_classes_is_numbered_anew():
    embeddings = some_embeddings(samples=600, classes=10)
    two = trust.part(embeddings, "one way:0.4", seed=0)
    assert list(two.class_names) == ["3", "5"]
    assert torch.bincount(two.labels).tolist() == [60, 60]
    tail = trust.part(embeddings, "long tail", seed=0)
    assert torch.bincount(tail.labels).tolist() == [min(60, size) for size in trust.TAIL]


def test_the_gap_that_is_closed_is_that_between_the_paper_and_the_oracle():
    assert frontier.gap_closed([1.0], [0.4], [0.2]) == "75%"
    assert frontier.gap_closed([1.0, 1.2], [0.4, 0.6], [0.2, 0.4]) == "75 ± 0 %"
    assert frontier.gap_closed([1.0], [0.4], [1.1]) == "-"


def test_a_curve_is_read_off_between_its_points_and_ends_where_it_ends():
    weights = frontier.CURVES["trust"]
    points = {f"trust {w}": {"diversity": float(i), "noise": 10.0 * i} for i, w in enumerate(weights)}
    assert frontier.at(points, "trust", 1.5, "noise") == pytest.approx(15)
    assert frontier.at(points, "trust", -1.0, "noise") == 0
    assert frontier.at(points, "trust", 1e3, "noise") == 10 * (len(weights) - 1)


def test_a_selection_is_judged_by_its_right_samples():
    embeddings = some_embeddings()
    labels = embeddings.labels.clone()
    labels[:20] = (labels[:20] + 1) % 4
    judge = frontier.Judge(embeddings, labels, seed=0)
    everything = judge(torch.arange(200))
    assert everything["noise"] == pytest.approx(10)
    assert everything["diversity"] == pytest.approx(1)
    assert everything["coverage"] == 1  # no random subset of right labels of this size covers better
    assert judge(torch.arange(20, 110))["noise"] == 0
    typical = semantic_alignment(embeddings.image, embeddings.text, embeddings.labels)[20:].argsort(descending=True)
    easy, hard = (judge(20 + rows) for rows in (typical[:60], typical[-60:]))
    assert easy["diversity"] < 1 < hard["diversity"]
    assert easy["hard"] < hard["hard"]
    assert min(easy["coverage"], hard["coverage"]) > 1  # one end of the data covers the other worse than a random part


def test_of_a_kind_of_damage_stays_what_is_among_the_better_half():
    value = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.2, 0.1])
    kinds = np.array([None, "fog", None, "fog", "fog", "snow"], dtype=object)
    assert damage.stays(value, kinds) == {"fog": pytest.approx(100 / 3), "snow": 0}


def test_rare_looks_alone_make_a_table():
    looks = {"grey": {"flagged": 1.0, "better half": 20.0, "drawn": 40.0}}
    spent = {"embed": 3.0, "statistics_and_twins": 0.2}
    rows = [{"kinds": "rare", "seed": seed, "looks": looks} for seed in range(2)]
    page = damage.table({"images": 100, "stored_again": None, "rows": rows, "milliseconds_an_image": spent})
    assert "| grey | 1.0 (1.0) | 20.0 (20.0) | 40.0 (40.0) |" in page


def test_equal_values_stay_by_chance_not_by_place():
    kinds = np.array(["fog"] * 500 + [None] * 500, dtype=object)
    assert damage.stays(torch.ones(1000), kinds)["fog"] == pytest.approx(50, abs=6)
