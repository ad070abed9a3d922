"""What a caller hands over is checked, and the message names the first bad entry and the way out."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selectsampler.validation import (
    as_indices,
    check_classes,
    check_features,
    check_labels,
    check_mask,
    check_vector,
    resolve_budget,
)

# Features


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_of_any_floating_type_pass(dtype):
    check_features(torch.ones(3, 2, dtype=dtype), name="image", rows=3, dim=2)


def test_features_whose_sum_overflows_pass():
    check_features(torch.full((3, 2), 3e38), name="image")


def test_features_of_no_sample_pass():
    check_features(torch.ones(0, 2), name="image", rows=0)


@pytest.mark.parametrize(
    ("features", "found"),
    [
        (torch.ones(3), r"a float32 tensor of shape \(3,\)"),
        (torch.ones(3, 2, dtype=torch.int64), r"a int64 tensor of shape \(3, 2\)"),
        (np.ones((3, 2)), "a ndarray"),
        ([[1.0, 2.0]], "a list"),
        (None, "a NoneType"),
    ],
)
def test_features_are_a_floating_point_matrix(features, found):
    with pytest.raises(ValueError, match=rf"image must be a floating point tensor of shape \(N, D\), not {found}\."):
        check_features(features, name="image")


def test_features_and_samples_are_equally_many():
    with pytest.raises(ValueError, match="image has 3 rows, but there are 4 samples"):
        check_features(torch.ones(3, 2), name="image", rows=4)


def test_features_of_two_models_are_not_mixed():
    with pytest.raises(ValueError, match="text has dimension 2, but 5 was expected: were two models mixed"):
        check_features(torch.ones(3, 2), name="text", dim=5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_first_row_that_is_not_finite_is_named(value):
    features = torch.ones(5, 2)
    features[[2, 4], 1] = value
    with pytest.raises(ValueError, match="image holds NaN or infinity in 2 rows, row 2 first"):
        check_features(features, name="image")


def test_infinities_that_cancel_are_found():
    with pytest.raises(ValueError, match="in 2 rows, row 0 first"):
        check_features(torch.tensor([[torch.inf], [-torch.inf]]), name="image")


# Labels, vectors, masks


def test_labels_in_range_pass():
    check_labels(torch.tensor([0, 2, 1]), samples=3, classes=3)
    check_labels(torch.tensor([0, 99]), samples=2)


@pytest.mark.parametrize(
    "labels", [torch.ones(3), torch.ones(3, 1, dtype=torch.int64), [0, 1, 2], torch.ones(3).bool()]
)
def test_labels_are_an_int64_vector(labels):
    with pytest.raises(ValueError, match=r"labels must be an int64 tensor of shape \(N,\), not a "):
        check_labels(labels, samples=3)


def test_labels_and_samples_are_equally_many():
    with pytest.raises(ValueError, match="There are 3 labels for 4 samples"):
        check_labels(torch.tensor([0, 1, 2]), samples=4)


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        ([0, 3, 7], 3, r"labels\[1\] is 3, but classes are numbered from 0 to 2 \(2 labels lie outside\)"),
        ([0, 1, -1], 3, r"labels\[2\] is -1, but classes are numbered from 0 to 2 \(1 labels lie outside\)"),
        ([-100, 1, -1], None, r"labels\[0\] is -100, but classes are numbered from 0 on \(2 labels lie outside\)"),
    ],
)
def test_the_first_label_outside_the_classes_is_named(labels, classes, message):
    with pytest.raises(ValueError, match=message):
        check_labels(torch.tensor(labels), samples=3, classes=classes)


def test_a_finite_vector_passes():
    check_vector(torch.tensor([0.5, -1e30]), name="utility", samples=2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            torch.ones(3, 1),
            r"utility must be a floating point tensor of shape \(N,\), not a float32 tensor of shape \(3, 1\)",
        ),
        (torch.arange(3), "not a int64 tensor"),
        ([1.0, 2.0, 3.0], "not a list"),
        (torch.ones(4), "utility has 4 entries, but there are 3 samples"),
        (torch.tensor([0, torch.nan, torch.inf]), r"utility\[1\] is nan \(2 such entries\): it must be finite"),
    ],
)
def test_a_vector_is_finite_and_as_long_as_the_data(values, message):
    with pytest.raises(ValueError, match=message):
        check_vector(values, name="utility", samples=3)


@pytest.mark.parametrize(
    "mask", [torch.ones(3), torch.ones(2).bool(), torch.ones(3, 1).bool(), [True, False, True], None]
)
def test_a_mask_is_a_bool_vector(mask):
    check_mask(torch.tensor([True, False, True]), name="readable", samples=3)
    with pytest.raises(ValueError, match=r"readable must be a bool tensor of shape \(3,\), not a "):
        check_mask(mask, name="readable", samples=3)


# Class names


@pytest.mark.parametrize("names", [["cat", "dog"], ("cat", "dog"), np.array(["cat", "dog"]), {"cat": 0, "dog": 1}])
def test_class_names_may_stand_in_any_sequence(names):
    check_classes(names, torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("names", ["cat", ["cat", ""], ["cat", " \t"], ["cat", 3], None, ["cat", None]])
def test_class_names_are_strings_that_say_something(names):
    with pytest.raises(ValueError, match="class_names must be a sequence of non-empty strings, one a class"):
        check_classes(names, torch.tensor([0]))


def test_two_classes_do_not_share_a_name():
    with pytest.raises(ValueError, match=r"The class name 'crane' stands twice.*'crane \(bird\)'"):
        check_classes(["crane", "dog", "crane"], torch.tensor([0]))


def test_the_first_label_beyond_the_class_names_is_named():
    with pytest.raises(ValueError, match=r"labels\[2\] is 2, but there are only 2 class names"):
        check_classes(["cat", "dog"], torch.tensor([0, 1, 2, 3]))


# Indices


@pytest.mark.parametrize(
    "indices",
    [[5, 0, 3], (5, 0, 3), torch.tensor([5, 0, 3]), torch.tensor([5, 0, 3], dtype=torch.uint8), np.array([5, 0, 3])],
)
def test_indices_become_ascending_int64(indices):
    ordered = as_indices(indices, population=6)
    assert ordered.tolist() == [0, 3, 5]
    assert ordered.dtype == torch.int64


@pytest.mark.parametrize("indices", [range(3), torch.arange(3).flip(0)])
def test_indices_may_be_a_range(indices):
    assert as_indices(indices).tolist() == [0, 1, 2]


def test_no_indices_are_indices():
    assert as_indices([]).dtype == torch.int64
    assert len(as_indices([])) == 0


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 6], r"Index 6 lies outside \[0, 6\)"),
        ([0, -1], r"Index -1 lies outside \[0, 6\)"),
        ([0, -2, 9, -1], r"Index -2 lies outside \[0, 6\)"),
        ([4, 2, 4, 2, 4], r"Index 2 stands more than once \(3 repetitions in all\)"),
        ([0.0, 1.0], r"indices must be integers of shape \(k,\), not a float32 tensor"),
        ([[0], [1]], r"not a int64 tensor of shape \(2, 1\)"),
    ],
)
def test_indices_are_unique_and_lie_in_the_population(indices, message):
    with pytest.raises(ValueError, match=message):
        as_indices(indices, population=6)


def test_a_mask_is_no_index_and_the_message_says_how_it_becomes_one():
    mask = torch.tensor([True, False, True])
    with pytest.raises(ValueError, match=r"A mask\? Take mask\.nonzero\(\)\[:, 0\]\."):
        as_indices(mask)
    assert as_indices(mask.nonzero()[:, 0]).tolist() == [0, 2]


# Budgets


@pytest.mark.parametrize(
    ("keep", "population", "budget"),
    [
        (0.29, 100, 29),  # int(0.29 * 100) is 28
        (0.57, 100, 57),
        (0.7, 50_000, 35_000),
        (0.1, 19, 1),
        (1, 7, 7),
        (1.0, 7, 7),
        ("0.3", 10, 3),
        ("1/3", 10, 3),
        (Fraction(2, 3), 3, 2),
        (Decimal("0.29"), 100, 29),
        (np.float64(0.29), 100, 29),
        (np.float32(0.29), 100, 29),
        (1e-3, 2_000, 2),
    ],
)
def test_keep_is_taken_as_the_decimal_that_was_written(keep, population, budget):
    assert resolve_budget(keep, None, population) == budget


@given(st.integers(1, 1000), st.integers(1, 100_000))
def test_the_budget_is_the_exact_floor_for_every_thousandth(thousandths, population):
    if thousandths * population >= 1000:
        assert resolve_budget(thousandths / 1000, None, population) == thousandths * population // 1000


@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.001, 70, "70 %", "", "1/0", float("nan"), float("inf"), True, [0.5]])
def test_a_keep_that_is_no_fraction_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep is .*, but it must be a fraction in \(0, 1\]\."):
        resolve_budget(keep, None, 100)


def test_a_keep_that_leaves_nothing_is_refused_and_the_advice_works():
    with pytest.raises(ValueError, match=r"keep=0\.1 of 3 samples leaves none\. Keep more, or pass count=1\."):
        resolve_budget(0.1, None, 3)
    assert resolve_budget(None, 1, 3) == 1


@pytest.mark.parametrize("count", [1, 5, np.int64(3), 10])
def test_a_count_stands_for_itself(count):
    assert resolve_budget(None, count, 10) == count


@pytest.mark.parametrize("count", [0, -1, 11, 2.0, True, "3"])
def test_a_count_outside_the_data_is_refused(count):
    with pytest.raises(ValueError, match=r"count is .*, but it must be a whole number from 1 to the 10 samples\."):
        resolve_budget(None, count, 10)


@pytest.mark.parametrize(("keep", "count"), [(None, None), (0.5, 5)])
def test_either_keep_or_count_is_given(keep, count):
    with pytest.raises(ValueError, match="Give either keep, a fraction"):
        resolve_budget(keep, count, 10)
