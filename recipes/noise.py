"""Label noise as pure functions of (labels, rate, seed), and the human labels of CIFAR-N.

Every rate is exact: round(rate * N) labels change, or round(rate * n) in each class, as the function says; no rate is
left to chance.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from selectsampler.validation import check_features, check_labels

__all__ = [
    "CIFAR10_MAP",
    "CIFAR100_MAP",
    "CIFAR100_SUPERCLASSES",
    "apply",
    "asymmetric",
    "human",
    "instance_dependent",
    "pair_flip",
    "symmetric",
    "transition_matrix",
]

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# truck -> automobile, bird -> airplane, deer -> horse, cat <-> dog (arXiv 1609.03683), classes in alphabetical order
CIFAR10_MAP: Mapping[int, int] = MappingProxyType({9: 1, 2: 0, 4: 7, 3: 5, 5: 3})

# The five classes of each superclass; the number of a class is its rank among all hundred names
CIFAR100_SUPERCLASSES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
        "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
        "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
        "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
        "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
        "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
        "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
        "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
        "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
        "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
        "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
        "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
        "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
        "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
        "people": ("baby", "boy", "girl", "man", "woman"),
        "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
        "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
        "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
        "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
        "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
    }
)


def _next_in_superclass() -> dict[int, int]:
    names = sorted(name for family in CIFAR100_SUPERCLASSES.values() for name in family)
    return {
        names.index(name): names.index(family[(place + 1) % len(family)])
        for family in CIFAR100_SUPERCLASSES.values()
        for place, name in enumerate(family)
    }


# Each class -> the next of its superclass, the last -> the first (arXiv 1609.03683)
CIFAR100_MAP: Mapping[int, int] = MappingProxyType(_next_in_superclass())


def symmetric(labels: Tensor, rate: float, *, classes: int, seed: int) -> Tensor:
    """Exactly round(rate * N) labels changed, each to another class, all others equally likely.

    >>> truth = torch.arange(10).repeat(100)
    >>> int((symmetric(truth, 0.4, classes=10, seed=0) != truth).sum())
    400

    Args:
        labels: (N,), int64, in [0, classes).
        rate: in [0, 1].
        classes: at least 2.
        seed: of the rows and of their new labels.

    Raises:
        ValueError: if the rate, the labels or the number of classes are out of range.
    """
    if not 0 <= rate <= 1 or classes < 2:
        raise ValueError(f"rate={rate} and classes={classes}: a rate in [0, 1] and at least two classes are needed.")
    check_labels(labels, samples=len(labels), classes=classes)
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.permutation(len(labels))[: round(rate * len(labels))])
    flipped = labels.clone()
    flipped[rows] = (labels[rows] + torch.from_numpy(random.integers(1, classes, len(rows)))) % classes
    return flipped


def asymmetric(labels: Tensor, rate: float, *, mapping: Mapping[int, int], seed: int) -> Tensor:
    """Exactly round(rate * n) of the n labels of each mapped class changed to the class that it is mapped to.

    >>> truth = torch.arange(10).repeat(100)
    >>> noisy = asymmetric(truth, 0.4, mapping=CIFAR10_MAP, seed=0)
    >>> [int((noisy[truth == label] != label).sum()) for label in range(10)]
    [0, 0, 40, 40, 40, 40, 0, 0, 0, 40]

    The rate is a share of each mapped class, as in the literature: with `CIFAR10_MAP`, which maps five classes of ten,
    "40 % asymmetric noise" makes 20 % of all labels wrong. The classes of the two CIFAR maps are numbered
    alphabetically, as torchvision and image folders number them.

    Args:
        labels: (N,), int64, from 0 on.
        rate: in [0, 1].
        mapping: class to class, as `CIFAR10_MAP` and `CIFAR100_MAP` (within superclasses).
        seed: of the rows.

    Raises:
        ValueError: if the rate is out of range, labels are negative, or a class is mapped to itself.
    """
    _check_rate(rate)
    check_labels(labels, samples=len(labels))
    fixed = [source for source, target in mapping.items() if source == target]
    if fixed:
        raise ValueError(f"mapping sends class {fixed[0]} to itself, which changes no label. Leave it out.")
    random = np.random.default_rng(seed)
    flipped = labels.clone()
    for source in sorted(mapping):
        rows = random.permutation((labels == source).nonzero()[:, 0].numpy())
        flipped[torch.from_numpy(rows[: round(rate * len(rows))])] = mapping[source]
    return flipped


def pair_flip(labels: Tensor, rate: float, *, classes: int, seed: int) -> Tensor:
    """Exactly round(rate * n) of the n labels of each class changed to the next class, the last to the first.

    Args:
        labels: (N,), int64, in [0, classes).
        rate: in [0, 1], of each class.
        classes: at least 2.
        seed: of the rows.

    Raises:
        ValueError: if the rate, the labels or the number of classes are out of range.

    arXiv 1804.06872.
    """
    if classes < 2:
        raise ValueError(f"classes is {classes}, but a pair needs at least two.")
    check_labels(labels, samples=len(labels), classes=classes)
    return asymmetric(labels, rate, mapping={label: (label + 1) % classes for label in range(classes)}, seed=seed)


def instance_dependent(features: Tensor, labels: Tensor, rate: float, *, classes: int, seed: int) -> Tensor:
    """Labels changed where and to what an image's own features say; exactly round(rate * N) of them.

    Each sample has a flip rate q from the normal distribution N(rate, 0.1^2) cut to [0, 1]; each class y a matrix W_y
    of standard normal entries. A sample x of class y flips with probability q, and then to class j != y with
    probability softmax(x W_y)_j over the other classes: images alike are mistaken alike. The paper draws every flip by
    itself, so that its rate is left to chance; here all q are shifted by the one constant that makes the number of
    flips exact. The new classes are drawn as in the paper.

    Args:
        features: (N, S), floating point; taken as given, and the longer they are, the more an image settles its wrong
            class. The paper takes standardised pixels, of length 55 for CIFAR. CLIP's features settle it as much as
            those where they are of unit length, and wholly as they come.
        labels: (N,), int64, in [0, classes).
        rate: in [0, 1].
        classes: at least 2.
        seed: of the flip rates, the matrices, the rows and their new labels.

    Raises:
        ValueError: if the rate, the labels or the number of classes are out of range, or features do not fit.

    Algorithm 2 of arXiv 2006.07836.
    """
    _check_rate(rate)
    if classes < 2:
        raise ValueError(f"classes is {classes}, but noise needs at least two.")
    check_labels(labels, samples=len(labels), classes=classes)
    check_features(features, name="features", rows=len(labels))
    random = np.random.default_rng(seed)
    flip_rates = _truncated_normal(rate, 0.1, len(labels), random)
    # A sample flips where its uniform number is below its rate: the k that fall shortest are k exact flips.
    flips = np.argsort(random.random(len(labels)) - flip_rates, kind="stable")[: round(rate * len(labels))]
    truth, flipped = labels.numpy(), labels.numpy().copy()
    for label in range(classes):
        projection = random.standard_normal((features.shape[1], classes), dtype=np.float32)
        rows = flips[truth[flips] == label]
        logits = features[torch.from_numpy(rows)].float().numpy() @ projection
        logits[:, label] = -np.inf
        flipped[rows] = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)  # one draw from each softmax
    return torch.from_numpy(flipped)


def human(path: Path | str, kind: str, *, expected: Tensor | None = None) -> Tensor:
    """Labels that people gave, (N,), int64, from a file of CIFAR-10N or CIFAR-100N (arXiv 2110.12088).

    >>> human("CIFAR-10_human.pt", "worse_label", expected=torch.tensor(train.targets))          # doctest: +SKIP
    tensor([6, 9, 9,  ..., 9, 1, 1])

    The file is a dictionary of arrays. It is read without running code from it: numpy's array constructors are allowed,
    all else is refused. Needs torch 2.6 or newer.

    Args:
        path: the `.pt` file.
        kind: `worse_label`, `aggre_label`, `random_label1` to `random_label3`, `noisy_label` (CIFAR-100N) or
            `clean_label`.
        expected: (N,), int64, the data set's own labels. The file follows the order of the original data set, so that
            they must equal its `clean_label`: files of an image folder, sorted by class, do not.

    Raises:
        ValueError: if the file holds code or is damaged, lacks `kind`, or its clean labels are not the expected ones.
        OSError: if the file cannot be read.
    """
    columns = _load_arrays(path)
    if kind not in columns:
        found = ", ".join(name for name in columns if str(name).endswith(("_label", "_label1", "_label2", "_label3")))
        raise ValueError(f"{path} has no {kind!r}; it has {found or 'no labels at all'}.")
    labels = _label_column(columns, kind, path)
    if expected is None:
        return labels
    if "clean_label" not in columns:
        raise ValueError(f"{path} has no 'clean_label', so that its order cannot be compared with the data set's.")
    clean = _label_column(columns, "clean_label", path)
    if not len(labels) == len(clean) == len(expected):
        raise ValueError(
            f"{path} labels {len(labels)} images, but the data set has {len(expected)}: human labels go with the whole "
            "training set, in torchvision's order (no --quick, no --first-per-class)."
        )
    differing = (clean != expected).nonzero()[:, 0]
    if len(differing):
        row = int(differing[0])
        raise ValueError(
            f"{path} says that image {row} is of class {int(clean[row])}, the data set says {int(expected[row])} "
            f"({len(differing)} such): the data set is another, or not in the order of the original files, as "
            "torchvision's CIFAR10 and CIFAR100 are (an image folder is sorted by class)."
        )
    return labels


def transition_matrix(truth: Tensor, noisy: Tensor, classes: int) -> Tensor:
    """(C, C), float64: row y holds the shares of the true class y that are labelled 0, ..., C - 1.

    >>> transition_matrix(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2)
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]], dtype=torch.float64)

    A class without a sample has a row of zeros.

    Args:
        truth, noisy: (N,), int64, in [0, classes).
        classes: C.

    Raises:
        ValueError: if labels are out of range or differ in number.
    """
    check_labels(truth, samples=len(truth), classes=classes)
    check_labels(noisy, samples=len(truth), classes=classes)
    counts = torch.bincount(truth * classes + noisy, minlength=classes**2).reshape(classes, classes).double()
    return counts / counts.sum(dim=1, keepdim=True).clamp(min=1)


def apply(
    spec: str,
    labels: Tensor,
    *,
    classes: int,
    seed: int,
    features: Tensor | None = None,
    class_names: Sequence[str] | None = None,
) -> Tensor:
    """The noise that `spec` names, (N,), int64.

    >>> apply("pair:0.5", torch.tensor([0, 0, 1, 1, 2, 2]), classes=3, seed=0)
    tensor([1, 0, 2, 1, 0, 2])

    Args:
        spec: `symmetric:RATE`, `asymmetric:RATE` (10 or 100 classes: those of CIFAR), `pair:RATE`, `instance:RATE`, or
            `human:FILE:KIND`.
        labels: (N,), int64, in [0, classes), the true ones.
        classes: C.
        seed: of the noise; human labels have none.
        features: (N, S), for `instance`.
        class_names: C names, to tell whether the classes are CIFAR's where the noise is made for those.

    Raises:
        ValueError: if the spec, or what it asks for, does not fit.
    """
    kind, _, value = spec.partition(":")
    if kind == "human":
        path, _, column = value.rpartition(":")
        if not path or not column:
            raise ValueError(
                f"{spec!r} lacks a file or kind: write human:FILE:KIND, as human:CIFAR-10_human.pt:worse_label."
            )
        given = human(path, column, expected=labels)
        check_labels(given, samples=len(labels), classes=classes)
        return given
    if kind not in ("symmetric", "asymmetric", "pair", "instance"):
        raise ValueError(f"{spec!r}: there is no noise {kind!r}, but symmetric, asymmetric, pair, instance and human.")
    try:
        rate = float(value)
    except ValueError:
        raise ValueError(f"{spec!r}: {value!r} is no rate. Write {kind}:RATE, as {kind}:0.4.") from None
    if kind == "symmetric":
        return symmetric(labels, rate, classes=classes, seed=seed)
    if kind == "asymmetric":
        return asymmetric(labels, rate, mapping=_cifar_map(spec, classes, class_names), seed=seed)
    if kind == "pair":
        return pair_flip(labels, rate, classes=classes, seed=seed)
    if features is None:
        raise ValueError(f"{spec!r} follows the images, but no features were given: pass features=, (N, S).")
    return instance_dependent(features, labels, rate, classes=classes, seed=seed)


def _cifar_map(spec: str, classes: int, class_names: Sequence[str] | None) -> Mapping[int, int]:
    hundred = sorted(name for family in CIFAR100_SUPERCLASSES.values() for name in family)
    known: dict[int, Sequence[str]] = {10: CIFAR10_NAMES, 100: hundred}
    if classes not in known:
        raise ValueError(
            f"{spec!r} is known for CIFAR's 10 and 100 classes, not for {classes}: call asymmetric(mapping=)."
        )
    for found, expected in zip(class_names or known[classes], known[classes], strict=True):
        if found.replace(" ", "_") != expected:
            raise ValueError(
                f"{spec!r} sends each of CIFAR's classes to one that resembles it, but here is a class {found!r} in "
                f"the place of {expected!r}: name the folders as CIFAR does, or call asymmetric(mapping=)."
            )
    return CIFAR10_MAP if classes == 10 else CIFAR100_MAP


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}, but it must lie in [0, 1].")


def _truncated_normal(mean: float, deviation: float, count: int, random: np.random.Generator) -> np.ndarray:
    """Draws from N(mean, deviation^2) cut to [0, 1]: what falls outside is drawn again."""
    draws = random.normal(mean, deviation, count)
    while (outside := (draws < 0) | (draws > 1)).any():
        draws[outside] = random.normal(mean, deviation, int(outside.sum()))
    return draws


def _load_arrays(path: Path | str) -> dict[str, object]:
    """A dictionary of integer arrays, unpickled without calling anything but numpy's array constructors."""
    dtypes = [type(np.dtype(name)) for name in ("int8", "int16", "int32", "int64", "uint8")]
    rebuild = np.empty(0).__reduce__()[0]
    both = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]  # before, from numpy 2
    if not hasattr(torch.serialization, "safe_globals"):
        raise ValueError(f"To read {path} without running code takes torch 2.6 or newer; here is {torch.__version__}.")
    try:
        with torch.serialization.safe_globals([np.ndarray, np.dtype, *dtypes, *both]):
            columns = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever torch meets in bytes that are not what they should be
        # Not torch's whole text, which advises to load the file with code and all
        found = re.search(r"unsupported GLOBAL \S+|(?<=WeightsUnpickler error: )\s*\S.*", str(error))
        cause = found[0].strip() if found else type(error).__name__
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than arrays of whole numbers, and to unpickle that could "
            f"run code ({cause:.200}). Get the file from CIFAR-N's authors again."
        ) from None
    if not isinstance(columns, dict):
        raise ValueError(f"{path} holds a {type(columns).__name__}, but CIFAR-N's files hold a dictionary of arrays.")
    return columns


def _label_column(columns: dict[str, object], kind: str, path: Path | str) -> Tensor:
    labels = np.asarray(columns[kind])
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: {kind!r} is {labels.dtype} of shape {labels.shape}, not (N,) whole numbers.")
    return torch.from_numpy(labels.astype(np.int64))
