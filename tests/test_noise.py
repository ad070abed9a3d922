"""Label noise has exactly the rate that it was asked for, goes where its definition says, and never runs code."""

import os
import pickle
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from selectsampler.recipes.noise import (
    CIFAR10_MAP,
    CIFAR100_MAP,
    CIFAR100_SUPERCLASSES,
    apply,
    asymmetric,
    human,
    instance_dependent,
    pair_flip,
    symmetric,
    transition_matrix,
)
from torch.testing import assert_close

TRUTH = torch.arange(7).repeat(143)  # 1,001 labels
TENS = torch.arange(10).repeat(50)
FEATURES = torch.randn(len(TRUTH), 8, generator=torch.Generator().manual_seed(0))
RATES = [0.0, 0.2, 0.4, 0.6, 1.0]

EVERY_NOISE = {
    "symmetric": partial(symmetric, TRUTH, 0.4, classes=7),
    "asymmetric": partial(asymmetric, TRUTH, 0.4, mapping={0: 1, 3: 5}),
    "pair_flip": partial(pair_flip, TRUTH, 0.4, classes=7),
    "instance_dependent": partial(instance_dependent, FEATURES, TRUTH, 0.4, classes=7),
}

# The coarse label of each fine one, as CIFAR-100's own files have it
COARSE = """
4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 5 19 8 8 15 13 14 17
18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6
0 17 8 14 13
"""


@pytest.mark.parametrize("noise", EVERY_NOISE.values(), ids=EVERY_NOISE)
def test_noise_follows_from_its_seed_and_leaves_the_truth_alone(noise):
    truth = TRUTH.clone()
    first, again, other = (noise(seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(TRUTH, truth)
    assert first.dtype == torch.int64


# Symmetric


@pytest.mark.parametrize("rate", RATES)
def test_symmetric_noise_changes_exactly_the_asked_share(rate):
    assert int((symmetric(TRUTH, rate, classes=7, seed=1) != TRUTH).sum()) == round(rate * len(TRUTH))


def test_symmetric_noise_goes_to_all_other_classes_alike():
    many = torch.zeros(70_000, dtype=torch.int64)
    counts = torch.bincount(symmetric(many, 1.0, classes=8, seed=0), minlength=8)
    assert counts[0] == 0
    assert (counts[1:] - 10_000).abs().max() < 400  # four standard deviations


@pytest.mark.parametrize(("rate", "classes"), [(-0.1, 7), (1.1, 7), (0.4, 1)])
def test_impossible_noise_is_refused(rate, classes):
    with pytest.raises(ValueError, match="rate"):
        symmetric(TRUTH, rate, classes=classes, seed=0)


# Asymmetric and pair flip


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("truth", "mapping"), [(TENS, CIFAR10_MAP), (torch.arange(100).repeat(10), CIFAR100_MAP)])
def test_asymmetric_noise_has_exactly_the_transition_matrix_of_its_definition(truth, mapping, rate):
    classes = int(truth.max()) + 1
    expected = torch.eye(classes, dtype=torch.float64)
    for source, target in mapping.items():
        expected[source, source], expected[source, target] = 1 - rate, rate
    noisy = asymmetric(truth, rate, mapping=mapping, seed=2)
    assert_close(transition_matrix(truth, noisy, classes), expected)


def test_cifar_10_is_mapped_by_name_as_in_the_literature():
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert {names[source]: names[target] for source, target in CIFAR10_MAP.items()} == {
        "truck": "automobile",
        "bird": "airplane",
        "deer": "horse",
        "cat": "dog",
        "dog": "cat",
    }


def test_superclasses_are_those_of_cifar_100():
    coarse = [int(number) for number in COARSE.split()]
    names = sorted(name for family in CIFAR100_SUPERCLASSES.values() for name in family)
    found = {name: number for number, family in enumerate(CIFAR100_SUPERCLASSES.values()) for name in family}
    assert [found[name] for name in names] == coarse
    assert all(list(family) == sorted(family) for family in CIFAR100_SUPERCLASSES.values())  # "next" is by number


def test_each_class_of_cifar_100_goes_to_the_next_of_its_superclass_and_all_are_reached():
    coarse = [int(number) for number in COARSE.split()]
    assert all(coarse[source] == coarse[target] and source != target for source, target in CIFAR100_MAP.items())
    assert sorted(CIFAR100_MAP) == sorted(CIFAR100_MAP.values()) == list(range(100))
    assert (CIFAR100_MAP[4], CIFAR100_MAP[30], CIFAR100_MAP[95]) == (30, 55, 4)  # beaver, dolphin; whale, beaver


@pytest.mark.parametrize("rate", RATES)
def test_pair_flip_has_exactly_the_transition_matrix_of_its_definition(rate):
    expected = (1 - rate) * torch.eye(10) + rate * torch.eye(10).roll(1, dims=1)
    noisy = pair_flip(TENS, rate, classes=10, seed=0)
    assert_close(transition_matrix(TENS, noisy, 10), expected.double(), atol=1e-7, rtol=0)


def test_the_rate_of_uneven_classes_is_rounded_in_each():
    truth = torch.tensor([0] * 7 + [1] * 12 + [2])
    noisy = pair_flip(truth, 0.3, classes=3, seed=0)
    assert [int((noisy[truth == label] != label).sum()) for label in range(3)] == [2, 4, 0]


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: asymmetric(TRUTH, 1.5, mapping={0: 1}, seed=0), "rate is 1.5"),
        (lambda: asymmetric(TRUTH, 0.5, mapping={0: 1, 2: 2}, seed=0), "class 2 to itself"),
        (lambda: pair_flip(TRUTH, 0.5, classes=1, seed=0), "classes is 1"),
        (lambda: pair_flip(TRUTH, 0.5, classes=6, seed=0), r"labels\[6\] is 6"),
        (lambda: instance_dependent(FEATURES, TRUTH, float("nan"), classes=7, seed=0), "rate is nan"),
        (lambda: instance_dependent(FEATURES[1:], TRUTH, 0.5, classes=7, seed=0), "1000 rows"),
        (lambda: instance_dependent(FEATURES, TRUTH, 0.5, classes=6, seed=0), r"labels\[6\] is 6"),
        (lambda: transition_matrix(TRUTH, TRUTH[1:], 7), "1000 labels for 1001"),
        (lambda: transition_matrix(TRUTH, TRUTH, 6), r"labels\[6\] is 6"),
    ],
)
def test_what_does_not_fit_is_named(call, culprit):
    with pytest.raises(ValueError, match=culprit):
        call()


# Instance-dependent


@pytest.mark.parametrize("rate", RATES)
def test_instance_dependent_noise_changes_exactly_the_asked_share(rate):
    noisy = instance_dependent(FEATURES, TRUTH, rate, classes=7, seed=1)
    assert int((noisy != TRUTH).sum()) == round(rate * len(TRUTH))
    assert noisy.min() >= 0
    assert noisy.max() <= 6


def test_instance_dependent_noise_draws_new_classes_from_the_softmax_of_its_definition():
    image = torch.tensor([[0.5, -0.5, 1.0, 0.25]])
    truth = torch.full((60_000,), 0)
    noisy = instance_dependent(image.expand(len(truth), -1), truth, 0.5, classes=5, seed=0)

    random = np.random.default_rng(0)  # the draws that come before the first class's matrix
    draws = random.normal(0.5, 0.1, len(truth))
    assert ((draws > 0) & (draws < 1)).all()  # so that none was drawn again
    random.random(len(truth))
    logits = image[0].numpy() @ random.standard_normal((4, 5), dtype=np.float32)
    expected = torch.from_numpy(np.exp(logits[1:]) / np.exp(logits[1:]).sum())
    shares = torch.bincount(noisy, minlength=5)[1:] / (noisy != truth).sum()
    assert (shares - expected).abs().max() < 0.011  # four standard deviations
    assert expected.max() / expected.min() > 2  # the image prefers some classes


def test_samples_of_a_higher_rate_flip_more_often():
    """Over many draws a sample flips with its own probability: where rates spread, so do the flips."""
    truth = torch.zeros(20_000, dtype=torch.int64)
    noisy = instance_dependent(torch.randn(len(truth), 2), truth, 0.3, classes=2, seed=5)
    flips = (noisy != truth).numpy()
    original = np.random.default_rng(5).normal(0.3, 0.1, len(truth))  # those outside [0, 1] were drawn again
    for low, high in ((0.1, 0.2), (0.3, 0.4), (0.5, 0.6)):
        within = (original >= low) & (original < high)
        assert flips[within].mean() == pytest.approx(original[within].mean(), abs=0.06)


def test_images_alike_are_mistaken_alike():
    features = 20 * torch.nn.functional.one_hot(torch.arange(3)).float().repeat(100, 1)
    truth = torch.zeros(300, dtype=torch.int64)
    noisy = instance_dependent(features, truth, 1.0, classes=6, seed=3)
    for image in range(3):
        counts = torch.bincount(noisy[image::3], minlength=6)
        assert counts.max() > 90  # a long feature settles its wrong class


# Transition matrix


def test_the_transition_matrix_of_an_absent_class_is_zero_and_others_sum_to_one():
    matrix = transition_matrix(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]), 4)
    assert matrix.tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert matrix.dtype == torch.float64


# Human labels


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def cifar_n(tmp_path):
    """A file as the authors of CIFAR-10N saved theirs."""
    clean = np.arange(10).repeat(3)
    columns = {"clean_label": clean, "worse_label": (clean + 1) % 10, "random_label1": clean[::-1]}
    torch.save(columns, tmp_path / "CIFAR-10_human.pt")
    return tmp_path / "CIFAR-10_human.pt"


def test_human_labels_are_read_as_they_stand(cifar_n):
    clean = torch.arange(10).repeat_interleave(3)
    assert torch.equal(human(cifar_n, "worse_label", expected=clean), (clean + 1) % 10)
    assert torch.equal(human(cifar_n, "random_label1"), clean.flip(0))
    assert human(cifar_n, "clean_label").dtype == torch.int64


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_human_labels_of_every_width_are_read(tmp_path, dtype):
    torch.save({"noisy_label": np.array([3, 1, 2], dtype=dtype)}, tmp_path / "labels.pt")
    assert human(tmp_path / "labels.pt", "noisy_label").tolist() == [3, 1, 2]


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_files_of_numpy_1_and_numpy_2_are_read_under_either(cifar_n, tmp_path, module):
    """The two call the same constructor by other names, and the authors' files are of the older."""
    rewritten = tmp_path / "other.pt"
    with zipfile.ZipFile(cifar_n) as source, zipfile.ZipFile(rewritten, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("data.pkl"):
                assert b"core.multiarray\n" in content
                content = content.replace(b"numpy._core.multiarray", module).replace(b"numpy.core.multiarray", module)
            target.writestr(name, content)
    assert torch.equal(human(rewritten, "worse_label"), human(cifar_n, "worse_label"))


def test_a_file_that_holds_code_is_refused_and_the_code_not_run(tmp_path):
    trace = tmp_path / "trace"
    for name, content in (
        ("beside.pt", {"clean_label": np.arange(3), "worse_label": Hostile(trace)}),
        ("unused.pt", {"clean_label": np.arange(3), "worse_label": np.arange(3), "other": Hostile(trace)}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is refused: .*mkdir") as caught:
            human(tmp_path / name, "worse_label")
        assert "weights_only" not in str(caught.value)  # no advice to run it after all
    assert not trace.exists()
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()  # the code would have worked


def test_arrays_of_objects_are_refused(tmp_path):
    torch.save({"worse_label": np.array([1, "a"], dtype=object)}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="refused"):
        human(tmp_path / "objects.pt", "worse_label")


@pytest.mark.parametrize("content", [b"", b"no pickle", np.random.default_rng(0).bytes(500)])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "damaged.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.pt is refused"):
        human(tmp_path / "damaged.pt", "worse_label")


def test_a_truncated_file_is_refused_and_a_missing_one_is_missing(cifar_n, tmp_path):
    (tmp_path / "short.pt").write_bytes(cifar_n.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"short\.pt is refused"):
        human(tmp_path / "short.pt", "worse_label")
    with pytest.raises(FileNotFoundError):
        human(tmp_path / "absent.pt", "worse_label")


@pytest.mark.parametrize(
    ("content", "culprit"),
    [
        ([1, 2], "holds a list"),
        ({"clean_label": np.arange(3)}, "has no 'worse_label'; it has clean_label"),
        ({"worse_label": np.eye(2, dtype=np.int64)}, r"of shape \(2, 2\)"),
        ({"worse_label": "text"}, "whole numbers"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, culprit):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=culprit):
        human(tmp_path / "other.pt", "worse_label")


def test_human_labels_of_a_data_set_in_another_order_are_refused(cifar_n):
    clean = torch.arange(10).repeat_interleave(3)
    with pytest.raises(ValueError, match=r"image 0 is of class 0, the data set says 9 \(30 such\)"):
        human(cifar_n, "worse_label", expected=clean.flip(0))
    with pytest.raises(ValueError, match="labels 30 images, but the data set has 29"):
        human(cifar_n, "worse_label", expected=clean[1:])


def test_human_labels_without_clean_ones_cannot_be_compared(tmp_path):
    torch.save({"noisy_label": np.arange(3)}, tmp_path / "labels.pt")
    with pytest.raises(ValueError, match="no 'clean_label'"):
        human(tmp_path / "labels.pt", "noisy_label", expected=torch.arange(3))


# Specs


def test_a_spec_names_the_function_and_its_rate(cifar_n):
    options = {"classes": 10, "seed": 7}
    features = torch.randn(len(TENS), 4, generator=torch.Generator().manual_seed(1))
    hundred = torch.arange(100).repeat(4)
    for spec, expected in (
        ("symmetric:0.4", symmetric(TENS, 0.4, **options)),
        ("asymmetric:0.4", asymmetric(TENS, 0.4, mapping=CIFAR10_MAP, seed=7)),
        ("pair:0.4", pair_flip(TENS, 0.4, **options)),
        ("instance:0.4", instance_dependent(features, TENS, 0.4, **options)),
    ):
        assert torch.equal(apply(spec, TENS, features=features, **options), expected)
    on_hundred = apply("asymmetric:0.5", hundred, classes=100, seed=7)
    assert torch.equal(on_hundred, asymmetric(hundred, 0.5, mapping=CIFAR100_MAP, seed=7))
    clean = torch.arange(10).repeat_interleave(3)
    assert torch.equal(apply(f"human:{cifar_n}:worse_label", clean, **options), human(cifar_n, "worse_label"))
    with pytest.raises(ValueError, match="data set"):
        apply(f"human:{cifar_n}:worse_label", clean.flip(0), **options)


@pytest.mark.parametrize(
    ("spec", "culprit"),
    [
        ("symetric:0.4", "'symetric'"),
        ("symmetric", "'' is no rate"),
        ("pair:much", "'much' is no rate"),
        ("pair:1.2", "rate is 1.2"),
        ("human:labels.pt", "human:FILE:KIND"),
        ("human:labels.pt:", "human:FILE:KIND"),
        ("asymmetric:0.4", "not for 7"),
        ("instance:0.4", "features="),
    ],
)
def test_a_wrong_spec_is_named(spec, culprit):
    with pytest.raises(ValueError, match=culprit):
        apply(spec, TRUTH, classes=7, seed=0)


def test_the_map_of_cifar_is_for_the_classes_of_cifar():
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    expected = apply("asymmetric:0.4", TENS, classes=10, seed=0)
    assert torch.equal(apply("asymmetric:0.4", TENS, classes=10, seed=0, class_names=names), expected)
    with pytest.raises(ValueError, match="a class 'automobile' in the place of 'airplane'"):
        apply("asymmetric:0.4", TENS, classes=10, seed=0, class_names=[*sorted(["plane", *names[1:]])])


def test_symmetric_noise_has_the_transition_matrix_of_its_definition_as_far_as_chance_allows():
    truth = torch.arange(10).repeat(10_000)
    matrix = transition_matrix(truth, symmetric(truth, 0.4, classes=10, seed=3), 10)
    expected = torch.full((10, 10), 0.4 / 9, dtype=torch.float64).fill_diagonal_(0.6)
    assert float((matrix - expected).abs().max()) < 5 * (0.6 * 0.4 / 10_000) ** 0.5
    assert float(matrix.diagonal().mean()) == pytest.approx(0.6)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 11]), torch.tensor([0, -1, 1])])
def test_symmetric_noise_refuses_labels_that_are_no_classes(labels):
    with pytest.raises(ValueError, match=r"labels\["):
        symmetric(labels, 0.4, classes=10, seed=0)
