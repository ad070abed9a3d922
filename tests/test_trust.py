"""Trust finds wrong labels of every kind, knows how many there are, and says where CLIP is no help."""

import math
import warnings

import numpy as np
import pytest
import torch
from selectsampler.recipes import noise
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

from selectsampler import Embeddings, Scores, SelectSampler, embed, presets, score, select
from selectsampler.scores import label_trust, trust_heads
from selectsampler.scores import trust as module
from selectsampler.scores.transition import anchored_transition, even_transition
from selectsampler.scores.trust_evidence import largest

CLASSES, EACH, DIM = 6, 300, 24


def made_images(*, seed=0, prompts="right", spread=0.55):
    """Features around a direction a class, prompts near these directions (or not), and the true labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1)
    truth = torch.arange(CLASSES).repeat(EACH)
    images = centres[truth] + spread * torch.randn(len(truth), DIM, generator=generator) / math.sqrt(DIM) * 2
    text = centres + 0.3 * torch.randn(CLASSES, DIM, generator=generator) / math.sqrt(DIM)
    if prompts == "random":
        text = torch.randn(CLASSES, DIM, generator=generator)
    return images, text, truth


def noisy(kind, truth, images, *, rate, seed=0):
    if kind == "symmetric":
        return noise.symmetric(truth, rate, classes=CLASSES, seed=seed)
    if kind == "asymmetric":
        return noise.asymmetric(truth, rate, mapping={0: 1, 1: 0, 2: 3}, seed=seed)
    return noise.instance_dependent(images, truth, rate, classes=CLASSES, seed=seed)


def expected_calibration_error(probability, right, bins=15):
    which = (probability * bins).long().clamp(max=bins - 1)
    errors = [
        float((which == b).float().mean()) * abs(float((probability - right.float())[which == b].mean()))
        for b in which.unique().tolist()
    ]
    return sum(errors)


@pytest.mark.parametrize(("kind", "error"), [("symmetric", 0.04), ("asymmetric", 0.04), ("instance", 0.16)])
def test_it_tells_right_from_wrong_labels_and_is_calibrated(kind, error):
    images, text, truth = made_images()
    labels = noisy(kind, truth, images, rate=0.4)
    trust = label_trust(images, text, labels)
    right = labels == truth
    assert roc_auc_score(right, trust.probability) > 0.97
    assert expected_calibration_error(trust.probability, right) < error
    assert trust.noise_rate == pytest.approx(float((~right).float().mean()), abs=error)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.6])
def test_it_knows_how_noisy_the_labels_are(rate):
    images, text, truth = made_images(seed=1)
    trust = label_trust(images, text, noisy("symmetric", truth, images, rate=rate))
    assert trust.noise_rate == pytest.approx(rate, abs=0.04)
    assert_close(trust.class_noise.mean().item(), trust.noise_rate, atol=0.02, rtol=0)


@pytest.mark.parametrize("temperature", [0.03, 0.06, 0.3])
def test_a_wrong_temperature_does_not_spoil_the_calibration(temperature):
    images, text, truth = made_images(seed=2, spread=0.8)
    labels = noisy("symmetric", truth, images, rate=0.4)
    trust = label_trust(images, text, labels, temperature=temperature)
    assert expected_calibration_error(trust.probability, labels == truth) < 0.035


def test_noise_that_follows_the_image_does_not_outweigh_the_prompts():
    images, text, truth = made_images(seed=2, spread=1.0)
    standard = (images - images.mean(dim=0)) / images.std(dim=0)
    labels = noisy("instance", truth, standard, rate=0.4)
    cosines = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    zero_shot = (cosines / 0.06).softmax(dim=1).gather(1, labels[:, None])[:, 0]
    trust = label_trust(images, text, labels, temperature=0.06)
    assert roc_auc_score(labels == truth, trust.probability) > roc_auc_score(labels == truth, zero_shot) - 0.002
    assert expected_calibration_error(trust.probability, labels == truth) < 0.04


@pytest.mark.parametrize(("rate", "gain"), [(0.2, -0.002), (0.4, 0.01)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_classes_that_look_alike_and_are_mistaken_one_way_are_told_apart(seed, rate, gain):
    """Whoever learns the labels as given learns that doubtful images are of the class that gets the wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(DIM, generator=generator) + 0.7 * torch.randn(2, DIM, generator=generator)
    centres = torch.nn.functional.normalize(centres, dim=1)
    truth = torch.arange(2).repeat(700)
    images = centres[truth] + 2 / math.sqrt(DIM) * torch.randn(len(truth), DIM, generator=generator)
    text = centres + 0.1 / math.sqrt(DIM) * torch.randn(2, DIM, generator=generator)
    labels = torch.where((truth == 0) & (torch.rand(len(truth), generator=generator) < rate), 1, truth)
    cosines = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    zero_shot = (cosines / 0.05).softmax(dim=1).gather(1, labels[:, None])[:, 0]
    trust = label_trust(images, text, labels, temperature=0.05)
    assert roc_auc_score(labels == truth, trust.probability) > roc_auc_score(labels == truth, zero_shot) + gain
    assert trust.noise_rate == pytest.approx(float((labels != truth).float().mean()), abs=0.04)


def test_where_no_noise_is_seen_labels_are_ranked_all_the_same(monkeypatch):
    images, text, truth = made_images()
    labels = noisy("symmetric", truth, images, rate=0.05)
    monkeypatch.setattr(module.Evidence, "noise_rate", lambda *_: 0.0)
    monkeypatch.setattr(module, "TELLING", math.inf)
    assert roc_auc_score(labels == truth, label_trust(images, text, labels).probability) > 0.97


def test_the_anchors_of_a_small_class_are_its_own():
    sizes = [400, 12, 60]
    labels = torch.arange(3).repeat_interleave(torch.tensor(sizes))

    class Surely:
        """Heads that know every class, and of others which is the likelier."""

        def logits(self, rows):
            return 9.0 * torch.nn.functional.one_hot(labels[rows], 3) + rows[:, None] / len(labels)

    data = trust_heads.Data(torch.randn(len(labels), DIM), torch.randn(3, DIM), labels)
    assert torch.equal(anchored_transition(data, Surely()), torch.eye(3))


@pytest.mark.parametrize(("kind", "counts"), [("asymmetric", True), ("mixed", True), ("of_the_unsure", False)])
def test_confusions_count_where_the_class_tells_what_an_image_is_mistaken_for(kind, counts, monkeypatch):
    images, text, truth = made_images(spread=1.0)
    if kind != "of_the_unsure":
        labels = noisy("asymmetric", truth, images, rate=0.3)
    if kind == "mixed":
        labels = noisy("symmetric", labels, images, rate=0.2, seed=1)
    if kind == "of_the_unsure":  # whoever looks at other features mistakes an image for what it looks like there
        observed = torch.cat([images[:, : DIM // 2], torch.zeros(len(images), DIM - DIM // 2)], dim=1)
        labels = noisy("instance", truth, observed, rate=0.2)
    auroc = {}
    for name, telling in (("as it is", module.TELLING), ("always", -1.0), ("never", math.inf)):
        monkeypatch.setattr(module, "TELLING", telling)
        trust = label_trust(images, text, labels)
        auroc[name] = roc_auc_score(labels == truth, trust.probability)
        assert trust.by_class is (counts if name == "as it is" else name == "always")
    assert auroc["as it is"] == auroc["always" if counts else "never"]
    assert auroc["as it is"] == max(auroc.values())


def test_the_transition_matrix_shows_which_classes_are_confused():
    images, text, truth = made_images()
    labels = noisy("asymmetric", truth, images, rate=0.4)
    transition = label_trust(images, text, labels).transition
    assert_close(transition.sum(dim=1), torch.ones(CLASSES))
    expected = torch.from_numpy(np.asarray(noise.transition_matrix(truth, labels, CLASSES))).float()
    assert float((transition - expected).abs().max()) < 0.1
    confused = {tuple(pair) for pair in (transition.fill_diagonal_(0) > 0.2).nonzero().tolist()}
    assert confused == {(0, 1), (1, 0), (2, 3)}


def test_the_datas_own_evidence_helps_where_prompts_say_nothing():
    images, text, truth = made_images(prompts="random")
    labels = noisy("symmetric", truth, images, rate=0.3)
    with pytest.warns(UserWarning, match="CLIP does not know .* of 6 classes"):
        trust = label_trust(images, text, labels)
    assert roc_auc_score(labels == truth, trust.probability) > 0.95


def test_classes_that_clip_does_not_know_are_named():
    images, text, truth = made_images()
    text[4] = -text[4]
    with pytest.warns(UserWarning, match="CLIP does not know 1 of 6 classes by their prompts: owl"):
        trust = label_trust(images, text, truth, class_names=["a", "b", "c", "d", "owl", "e"])
    assert trust.unknown == (4,)
    assert trust.noise_rate < 0.05, "and they are not distrusted for that"


def test_one_seed_gives_the_same_bits_and_storage_order_and_length_count_for_little():
    images, text, truth = made_images()
    labels = noisy("symmetric", truth, images, rate=0.4)
    first = label_trust(images, text, labels, seed=3).probability
    assert torch.equal(first, label_trust(images, text, labels, seed=3).probability)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    other = label_trust(3 * images[order], text, labels[order], seed=3).probability
    assert float((first[order] - other).abs().mean()) < 0.03


def test_blocks_change_nothing(monkeypatch):
    images, text, truth = made_images()
    labels = noisy("symmetric", truth, images, rate=0.4)
    whole = label_trust(images, text, labels)
    monkeypatch.setattr(trust_heads.Data, "block_rows", 97)
    parts = label_trust(images, text, labels)
    assert_close(whole.probability, parts.probability, atol=1e-3, rtol=0)


def test_a_label_is_judged_by_heads_that_never_saw_it():
    images, text, truth = made_images(prompts="random", spread=3.0)  # nothing to learn: only memory could help
    labels = noisy("symmetric", truth, images, rate=0.5)
    with pytest.warns(UserWarning, match="does not know"):
        probability = label_trust(torch.randn(images.shape), text, labels).probability
    assert 0.4 < roc_auc_score(labels == truth, probability) < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_features": torch.ones(1, DIM), "labels": torch.zeros(4, dtype=torch.int64)}, "one class only"),
        ({"folds": 1}, "folds is 1"),
        ({"temperature": 0.0}, "temperature is 0.0, but it must be positive"),
        ({"folds": 9}, "folds is 9.*the 4 samples"),
        ({"labels": torch.tensor([0, 1, 2, 7])}, r"labels\[3\] is 7"),
        ({"image_features": torch.zeros(4, DIM)}, "zero"),
        ({"text_features": torch.eye(3, DIM).index_fill(0, torch.tensor([1]), 0.0)}, r"text_features\[1\] is zero"),
        ({"folds": 2.5}, r"folds is 2.5, but it must be a whole number"),
        ({"seed": -1}, "seed is -1"),
        ({"class_names": ["a"]}, "There are 1 class names, but text_features names"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {
        "image_features": torch.ones(4, DIM),
        "text_features": torch.eye(3, DIM),
        "labels": torch.arange(4) % 3,
    }
    with pytest.raises(ValueError, match=message):
        label_trust(**(arguments | {"folds": 2} | change))


def embeddings_of(images, text, labels, **more):
    return Embeddings(image=images, text=text, labels=labels, class_names=[f"c{i}" for i in range(CLASSES)], **more)


def test_by_default_wrong_labels_are_left_out_and_near_duplicates_come_last():
    images, text, truth = made_images()
    images[1::CLASSES][:20] = images[1] + 1e-4  # twenty times the same picture
    labels = noisy("symmetric", truth, images, rate=0.4)
    scores = score(embeddings_of(images, text, labels))
    kept = select(scores, keep=0.3)
    assert float((labels != truth)[kept.indices].float().mean()) < 0.01
    repeated = scores["trusted_diversity"][1::CLASSES][:20][labels[1::CLASSES][:20] == 1]
    assert len(repeated) > 8
    assert int((repeated > 0).sum()) <= 1
    assert kept.provenance["trust"]["noise_rate"] == pytest.approx(0.4, abs=0.05)
    assert kept.provenance["selection"]["balance"] == "trusted"


def test_unreadable_images_are_not_judged():
    images, text, truth = made_images()
    readable = torch.ones(len(truth), dtype=torch.bool)
    readable[::7] = False
    images[::7] = 1.0
    scores = score(embeddings_of(images, text, truth, readable=readable))
    assert not scores["trust"][::7].any()
    assert not scores["trusted_diversity"][::7].any()
    assert float(scores["trust"][readable].mean()) > 0.9


def test_trusted_diversity_is_trust_times_the_distance_to_trusted_neighbours():
    images, text, truth = made_images()
    scores = score(embeddings_of(images, text, noisy("symmetric", truth, images, rate=0.3)), k=5)
    directions = torch.nn.functional.normalize(images, dim=1)
    trust, labels = scores["trust"], scores.labels
    row = int((trust > 0.9).nonzero()[3])
    others = ((labels == labels[row]) & (trust >= 0.5)).nonzero()[:, 0]
    distances = (directions[others[others != row]] - directions[row]).norm(dim=1).sort().values[:5]
    mean = scores["trusted_diversity"][trust >= 0.5] / trust[trust >= 0.5]
    assert_close(mean.mean(), torch.tensor(1.0), atol=1e-4, rtol=0)
    other = int((trust > 0.9).nonzero()[8])
    near = ((labels == labels[other]) & (trust >= 0.5)).nonzero()[:, 0]
    second = (directions[near[near != other]] - directions[other]).norm(dim=1).sort().values[:5]
    ratio = scores["trusted_diversity"][row] / scores["trusted_diversity"][other]
    assert_close(ratio, trust[row] * distances.mean() / (trust[other] * second.mean()), rtol=1e-4, atol=0)


def scores_with_trust(trust, labels):
    return Scores(
        {"trust": torch.tensor(trust), "semantic_alignment": torch.tensor(trust)}, labels=torch.tensor(labels)
    )


def test_a_trusted_balance_follows_the_sum_of_trust():
    scores = scores_with_trust([0.9] * 10 + [0.1] * 10 + [0.9] * 20, [0] * 20 + [1] * 20)
    kept = select(scores, count=12, method="exact")
    assert torch.bincount(scores.labels[kept.indices]).tolist() == [4, 8]  # 10 to 18 of trust


def test_a_trusted_balance_asks_no_class_for_more_than_it_can_trust():
    scores = scores_with_trust([0.9] * 2 + [0.49] * 60 + [0.9] * 20, [0] * 62 + [1] * 20)
    kept = select(scores, count=15, method="exact")
    assert torch.bincount(scores.labels[kept.indices]).tolist() == [2, 13]


def test_a_budget_beyond_what_can_be_trusted_is_met_with_a_warning():
    scores = scores_with_trust([0.9, 0.2, 0.3, 0.9, 0.4, 0.1], [0, 0, 0, 1, 1, 1])
    with pytest.warns(UserWarning, match="The budget is 4, but only 2 labels of distinct images are more"):
        kept = select(scores, count=4, method="exact")
    assert kept.indices.tolist() == [0, 2, 3, 4]


def test_shares_hold_and_have_a_price():
    scores = scores_with_trust([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0] * 6)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    kept = select(scores, count=4, groups=groups, shares={1: ("0.5", "1.0")})
    assert kept.indices.tolist() == [0, 1, 3, 4]
    found = kept.provenance["selection"]
    assert found["prices"]["1"] == found["price_of_all"] == pytest.approx(0.2)
    assert found["balance"] is None
    assert kept.objective == pytest.approx(2.8)
    pinned = select(scores, count=4, groups=groups, shares={0: (0.5, 0.5), 1: (0.5, 0.5)}).provenance["selection"]
    assert pinned["prices"] == {"0": 0.0, "1": 0.0}, "each frees nothing while the other is pinned"
    assert pinned["price_of_all"] == pytest.approx(0.2)


def test_within_shares_the_lot_decides_as_well():
    generator = torch.Generator().manual_seed(0)
    trust, groups = torch.rand(400, generator=generator), torch.arange(400) % 4
    trust[:300] = 1.0
    scores = Scores({"trust": trust, "trusted_diversity": torch.rand(400, generator=generator)})
    options = {"groups": groups, "shares": {3: ("0.5", 1)}}
    drawn = [select(scores, 0.25, seed=seed, risk=0.0, **options) for seed in (0, 1)]
    assert [int((groups[each.indices] == 3).sum()) for each in drawn] == [50, 50]
    assert all(trust[each.indices].min() == 1 for each in drawn)
    assert not torch.equal(drawn[0].indices, drawn[1].indices)
    best = select(scores, 0.25, method="exact", **options)
    prices = [each.provenance["selection"]["prices"] for each in (best, drawn[0])]
    assert prices[0] == prices[1]
    assert drawn[0].objective <= drawn[0].bound == best.objective


def test_shares_that_only_doubtful_labels_can_fill_are_met_with_a_warning():
    trust = torch.tensor([0.9] * 50 + [0.2] * 50)
    scores = scores_with_trust(trust.tolist(), [0] * 100)
    groups = torch.arange(100) // 50
    with pytest.warns(UserWarning, match="20 of 40 selected samples are more likely wrong than right"):
        select(scores, 0.4, method="draw", groups=groups, shares={1: (0.5, 0.5)})


def test_of_the_surest_labels_the_quarter_with_the_lowest_margin_is_counted():
    trust = torch.tensor([1.0] * 80 + [0.3] * 320)
    margin = torch.cat([torch.linspace(-0.1, 0.5, 80), torch.linspace(-0.5, -0.2, 320)])
    scores = Scores({"trust": trust, "semantic_margin": margin}, labels=torch.zeros(400, dtype=torch.int64))
    counted = select(scores, count=40, method="exact").provenance["selection"]["hard_but_trusted"]
    assert counted["there"] == 20
    indices = select(scores, count=80).indices
    assert indices.tolist() == list(range(80))
    assert select(scores, count=80).provenance["selection"]["hard_but_trusted"]["kept"] == 20


def test_a_thousand_noisy_classes_of_twenty_are_known():
    generator = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(1000, 64, generator=generator), dim=1)
    truth = torch.arange(1000).repeat(20)
    images = text[truth] + 0.08 * torch.randn(len(truth), 64, generator=generator)
    labels = noise.symmetric(truth, 0.4, classes=1000, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trust = label_trust(images, text, labels)
    right = labels == truth
    assert roc_auc_score(right, trust.probability) > 0.97
    assert trust.noise_rate == pytest.approx(0.4, abs=0.04)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": {0: (0, 1)}}, "groups and shares go together"),
        ({"groups": torch.zeros(6, dtype=torch.int64), "shares": {0: (0.6, 0.5)}}, r"shares\[0\] is \(0.6, 0.5\)"),
        ({"groups": torch.zeros(6, dtype=torch.int64), "shares": {0: ("0.3", "0.4")}}, "no whole number lies within"),
        ({"groups": torch.arange(6) % 2, "shares": {0: (0.9, 1)}}, "Group 0 is to give 4 samples or more"),
        ({"groups": torch.arange(6) % 2, "shares": {0: (0, 1)}, "balance": "given"}, "shares replace balance"),
        ({"groups": torch.arange(6) % 2, "shares": {7: (0, 1)}}, "a group 7, but groups are numbered from 0 to 1"),
        ({"groups": torch.arange(6) % 2, "shares": {0: 0.5}}, r"shares\[0\] is 0.5, but it must be a pair"),
        ({"groups": torch.arange(5) % 2, "shares": {0: (0, 1)}}, r"groups must be an int64 tensor of shape \(6,\)"),
        ({"method": "group"}, "pass image_features=embeddings.image"),
    ],
)
def test_shares_that_do_not_fit_are_named(arguments, message):
    scores = scores_with_trust([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0] * 6)
    with pytest.raises(ValueError, match=message):
        select(scores, count=4, **arguments)


def test_what_is_probably_damaged_is_left_out_as_what_is_probably_mislabelled_is():
    scores = scores_with_trust([0.9, 0.9, 0.2, 0.9], [0] * 4)
    intact = Scores({**scores.columns, "intactness": torch.tensor([0.99, 0.1, 0.99, 0.9])}, labels=scores.labels)
    assert select(intact, count=2, method="exact").indices.tolist() == [0, 3]


def test_the_default_preset_takes_a_data_set_of_one_class(images_of, tiny_clip):
    dataset = [(image, 0) for image in images_of(8)]
    sampler = SelectSampler.from_dataset(dataset, keep=0.5, clip=tiny_clip, class_names=["cat"], progress=False)
    assert len(sampler) == 4
    assert sampler.selection.provenance["selection"]["score_weights"] == {"semantic_alignment": 1.0}


def test_images_that_embed_learned_to_judge_get_an_intactness(images_of, tiny_clip):
    dataset = [(image, number % 2) for number, image in enumerate(images_of(240))]
    embeddings = embed(dataset, tiny_clip, class_names=["cat", "dog"], progress=False)
    columns = presets.default["score"]["columns"]
    assert tuple(score(embeddings, columns=columns).columns) == columns
    few = score(embeddings_of(*made_images()), columns=columns)
    assert tuple(few.columns) == columns[:-1], "features of one's own come without"


@pytest.mark.parametrize("method", ["exact", "group"])
def test_from_dataset_takes_any_method_of_select(method, tiny_clip, pairs):
    preset = presets.default | {"select": {"method": method, "balance": "given"}}
    options = {"clip": tiny_clip, "class_names": ["cat", "dog", "owl"], "preset": preset, "progress": False}
    sampler = SelectSampler.from_dataset(pairs, keep=0.5, **options)
    assert len(sampler) == 6
    assert sampler.selection.provenance["selection"]["method"] == method
    assert sampler.selection.bound >= sampler.selection.objective - 1e-9


def test_the_gradient_that_is_written_out_is_that_of_the_likelihood():
    images, text, truth = made_images()
    labels = noisy("symmetric", truth, images, rate=0.4)
    data = trust_heads.Data(images, text, labels)
    heads = trust_heads.Heads(data, 0.05, 3, seed=0)
    generator = torch.Generator().manual_seed(1)
    heads.weight, heads.bias, heads.trust_in_prompts = (
        torch.randn(shape, generator=generator) / 4 for shape in ((DIM, 3, CLASSES), (3, CLASSES), (3, CLASSES))
    )
    transition = even_transition(CLASSES, 0.3)
    rows = torch.arange(0, len(labels), 7)
    parameters = [each.double().requires_grad_() for each in (heads.weight, heads.bias, heads.trust_in_prompts)]
    weight, bias, trust_in_prompts = parameters
    directions = data.directions(rows).double()
    loss = trust_heads.SHRINKAGE / (len(labels) * 2 / 3) * weight.square().sum()
    for fold in range(3):
        seen = heads.fold[rows] != fold
        logits = (directions[seen] - data.mean) @ data.whitening.double() @ weight[:, fold] + bias[fold]
        logits = logits + directions[seen] @ data.text.T.double() / 0.05 * trust_in_prompts[fold]
        likelihood = (logits.softmax(dim=1) * transition.T[labels[rows][seen]]).sum(dim=1)
        loss = loss - likelihood.log().mean()
    expected = torch.autograd.grad(loss, parameters)
    for gradient, reference in zip(heads._gradients(rows, transition.T.contiguous()), expected, strict=True):
        assert_close(gradient, reference.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("columns", "k"), [(4096, 50), (408, 50), (400, 50), (401, 50), (30, 30)])
def test_the_largest_of_a_row_are_those_of_a_whole_sort(columns, k):
    values = torch.randn(64, columns, generator=torch.Generator().manual_seed(0))
    found, expected = largest(values, k), values.topk(k, dim=1)
    assert torch.equal(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)


def test_names_of_classes_that_have_no_samples_change_nothing():
    images, text, truth = made_images()
    labels = noisy("symmetric", truth, images, rate=0.4)
    classes = len(text)
    more = torch.randn(3 * classes, text.shape[1], generator=torch.Generator().manual_seed(5))
    alone = label_trust(images, text, labels, progress=False)
    among = label_trust(images, torch.cat([more, text]), labels + 3 * classes, progress=False)
    assert torch.equal(among.probability, alone.probability)
    assert among.noise_rate == alone.noise_rate
    assert torch.equal(among.transition[3 * classes :, 3 * classes :], alone.transition)
    assert torch.equal(among.transition[: 3 * classes], torch.eye(4 * classes)[: 3 * classes])
    assert among.class_noise[: 3 * classes].isnan().all()
    with pytest.raises(ValueError, match="Only one class has samples"):
        label_trust(images, text, torch.zeros_like(labels), progress=False)


def test_trusted_diversity_counts_trusted_samples_only_and_who_is_alone_is_no_repeat():
    images, text, truth = made_images()
    labels = noisy("symmetric", truth, images, rate=0.3)
    lone = torch.full_like(labels[:1], len(text))
    made = Embeddings(
        image=torch.cat([images, 3 * images[:1]]),
        text=torch.cat([text, images[:1]]),
        labels=torch.cat([labels, lone]),
        class_names=[str(number) for number in range(len(text) + 1)],
    )
    scores = score(made)
    trusted = scores["trust"] >= 0.5
    assert (scores["trusted_diversity"][~trusted] == 0).all()
    assert scores["trusted_diversity"][trusted].mean() == pytest.approx(1, abs=0.1)
    assert trusted[-1]
    assert scores["trusted_diversity"][-1] == scores["trust"][-1]


def test_a_trusted_balance_asks_no_class_for_its_copies():
    trust, diversity = torch.ones(30), torch.ones(30)
    diversity[:5] = 0  # copies
    labels = torch.arange(3).repeat_interleave(10)
    scores = Scores({"trust": trust, "trusted_diversity": diversity}, labels=labels)
    chosen = select(scores, count=25).indices
    assert torch.equal(chosen, torch.arange(5, 30))


def test_confusions_are_seen_where_the_scalars_are_fitted_to_few_samples_a_class(monkeypatch):
    images, text, truth = made_images()
    classes = len(text)
    labels = noise.pair_flip(truth, 0.3, classes=classes, seed=0)
    monkeypatch.setattr(trust_heads, "FITTED", 6 * classes * classes)  # six samples a class, as of 1,000 classes two
    transition = label_trust(images, text, labels, progress=False).transition
    rows = torch.arange(classes)
    assert float(transition[rows, (rows + 1) % classes].mean()) == pytest.approx(0.3, abs=0.05)
