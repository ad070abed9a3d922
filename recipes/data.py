"""Image data sets as the recipes take them."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class ZippedImageFolder(Dataset):
    """An image folder inside a zip file: one sub-folder a class below `root`, read without unpacking.

    >>> train = ZippedImageFolder("cifar10.zip", "cifar10/train")      # doctest: +SKIP
    >>> train.classes[:2], len(train)                                  # doctest: +SKIP
    (['airplane', 'automobile'], 50000)

    Args:
        path: the zip file.
        root: the folder inside it whose sub-folders are the classes.
        accept: keeps the members for whose name (below `root`) it is true; None keeps all.
        change: applied to every image before `transform`, as to damage it for an experiment.
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
            names = sorted(name for name in archive.namelist() if name.startswith(prefix))
        names = [name for name in names if name.lower().endswith(ENDINGS)]
        names = [name for name in names if accept is None or accept(name.removeprefix(prefix))]
        if not names:
            raise ValueError(f"{path} holds no images below {root!r}.")
        self.classes = sorted({name.removeprefix(prefix).split("/")[0] for name in names})
        number = {name: i for i, name in enumerate(self.classes)}
        self.samples = [(name, number[name.removeprefix(prefix).split("/")[0]]) for name in names]
        self.targets = [label for _, label in self.samples]
        self.change = change
        self.transform: Any = None
        self._archive: zipfile.ZipFile | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        name, label = self.samples[index]
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.path)
        with self._archive.open(name) as file:
            image: Any = Image.open(file).convert("RGB")
        image = image if self.change is None else self.change(image)
        return (image if self.transform is None else self.transform(image)), label

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}  # workers open the file for themselves
