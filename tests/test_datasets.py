"""One view on every kind of data set: raw images, labels without decoding, names and identities; nothing is changed."""

import copy
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import datasets as tv
from torchvision import transforms as T

from selectsampler.embeddings.datasets import UNREADABLE, as_images

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

TRAINING = T.Compose([T.RandomResizedCrop(8), T.RandomHorizontalFlip(), T.ToTensor(), T.RandomErasing(p=1)])


@pytest.fixture
def pictures(images_of):
    return images_of(12)


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def assert_shows(images, expected):
    assert len(images) == len(expected)
    for index, image in enumerate(expected):
        assert pixels(images.open(index)) == pixels(image.convert("RGB")), index


class Opens:
    """How often an image file was opened."""

    def __init__(self, monkeypatch):
        self.count = 0
        self.open = Image.open
        monkeypatch.setattr(Image, "open", self)

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.open(*args, **kwargs)


@pytest.fixture
def opens(monkeypatch):
    return Opens(monkeypatch)


# The kinds of data sets, each with the same twelve pictures of three classes, four of each


def a_list(pictures, tmp_path):
    return [(picture, index // 4) for index, picture in enumerate(pictures)]


def a_list_of_arrays(pictures, tmp_path):
    return [(np.asarray(picture), np.int64(index // 4)) for index, picture in enumerate(pictures)]


def a_torchvision_folder(pictures, tmp_path):
    return tv.ImageFolder(write_folder(pictures, tmp_path / "folder"), transform=TRAINING)


def a_timm_folder(pictures, tmp_path):
    return timm.data.create_dataset("", root=str(write_folder(pictures, tmp_path / "folder")), transform=TRAINING)


def a_timm_torch_folder(pictures, tmp_path):
    root = write_folder(pictures, tmp_path / "folder")
    return timm.data.create_dataset("torch/image_folder", root=str(root), transform=TRAINING)


def a_timm_tar(pictures, tmp_path):
    root = write_folder(pictures, tmp_path / "folder")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(root, arcname=".")
    return timm.data.create_dataset("", root=str(tmp_path / "images.tar"), transform=TRAINING)


def a_timm_tar_of_tars(pictures, tmp_path):
    root = write_folder(pictures, tmp_path / "folder")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for folder in sorted(root.iterdir()):
            with tarfile.open(tmp_path / f"{folder.name}.tar", "w") as inner:
                for path in sorted(folder.iterdir()):
                    inner.add(path, arcname=path.name)
            tar.add(tmp_path / f"{folder.name}.tar", arcname=f"{folder.name}.tar")
    return timm.data.create_dataset("", root=str(tmp_path / "images.tar"), transform=TRAINING)


def a_hugging_face_folder(pictures, tmp_path):
    pytest.importorskip("datasets")
    root = write_folder(pictures, tmp_path / "folder")
    return timm.data.create_dataset(
        f"hfds/{root}", root=str(tmp_path / "cache"), split="train", transform=TRAINING, trust_remote_code=False
    )


def a_hugging_face_parquet(pictures, tmp_path):
    hugging_face = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": png(picture), "path": None} for picture in pictures], "label": labels_of(pictures)}
    label = hugging_face.ClassLabel(names=["cat", "dog", "owl"])
    features = hugging_face.Features({"image": hugging_face.Image(), "label": label})
    (tmp_path / "parquet").mkdir()
    table = hugging_face.Dataset.from_dict(columns, features=features)
    table.to_parquet(str(tmp_path / "parquet" / "train-00000-of-00001.parquet"))
    return timm.data.create_dataset(
        f"hfds/{tmp_path / 'parquet'}", root=str(tmp_path / "cache"), split="train", transform=TRAINING
    )


class OwnCifar10(tv.CIFAR10):
    """torchvision's own class on a file of ours."""

    train_list = [["batch", None]]  # noqa: RUF012, as in torchvision
    test_list = []  # noqa: RUF012
    meta = {"filename": "meta", "key": "label_names", "md5": None}  # noqa: RUF012


def a_cifar10(pictures, tmp_path):
    base = tmp_path / OwnCifar10.base_folder
    base.mkdir()
    stacked = np.stack([np.asarray(picture.resize((32, 32), Image.Resampling.NEAREST)) for picture in pictures])
    batch = {"data": stacked.transpose(0, 3, 1, 2).reshape(len(pictures), -1), "labels": labels_of(pictures)}
    (base / "batch").write_bytes(pickle.dumps(batch))
    (base / "meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog", "owl"]}))
    return OwnCifar10(tmp_path, transform=TRAINING)


def an_mnist(pictures, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    grey = np.stack(
        [np.asarray(picture.convert("L").resize((28, 28), Image.Resampling.NEAREST)) for picture in pictures]
    )
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, len(grey), 28, 28) + grey.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, len(grey)) + bytes(labels_of(pictures))
        )
    return tv.MNIST(tmp_path, transform=TRAINING)


class JointlyTransformed(tv.VisionDataset):
    """As torchvision's data sets for which image and target may be transformed together; labels stand in `samples`."""

    def __init__(self, root):
        super().__init__(root, transform=TRAINING)
        self.samples = [(str(path), int(path.stem) // 4) for path in sorted(root.rglob("*.png"))]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, label = Image.open(self.samples[index][0]).convert("RGB"), self.samples[index][1]
        return (image, label) if self.transforms is None else self.transforms(image, label)


def a_jointly_transformed_folder(pictures, tmp_path):
    return JointlyTransformed(write_folder(pictures, tmp_path / "folder"))


class OnTheFly(Dataset):
    """A data set of a user's own, which tells labels only with the images."""

    def __init__(self, pictures, transform=TRAINING):
        self.pictures = pictures
        self.transform = transform

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        image = self.pictures[index]
        return (image if self.transform is None else self.transform(image)), index // 4


def a_users_own(pictures, tmp_path):
    return OnTheFly(pictures)


def a_subset_of_a_folder(pictures, tmp_path):
    more = [pictures[0], *pictures]  # cat/0000 stands twice; the subset leaves it out
    return Subset(tv.ImageFolder(write_folder(more, tmp_path / "folder", shift=1), transform=TRAINING), range(1, 13))


def a_chain(pictures, tmp_path):
    halves = a_list(pictures, tmp_path)[:6], Subset(a_torchvision_folder(pictures, tmp_path), torch.arange(6, 12))
    return ConcatDataset(halves)


KINDS = [
    a_list,
    a_list_of_arrays,
    a_torchvision_folder,
    a_timm_folder,
    a_timm_torch_folder,
    a_timm_tar,
    a_timm_tar_of_tars,
    a_hugging_face_folder,
    a_hugging_face_parquet,
    a_cifar10,
    an_mnist,
    a_jointly_transformed_folder,
    a_users_own,
    a_subset_of_a_folder,
    a_chain,
]


def labels_of(pictures):
    return [index // 4 for index in range(len(pictures))]


def png(picture):
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


def write_folder(pictures, root, *, shift=0):
    """Three classes of four PNGs, and `shift` more of the first."""
    for index, picture in enumerate(pictures):
        place = max(0, index - shift)
        path = root / ("cat", "dog", "owl")[place // 4] / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_shown_as_stored_whatever_the_training_transform(kind, pictures, tmp_path):
    if kind is a_cifar10:
        expected = [picture.resize((32, 32), Image.Resampling.NEAREST) for picture in pictures]
    elif kind is an_mnist:
        expected = [picture.convert("L").resize((28, 28), Image.Resampling.NEAREST) for picture in pictures]
    else:
        expected = pictures
    assert_shows(as_images(kind(pictures, tmp_path)), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not a_users_own])
def test_labels_are_had_without_decoding_more_than_the_first_image(kind, pictures, tmp_path, opens):
    dataset = kind(pictures, tmp_path)
    opens.count = 0
    assert as_images(dataset).labels() == labels_of(pictures)
    assert opens.count <= 1


@pytest.mark.parametrize(
    "kind", [a_timm_folder, a_timm_tar, a_timm_tar_of_tars, a_hugging_face_folder, a_hugging_face_parquet]
)
def test_timms_readers_tell_labels_without_reading_an_image(kind, pictures, tmp_path, monkeypatch):
    dataset = kind(pictures, tmp_path)
    monkeypatch.setattr(type(dataset.reader), "__getitem__", None)
    assert as_images(dataset).labels() == labels_of(pictures)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_label_is_had_with_its_image(kind, pictures, tmp_path):
    images = as_images(kind(pictures, tmp_path))
    assert [images.label(index) for index in range(12)] == labels_of(pictures)


def test_labels_that_only_come_with_images_are_not_guessed(pictures):
    assert as_images(OnTheFly(pictures)).labels() is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_has_an_identity_of_its_own_that_stays_the_same(kind, pictures, tmp_path):
    dataset = kind(pictures, tmp_path)
    identities = as_images(dataset).identities()
    if kind is a_users_own:
        assert identities is None
    else:
        assert len(set(identities)) == 12
        assert as_images(dataset).identities() == identities


@pytest.mark.parametrize(
    "kind", [a_torchvision_folder, a_timm_folder, a_timm_torch_folder, a_timm_tar, a_subset_of_a_folder]
)
def test_files_are_called_by_their_place_below_the_root(kind, pictures, tmp_path):
    keys = as_images(kind(pictures, tmp_path)).keys()
    shift = 1 if kind is a_subset_of_a_folder else 0
    expected = [f"{name}/{4 * c + i + shift:04}.png" for c, name in enumerate(["cat", "dog", "owl"]) for i in range(4)]
    assert [key.removeprefix("./") for key in keys] == expected


@pytest.mark.parametrize("kind", [a_list, a_cifar10, a_hugging_face_parquet, a_users_own, a_chain])
def test_images_without_files_have_no_names(kind, pictures, tmp_path):
    assert as_images(kind(pictures, tmp_path)).keys() is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_set_is_left_as_it_was(kind, pictures, tmp_path):
    dataset = kind(pictures, tmp_path)
    items = [items_of(dataset), items_of(dataset)]
    state = state_of(dataset)
    images = as_images(dataset)
    for index in range(12):
        images.open(index)
    images.labels(), images.keys(), images.identities()
    assert state_of(dataset) == state
    assert items == [items_of(dataset)] * 2


def state_of(dataset):
    """Which objects the data set and those inside of it consist of."""
    inside = [getattr(dataset, name, None) for name in ("dataset", "reader", "transforms")]
    parts = [part for part in (dataset, *inside, *getattr(dataset, "datasets", [])) if hasattr(part, "__dict__")]
    return [{name: id(value) for name, value in vars(part).items()} for part in parts]


def items_of(dataset):
    """What training would see with a fixed seed."""
    torch.manual_seed(0)
    return [np.asarray(image).tolist() for image, _ in (dataset[index] for index in range(len(dataset)))]


# Details of a kind


def test_the_labels_transform_is_applied(pictures, tmp_path):
    root = write_folder(pictures, tmp_path / "folder")
    swap = [2, 1, 0].__getitem__
    expected = [2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0]
    for dataset in (
        tv.ImageFolder(root, transform=TRAINING, target_transform=swap),
        timm.data.create_dataset("", root=str(root), target_transform=swap),
    ):
        images = as_images(dataset)
        assert images.labels() == expected
        assert [images.label(index) for index in range(12)] == expected


def test_a_part_of_a_part_keeps_its_order(pictures, tmp_path):
    inner = Subset(a_torchvision_folder(pictures, tmp_path), [11, 0, 5, 7])
    images = as_images(Subset(inner, [3, 0, 1]))
    assert_shows(images, [pictures[7], pictures[11], pictures[0]])
    assert images.labels() == [1, 2, 0]
    assert images.keys() == ["dog/0007.png", "owl/0011.png", "cat/0000.png"]
    whole = as_images(a_torchvision_folder(pictures, tmp_path)).identities()
    assert images.identities() == [whole[7], whole[11], whole[0]]


def test_a_chain_of_three_finds_its_parts(pictures, tmp_path):
    parts = [a_list(pictures, tmp_path)[start:end] for start, end in ((0, 1), (1, 5), (5, 12))]
    images = as_images(ConcatDataset(parts))
    assert_shows(images, pictures)
    assert images.labels() == labels_of(pictures)


def test_a_chain_of_which_one_part_tells_no_labels_tells_none(pictures, tmp_path):
    images = as_images(ConcatDataset([a_list(pictures, tmp_path), OnTheFly(pictures)]))
    assert images.labels() is None
    assert images.label(15) == 0
    assert images.label(16) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_images_of_every_mode_are_shown_in_rgb(mode, pictures):
    image = pictures[0].convert(mode)
    assert_shows(as_images([(image, 0)]), [image])


def test_a_list_of_bare_images_has_no_labels(pictures):
    images = as_images(pictures)
    assert images.labels() == [None] * 12
    assert images.label(3) is None


def test_a_damaged_file_is_not_answered_with_the_next_one(pictures, tmp_path):
    for kind in (a_timm_folder, a_torchvision_folder):
        dataset = kind(pictures, tmp_path)
        (tmp_path / "folder" / "cat" / "0002.png").write_bytes(b"no image")
        with pytest.raises(UNREADABLE):
            as_images(dataset).open(2)


def test_a_missing_file_has_an_identity_and_cannot_be_opened(pictures, tmp_path):
    for kind in (a_timm_folder, a_torchvision_folder):
        dataset = kind(pictures, tmp_path)
        before = as_images(dataset).identities()
        (tmp_path / "folder" / "cat" / "0002.png").unlink()
        images = as_images(dataset)
        assert [index for index in range(12) if images.identities()[index] != before[index]] == [2]
        with pytest.raises(UNREADABLE):
            images.open(2)


def test_the_labels_of_a_folder_of_unreadable_files_are_known(pictures, tmp_path):
    for kind in (a_timm_folder, a_torchvision_folder):
        dataset = kind(pictures, tmp_path)
        for path in (tmp_path / "folder").rglob("*.png"):
            path.write_bytes(b"no image")
        assert as_images(dataset).labels() == labels_of(pictures)


@pytest.mark.parametrize("kind", [a_timm_tar, a_timm_tar_of_tars])
def test_workers_do_not_share_the_position_in_an_open_tar(kind, pictures, tmp_path):
    images = as_images(kind(pictures, tmp_path))
    images.open(0)  # whatever this leaves open, two forked workers inherit
    loader = DataLoader(Shown(images), batch_size=None, sampler=[*range(12)] * 20, num_workers=2)
    assert [shown.tolist() for shown in loader] == [pixels(picture) for picture in pictures] * 20


class Shown(Dataset):
    def __init__(self, images):
        self.images = images

    def __getitem__(self, index):
        return np.array(self.images.open(index))


def test_files_are_told_apart_by_name_and_size(pictures, tmp_path):
    dataset = a_torchvision_folder(pictures, tmp_path)
    before = as_images(dataset).identities()
    path = tmp_path / "folder" / "dog" / "0005.png"
    path.write_bytes(path.read_bytes() + b"more")
    after = as_images(dataset).identities()
    assert [index for index in range(12) if before[index] != after[index]] == [5]


def test_a_moved_folder_stays_the_same(pictures, tmp_path):
    before = as_images(a_torchvision_folder(pictures, tmp_path)).identities()
    (tmp_path / "folder").rename(tmp_path / "elsewhere")
    assert as_images(tv.ImageFolder(tmp_path / "elsewhere")).identities() == before


def test_arrays_are_told_apart_by_content(pictures, tmp_path):
    dataset = a_cifar10(pictures, tmp_path)
    before = as_images(dataset).identities()
    dataset.data[7, 0, 0, 0] ^= 1
    after = as_images(dataset).identities()
    assert [index for index in range(12) if before[index] != after[index]] == [7]


class PathsAndTargets(Dataset):
    """A common layout: `samples` holds paths alone, `targets` the labels."""

    def __init__(self, paths, targets):
        self.samples, self.targets, self.transform = paths, targets, TRAINING

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.transform(Image.open(self.samples[index])), self.targets[index]


def test_samples_that_are_bare_paths_are_not_taken_for_pairs(pictures, tmp_path):
    paths = sorted(str(path) for path in write_folder(pictures, tmp_path / "folder").rglob("*.png"))
    images = as_images(PathsAndTargets(paths, labels_of(pictures)))
    assert images.labels() == labels_of(pictures)
    assert images.keys() is None
    assert images.identities() is None  # so that embed looks at the content


def test_a_data_attribute_that_holds_no_pixels_identifies_nothing(pictures):
    dataset = OnTheFly(pictures)
    for data in (np.array([f"{index}.png" for index in range(12)]), np.zeros((12, 5)), np.array([None] * 12)):
        dataset.data = data
        assert as_images(dataset).identities() is None


def test_names_inside_an_archive_are_names_without_sizes(pictures):
    dataset = OnTheFly(pictures)
    dataset.samples = [(f"member/{index}.png", index // 4) for index in range(12)]
    images = as_images(dataset)
    assert images.labels() == labels_of(pictures)
    assert images.keys() == [f"{index}.png" for index in range(12)]
    assert images.identities() is None  # so that embed looks at the content


def test_labels_that_name_the_classes_are_not_taken_for_those_of_the_samples(pictures):
    dataset = OnTheFly(pictures)
    dataset.labels = ["cat", "dog", "owl"]
    assert as_images(dataset).labels() is None


def test_odd_file_names_are_kept(pictures, tmp_path):
    names = ["größe.png", "a b'\"\n.png", "猫.png", os.fsdecode(b"caf\xe9.png")]
    for name, picture in zip(names, pictures, strict=False):
        (tmp_path / "folder" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "cat" / name).write_bytes(png(picture))
    keys = as_images(tv.ImageFolder(tmp_path / "folder")).keys()
    assert sorted(keys) == sorted(f"cat/{name}" for name in names)


# What is refused


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


class OnlyIterable:
    def __iter__(self):
        yield from ()


class WithoutLength(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    "dataset", [Stream(), OnlyIterable(), timm.data.dataset.IterableImageDataset("", reader=Stream()), iter([])]
)
def test_an_iterable_data_set_is_refused_with_the_way_out(dataset):
    with pytest.raises(ValueError, match=r"is an iterable data set: .*Use a map-style data set .*Selection\.keys"):
        as_images(dataset)


@pytest.mark.parametrize("dataset", [[], WithoutLength(), Subset([1, 2], [])])
def test_a_data_set_without_samples_is_refused(dataset):
    with pytest.raises(ValueError, match="has no samples"):
        as_images(dataset)


@pytest.mark.parametrize(
    ("dataset", "found"),
    [
        (
            TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4)),
            r"a Tensor of dtype torch\.float32 and shape \(3, 8, 8\)",
        ),
        ([(np.zeros((3, 8, 8), dtype=np.float32), 0)], r"a ndarray of dtype float32"),
        ([("cat/0001.jpg", 0)], "a str"),
        ([{"image": None, "label": 0}], "a dict"),
        (OnTheFly([torch.zeros(3, 8, 8)]), "a Tensor"),
    ],
)
def test_a_data_set_of_something_else_than_images_is_refused_with_the_way_out(dataset, found):
    with pytest.raises(
        ValueError, match=rf"\[0\] yields {found}.*, but \(PIL image, label\) is needed\. Pass the data set"
    ):
        as_images(dataset)


class FailsWithoutTransform(OnTheFly):
    def __getitem__(self, index):
        return self.transform(self.pictures[index]).mean(), 0


def test_a_data_set_that_needs_its_transform_is_refused_with_the_reason(pictures):
    with pytest.raises(
        ValueError, match=r"FailsWithoutTransform\[0\] fails with AttributeError: .*'mean'.*once its transform"
    ):
        as_images(FailsWithoutTransform(pictures))


class Wrapper(Dataset):
    """Its transform is that of the data set inside."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]

    @property
    def transform(self):
        return self.dataset.transform

    @transform.setter
    def transform(self, transform):
        self.dataset.transform = transform


def test_a_transform_that_belongs_to_a_data_set_inside_is_not_replaced(pictures):
    inside = OnTheFly(pictures)
    with pytest.raises(ValueError, match=r"Wrapper\[0\] yields a Tensor"):
        as_images(Wrapper(inside))
    assert inside.transform is TRAINING
    inside.transform = None
    assert_shows(as_images(Wrapper(inside)), pictures)


def test_timms_augmented_splits_are_refused(pictures, tmp_path):
    inside = a_timm_folder(pictures, tmp_path)
    inside.transform = [TRAINING.transforms[0], TRAINING.transforms[1], T.ToTensor()]
    with pytest.raises(ValueError, match=r"AugMixDataset\[0\] yields a tuple"):
        as_images(timm.data.AugMixDataset(inside))


def test_a_view_is_taken_as_it_is(pictures):
    images = as_images(copy.copy(pictures))
    assert as_images(images) is images
