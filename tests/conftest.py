"""What several tests use: a tiny CLIP, small image folders, and the shared model and data where they are there."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared"
CONTEXT, VOCABULARY = 24, 64

torch.set_num_threads(1)  # tensors are small here: threads would cost more than they bring


class CharacterTokenizer:
    """One token a character: enough to tell prompts apart."""

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        tokens = torch.zeros(len(prompts), CONTEXT, dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            characters = [1 + ord(character) % (VOCABULARY - 2) for character in prompt[-(CONTEXT - 1) :]]
            row[: len(characters) + 1] = torch.tensor([*characters, VOCABULARY - 1])  # the highest token ends a text
        return tokens


def make_tiny_clip(*, seed: int = 0, quick_gelu: bool = False) -> tuple[CLIP, Callable, Callable]:
    """(model, preprocess, tokenizer) as open_clip makes them, with features of 16 dimensions from 16 x 16 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIP(
            embed_dim=16,
            vision_cfg=CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=8, image_size=16),
            text_cfg=CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=16, heads=2, layers=1),
            quick_gelu=quick_gelu,
        )
    return model.eval(), open_clip.image_transform(16, is_train=False), CharacterTokenizer()


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


def make_images(count: int, *, seed: int = 0) -> list[Image.Image]:
    """Pictures of 20 x 24 pixels, each unlike all others."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 24, 20, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


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
