"""Damage follows from (seed, index), grows with severity, hits an exact share, and is seen alike by all that look."""

import os
import pickle
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image, ImageDraw, ImageOps
from selectsampler.recipes import corruptions
from selectsampler.recipes.corruptions import OTHER_KINDS, PAPER_KINDS, Corrupted, contact_sheet, corrupt
from selectsampler.recipes.data import ZippedImageFolder
from selectsampler.recipes.noise import symmetric
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import datasets as tv

import selectsampler as ss

KINDS = PAPER_KINDS + OTHER_KINDS
DRAWN = ("gaussian_noise", "occlusion", "fog", "motion_blur", "snow")  # the others draw nothing at random
NAMES = ["cat", "dog", "owl"]


def a_picture(width, height, *, seed=0):
    """Smooth colours with a few sharp shapes, as photos have them."""
    random = np.random.default_rng(seed)
    corners = Image.fromarray(random.integers(40, 200, (3, 3, 3), dtype=np.uint8))
    picture = corners.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(8):
        left, top = random.uniform(0, width), random.uniform(0, height)
        color = tuple(random.integers(0, 255, 3).tolist())
        draw.rectangle((left, top, left + width / 5, top + height / 5), fill=color)
    return picture


def pixels(image):
    return np.asarray(image, dtype=np.int64)


def assert_same(image, other):
    assert (image.mode, image.size) == (other.mode, other.size)
    assert np.array_equal(pixels(image), pixels(other))


# One image


@pytest.mark.parametrize("kind", KINDS)
def test_damage_follows_from_seed_and_index(kind):
    image = a_picture(32, 32)
    first, again = (corrupt(image, kind, 3, seed=1, index=5) for _ in range(2))
    assert_same(first, again)
    assert not np.array_equal(pixels(first), pixels(image))
    for seed, index in ((2, 5), (1, 6), (5, 1)):
        same = np.array_equal(pixels(first), pixels(corrupt(image, kind, 3, seed=seed, index=index)))
        assert same == (kind not in DRAWN)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 8), (8, 9), (32, 32), (57, 40), (260, 300), (8, 200)])
@pytest.mark.parametrize("severity", [1, 5])
def test_an_image_of_any_size_keeps_it(kind, size, severity):
    image = a_picture(*size)
    before = pixels(image)
    damaged = corrupt(image, kind, severity, seed=0, index=0)
    assert (damaged.mode, damaged.size) == ("RGB", size)
    assert not np.array_equal(pixels(damaged), before)
    assert np.array_equal(pixels(image), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
def test_even_a_few_pixels_are_no_error(kind, size):
    assert corrupt(Image.new("RGB", size, (10, 200, 90)), kind, 5, seed=0, index=0).size == size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_are_damaged_as_rgb(kind, mode):
    image = a_picture(24, 20).convert(mode)
    assert_same(corrupt(image, kind, 2, seed=0, index=0), corrupt(image.convert("RGB"), kind, 2, seed=0, index=0))


@pytest.mark.parametrize("size", [(32, 32), (96, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_grows_with_severity(kind, size):
    pictures = [a_picture(*size, seed=seed) for seed in range(20)]
    differences = [
        np.mean(
            [
                np.abs(pixels(corrupt(picture, kind, severity, seed=0, index=index)) - pixels(picture)).mean()
                for index, picture in enumerate(pictures)
            ]
        )
        for severity in (1, 2, 3, 4, 5)
    ]
    assert np.all(np.diff(differences) > 0), differences
    assert differences[4] > 1.4 * differences[0]


@pytest.mark.parametrize("color", ["black", "white"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_image_stays_in_range(kind, color):
    damaged = pixels(corrupt(Image.new("RGB", (32, 32), color), kind, 5, seed=0, index=0))
    if kind in ("low_resolution", "motion_blur", "jpeg", "pixelation"):
        assert np.all(damaged == (0 if color == "black" else 255))
    if kind == "brightness":
        assert np.all(damaged == (255 if color == "white" else 77))  # 0.3 of 255, rounded


def test_the_deviation_of_noise_is_the_one_of_the_benchmarks():
    for side, severity, deviation in ((32, 1, 0.04), (32, 5, 0.10), (224, 1, 0.08), (448, 3, 0.18)):
        grey = Image.new("RGB", (side, side), (128, 128, 128))
        noisy = pixels(corrupt(grey, "gaussian_noise", severity, seed=0, index=0))
        assert (noisy - 128).std() / 255 == pytest.approx(deviation, rel=0.05)


def test_the_grain_of_a_large_image_survives_scaling_it_down():
    grey = Image.new("RGB", (896, 896), (128, 128, 128))
    noisy = corrupt(grey, "gaussian_noise", 1, seed=0, index=0).resize((224, 224), Image.Resampling.BOX)
    assert (pixels(noisy) - 128).std() / 255 == pytest.approx(0.08, rel=0.05)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_occlusion_covers_its_share_by_one_rectangle_that_grows_in_place(severity):
    white = Image.new("RGB", (100, 80), "white")
    for index in range(20):
        black = pixels(corrupt(white, "occlusion", severity, seed=0, index=index))[..., 0] == 0
        rows, columns = np.nonzero(black.any(axis=1))[0], np.nonzero(black.any(axis=0))[0]
        assert black.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert black.mean() == pytest.approx(0.1 * severity, abs=0.02)
        less = pixels(corrupt(white, "occlusion", max(1, severity - 1), seed=0, index=index))[..., 0] == 0
        assert (less & ~black).sum() <= 200  # the smaller one lies within, up to a pixel of rounding


def test_motion_blur_draws_a_point_into_a_line_of_the_same_light():
    point = np.zeros((64, 64, 3), dtype=np.float32)
    point[32, 32] = 1
    angle = np.deg2rad(30)
    line = corruptions._smear(point, 4.0, angle)[..., 0]
    y, x = np.mgrid[:64, :64] - 32
    assert line.sum() == pytest.approx(1, abs=1e-4)
    assert (line * x).sum() == pytest.approx(0, abs=0.05)  # it stays where it is
    assert (line * y).sum() == pytest.approx(0, abs=0.05)
    along, across = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    assert (line * along**2).sum() > 10 * (line * across**2).sum()


def test_a_low_decay_makes_rough_fog_and_a_high_one_smooth_fog():
    rough, smooth = (corruptions._plasma(64, decay, np.random.default_rng(0)) for decay in (1.5, 3.0))
    for plasma in (rough, smooth):
        assert (plasma.min(), plasma.max()) == (0, 1)
    assert np.abs(np.diff(rough)).mean() > 2 * np.abs(np.diff(smooth)).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_image_takes_less_than_5_ms(kind):
    image = a_picture(32, 32)
    seconds = []
    for index in range(20):
        start = time.perf_counter()
        corrupt(image, kind, 5, seed=0, index=index)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 0.005


@pytest.mark.parametrize(
    ("kind", "severity", "culprit"),
    [
        ("frost", 3, "'frost'"),
        ("fog", 0, "severity is 0"),
        ("fog", 6, "severity is 6"),
        ("fog", 2.5, "severity is 2.5"),
    ],
)
def test_unknown_damage_is_refused(kind, severity, culprit):
    with pytest.raises(ValueError, match=culprit):
        corrupt(a_picture(8, 8), kind, severity, seed=0, index=0)
    with pytest.raises(ValueError, match=culprit):
        Corrupted([(a_picture(8, 8), 0)], kind, share=0.5, severity=severity)


# A data set


@pytest.fixture
def pictures():
    return [a_picture(20, 24, seed=seed) for seed in range(12)]


def write_folder(pictures, root):
    for index, picture in enumerate(pictures):
        path = root / NAMES[index // 4] / f"{index % 4:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return root


def a_list(pictures, tmp_path):
    return [(picture, index // 4) for index, picture in enumerate(pictures)]


def a_torchvision_folder(pictures, tmp_path):
    return tv.ImageFolder(write_folder(pictures, tmp_path / "folder"))


def a_timm_folder(pictures, tmp_path):
    return timm.data.create_dataset("", root=str(write_folder(pictures, tmp_path / "folder")))


def a_zipped_folder(pictures, tmp_path):
    root = write_folder(pictures, tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "folder.zip", "w") as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, f"train/{path.relative_to(root)}")
    return ZippedImageFolder(tmp_path / "folder.zip", "train")


class InMemory(Dataset):
    """Built like torchvision's CIFAR10: `data`, `targets`, `classes`, `transform`."""

    def __init__(self, pictures):
        self.data = np.stack([pixels(picture).astype(np.uint8) for picture in pictures])
        self.targets = [index // 4 for index in range(len(pictures))]
        self.classes = NAMES
        self.transform = None

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image = Image.fromarray(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def in_memory(pictures, tmp_path):
    return InMemory(pictures)


def a_subset(pictures, tmp_path):
    return Subset(InMemory(pictures[::-1]), range(11, -1, -1))


EVERY_KIND = [a_list, a_torchvision_folder, a_timm_folder, a_zipped_folder, in_memory, a_subset]


@pytest.mark.parametrize("make", EVERY_KIND)
def test_every_kind_of_data_set_shows_the_same_damage_at_the_same_rows(make, pictures, tmp_path):
    dataset = make(pictures, tmp_path)
    damaged = Corrupted(dataset, "mixed", share=0.5, severity=4, seed=3)
    assert len(damaged) == 12
    assert sum(kind is not None for kind in damaged.kinds) == 6
    for index, (picture, kind) in enumerate(zip(pictures, damaged.kinds, strict=True)):
        expected = picture if kind is None else corrupt(picture, kind, 4, seed=3, index=index)
        image, label = damaged[index]
        assert_same(image, expected)
        assert label == dataset[index][1]
        assert_same(dataset[index][0].convert("RGB"), picture)  # it stays as it is
    assert damaged.targets == [dataset[index][1] for index in range(12)]
    assert damaged.classes == (None if make is a_list else NAMES)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.33, 1.0])
@pytest.mark.parametrize("kind", ["fog", "mixed"])
def test_exactly_the_asked_share_is_damaged_in_equal_parts(kind, share):
    dataset = [(a_picture(8, 8), 0)] * 103
    kinds = Corrupted(dataset, kind, share=share, seed=1).kinds
    counts = [kinds.count(name) for name in (PAPER_KINDS if kind == "mixed" else (kind,))]
    assert sum(counts) == round(share * 103) == 103 - kinds.count(None)
    assert max(counts) - min(counts) <= 1


def test_rows_follow_from_the_seed_and_are_not_those_of_label_noise():
    dataset = [(a_picture(8, 8), 0)] * 1000
    first, again, other = (Corrupted(dataset, "fog", share=0.2, seed=seed).kinds for seed in (0, 0, 1))
    assert first == again != other
    flipped = symmetric(torch.zeros(1000, dtype=torch.int64), 0.2, classes=5, seed=0) != 0
    both = sum(kind is not None for kind in np.array(first, dtype=object)[flipped.numpy()])
    assert both == pytest.approx(40, abs=24)  # of 200, four standard deviations


def test_the_transform_comes_after_the_damage_and_is_taken_over_from_the_data_set(pictures):
    dataset = InMemory(pictures)
    dataset.transform = np.asarray
    for inner in (dataset, Subset(dataset, range(12))):
        damaged = Corrupted(inner, "fog", share=1.0)
        assert isinstance(damaged[7][0], np.ndarray)
        assert np.array_equal(damaged[7][0], pixels(corrupt(pictures[7], "fog", 3, seed=0, index=7)))
    damaged.transform = None
    assert isinstance(damaged[7][0], Image.Image)
    assert dataset.transform is np.asarray
    with pytest.raises(ValueError, match="damage the parts"):
        Corrupted(ConcatDataset([dataset, dataset]), "fog", share=0.5)


def test_noisy_labels_may_take_the_place_of_the_targets(pictures, tiny_clip):
    damaged = Corrupted(InMemory(pictures), "fog", share=0.5)
    damaged.targets = 2 - torch.tensor(damaged.targets)
    assert [int(damaged[index][1]) for index in (0, 11)] == [2, 0]
    assert ss.embed(damaged, tiny_clip, class_names=NAMES).labels.tolist() == damaged.targets.tolist()


def test_indices_count_from_the_end_and_end(pictures):
    damaged = Corrupted(InMemory(pictures), "gaussian_noise", share=1.0)
    assert_same(damaged[-1][0], damaged[11][0])
    assert len(list(damaged)) == 12
    with pytest.raises(IndexError):
        damaged[12]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share, pictures):
    with pytest.raises(ValueError, match="share is"):
        Corrupted(InMemory(pictures), "fog", share=share)


@pytest.mark.parametrize("make", EVERY_KIND)
@pytest.mark.parametrize("workers", [0, 2])
def test_embed_sees_what_training_sees(make, workers, pictures, tmp_path, tiny_clip):
    damaged = Corrupted(make(pictures, tmp_path), "mixed", share=0.5, severity=5, seed=1)
    shown = [damaged[index] for index in range(12)]
    damaged.transform = lambda image: pytest.fail("embed applies no training transform")
    found = ss.embed(damaged, tiny_clip, class_names=NAMES, num_workers=workers)
    expected = ss.embed(shown, tiny_clip, class_names=NAMES)
    assert torch.equal(found.image, expected.image)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("make", EVERY_KIND)
def test_the_cache_of_embed_tells_one_damage_from_another(make, pictures, tmp_path, tiny_clip):
    dataset = make(pictures, tmp_path)

    def embed(data, **options):
        return ss.embed(data, tiny_clip, class_names=NAMES, **options)

    variants = [
        dataset,
        Corrupted(dataset, "fog", share=0.5, severity=3, seed=0),
        Corrupted(dataset, "fog", share=0.5, severity=4, seed=0),
        Corrupted(dataset, "fog", share=0.5, severity=3, seed=1),
        Corrupted(dataset, "motion_blur", share=0.5, severity=3, seed=0),
    ]
    cache = tmp_path / "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none takes the place of another
        cached = [embed(data, cache_dir=cache) for data in variants]
    for found, data in zip(cached, variants, strict=True):
        assert torch.equal(found.image, embed(data).image)
    inputs = [found.provenance["inputs"] for found in cached]
    assert len(set(inputs)) == len(variants)
    assert embed(variants[1], cache_dir=cache).provenance["inputs"] == inputs[1]


def test_a_zip_is_known_without_reading_its_images_unless_they_are_changed(pictures, tmp_path, tiny_clip, monkeypatch):
    folder, cache = a_zipped_folder(pictures, tmp_path), tmp_path / "cache"
    first = ss.embed(folder, tiny_clip, class_names=NAMES, cache_dir=cache)
    folder.change = ImageOps.invert
    inverted = ss.embed(folder, tiny_clip, class_names=NAMES, cache_dir=cache)
    assert not torch.equal(inverted.image, first.image)
    folder.change = None
    monkeypatch.setattr(Image, "open", lambda file: pytest.fail("an image was read"))
    assert torch.equal(ss.embed(folder, tiny_clip, class_names=NAMES, cache_dir=cache).image, first.image)
    assert first.keys == [f"{name}/{number:04}.png" for name in NAMES for number in range(4)]


def test_another_image_of_the_same_name_and_size_in_a_zip_is_embedded_again(tmp_path, tiny_clip):
    found = []
    for seed in (0, 1):
        with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive, archive.open("train/cat/0.bmp", "w") as file:
            a_picture(20, 24, seed=seed).save(file, "BMP")
        folder = ZippedImageFolder(tmp_path / "one.zip", "train")
        found.append(ss.embed(folder, tiny_clip, class_names=["cat"], cache_dir=tmp_path / "cache").image)
    assert not torch.equal(*found)


def test_a_selection_from_damaged_images_knows_their_names_and_their_damage(pictures, tmp_path, tiny_clip):
    dataset = a_torchvision_folder(pictures, tmp_path)
    damaged, other = (Corrupted(dataset, "fog", share=0.5, seed=seed) for seed in (0, 1))
    selection = ss.select(ss.score(ss.embed(damaged, tiny_clip, class_names=NAMES)), keep=0.5)
    assert set(selection.keys()) <= {f"{name}/{number:04}.png" for name in NAMES for number in range(4)}
    selection.verify(damaged)
    with pytest.raises(ValueError, match="changed after the selection"):
        selection.verify(other)


def test_timm_and_plain_loaders_show_the_damage(pictures, tmp_path):
    damaged = Corrupted(a_zipped_folder(pictures, tmp_path), "fog", share=0.5, severity=5)
    loader = timm.data.create_loader(
        damaged, (3, 24, 20), 12, device=torch.device("cpu"), num_workers=2, persistent_workers=False, crop_pct=1.0
    )
    batch, labels = next(iter(loader))
    assert batch.shape == (12, 3, 24, 20)
    assert labels.tolist() == damaged.targets
    damaged.transform = lambda image: torch.from_numpy(pixels(image))
    expected = torch.stack([damaged[index][0] for index in range(12)])
    found = torch.cat([batch for batch, _ in DataLoader(damaged, batch_size=4, num_workers=2)])
    assert torch.equal(found, expected)


def test_a_damaged_data_set_can_be_sent_to_another_process(pictures, tmp_path):
    damaged = Corrupted(a_zipped_folder(pictures, tmp_path), "mixed", share=0.5)
    copy = pickle.loads(pickle.dumps(damaged))
    for index in range(12):
        assert_same(copy[index][0], damaged[index][0])


def test_a_forked_worker_opens_a_zip_for_itself(pictures, tmp_path, monkeypatch):
    """It would share the position in the file with its parent and siblings, and read their images."""
    folder = a_zipped_folder(pictures, tmp_path)
    opened = []
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args, open=zipfile.ZipFile: opened.append(args) or open(*args))
    for process, expected in ((1, 1), (2, 2)):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        for index in range(3):
            assert_same(folder[index][0], pictures[index])
        assert len(opened) == expected


# The picture


@pytest.mark.parametrize("words", [["nowhere.jpg"], ["folder.zip", "--member", "nowhere.png"]])
def test_a_picture_that_is_not_there_is_named(pictures, tmp_path, monkeypatch, words):
    a_zipped_folder(pictures, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["corruptions.py", *words, "--out", "sheet.png"])
    with pytest.raises(SystemExit, match="nowhere"):
        corruptions.main()


def test_the_command_draws_every_kind_at_every_severity(pictures, tmp_path, monkeypatch):
    a_zipped_folder(pictures, tmp_path)
    out = tmp_path / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["corruptions.py", str(tmp_path / "folder.zip"), "--out", str(out)])
    corruptions.main()
    contact_sheet(pictures[0], tmp_path / "same.png")
    assert_same(Image.open(out), Image.open(tmp_path / "same.png"))
    sheet = Image.open(out)
    cells = [
        sheet.crop((104 + 84 * column, 16 + 100 * row, 184 + 84 * column, 112 + 100 * row))
        for row in range(len(KINDS))
        for column in range(6)
    ]
    clean = pictures[0].resize((80, 96), Image.Resampling.NEAREST)
    assert [np.array_equal(pixels(cell), pixels(clean)) for cell in cells] == [True, *[False] * 5] * len(KINDS)
