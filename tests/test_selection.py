"""The selection and select(): exact budgets, quotas, fingerprints, files that are whole or refused."""

import json
import math
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import image_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.datasets import ImageFolder

from selectsampler import Scores, Selection, select
from selectsampler.embeddings.datasets import as_images
from selectsampler.embeddings.encode import dataset_fingerprint
from selectsampler.optimizers import apportion, group, top_k

WEIGHTS = {"semantic_alignment": 1.0, "sample_diversity": 0.1}


def some_scores(samples: int = 40, *, seed: int = 0, **fields) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores({name: torch.rand(samples, generator=generator) for name in WEIGHTS}, **fields)


# --- select: the budget


@pytest.mark.parametrize(
    ("keep", "samples", "budget"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.7, 10, 7),
        (1.0, 7, 7),
        (1, 7, 7),
        ("0.3", 9, 2),
        (np.float32(0.29), 100, 29),
    ],
)
def test_keep_is_taken_as_the_decimal_that_it_is_written_as(keep, samples, budget):
    assert len(select(torch.rand(samples), keep)) == budget


@settings(deadline=None)
@given(keep=st.decimals(0, 1, places=5).filter(bool), samples=st.integers(1, 3000), as_text=st.booleans())
def test_the_budget_is_the_exact_floor_of_any_decimal_share(keep, samples, as_text):
    expected = math.floor(Fraction(keep) * samples)
    given_as = str(keep) if as_text else float(keep)
    if expected == 0:
        with pytest.raises(ValueError, match="leaves none"):
            select(torch.rand(samples), given_as)
    else:
        assert len(select(torch.rand(samples), given_as)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": 0}, r"keep is 0, but it must be a fraction in \(0, 1\]"),
        ({"keep": 1.5}, r"keep is 1\.5.* For a number of samples use count="),
        ({"keep": -0.1}, r"keep is -0\.1"),
        ({"keep": math.nan}, "keep is nan"),
        ({"keep": math.inf}, "keep is inf"),
        ({"keep": "most"}, "keep is 'most'"),
        ({"keep": "1/0"}, "keep is '1/0'"),
        ({"keep": 0.001}, "leaves none"),
        ({"count": 0}, "count is 0, but it must be a whole number from 1 to the 10 samples"),
        ({"count": 11}, "count is 11"),
        ({"count": 2.5}, r"count is 2\.5"),
        ({"count": True}, "count is True"),
        ({}, "either keep, .* or count"),
        ({"keep": 0.5, "count": 5}, "either keep, .* or count"),
    ],
)
def test_a_budget_that_makes_no_sense_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        select(torch.rand(10), **arguments)


@pytest.mark.parametrize("count", [1, 10, np.int64(4)])
def test_a_count_is_kept_to_the_sample(count):
    assert len(select(torch.rand(10), count=count)) == count


def test_keep_is_a_share_of_all_samples_but_only_eligible_ones_are_chosen():
    eligible = torch.tensor([False] * 10 + [True] * 30)
    selection = select(some_scores(eligible=eligible), 0.75)
    assert selection.indices.tolist() == list(range(10, 40))


def test_a_budget_above_the_eligible_samples_is_refused_with_both_numbers():
    eligible = torch.tensor([False] * 10 + [True] * 30)
    with pytest.raises(ValueError, match="budget is 31, but only 30 of 40 samples can be selected"):
        select(some_scores(eligible=eligible), count=31)


# --- select: what is chosen


def test_the_exact_method_takes_the_samples_of_highest_utility_by_the_papers_weights():
    scores = some_scores()
    utility = scores.utility(WEIGHTS)
    selection = select(scores, 0.3)
    assert selection.indices.tolist() == sorted(utility.argsort(descending=True)[:12].tolist())
    assert selection.objective == pytest.approx(float(utility[selection.indices].sum()))
    assert selection.bound == pytest.approx(selection.objective)
    assert selection.population == 40


def test_weights_of_ones_own_change_what_is_chosen():
    scores = some_scores()
    diverse = select(scores, 0.3, score_weights={"sample_diversity": 1.0})
    assert diverse.indices.tolist() == sorted(scores["sample_diversity"].argsort(descending=True)[:12].tolist())


def test_a_tensor_of_ones_own_is_the_utility_itself():
    utility = torch.tensor([0.1, 0.9, 0.5, 0.7])
    selection = select(utility, 0.5)
    assert selection.indices.tolist() == [1, 3]
    assert selection.objective == pytest.approx(1.6)


def test_straight_through_ends_in_the_same_samples_and_reports_its_gap():
    scores = some_scores(8000)
    exact, descended = select(scores, 0.3), select(scores, 0.3, method="straight_through")
    assert torch.equal(descended.indices, exact.indices)
    details = descended.provenance["selection"]
    assert details["converged"]
    assert details["gap"] == pytest.approx(0, abs=1e-6)
    assert len(details["loss_curve"]) <= 200 < details["steps"]


def test_straight_through_never_takes_what_is_not_eligible():
    eligible = torch.arange(300) % 3 > 0
    selection = select(some_scores(300, eligible=eligible), 0.5, method="straight_through")
    assert eligible[selection.indices].all()
    assert len(selection) == 150


def test_keys_of_the_selected_samples_come_with_them():
    columns = {"semantic_alignment": torch.tensor([0.1, 0.9, 0.5, 0.7])}
    scores = Scores(columns, keys=["a", "b", "c", "d"])
    assert select(scores, 0.5, score_weights={"semantic_alignment": 1.0}).keys() == ["b", "d"]


@pytest.mark.parametrize("balance", [None, "given", {"cat": np.int64(3), 1: 17}])
def test_what_made_a_selection_stands_in_its_provenance_as_json(balance):
    labels = torch.arange(40) % 2
    scores = some_scores(labels=labels, class_names=["cat", "dog"], provenance={"clip": "tiny", "k": 3})
    selection = select(scores, np.float64(0.5), balance=balance, score_weights={"semantic_alignment": np.float32(1)})
    assert json.loads(json.dumps(selection.provenance)) == selection.provenance
    assert (selection.provenance["clip"], selection.provenance["k"]) == ("tiny", 3)
    details = selection.provenance["selection"]
    assert (details["keep"], details["count"], details["method"]) == ("0.5", 20, "exact")


@pytest.mark.parametrize(
    ("scores", "arguments", "message"),
    [
        (some_scores(), {"method": "magic"}, "method is 'magic', but it must be 'auto', 'draw', 'exact', 'group' or"),
        (some_scores(), {"score_weights": {"beauty": 1.0}}, "no score 'beauty'; there are semantic_alignment"),
        (some_scores(), {"score_weights": {}}, "score_weights is empty"),
        (torch.rand(9), {"score_weights": WEIGHTS}, "score_weights go with Scores"),
        (torch.tensor([0.1, math.nan, 0.3]), {}, r"'utility'\[1\] is nan"),
        (torch.arange(9), {}, "must be a floating point tensor"),
        (torch.rand(9), {"seed": 1.5}, r"seed is 1\.5, but it must be a whole number from 0"),
        (torch.rand(9), {"balance": "given"}, "balance needs labels"),
        (some_scores(), {"balance": {0: 20}}, "balance needs labels"),
        (some_scores(labels=torch.arange(40) % 2), {"balance": "fair"}, "balance is 'fair'"),
        (
            some_scores(labels=torch.arange(40) % 2),
            {"balance": "given", "method": "straight_through"},
            "'straight_through' knows no quotas: use method='exact'",
        ),
    ],
)
def test_select_names_what_it_does_not_know(scores, arguments, message):
    with pytest.raises(ValueError, match=message):
        select(scores, 0.5, **arguments)


# --- select: which method


def trusted_scores(*, image_features=True, **fields):
    random = torch.Generator().manual_seed(0)
    columns = {name: torch.rand(40, generator=random) for name in ("trust", "intactness", "trusted_diversity")}
    image = torch.randn(40, 8, generator=random) if image_features else None
    return Scores(columns, labels=torch.arange(40) % 2, class_names=["cat", "dog"], image_features=image, **fields)


def safe_scores(safe: int, samples: int = 400, **columns) -> Scores:
    """The first rows are surely right, the others less and less."""
    trust = torch.cat([torch.ones(safe), torch.linspace(0.9, 0.1, samples - safe)])
    return Scores({"trust": trust, **columns}, labels=torch.zeros(samples, dtype=torch.int64), class_names=["cat"])


def test_where_trust_is_known_the_lot_decides_among_what_is_safe():
    selection = select(safe_scores(300), 0.25, risk=0.0)
    assert selection.provenance["selection"]["method"] == "draw"
    assert selection.provenance["selection"]["safe"] == 300
    assert selection.indices.max() < 300
    assert not torch.equal(selection.indices, torch.arange(100))
    assert torch.equal(select(safe_scores(300), 0.25, risk=0.0).indices, selection.indices)
    assert not torch.equal(select(safe_scores(300), 0.25, risk=0.0, seed=1).indices, selection.indices)


def test_where_all_labels_are_right_every_sample_is_drawn_about_equally_often():
    scores = safe_scores(400)
    drawn = torch.zeros(400)
    for seed in range(200):
        drawn[select(scores, 0.5, seed=seed).indices] += 1
    assert drawn.mean() == 100
    assert drawn.std() == pytest.approx(50**0.5, rel=0.15)  # of the binomial distribution


@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_hardly_anyone_is_left_out_because_some_intact_images_look_less_intact_than_others(keep):
    looks = 1 - 0.02 * torch.linspace(0, 1, 400) ** 20  # nearly all surely intact, few of them less surely
    drawn = torch.zeros(400)
    for seed in range(100):
        drawn[select(safe_scores(400, intactness=looks), keep, seed=seed).indices] += 1
    assert float((drawn == 0).float().mean()) < 0.2
    assert float((drawn == 100).float().mean()) < 0.02
    assert drawn[:300].std() < 3 * (100 * keep * (1 - keep)) ** 0.5


def test_the_more_intact_half_is_drawn_from_however_few_are_asked_for():
    looks = 1 - 0.5 * torch.linspace(0, 1, 400)
    drawn = torch.zeros(400)
    for seed in range(100):
        drawn[select(safe_scores(400, intactness=looks), 0.1, seed=seed).indices] += 1
    assert (drawn[:200] > 0).all()
    assert (drawn[201:] == 0).all()


@pytest.mark.filterwarnings("ignore:The budget is")
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
def test_where_few_labels_are_right_how_intact_images_look_decides_nothing_against_trust(keep):
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(800, generator=generator) < 0.4
    trust = torch.where(right, 0.99, 0.01) * (1 - 0.02 * torch.rand(800, generator=generator))
    intact = 0.9 + 0.096 * torch.rand(800, generator=generator)  # of few images, that is all that is known
    scores = Scores({"trust": trust, "intactness": intact}, labels=torch.zeros(800, dtype=torch.int64))
    wrong = [float((~right[select(scores, keep, risk=r).indices]).float().mean()) for r in (0.0, 0.005)]
    best = float((~right[select(scores, keep, method="exact", score_weights={"trust": 1.0}).indices]).float().mean())
    assert best <= min(wrong)
    assert max(wrong) <= best + 0.01


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_draw_holds_at_most_the_risk_more_of_wrong_labels_than_the_safest_selection(keep):
    scores = safe_scores(0)
    wrong = [float((1 - scores["trust"][select(scores, keep, seed=seed).indices]).mean()) for seed in range(50)]
    safest = float((1 - scores["trust"][select(scores, keep, risk=0.0).indices]).mean())
    assert safest == pytest.approx(float((1 - scores["trust"][: int(keep * 400)]).mean()), abs=1e-6)
    assert safest < sum(wrong) / 50 < safest + 0.005 + 0.001


def far_and_doubtful(samples: int = 2000) -> Scores:
    """The farther from its neighbours, the less sure is a label; all are trusted."""
    near, doubt = torch.rand(2, samples, generator=torch.Generator().manual_seed(0))
    distance, trust = 0.5 + near, 1 - 0.1 * near**2 * doubt
    columns = {"trust": trust, "trusted_diversity": trust * distance}
    return Scores(columns, labels=torch.arange(samples) % 4, class_names=list("abcd"))


@pytest.mark.parametrize("keep", [0.1, 0.2])
def test_what_is_drawn_lies_as_far_apart_as_all_that_is_trusted_and_keeps_to_the_risk(keep):
    scores = far_and_doubtful()
    found = select(scores, keep).provenance["selection"]
    distance = scores["trusted_diversity"] / scores["trust"]
    assert found["diversity"]["of_trusted"] == pytest.approx(float(distance.mean()), abs=0.01)
    assert found["diversity"]["drawn"] == pytest.approx(found["diversity"]["of_trusted"], abs=0.006)
    assert 0 < found["diversity"]["power"] < 4
    assert found["wrong_labels"]["expected"] <= found["wrong_labels"]["of_safest"] + 0.005 + 1e-6
    drawn = torch.cat([select(scores, keep, seed=seed).indices for seed in range(40)])
    assert float(distance[drawn].mean()) == pytest.approx(found["diversity"]["drawn"], abs=0.005)
    assert float((1 - scores["trust"][drawn]).mean()) == pytest.approx(found["wrong_labels"]["expected"], abs=2e-4)
    safest = select(scores, keep, risk=0.0).indices
    assert distance[safest].mean() < distance.mean() - 0.1


@pytest.mark.parametrize("samples", [40, 400])
@pytest.mark.parametrize(
    "options", [{"keep": 0.5}, {"balance": {0: 4, 1: 12}}, {"balance": {0: 12, 1: 4}}, {"count": 12, "intact": True}]
)
def test_where_all_labels_are_right_all_that_looks_intact_has_the_same_chance(samples, options):
    options = dict(options)
    labels = torch.arange(samples) % 2
    distance = 0.3 + torch.rand(samples, generator=torch.Generator().manual_seed(0)) + labels  # one class lies wider
    distance[:3] = 20.0  # some lie far out
    columns = {"trust": torch.ones(samples), "trusted_diversity": distance / distance.mean()}
    if options.pop("intact", False):  # the damaged lie far out, too
        columns["intactness"] = torch.where(torch.arange(samples) < samples // 4, 0.1, 1.0)
    found = select(Scores(columns, labels=labels, class_names=["cat", "dog"]), **options).provenance["selection"]
    assert found["diversity"]["power"] == 0


def test_some_that_lie_far_out_are_not_preferred_for_a_sliver_of_diversity():
    distance = torch.ones(10_000)
    distance[:100] = 10.0
    columns = {"trust": torch.ones(10_000), "trusted_diversity": distance}
    scores = Scores(columns, labels=torch.zeros(10_000, dtype=torch.int64), class_names=["cat"])
    far = [int((select(scores, count=200, seed=seed).indices < 100).sum()) for seed in range(20)]
    assert sum(far) / 20 == pytest.approx(2, abs=1.5)


@pytest.mark.parametrize("unsafe", ["copies", "damaged"])
def test_the_risk_is_that_of_what_can_be_drawn(unsafe):
    trust = torch.linspace(1.0, 0.9, 10_000)  # many of the surest repeat, or are damaged
    columns = {"trust": trust, "trusted_diversity": trust.clone(), "intactness": torch.ones(10_000)}
    if unsafe == "copies":
        columns["trusted_diversity"][:4000] = 0.0
    else:
        columns["intactness"][:4000] = 0.01
    found = select(Scores(columns, labels=torch.zeros(10_000, dtype=torch.int64)), count=2000)
    wrong = found.provenance["selection"]["wrong_labels"]
    assert found.indices.min() >= 4000
    assert wrong["of_safest"] == pytest.approx(float(1 - trust[4000:6000].mean()), abs=1e-6)
    assert 0.003 < wrong["expected"] - wrong["of_safest"] <= 0.005 + 1e-6


def test_of_repeats_the_more_trusted_come_first():
    """Ten originals, ten copies of sure labels and ten of doubtful ones: the twenty are the first two tens."""
    columns = {"trust": torch.tensor([0.999, 0.99, 0.51]).repeat_interleave(10)}
    columns["trusted_diversity"] = torch.tensor([1.0, 0.0, 0.0]).repeat_interleave(10)
    with pytest.warns(UserWarning, match="only 10 labels of distinct images"):
        selection = select(Scores(columns, labels=torch.zeros(30, dtype=torch.int64)), count=20)
    assert torch.equal(selection.indices, torch.arange(20))


@pytest.mark.parametrize("repeats", [True, False])
def test_beyond_what_is_trusted_classes_give_what_is_most_probably_right(repeats):
    """Of class 0 there are samples that are more likely right than the untrusted ones of class 1, which is larger."""
    sure, better, worse = torch.ones(100), torch.full((100,), 0.98 if repeats else 0.4), torch.full((900,), 0.01)
    trust = torch.cat([sure, better, sure, worse])
    diversity = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat_interleave(torch.tensor([100, 100, 100, 900]))
    labels = (torch.arange(1200) >= 200).long()
    scores = Scores({"trust": trust, "trusted_diversity": diversity}, labels=labels, class_names=["cat", "dog"])
    with pytest.warns(UserWarning, match="only 200 labels of distinct images"):
        selection = select(scores, count=310)
    assert torch.equal(selection.indices[:300], torch.arange(300))
    assert selection.provenance["selection"]["quotas"] == [200, 110]


def test_a_draw_among_readable_images_needs_no_diversity():
    eligible = torch.arange(40) % 4 > 0
    scores = Scores({"trust": torch.ones(40)}, labels=torch.zeros(40, dtype=torch.int64), eligible=eligible)
    assert eligible[select(scores, 0.5).indices].all()


def test_at_risk_1_it_draws_from_all():
    assert select(safe_scores(0), 0.5, risk=1.0).provenance["selection"]["safe"] == 400


def test_what_is_drawn_is_intact_first_and_repeats_come_after_what_is_trusted():
    intact = torch.ones(400)
    intact[:100] = 0.5
    assert select(safe_scores(300, intactness=intact), 0.5).indices.min() >= 100
    diversity = torch.ones(400)
    diversity[100:300] = 0.0
    chosen = select(safe_scores(300, trusted_diversity=diversity), count=150, risk=0.0).indices
    assert torch.equal(chosen, torch.cat([torch.arange(100), torch.arange(300, 350)]))


def test_a_draw_says_how_far_from_the_safest_it_is():
    selection = select(safe_scores(0), 0.5, risk=0.05)
    assert selection.objective < selection.bound == select(safe_scores(0), 0.5, method="exact").objective


def test_a_draw_needs_trust_and_takes_no_weights():
    with pytest.raises(ValueError, match="needs the score 'trust'"):
        select(torch.rand(10), 0.5, method="draw")
    with pytest.raises(ValueError, match="needs the score 'trust'"):
        select(torch.rand(10), 0.5, method="draw", groups=torch.arange(10) % 2, shares={0: (0.4, 0.6)})
    with pytest.raises(ValueError, match="knows no score_weights"):
        select(safe_scores(300), 0.5, method="draw", score_weights={"trust": 1.0})
    with pytest.raises(ValueError, match=r"risk is 1\.5"):
        select(safe_scores(300), 0.5, risk=1.5)


def test_trust_without_labels_is_drawn_by_without_quotas():
    selection = select(Scores({"trust": torch.rand(100)}), 0.3)
    assert len(selection) == 30
    assert "quotas" not in selection.provenance["selection"]


def test_weights_of_ones_own_are_maximised():
    weighed = select(safe_scores(0), 0.5, score_weights={"trust": 1.0})
    assert weighed.provenance["selection"]["method"] == "exact"
    assert weighed.indices.max() == 199


def test_group_covers_the_trusted_samples_of_each_class():
    scores = trusted_scores()
    selection = select(scores, 0.5, method="group")
    assert selection.provenance["selection"]["score_weights"] == {"trust": 1.0, "intactness": 1.0}
    trusted = scores["trust"] * (scores["trust"] >= 0.5)
    utility = (scores["trust"] + scores["intactness"]).double()
    options = {"labels": scores.labels, "weights": trusted, "coverage_weight": 0.05, "groups": scores.labels}
    quotas = torch.bincount(scores.labels[selection.indices])
    expected = group(utility, scores.image_features, 20, quotas=quotas, **options)
    assert selection.indices.tolist() == expected.indices.tolist()
    assert selection.bound == pytest.approx(expected.bound, rel=1e-7)


def test_saved_scores_lack_the_features_that_coverage_needs_and_say_so(tmp_path):
    scores = trusted_scores()
    scores.save(tmp_path / "scores")
    loaded = Scores.load(tmp_path / "scores")
    with pytest.raises(
        ValueError, match=r"neither saved scores nor a tensor hold: pass image_features=embeddings\.image, or method="
    ):
        select(loaded, 0.5, method="group")
    again = select(loaded, 0.5, method="group", image_features=scores.image_features)
    assert again.indices.tolist() == select(scores, 0.5, method="group").indices.tolist()
    assert select(loaded, 0.5).indices.tolist() == select(scores, 0.5).indices.tolist()  # a draw needs none


# --- select: balance


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(1, 6), keep=st.integers(1, 100))
def test_a_given_balance_is_the_best_subset_with_the_quotas_of_the_largest_remainder(seed, classes, keep):
    labels = torch.randint(classes, (100,), generator=torch.Generator().manual_seed(seed))
    scores = some_scores(100, seed=seed, labels=labels, class_names=[str(c) for c in range(classes + 1)])
    selection = select(scores, count=keep, balance="given")
    quotas = apportion(torch.bincount(labels, minlength=classes + 1), keep)
    assert torch.bincount(labels[selection.indices], minlength=classes + 1).tolist() == quotas.tolist()
    best = top_k(scores.utility(WEIGHTS), keep, groups=labels, quotas=quotas)
    assert selection.indices.tolist() == best.tolist()
    assert selection.bound == pytest.approx(selection.objective)


def test_a_given_balance_counts_labels_as_given_and_asks_no_class_for_more_than_is_eligible():
    labels = torch.tensor([0] * 20 + [1] * 20)
    eligible = torch.arange(40) >= 15  # five of class 0
    selection = select(some_scores(labels=labels, eligible=eligible), 0.5, balance="given")
    assert torch.bincount(labels[selection.indices]).tolist() == [5, 15]
    assert eligible[selection.indices].all()


@pytest.mark.parametrize(
    "balance", [{"cat": 2, "dog": 5}, {0: 2, 1: 5}, {"cat": 2, np.int64(1): 5}, {"cat": 2, "dog": 5, "empty": 0}]
)
def test_quotas_go_by_the_name_or_the_number_of_a_class(balance):
    labels = torch.arange(40) % 2
    scores = some_scores(labels=labels, class_names=["cat", "dog", "empty"])
    selection = select(scores, count=7, balance=balance)
    assert torch.bincount(labels[selection.indices]).tolist() == [2, 5]


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ({"cat": 2, "dog": 4}, "quotas sum to 6, but the budget is 7"),
        ({"cat": 2, "cow": 5}, "class 'cow' that is not there"),
        ({0: 2, 3: 5}, "class 3 that is not there"),
        ({0: 2, -1: 5}, "class -1 that is not there"),
        ({"cat": -1, "dog": 8}, "asks class 'cat' for -1"),
        ({"cat": 0, "dog": 7, "empty": 1}, "asks class 'empty' for 1 samples, but it has 0"),
        ({"cat": 21, "dog": 0}, "asks class 'cat' for 21 samples, but it has 20"),
        ({"cat": 2.9, "dog": 5}, r"asks class 'cat' for 2\.9"),
        ({"cat": 3, 0: 2, "dog": 5}, "names class 0 twice"),
    ],
)
def test_quotas_that_do_not_fit_are_named(balance, message):
    scores = some_scores(labels=torch.arange(40) % 2, class_names=["cat", "dog", "empty"])
    with pytest.raises(ValueError, match=message):
        select(scores, count=7, balance=balance)


# --- Selection


def test_a_selection_stays_as_it_is_when_what_it_was_given_changes():
    indices, weights = torch.tensor([1, 4, 6]), torch.tensor([1.0, 2.0, 3.0])
    selection = Selection(indices, 10, loss_weights=weights)
    indices += 1
    weights += 1
    assert selection.indices.tolist() == [1, 4, 6]
    assert selection.loss_weights.tolist() == [1, 2, 3]


def test_indices_in_any_order_come_out_ascending_with_their_weights_and_keys():
    selection = Selection([5, 2, 9], population=10, loss_weights=torch.tensor([0.5, 0.2, 0.9]), keys=["e", "b", "i"])
    assert selection.indices.tolist() == [2, 5, 9]
    assert selection.loss_weights.tolist() == pytest.approx([0.2, 0.5, 0.9])
    assert selection.keys() == ["b", "e", "i"]
    assert len(selection) == 3
    assert math.isnan(selection.objective)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": [1, 4, 1]}, "Index 1 stands more than once"),
        ({"indices": [1, 10]}, r"Index 10 lies outside \[0, 10\)"),
        ({"indices": [-1, 3]}, r"Index -1 lies outside"),
        ({"indices": torch.tensor([0.0, 1.0])}, "indices must be integers"),
        ({"indices": torch.tensor([True, False])}, r"Take mask\.nonzero\(\)"),
        ({"indices": torch.tensor([[0, 1]])}, r"integers of shape \(k,\)"),
        ({"indices": [1, 2], "keys": ["a"]}, "1 keys for 2 indices"),
        ({"indices": [1, 2], "loss_weights": torch.ones(3)}, "loss_weights has 3 entries"),
        ({"indices": [1, 2], "loss_weights": torch.tensor([1.0, -1.0])}, r"loss_weights\[1\] is negative"),
        ({"indices": [1, 2], "loss_weights": torch.tensor([1.0, math.nan])}, r"loss_weights\[1\] is nan"),
    ],
)
def test_a_selection_that_does_not_fit_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Selection(population=10, **arguments)


def test_the_fingerprint_follows_the_set_of_indices_and_the_weights_and_nothing_else():
    plain = Selection([2, 5, 9], 10)
    assert Selection(torch.tensor([9, 2, 5]), 10, objective=3.0, provenance={"a": 1}).fingerprint == plain.fingerprint
    weights = torch.tensor([1.0, 1.0, 1.0])
    others = [
        Selection([2, 5, 8], 10),
        Selection([2, 5], 10),
        Selection([2, 5, 9], 10, loss_weights=weights),
        Selection([2, 5, 9], 10, loss_weights=weights / 2),
    ]
    assert len({selection.fingerprint for selection in [plain, *others]}) == 5
    moved = Selection([9, 5, 2], 10, loss_weights=torch.tensor([3.0, 2.0, 1.0]))
    assert moved.fingerprint == Selection([2, 5, 9], 10, loss_weights=torch.tensor([1.0, 2.0, 3.0])).fingerprint


def test_weights_for_a_batch_come_in_the_batchs_order():
    selection = Selection([5, 2, 9], 10, loss_weights=torch.tensor([0.5, 0.25, 1.0]))
    assert selection.weights_for(torch.tensor([9, 5, 5, 2])).tolist() == [1.0, 0.5, 0.5, 0.25]
    assert Selection([5, 2, 9], 10).weights_for([2, 9]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("indices", [[2, 3], [11], [0]])
def test_weights_for_a_sample_that_is_not_selected_are_refused(indices):
    with pytest.raises(ValueError, match=f"Index {indices[-1]} is not selected"):
        Selection([5, 2, 9], 10).weights_for(indices)
    with pytest.raises(ValueError, match="is not selected"):
        Selection([], 10).weights_for(indices)


def test_keys_are_indices_where_there_are_no_names():
    assert Selection([5, 2], 10).keys() == ["2", "5"]


def test_a_selection_comes_back_from_its_file_as_it_was(tmp_path):
    path = tmp_path / "selection.safetensors"
    selection = Selection(
        [5, 2, 9],
        10,
        loss_weights=torch.tensor([0.5, 0.25, 1.0]),
        objective=1.5,
        bound=2.5,
        keys=["e", "ü/b", ""],
        provenance={"clip": "tiny", "curve": [1.0, 0.5]},
    )
    selection.save(path)
    back = Selection.load(path)
    assert back.indices.tolist() == [2, 5, 9]
    assert back.loss_weights.tolist() == [0.25, 0.5, 1.0]
    assert (back.population, back.objective, back.bound) == (10, 1.5, 2.5)
    assert (back.keys(), back.provenance) == (["ü/b", "e", ""], selection.provenance)
    assert back.fingerprint == selection.fingerprint


def test_a_bare_selection_comes_back_bare(tmp_path):
    Selection([5, 2], 10).save(tmp_path / "selection.safetensors")
    back = Selection.load(tmp_path / "selection.safetensors")
    assert back.loss_weights is None
    assert back.keys() == ["2", "5"]
    assert math.isnan(back.objective)
    assert math.isnan(back.bound)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "selection.safetensors"
    Selection([5, 2, 9], 10, loss_weights=torch.tensor([0.5, 0.25, 1.0])).save(path)
    return path


@pytest.mark.parametrize(
    "change", [{"indices": torch.tensor([2, 5, 8])}, {"loss_weights": torch.tensor([0.25, 0.5, 0.75])}]
)
def test_a_file_that_was_tampered_with_is_refused(saved, change):
    with safe_open(saved, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in ("indices", "loss_weights")}
    save_file(tensors | change, saved, metadata)
    with pytest.raises(ValueError, match=r"selection\.safetensors does not match its fingerprint"):
        Selection.load(saved)


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_file_that_was_cut_off_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"selection\.safetensors cannot be read"):
        Selection.load(saved)


def test_a_file_of_something_else_is_refused(tmp_path):
    some_scores().save(tmp_path / "scores.safetensors")
    with pytest.raises(ValueError, match=r"should hold selection .* but it holds scores"):
        Selection.load(tmp_path / "scores.safetensors")
    save_file({"indices": torch.tensor([1, 2])}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"should hold selection .* but it holds something else"):
        Selection.load(tmp_path / "foreign.safetensors")
    (tmp_path / "notes.txt").write_text("not a tensor in sight")
    with pytest.raises(ValueError, match=r"notes\.txt cannot be read"):
        Selection.load(tmp_path / "notes.txt")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Selection.load(tmp_path / "absent")


# --- Selection.verify


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images", [4, 3])


def selected_from(root, indices=(0, 2, 5)) -> Selection:
    images = as_images(ImageFolder(root))
    keys = [images.keys()[i] for i in indices]
    return Selection(list(indices), len(images), keys=keys, provenance={"inputs": dataset_fingerprint(images)})


def test_a_selection_knows_the_data_set_that_it_was_made_from(folder):
    selected_from(folder).verify(ImageFolder(folder, transform=lambda image: image))


def test_a_selection_refuses_a_data_set_with_a_file_more(folder):
    selection = selected_from(folder)
    shutil.copy(folder / "class_01" / "000.png", folder / "class_01" / "009.png")
    with pytest.raises(ValueError, match="has 8 samples; 7 were there"):
        selection.verify(ImageFolder(folder))


def test_a_selection_refuses_a_data_set_whose_selected_file_was_renamed(folder):
    selection = selected_from(folder)
    (folder / "class_00" / "002.png").rename(folder / "class_00" / "0025.png")
    with pytest.raises(ValueError, match=r"Sample 2 is 'class_00/0025\.png' now, but was 'class_00/002\.png'"):
        selection.verify(ImageFolder(folder))


@pytest.mark.parametrize("change", ["renamed", "written"])
def test_a_selection_refuses_a_data_set_one_of_whose_other_files_was(folder, change):
    selection = selected_from(folder)
    other = folder / "class_00" / "003.png"
    if change == "renamed":
        other.rename(folder / "class_00" / "0035.png")
    else:
        other.write_bytes(b"another size")
    with pytest.raises(ValueError, match="data set changed after the selection"):
        selection.verify(ImageFolder(folder))


def test_a_range_that_forbids_nothing_leaves_the_groups_as_a_draw_would():
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0] * 400 + [1] * 400 + [2] * 200)
    trust = torch.tensor([0.9999, 0.999, 0.998])[groups] - 1e-4 * torch.rand(1000, generator=generator)
    scores = Scores({"trust": trust})
    counts = torch.bincount(groups[select(scores, 0.3, groups=groups, shares={2: (0, 1)}).indices], minlength=3)
    assert (counts - torch.tensor([120, 120, 60])).abs().max() < 30
    counts = torch.bincount(groups[select(scores, 0.3, groups=groups, shares={2: (0.4, 0.4)}).indices], minlength=3)
    assert counts[2] == 120
    assert (counts[:2] - 90).abs().max() < 30


def test_the_provenance_names_the_quotas_and_a_risk_that_is_no_share_is_refused_by_every_method():
    scores = Scores({"trust": torch.ones(6)}, labels=torch.tensor([0, 0, 0, 0, 1, 1]))
    assert select(scores, 0.5).provenance["selection"]["quotas"] == [2, 1]
    with pytest.raises(ValueError, match=r"risk is 7\.0"):
        select(scores, 0.5, method="exact", risk=7.0)
