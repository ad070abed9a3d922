"""Image data sets as the recipes take them."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from selectsampler.embeddings.datasets import Images

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ZippedImageFolder(Images, Dataset):
    """An image folder inside a zip file: one sub-folder a class below `root`, read without unpacking.

    >>> train = ZippedImageFolder("cifar10.zip", "cifar10/train")      # doctest: +SKIP
    >>> train.classes[:2], len(train)                                  # doctest: +SKIP
    (['airplane', 'automobile'], 50000)

    Args:
        path: the zip file.
        root: the folder inside it whose sub-folders are the classes.
        accept: keeps the members for whose name (below `root`) it is true; None keeps all.
        change: applied to every image before `transform`, as to invert its colours for an experiment. Without it, the
            cache of `embed` knows the images by the checksums in the zip file, and reads none to look it up.
    """

    def __init__(
        self,
        path: Path | str,
        root: str,
        *,
        accept: Callable[[str], bool] | None = None,
        change: Callable[[Image.Image], Image.Image] | None = None,
    ) -> None:
        self.path = Path(path)
        prefix = root.strip("/") + "/"
        with zipfile.ZipFile(self.path) as archive:
            checksums = {member.filename: f"{member.file_size} {member.CRC:08x}" for member in archive.infolist()}
        names = sorted(name for name in checksums if name.startswith(prefix))
        names = [name for name in names if name.lower().endswith(ENDINGS)]
        names = [name for name in names if accept is None or accept(name.removeprefix(prefix))]
        if not names:
            raise ValueError(f"{path} holds no images below {root!r}.")
        self.classes = sorted({name.removeprefix(prefix).split("/")[0] for name in names})
        number = {name: i for i, name in enumerate(self.classes)}
        self.samples = [(name, number[name.removeprefix(prefix).split("/")[0]]) for name in names]
        self.targets = [label for _, label in self.samples]
        super().__init__(len(names))
        self._keys = [name.removeprefix(prefix) for name in names]
        self._checksums = [checksums[name] for name in names]
        self.change = change
        self.transform: Any = None
        self._archive: zipfile.ZipFile | None = None
        self._opened_by = 0

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = self.open(index)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def open(self, index: int) -> Image.Image:
        if self._archive is None or self._opened_by != os.getpid():  # a forked worker would share the file's position
            self._archive, self._opened_by = zipfile.ZipFile(self.path), os.getpid()
        with self._archive.open(self.samples[index][0]) as file:
            image = Image.open(file).convert("RGB")
        return image if self.change is None else self.change(image)

    def labels(self) -> list[int]:
        return list(self.targets)

    def class_names(self) -> list[str]:
        return list(self.classes)

    def label(self, index: int) -> int:
        return self.targets[index]

    def keys(self) -> list[str]:
        return list(self._keys)

    def identities(self) -> list[str] | None:
        if self.change is not None:
            return None  # what it does to an image cannot be told without doing it
        return [f"{key} {checksum}" for key, checksum in zip(self._keys, self._checksums, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}  # workers open the file for themselves
