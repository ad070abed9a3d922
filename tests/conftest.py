"""What several tests use: a tiny CLIP, small image folders, and the shared model and data where they are there."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SHARED, make_images, make_tiny_clip
from open_clip.model import CLIP
from PIL import Image


@pytest.fixture(scope="session")
def tiny_clip() -> tuple[CLIP, Callable, Callable]:
    """A model of which only the size is unlike a real one; `clip=` takes it as it is."""
    return make_tiny_clip()


@pytest.fixture(scope="session")
def tiny_clip_of() -> Callable[..., tuple[CLIP, Callable, Callable]]:
    """Tiny models with another seed or activation."""
    return make_tiny_clip


@pytest.fixture(scope="session")
def shared_clip() -> str:
    """The name of a small CLIP that was trained for real."""
    folder = SHARED / "models" / "cifar-clip"
    if not (folder / "open_clip_model.safetensors").is_file():
        pytest.skip(f"needs the trained model in {folder}")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def cifar_zip() -> Path:
    """CIFAR-10 as JPEGs: cifar10/{train,test}/{class}/{0000..}.jpg."""
    path = SHARED / "data" / "cifar10.zip"
    if not path.is_file():
        pytest.skip(f"needs CIFAR-10 in {path}")
    return path


@pytest.fixture(scope="session")
def images_of() -> Callable[..., list[Image.Image]]:
    """Synthetic pictures, by number and seed."""
    return make_images


@pytest.fixture
def pairs() -> list[tuple[Image.Image, int]]:
    """Twelve (PIL image, label) of three classes."""
    return [(image, index % 3) for index, image in enumerate(make_images(12))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: three classes of four PNGs each."""
    root = tmp_path / "folder"
    for index, image in enumerate(make_images(12)):
        path = root / ("cat", "dog", "owl")[index // 4] / f"{index % 4:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root
