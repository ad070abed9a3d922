"""Folders that look like ImageNet: train/WNID/*.JPEG and val/WNID/*.JPEG, of as many classes as wanted.

    python tests/made_imagenet.py FOLDER --train 4 --val 1 --size 500 375 --pictures cifar10.zip

Pictures are grainy enlargements, so that a JPEG of 500 x 375 pixels is as large, and takes as long, as a photograph's.
"""

import argparse
import io
import itertools
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo

WNIDS = ImageNetInfo().label_names()


def made_imagenet(
    root: Path,
    wnids: Sequence[str],
    *,
    train: int,
    val: int,
    size: tuple[int, int] = (40, 30),
    grain: float = 18.0,
    pictures: Iterator[Image.Image] | None = None,
) -> Path:
    """Write so many images of each class; without pictures, each class has a colour of its own."""
    random = np.random.default_rng(0)
    for label, wnid in enumerate(wnids):
        colour = np.random.default_rng(label).integers(40, 215, 3)
        for split, number in [("train", number) for number in range(train)] + [
            ("val", number) for number in range(val)
        ]:
            small = Image.new("RGB", (8, 8), tuple(colour.tolist())) if pictures is None else next(pictures)
            pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
            pixels = pixels + grain * random.standard_normal(pixels.shape[:2], dtype=np.float32)[..., None]
            path = root / split / wnid / f"{wnid}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return root


def pictures_in(archive: Path) -> Iterator[Image.Image]:
    """The images of a zip file, by turns through it, without end."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith((".jpg", ".png")))
        step = 7919  # a prime: classes mix
        for place in itertools.count():
            yield Image.open(io.BytesIO(file.read(names[place * step % len(names)]))).convert("RGB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4)
    parser.add_argument("--val", type=int, default=1)
    parser.add_argument("--size", type=int, nargs=2, default=[500, 375])
    parser.add_argument("--pictures", type=Path, help="a zip file of images; otherwise every class has a colour")
    given = parser.parse_args()
    pictures = None if given.pictures is None else pictures_in(given.pictures)
    made_imagenet(given.folder, WNIDS, train=given.train, val=given.val, size=tuple(given.size), pictures=pictures)
