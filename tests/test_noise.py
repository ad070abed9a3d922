"""Label noise has exactly the rate that it was asked for."""

import pytest
import torch
from selectsampler.recipes.noise import symmetric

TRUTH = torch.arange(7).repeat(143)  # 1,001 labels


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_symmetric_noise_changes_exactly_the_asked_share(rate):
    assert int((symmetric(TRUTH, rate, classes=7, seed=1) != TRUTH).sum()) == round(rate * len(TRUTH))


def test_symmetric_noise_follows_from_its_seed():
    first, again, other = (symmetric(TRUTH, 0.4, classes=7, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_symmetric_noise_goes_to_all_other_classes_alike():
    many = torch.zeros(70_000, dtype=torch.int64)
    counts = torch.bincount(symmetric(many, 1.0, classes=8, seed=0), minlength=8)
    assert counts[0] == 0
    assert (counts[1:] - 10_000).abs().max() < 400  # four standard deviations


@pytest.mark.parametrize(("rate", "classes"), [(-0.1, 7), (1.1, 7), (0.4, 1)])
def test_impossible_noise_is_refused(rate, classes):
    with pytest.raises(ValueError, match="rate"):
        symmetric(TRUTH, rate, classes=classes, seed=0)
