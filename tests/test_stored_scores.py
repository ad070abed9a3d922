"""The paper's subsets, as an independent implementation stored them: 50,000 images, 20 % of their labels wrong."""

import numpy as np
import pytest
import torch
from helpers import shared

from selectsampler import Scores, Selection, presets, select

RUNS = pytest.mark.parametrize("run", ["cifar10_22", "cifar10_42", "cifar100_22", "cifar100_42"])
KEEP = pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
WEIGHTS = presets.paper["select"]["score_weights"]


def stored(run: str) -> tuple[Scores, np.ndarray]:
    """The scores of a run, and all that was stored with them."""
    arrays = np.load(shared(f"data/stored_scores/{run}.npz"))
    columns = {"semantic_alignment": arrays["sa"], "sample_diversity": arrays["sd"]}
    labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    return Scores({name: torch.from_numpy(values) for name, values in columns.items()}, labels=labels), arrays


def stored_subset(arrays: np.ndarray, keep: float) -> set[int]:
    mask = np.unpackbits(arrays[f"mask_{round(100 * keep)}"], count=len(arrays["sa"]))
    return set(np.flatnonzero(mask).tolist())


def assert_equal_up_to_one_swap_at_the_threshold(selection: Selection, subset: set[int], scores: Scores) -> None:
    chosen = set(selection.indices.tolist())
    utility = scores.utility(WEIGHTS)
    threshold = utility[selection.indices].min()
    swapped = sorted(chosen ^ subset)
    assert len(chosen - subset) == len(subset - chosen) <= 1
    assert ((utility[swapped] - threshold).abs() < 1e-6).all()


@RUNS
@KEEP
def test_the_exact_method_reproduces_the_stored_subset(run, keep):
    scores, arrays = stored(run)
    selection = select(scores, keep, score_weights=WEIGHTS, method="exact")
    assert len(selection) == round(keep * 50_000)
    assert_equal_up_to_one_swap_at_the_threshold(selection, stored_subset(arrays, keep), scores)


@RUNS
@KEEP
def test_the_stored_utility_is_that_of_the_formula(run, keep):
    scores, arrays = stored(run)
    utility = 0.0
    for values, weight in ((arrays["sa"], 1.0), (arrays["sd"], 0.1)):
        scaled = (values.astype(np.float64) - values.min()) / (float(values.max()) - float(values.min()))
        utility = utility + weight * scaled / scaled.mean()
    torch.testing.assert_close(scores.utility(WEIGHTS), torch.from_numpy(utility), rtol=1e-5, atol=1e-6)
    selection = select(scores, keep)
    assert selection.objective == pytest.approx(np.sort(utility)[-len(selection) :].sum(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "keep"), [("cifar10_22", 0.3), ("cifar10_42", 0.7), ("cifar100_22", 0.5), ("cifar100_42", 0.7)]
)
def test_the_straight_through_optimizer_ends_in_the_same_subset(run, keep):
    scores, arrays = stored(run)
    selection = select(scores, keep, score_weights=WEIGHTS, method="straight_through")
    assert len(selection) == round(keep * 50_000)
    assert_equal_up_to_one_swap_at_the_threshold(selection, stored_subset(arrays, keep), scores)
    details = selection.provenance["selection"]
    assert details["converged"]
    assert details["gap"] == pytest.approx(0, abs=1e-7)
    assert 2 * abs(details["converged_size"] - len(selection)) / 50_000 < 1e-3
    assert 1_900 < details["steps"] < 3_000
    assert selection.objective == pytest.approx(select(scores, keep).objective, rel=1e-7)


@RUNS
def test_few_of_the_wrong_labels_are_selected(run):
    scores, arrays = stored(run)
    kept = select(scores, 0.3, score_weights=WEIGHTS).indices.numpy()
    assert arrays["is_noisy"].mean() == pytest.approx(0.2, abs=0.02)
    assert arrays["is_noisy"][kept].mean() < 0.005


@RUNS
def test_balance_gives_every_class_its_share_where_the_papers_subset_does_not(run):
    scores, _ = stored(run)
    given = torch.bincount(scores.labels)
    plain, balanced = (select(scores, 0.3, balance=balance) for balance in (None, "given"))
    shares = torch.bincount(scores.labels[balanced.indices], minlength=len(given))
    assert ((shares - 0.3 * given).abs() < 1).all()
    assert len(balanced) == 15_000
    assert not torch.equal(plain.indices, balanced.indices)
    assert balanced.objective < plain.objective
