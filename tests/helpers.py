"""What several test files share: seeded data, small data sets on disk, the way to data outside the package."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from selectsampler import Embeddings

SHARED = Path(__file__).resolve().parents[2] / "shared"
CONTEXT, VOCABULARY = 24, 64  # of the tiny CLIP

torch.set_num_threads(1)  # tensors are small here, and on a busy machine a second thread only waits for the first


def shared(path: str) -> Path:
    """A file or folder that lies beside the checkout; the test is skipped where it does not."""
    if not (SHARED / path).exists():
        pytest.skip(f"{SHARED / path} is not there: it is no part of the package.")
    return SHARED / path


def random_features(samples: int, classes: int, *, dim: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image features (N, D), class prompts (C, D) and labels (N,), in no order, every class there."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (samples - classes,), generator=generator)])
    labels = labels[torch.randperm(samples, generator=generator)]
    images, texts = (torch.randn(rows, dim, generator=generator) for rows in (samples, classes))
    return images, texts, labels


def random_embeddings(samples: int, classes: int, *, dim: int = 16, seed: int = 0, **fields) -> Embeddings:
    """Embeddings whose images lie near the prompts of their classes."""
    images, texts, labels = random_features(samples, classes, dim=dim, seed=seed)
    names = [f"class {number}" for number in range(classes)]
    return Embeddings(images + 2 * texts[labels], texts, labels, names, **fields)


def image_folder(root: Path, sizes: Sequence[int]) -> Path:
    """An image folder of one class a size; image i of all has the grey value 4 i, so that pixels tell who it is."""
    number = 0
    for label, size in enumerate(sizes):
        (root / f"class_{label:02}").mkdir(parents=True)
        for file in range(size):
            pixels = np.full((12, 12, 3), 4 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class_{label:02}" / f"{file:03}.png")
            number += 1
    return root


def make_images(count: int, *, seed: int = 0) -> list[Image.Image]:
    """Pictures of 20 x 24 pixels, each unlike all others."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 24, 20, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


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


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index
