"""Of near-duplicates the preferred one stays; what is merely close to its class stays as well."""

import pytest
import torch
from helpers import random_features
from torch.nn.functional import normalize

from selectsampler.scores import duplicates as module
from selectsampler.scores import near_duplicates


def with_twins(twins, *, spread=1e-3):
    """Features of 200 samples of four classes, the last `twins` rows nearly equal to the first of the same class."""
    images, _, labels = random_features(samples=200, classes=4, dim=32)
    generator = torch.Generator().manual_seed(1)
    copies = images[:twins] + spread * torch.randn(twins, 32, generator=generator)
    return torch.cat([images, copies]), torch.cat([labels, labels[:twins]])


def by_definition(images, labels, preference):
    """Whether one that is preferred lies within a tenth of the usual distance, pair by pair in float64."""
    images = normalize(images.double(), dim=1)
    nearest = torch.full((len(labels),), torch.nan, dtype=torch.float64)
    for i in range(len(labels)):
        before = (preference > preference[i]) | ((preference == preference[i]) & (torch.arange(len(labels)) < i))
        rows = (before & (labels == labels[i])).nonzero()[:, 0]
        if len(rows):
            nearest[i] = (images[rows] - images[i]).norm(dim=1).min()
    usual = torch.stack([nearest[labels == c][~nearest[labels == c].isnan()].median() for c in range(4)])
    return nearest < 0.1 * usual[labels]


@pytest.mark.parametrize("block", [2**23, 100])
def test_it_is_what_its_definition_says(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    images, labels = with_twins(20)
    preference = torch.rand(220, generator=torch.Generator().manual_seed(2)).mul(10).round()
    found = near_duplicates(images, labels, preference)
    assert torch.equal(found, by_definition(images, labels, preference))
    assert int(found.sum()) == 20


def test_the_preferred_one_of_two_stays():
    images, labels = with_twins(10)
    preference = torch.zeros(210)
    preference[200:] = 1.0
    found = near_duplicates(images, labels, preference).nonzero()[:, 0]
    assert found.tolist() == list(range(10))


def test_near_images_of_different_classes_are_no_duplicates():
    images, labels = with_twins(10)
    labels[200:] = (labels[200:] + 1) % 4
    assert not near_duplicates(images, labels, torch.zeros(210)).any()


def test_a_class_of_one_has_no_duplicates_and_one_of_two_only_copies():
    points = torch.tensor([[1.0, 0.0], [1.0, 1e-4], [1.0, 0.0], [1.0, 1e-2], [1.0, 0.0]])
    found = near_duplicates(points, torch.tensor([0, 0, 1, 1, 2]), torch.zeros(5))
    assert found.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("copies", [1, 2, 9])
@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_where_every_image_has_copies_one_of_each_stays(copies, spread):
    images, _, labels = random_features(samples=100, classes=4, dim=32)
    generator = torch.Generator().manual_seed(1)
    stored = [images + spread * torch.randn(100, 32, generator=generator) for _ in range(copies)]
    found = near_duplicates(torch.cat([images, *stored]), labels.repeat(copies + 1), torch.zeros(100 * (copies + 1)))
    assert found.tolist() == [False] * 100 + [True] * (100 * copies)


def test_of_a_class_of_equals_one_stays():
    assert near_duplicates(torch.ones(50, 3), torch.zeros(50, dtype=torch.int64), torch.zeros(50)).sum() == 49
