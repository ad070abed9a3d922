"""Adaptation: losses against slow definitions, folds that never see their labels, and what adapters are good for."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import random_embeddings, random_features
from torch import Tensor
from torch.testing import assert_close

from selectsampler import Embeddings, adapt, adaptation, score
from selectsampler.adaptation import info_nce_loss, prompt_loss

QUICK = {"steps": 6, "batch_size": 16, "progress": False}


def adapters(adapted) -> Tensor:
    return torch.stack([adapted.image_adapters, adapted.text_adapters], dim=1)  # (F, 2, D, D)


def moved_to_another_domain(embeddings: Embeddings, seed: int = 0) -> Embeddings:
    """The same images after a rotation of their space, as of a domain that CLIP does not know."""
    dim = embeddings.image.shape[1]
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed))).Q
    return replace(embeddings, image=embeddings.image @ rotation)


# --- losses


def cosines(image: Tensor, text: Tensor) -> list[list[float]]:
    unit = [[row / row.norm() for row in matrix.double()] for matrix in (image, text)]
    return [[float(i @ t) for t in unit[1]] for i in unit[0]]


def log_share(of: float, among: list[float]) -> float:
    """log softmax of one entry, by its definition."""
    return math.log(math.exp(of) / sum(math.exp(other) for other in among))


def slow_prompt_loss(image: Tensor, text: Tensor, labels: list[int], temperature: float, robustness: float) -> float:
    logits = [[cosine / temperature for cosine in row] for row in cosines(image, text)]
    of_label = [log_share(row[y], row) for row, y in zip(logits, labels, strict=True)]
    of_image = [log_share(row[y], [other[y] for other in logits]) for row, y in zip(logits, labels, strict=True)]
    weights = [math.exp(log) ** robustness for log in of_label]
    terms = [w * (a + b) for w, a, b in zip(weights, of_label, of_image, strict=True)]
    return -sum(terms) / sum(weights) / 2


def slow_info_nce(image: Tensor, text: Tensor, labels: list[int], temperature: float) -> float:
    pairs = [[cosine / temperature for cosine in row] for row in cosines(image, text[labels])]
    rows = [log_share(row[i], row) for i, row in enumerate(pairs)]
    columns = [log_share(pairs[i][i], [row[i] for row in pairs]) for i in range(len(pairs))]
    return -sum(rows + columns) / len(pairs) / 2


@pytest.mark.parametrize("robustness", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_prompt_loss_is_the_symmetric_cross_entropy_over_prompts_and_images(robustness, temperature):
    images, texts, labels = random_features(samples=12, classes=4)
    loss = prompt_loss(images, texts, labels, torch.tensor(temperature), robustness)
    assert float(loss) == pytest.approx(slow_prompt_loss(images, texts, labels, temperature, robustness), rel=1e-5)


def test_the_weights_of_prompt_loss_carry_no_gradient():
    images, texts, labels = random_features(samples=12, classes=4)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(prompt_loss(images, texts, labels, torch.tensor(0.5), 1.0), images)
    # by the definition: the weighted sum of the single terms' gradients, with the weights as plain numbers
    cosine = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=2) / 0.5
    own = torch.arange(12), labels
    terms = cosine.log_softmax(1)[own] + cosine.log_softmax(0)[own]
    weights = cosine.softmax(1)[own].detach()
    (expected,) = torch.autograd.grad(-(weights * terms).sum() / weights.sum() / 2, images)
    assert_close(gradient, expected)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_info_nce_loss_tells_every_pair_from_all_others_of_the_batch(temperature):
    images, texts, labels = random_features(samples=12, classes=4)
    loss = info_nce_loss(images, texts, labels, torch.tensor(temperature))
    assert float(loss) == pytest.approx(slow_info_nce(images, texts, labels, temperature), rel=1e-5)


# --- methods


def test_no_adaptation_is_the_identity():
    embeddings = random_embeddings(samples=20, classes=2, dim=8)
    adapted = adapt(embeddings, method="none")
    assert torch.equal(adapted.image_adapters, torch.eye(8)[None])
    assert torch.equal(adapted.text_adapters, torch.eye(8)[None])
    assert adapted.distance_features is embeddings.image
    assert adapted.provenance == {"method": "none"}
    ((rows, image, text),) = adapted.by_fold()
    assert torch.equal(rows, torch.arange(20))
    assert_close(image, embeddings.image)
    assert_close(text, embeddings.text)


@pytest.mark.parametrize(("method", "folds"), [("cross_fit", 3), ("info_nce", 1)])
def test_adapters_keep_the_dimension_and_every_sample_has_a_fold(method, folds):
    embeddings = random_embeddings(samples=31, classes=2, dim=8)
    options = {"folds": 3} if method == "cross_fit" else {}
    adapted = adapt(embeddings, method=method, **options, **QUICK)
    assert adapted.image_adapters.shape == adapted.text_adapters.shape == (folds, 8, 8)
    assert (len(adapted), adapted.method) == (31, method)
    parts = list(adapted.by_fold())
    assert torch.equal(torch.cat([rows for rows, _, _ in parts]).sort().values, torch.arange(31))
    for fold, (rows, image, text) in enumerate(parts):
        assert_close(image, embeddings.image[rows] @ adapted.image_adapters[fold].T)
        assert_close(text, embeddings.text @ adapted.text_adapters[fold].T)


def test_adapted_features_come_in_blocks_which_change_no_score(monkeypatch):
    adapted = adapt(random_embeddings(samples=31, classes=2), folds=3, **QUICK)
    expected = score(adapted, columns=("semantic_alignment",))["semantic_alignment"]
    monkeypatch.setattr(adaptation, "BLOCK", 4)
    assert max(len(rows) for rows, _, _ in adapted.by_fold()) == 4
    assert_close(score(adapted, columns=("semantic_alignment",))["semantic_alignment"], expected)


def test_the_image_and_the_text_adapter_are_two():
    adapted = adapt(random_embeddings(samples=30, classes=2), method="info_nce", **QUICK)
    assert not torch.allclose(adapted.image_adapters, adapted.text_adapters)


@pytest.mark.parametrize("method", ["cross_fit", "info_nce"])
def test_one_seed_gives_one_result_and_another_seed_another(method):
    embeddings = random_embeddings(samples=60, classes=3)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = adapt(embeddings, method=method, seed=3, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second, other = (adapt(embeddings, method=method, seed=seed, **QUICK) for seed in (3, 4))
    assert torch.equal(adapters(first), adapters(second))
    assert torch.equal(first.folds, second.folds)
    assert first.provenance == second.provenance
    assert not torch.equal(adapters(first), adapters(other))


def test_half_precision_embeddings_are_adapted_in_float32():
    embeddings = random_embeddings(samples=40, classes=2)
    half = replace(embeddings, image=embeddings.image.half())
    assert adapt(half, **QUICK).image_adapters.dtype == torch.float32


# --- folds


@pytest.mark.parametrize(("samples", "folds"), [(97, 5), (40, 2), (12, 12)])
def test_folds_are_equal_within_one_and_so_is_every_class_in_them(samples, folds):
    embeddings = random_embeddings(samples, classes=4)
    assigned = adapt(embeddings, folds=folds, **QUICK).folds
    counts = torch.bincount(assigned, minlength=folds)
    assert len(counts) == folds
    assert counts.max() - counts.min() <= 1
    for label in range(4):
        counts = torch.bincount(assigned[embeddings.labels == label], minlength=folds)
        assert counts.max() - counts.min() <= 1


def test_folds_are_drawn_at_random_not_in_storage_order():
    embeddings = random_embeddings(samples=60, classes=2)
    folds = [adapt(embeddings, folds=3, seed=seed, **QUICK).folds for seed in range(3)]
    assert not torch.equal(folds[0], folds[1])
    assert not torch.equal(folds[1], folds[2])


def test_the_adapters_of_a_fold_never_see_its_labels_or_images(monkeypatch):
    embeddings = random_embeddings(samples=60, classes=3)
    adapted = adapt(embeddings, folds=4, **QUICK)
    # folds are spread over the classes, so that another label alone would deal them anew: hold them
    monkeypatch.setattr(adaptation, "_stratified_folds", lambda *_: adapted.folds)
    sample = 7
    fold = int(adapted.folds[sample])
    others = [f for f in range(4) if f != fold]
    label = embeddings.labels.clone()
    label[sample] = (label[sample] + 1) % 3
    image = embeddings.image.clone()
    image[sample] = -image[sample]
    for change in ({"labels": label}, {"image": image}):
        changed = adapt(replace(embeddings, **change), folds=4, **QUICK)
        assert torch.equal(adapters(changed)[fold], adapters(adapted)[fold])
        for other in others:
            assert not torch.equal(adapters(changed)[other], adapters(adapted)[other])


def test_unreadable_images_take_no_part_whatever_they_hold():
    readable = torch.ones(60, dtype=torch.bool)
    readable[[4, 9, 33]] = False
    embeddings = random_embeddings(samples=60, classes=3, readable=readable)
    image, labels = embeddings.image.clone(), embeddings.labels.clone()
    image[~readable] = 100.0
    labels[~readable] = (labels[~readable] + 1) % 3
    without = random_embeddings(samples=60, classes=3)
    for method in ("cross_fit", "info_nce"):
        adapted = adapt(embeddings, method=method, **QUICK)
        changed = adapt(replace(embeddings, image=image, labels=labels), method=method, **QUICK)
        assert torch.equal(adapters(changed), adapters(adapted))
        assert torch.equal(changed.folds, adapted.folds)
        assert not torch.equal(adapters(adapt(without, method=method, **QUICK)), adapters(adapted))


def test_the_readable_images_alone_are_spread_over_the_folds():
    readable = torch.zeros(60, dtype=torch.bool)
    readable[[4, 9, 33]] = True
    adapted = adapt(random_embeddings(samples=60, classes=3, readable=readable), folds=3, **QUICK)
    assert sorted(adapted.folds[readable].tolist()) == [0, 1, 2]


# --- what training does


def test_a_single_step_moves_the_adapters_by_the_learning_rate():
    adapted = adapt(random_embeddings(samples=30, classes=2), method="info_nce", steps=1, learning_rate=0.25)
    moved = (adapted.image_adapters[0] - torch.eye(16)).abs()
    assert_close(moved, torch.full_like(moved, 0.25), rtol=1e-2, atol=0)  # Adam's first step has one length


def test_the_rate_falls_along_a_cosine_to_zero():
    schedule = adaptation.Schedule(steps=10, batch_size=2, learning_rate=0.2, seed=0)
    assert [schedule.rate(step) for step in (0, 5, 10)] == pytest.approx([0.2, 0.1, 0.0])


def test_what_was_done_stands_in_the_provenance_as_json_with_a_falling_loss_curve_a_fold():
    embeddings = moved_to_another_domain(random_embeddings(samples=100, classes=3))
    adapted = adapt(embeddings, folds=3, steps=60, learning_rate=0.02, shrinkage=0.0, robustness=0.25, seed=9)
    provenance = adapted.provenance
    assert json.loads(json.dumps(provenance)) == provenance
    expected = {"method": "cross_fit", "folds": 3, "steps": 60, "batch_size": 256, "robustness": 0.25, "seed": 9}
    assert expected.items() <= provenance.items()
    assert len(provenance["loss_curves"]) == len(provenance["temperatures"]) == 3
    for curve in provenance["loss_curves"]:
        assert len(curve) in (20, 21)
        assert curve[-1] < curve[0] - 0.1
    assert all(temperature != pytest.approx(0.07) for temperature in provenance["temperatures"])


@pytest.mark.parametrize("method", ["cross_fit", "info_nce"])
def test_adapters_bring_a_foreign_domain_back_to_its_prompts(method):
    embeddings = moved_to_another_domain(random_embeddings(samples=300, classes=3))
    before = score(embeddings)["semantic_alignment"]
    adapted = adapt(embeddings, method=method, steps=100, learning_rate=0.02, shrinkage=0.0)
    after = score(adapted)["semantic_alignment"]
    assert before.mean() < 0.3
    assert after.mean() > 0.6


def test_wrong_labels_align_worse_even_where_the_adapters_were_trained_with_them():
    embeddings = moved_to_another_domain(random_embeddings(samples=300, classes=3))
    wrong = torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.3
    labels = torch.where(wrong, (embeddings.labels + 1) % 3, embeddings.labels)
    adapted = adapt(embeddings.with_labels(labels), steps=100, learning_rate=0.02, shrinkage=0.0)
    alignment = score(adapted)["semantic_alignment"]
    right_above_wrong = (alignment[~wrong][:, None] > alignment[wrong]).double().mean()
    assert right_above_wrong > 0.9


def test_robustness_listens_less_to_labels_that_are_unlikely():
    embeddings = random_embeddings(samples=300, classes=3)
    wrong = torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.3
    noisy = embeddings.with_labels(torch.where(wrong, (embeddings.labels + 1) % 3, embeddings.labels))
    gaps = []
    for robustness in (0.0, 1.0):
        adapted = adapt(noisy, steps=60, learning_rate=0.02, shrinkage=0.0, robustness=robustness)
        alignment = score(adapted)["semantic_alignment"]
        gaps.append(float(alignment[~wrong].mean() - alignment[wrong].mean()))
    assert gaps[1] > gaps[0] + 0.1


@pytest.mark.parametrize("method", ["cross_fit", "info_nce"])
def test_shrinkage_keeps_the_adapters_near_the_identity(method):
    embeddings = moved_to_another_domain(random_embeddings(samples=60, classes=3))
    distances = [
        float((adapt(embeddings, method=method, shrinkage=s, steps=60).image_adapters - torch.eye(16)).norm())
        for s in (0.0, 100.0, 10_000.0)
    ]
    assert distances[0] > 1.5 * distances[1] > 3 * distances[2]


def test_the_shrinkage_adds_its_share_of_the_squared_distance_to_the_loss(monkeypatch):
    shrinkage = 40.0

    class Descent(torch.optim.SGD):  # plain steps, so that what one step leaves tells the gradient
        def __init__(self, groups, lr, **_):
            super().__init__(groups, lr=lr)

    monkeypatch.setattr(torch.optim, "Adam", Descent)
    monkeypatch.setattr(adaptation.Schedule, "rate", lambda *_: 0.1)
    embeddings = random_embeddings(samples=20, classes=2)
    adapted = {
        s: adapt(embeddings, method="info_nce", steps=2, shrinkage=s).image_adapters[0] - torch.eye(16)
        for s in (0.0, shrinkage)
    }
    first = adapt(embeddings, method="info_nce", steps=1, shrinkage=0.0).image_adapters[0] - torch.eye(16)
    # of a distance d^2 the gradient is 2 (shrinkage / n) d; the first step starts at d = 0
    expected = adapted[0.0] - 0.1 * 2 * shrinkage / 20 * first
    assert_close(adapted[shrinkage], expected, rtol=1e-4, atol=1e-6)
    assert first.norm() > 0


@pytest.mark.parametrize("method", ["cross_fit", "info_nce"])
def test_what_is_not_given_is_the_methods_own(method):
    schedule = adapt(random_embeddings(samples=40, classes=2), method=method, steps=2, shrinkage=0.0).provenance
    assert (schedule["steps"], schedule["shrinkage"]) == (2, 0.0)
    assert schedule["batch_size"] == adaptation.DEFAULTS[method]["batch_size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "method is 'magic', but it must be 'none', 'info_nce' or 'cross_fit'"),
        ({"folds": 1}, "folds is 1, but it must lie between 2 and the 20 readable samples"),
        ({"folds": 21}, "folds is 21"),
        ({"folds": 2.5}, r"folds is 2\.5, but it must be a whole number"),
        ({"steps": 0}, "steps is 0, but it must be a whole number, at least 1"),
        ({"steps": 2.5}, r"steps is 2\.5"),
        ({"batch_size": 1}, "batch_size is 1, but it must be a whole number, at least 2"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"robustness": -0.1}, r"robustness is -0\.1"),
        ({"robustness": 1.1}, r"robustness is 1\.1"),
        ({"robustness": math.nan}, "robustness is nan"),
        ({"shrinkage": -1.0}, r"shrinkage is -1\.0"),
        ({"shrinkage": math.inf}, "shrinkage is inf"),
        ({"seed": 0.5}, r"seed is 0\.5"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapt(random_embeddings(samples=20, classes=2), **arguments)
