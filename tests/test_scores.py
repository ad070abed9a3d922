"""Semantic alignment, the table of scores, and score(), against slow float64 definitions."""

import csv
import math
from dataclasses import replace

import pytest
import torch
from helpers import random_embeddings, random_features
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from selectsampler import Embeddings, Scores, adapt, score
from selectsampler.scores import alignment, default_neighbours, sample_diversity, semantic_alignment, semantic_margin

CLOSE = {"rtol": 1e-5, "atol": 1e-7}


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()))


@pytest.mark.parametrize("seed", [0, 1])
def test_semantic_alignment_is_the_cosine_of_an_image_and_its_own_class_prompt(seed):
    images, texts, labels = random_features(samples=50, classes=7, seed=seed)
    expected = torch.tensor([cosine(image, texts[label]) for image, label in zip(images, labels, strict=True)])
    assert_close(semantic_alignment(images, texts, labels), expected, **CLOSE)


def test_semantic_alignment_is_the_same_on_both_sides_of_a_block_border():
    images, texts, labels = random_features(samples=65_540, classes=3, dim=2)
    tail = slice(65_530, None)
    assert_close(semantic_alignment(images, texts, labels)[tail], semantic_alignment(images[tail], texts, labels[tail]))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.floats(1e-6, 1e6))
def test_semantic_alignment_ignores_length_follows_the_samples_and_stays_within_one(seed, length):
    images, texts, labels = random_features(samples=30, classes=5, seed=seed)
    scores = semantic_alignment(images, texts, labels)
    assert_close(semantic_alignment(length * images.flip(0), texts / length, labels.flip(0)), scores.flip(0), **CLOSE)
    assert scores.abs().max() <= 1 + 1e-6
    assert_close(semantic_alignment(texts[labels], texts, labels), torch.ones(30))


@pytest.mark.parametrize("cosines_at_once", [2**22, 7])
def test_the_margin_is_the_cosine_of_the_own_prompt_less_the_highest_of_another(cosines_at_once, monkeypatch):
    monkeypatch.setattr(alignment, "COSINES", cosines_at_once)
    images, texts, labels = random_features(samples=30, classes=5)
    expected = [
        cosine(image, texts[label]) - max(cosine(image, text) for number, text in enumerate(texts) if number != label)
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    assert_close(semantic_margin(images, texts, labels), torch.tensor(expected), **CLOSE)


def test_of_a_single_class_there_is_no_margin():
    with pytest.raises(ValueError, match="one class, so that there is no other"):
        semantic_margin(torch.ones(3, 2), torch.ones(1, 2), torch.zeros(3, dtype=torch.int64))


def test_semantic_alignment_of_half_precision_features_is_computed_in_float32():
    images, texts, labels = random_features(samples=20, classes=2)
    scores = semantic_alignment(images.half(), texts.half(), labels)
    assert scores.dtype == torch.float32
    assert_close(scores, semantic_alignment(images.half().float(), texts.half().float(), labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 2, 1])}, r"labels\[1\] is 2, but classes are numbered from 0 to 1"),
        ({"labels": torch.tensor([0, 1])}, "2 labels for 3 samples"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "labels must be an int64 tensor"),
        ({"text_features": torch.ones(2, 5)}, "text_features has dimension 5, but 4 was expected"),
        (
            {"image_features": torch.ones(3, 4).index_fill(0, torch.tensor(2), torch.inf)},
            "image_features.* row 2 first",
        ),
        ({"image_features": torch.ones(3, 4).index_fill(0, torch.tensor(1), 0)}, r"image_features\[1\] is zero"),
        ({"text_features": torch.zeros(2, 4)}, r"text_features\[0\] is zero"),
    ],
)
def test_features_and_labels_that_do_not_fit_are_named(change, message):
    arguments = {
        "image_features": torch.ones(3, 4),
        "text_features": torch.ones(2, 4),
        "labels": torch.tensor([0, 1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        semantic_alignment(**arguments | change)


def test_a_zero_feature_behind_a_block_border_is_named_by_its_own_row():
    images = torch.ones(65_540, 1)
    images[65_537] = 0
    with pytest.raises(ValueError, match=r"image_features\[65537\] is zero"):
        semantic_alignment(images, torch.ones(1, 1), torch.zeros(65_540, dtype=torch.int64))


def a_table(samples: int = 12, *, seed: int = 0, **fields) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    columns = {name: torch.randn(samples, generator=generator) for name in ("alignment", "diversity")}
    return Scores(columns, **fields)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=30), seed=st.integers(0, 100))
def test_min_max_scaling_maps_the_eligible_samples_to_the_unit_interval_and_the_others_to_zero(values, seed):
    column = torch.tensor(values)
    eligible = torch.rand(len(column), generator=torch.Generator().manual_seed(seed)) < 0.7
    eligible[0] = True
    scaled = Scores({"mine": column}, eligible=eligible).scaled("mine")
    low, high = column[eligible].min(), column[eligible].max()
    expected = [(v - low) / (high - low) if ok and high > low else 0.0 for v, ok in zip(column, eligible, strict=True)]
    assert_close(scaled, torch.tensor(expected))


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(-4, 4), min_size=2, max_size=30), seed=st.integers(0, 100))
def test_rank_scaling_is_the_share_of_eligible_samples_that_score_lower_with_ties_in_the_middle(values, seed):
    eligible = torch.rand(len(values), generator=torch.Generator().manual_seed(seed)) < 0.7
    eligible[:2] = True
    scaled = Scores({"mine": torch.tensor(values).float()}, eligible=eligible, scaling="rank").scaled("mine")
    peers = [v for v, ok in zip(values, eligible, strict=True) if ok]
    expected = [
        (sum(p < v for p in peers) + (peers.count(v) - 1) / 2) / (len(peers) - 1) if ok and len(set(peers)) > 1 else 0.0
        for v, ok in zip(values, eligible, strict=True)
    ]
    assert_close(scaled, torch.tensor(expected))


@pytest.mark.parametrize("scaling", ["min_max", "rank"])
def test_utility_is_the_sum_of_weighted_scaled_scores_over_their_means(scaling):
    eligible = torch.tensor([True] * 9 + [False] * 3)
    table = a_table(12, eligible=eligible, scaling=scaling)
    expected = torch.zeros(12, dtype=torch.float64)
    for name, weight in (("alignment", 1.0), ("diversity", 0.1)):
        scaled = table.scaled(name).double()
        expected += weight * scaled / (scaled[:9].sum() / 9)
    utility = table.utility({"alignment": 1.0, "diversity": 0.1})
    assert utility.dtype == torch.float64
    assert_close(utility, expected, rtol=1e-12, atol=0)
    assert not utility[9:].any()


@pytest.mark.parametrize("scaling", ["min_max", "rank"])
def test_a_constant_column_adds_nothing(scaling):
    table = Scores({"mine": torch.rand(6), "constant": torch.full((6,), 0.3)}, scaling=scaling)
    assert table.scaled("constant").tolist() == [0.0] * 6
    assert torch.equal(table.utility({"mine": 1.0, "constant": 5.0}), table.utility({"mine": 1.0}))


def test_a_table_comes_back_from_its_file_as_it_was(tmp_path):
    table = a_table(
        4,
        labels=torch.tensor([0, 1, 1, 0]),
        class_names=["cat", "naïve dog"],
        eligible=torch.tensor([True, True, False, True]),
        keys=["a.png", "b,c.png", "ü/d.png", "e\nf.png"],
        scaling="rank",
        provenance={"k": 3},
    )
    table.save(tmp_path / "scores.safetensors")
    back = Scores.load(tmp_path / "scores.safetensors")
    assert list(back.columns) == ["alignment", "diversity"]
    for name in table.columns:
        assert torch.equal(back[name], table[name])
    assert torch.equal(back.labels, table.labels)
    assert torch.equal(back.eligible, table.eligible)
    assert (list(back.class_names), list(back.keys)) == (table.class_names, table.keys)
    assert (back.scaling, back.provenance) == ("rank", {"k": 3})


def test_a_table_without_labels_and_names_comes_back_without_them(tmp_path):
    a_table().save(tmp_path / "scores.safetensors")
    back = Scores.load(tmp_path / "scores.safetensors")
    assert (back.labels, back.class_names, back.eligible, back.keys) == (None, None, None, None)


@pytest.fixture
def named_table() -> Scores:
    return a_table(
        3,
        labels=torch.tensor([0, 1, 0]),
        class_names=["cat", "dog"],
        eligible=torch.tensor([True, False, True]),
        keys=["a.png", 'b,"c".png', "ü.png"],
    )


def test_a_table_in_csv_reads_back_as_the_same_numbers(named_table, tmp_path):
    named_table.export(tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "key", "label", "class", "eligible", "alignment", "diversity"]
    assert [row["key"] for row in rows] == named_table.keys
    assert [row["class"] for row in rows] == ["cat", "dog", "cat"]
    assert [row["eligible"] for row in rows] == ["True", "False", "True"]
    for name in ("alignment", "diversity"):
        assert torch.equal(torch.tensor([float(row[name]) for row in rows]), named_table[name])


def test_a_table_in_parquet_reads_back_as_the_same_columns(named_table, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    named_table.export(tmp_path / "scores.parquet")
    assert parquet.read_table(tmp_path / "scores.parquet").to_pydict() == named_table.to_table()


def test_other_formats_are_refused_before_anything_is_written(named_table, tmp_path):
    with pytest.raises(ValueError, match=r"scores\.txt.* a table is written as \.csv or \.parquet"):
        named_table.export(tmp_path / "scores.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": {}}, "at least one column"),
        ({"columns": {"mine": torch.empty(0)}}, "no samples"),
        ({"columns": {"good": torch.zeros(3), "bad": torch.tensor([0, math.nan, 1])}}, r"The score 'bad'\[1\] is nan"),
        ({"columns": {"mine": torch.tensor([1, 2])}}, "The score 'mine' must be a floating point tensor"),
        ({"columns": {"one": torch.zeros(3), "two": torch.zeros(4)}}, "The score 'two' has 4 entries, .* 3 samples"),
        ({"columns": {"mine": torch.zeros(3)}, "scaling": "softmax"}, "scaling is 'softmax'"),
        ({"columns": {"mine": torch.zeros(3)}, "eligible": torch.ones(3)}, "eligible must be a bool tensor"),
        ({"columns": {"mine": torch.zeros(3)}, "keys": ["a"]}, "keys has 1 rows, but there are 3"),
        (
            {"columns": {"mine": torch.zeros(3)}, "labels": torch.zeros(2, dtype=torch.int64)},
            "There are 2 labels for 3",
        ),
        ({"columns": {"mine": torch.zeros(3)}, "labels": torch.tensor([0, -1, 1])}, r"labels\[1\] is -1"),
        ({"columns": {"mine": torch.zeros(1)}, "labels": torch.tensor([1]), "class_names": ["a"]}, "from 0 to 0"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scores(**arguments)


def test_an_unknown_score_is_named_with_those_that_are_there():
    with pytest.raises(ValueError, match="no score 'magic'; there are alignment, diversity"):
        a_table().utility({"magic": 1.0})


def test_score_aligns_each_sample_with_the_adapters_of_its_fold_and_takes_distances_in_the_features_as_they_came():
    embeddings = random_embeddings(samples=60, classes=3)
    adapted = adapt(embeddings, folds=3, steps=5, batch_size=16)
    scores = score(adapted, k=4)
    expected = [
        cosine(
            adapted.image_adapters[fold] @ embeddings.image[row],
            adapted.text_adapters[fold] @ embeddings.text[embeddings.labels[row]],
        )
        for row, fold in enumerate(adapted.folds.tolist())
    ]
    assert_close(scores["semantic_alignment"], torch.tensor(expected), **CLOSE)
    assert torch.equal(scores["sample_diversity"], sample_diversity(embeddings.image, embeddings.labels, 4))


def test_score_takes_the_distances_of_info_nce_in_its_adapted_features():
    adapted = adapt(random_embeddings(samples=40, classes=2), method="info_nce", steps=5)
    features = adapted.embeddings.image @ adapted.image_adapters[0].T
    expected = sample_diversity(features, adapted.embeddings.labels, 3)
    assert_close(score(adapted, k=3)["sample_diversity"], expected, **CLOSE)


def test_score_takes_embeddings_that_were_not_adapted_as_they_are():
    embeddings = random_embeddings(samples=80, classes=2)
    scores = score(embeddings)
    assert_close(
        scores["semantic_alignment"],
        semantic_alignment(embeddings.image, embeddings.text, embeddings.labels),
        **CLOSE,
    )
    k = default_neighbours(embeddings.labels)
    assert scores.provenance["k"] == k == 3
    assert torch.equal(scores["sample_diversity"], sample_diversity(embeddings.image, embeddings.labels, k))


@pytest.mark.parametrize("method", ["none", "cross_fit"])
def test_unreadable_images_are_not_eligible_score_zero_and_are_nobodys_neighbours(method):
    readable = torch.ones(40, dtype=torch.bool)
    readable[[3, 17, 30]] = False
    keys = [f"{i}.png" for i in range(40)]
    embeddings = random_embeddings(samples=40, classes=2, readable=readable, keys=keys)
    embeddings = replace(embeddings, image=embeddings.image * readable[:, None])
    scores = score(adapt(embeddings, method=method, folds=2, steps=2), k=3)
    assert torch.equal(scores.eligible, readable)
    assert list(scores.keys) == keys
    for column in scores.columns.values():
        assert column[~readable].tolist() == [0, 0, 0]
    expected = sample_diversity(embeddings.image[readable], embeddings.labels[readable], 3)
    assert torch.equal(scores["sample_diversity"][readable], expected)


def test_a_class_whose_images_are_all_unreadable_and_a_class_without_any_do_no_harm():
    images, texts, labels = random_features(samples=20, classes=4)
    labels[labels == 1] = 0
    with pytest.warns(UserWarning, match="1 of 4 classes have no sample: b"):
        embeddings = Embeddings(images, texts, labels, list("abcd"), readable=labels != 2)
    scores = score(embeddings, k=2)
    assert scores["sample_diversity"][labels == 2].tolist() == [0.0] * int((labels == 2).sum())


def test_score_refuses_a_k_below_one():
    with pytest.raises(ValueError, match="k is 0"):
        score(random_embeddings(samples=10, classes=2), k=0)
