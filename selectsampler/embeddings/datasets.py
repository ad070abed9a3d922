"""One view on every kind of map-style data set: raw images, labels, file names and a fingerprint.

The user's data set is never changed: where it has a `transform`, a shallow copy gets one that keeps the image as it is.
"""

import copy
import hashlib
import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from selectsampler.store import bytes_of

__all__ = ["UNREADABLE", "Images", "NotAnImage", "as_images", "digest_pixels"]

# What decoders raise on a damaged file. Anything else is a fault of the program and is passed on.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)
WAY_OUT = (
    "Pass the data set without its tensor conversion, give it a `transform` attribute that embed can replace, or pass "
    "a list of (PIL image, label)."
)


class NotAnImage(TypeError):
    """A data set yields something else than an image; no ValueError, lest it pass for a damaged file."""


class Images:
    """The raw images of a data set, by index."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def open(self, index: int) -> Image.Image:
        """The image as stored, decoded, in RGB; raises one of `UNREADABLE` where it cannot be."""
        raise LookupError(index)

    def labels(self) -> list[Any] | None:
        """The labels, where they can be had without decoding images."""
        return None

    def class_names(self) -> list[str] | None:
        """The data set's own names of its classes, in the order of the labels, where it has any."""
        return None

    def label(self, index: int) -> Any:
        """One label, by way of decoding its image; None where there is none."""
        return None

    def keys(self) -> list[str] | None:
        """File names relative to the data set's root, where there are files."""
        return None

    def identities(self) -> list[str] | None:
        """What tells each image from another without decoding it: (name, size) of files, content in memory."""
        return None

    def content(self, index: int) -> bytes:
        """sha256 of the image's pixels, whatever holds them."""
        return digest_pixels(self.open(index))


def digest_pixels(image: Image.Image) -> bytes:
    """sha256 of an image's size and pixels."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()


def as_images(dataset: Any) -> Images:
    """A view on `dataset`; see the module.

    Raises:
        ValueError: if the data set is iterable-style, has no length, or yields something else than images.
    """
    if isinstance(dataset, Images):
        return dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{type(dataset).__name__} is an iterable data set: its samples have no indices that a sampler could "
            "yield. Use a map-style data set (an image folder, a tar, `torch/...` or `hfds/...` of timm), or filter "
            "the stream by `Selection.keys()`."
        )
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise ValueError(f"{type(dataset).__name__} has no samples.")
    if isinstance(dataset, Subset):
        return _Part(as_images(dataset.dataset), [int(i) for i in dataset.indices])
    if isinstance(dataset, ConcatDataset):
        return _Chain([as_images(part) for part in dataset.datasets])
    if hasattr(dataset, "reader") and hasattr(dataset, "filename"):
        return _Timm(dataset)
    return _MapStyle(dataset)


class _MapStyle(Images):
    """torchvision's data sets, lists of (image, label), and whatever is built like them."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(len(dataset))
        self.dataset = dataset
        # A property may reach through to a data set inside, which the copy shares with the user's.
        if hasattr(dataset, "transform") and not isinstance(getattr(type(dataset), "transform", None), property):
            self.dataset = copy.copy(dataset)
            self.dataset.transform = _as_it_is
            if getattr(dataset, "transforms", None) is not None:
                self.dataset.transforms = None
        self._check_first()

    def _check_first(self) -> None:
        try:
            item = self.dataset[0]
        except UNREADABLE:
            return  # a damaged first file is found, and listed, with all others
        except Exception as error:
            raise ValueError(
                f"{type(self.dataset).__name__}[0] fails with {type(error).__name__}: {error} once its transform is "
                f"replaced by one that keeps the image as it is. {WAY_OUT}"
            ) from error
        try:
            self._image_of(item, 0)
        except NotAnImage as error:
            raise ValueError(str(error)) from None

    def _image_of(self, item: Any, index: int) -> Image.Image:
        image = item[0] if isinstance(item, (tuple, list)) and len(item) else item
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            raise NotAnImage(
                f"{type(self.dataset).__name__}[{index}] yields {_describe(image)}, but (PIL image, label) is needed. "
                f"{WAY_OUT}"
            )
        return image

    def open(self, index: int) -> Image.Image:
        return _rgb(self._image_of(self.dataset[index], index))

    def labels(self) -> list[Any] | None:
        if isinstance(self.dataset, (list, tuple)):
            return [item[1] if isinstance(item, (list, tuple)) and len(item) > 1 else None for item in self.dataset]
        targets = _first_attribute(self.dataset, ("targets", "labels", "_labels"), self._length)
        if targets is None:
            pairs = self._pairs()
            targets = None if pairs is None else [pair[1] for pair in pairs]
        if targets is None:
            return None
        transform = getattr(self.dataset, "target_transform", None)
        targets = targets.tolist() if isinstance(targets, (Tensor, np.ndarray)) else list(targets)
        return [transform(target) for target in targets] if transform else targets

    def class_names(self) -> list[str] | None:
        names = getattr(self.dataset, "classes", None)
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            return None
        return list(names) if getattr(self.dataset, "target_transform", None) is None else None

    def label(self, index: int) -> Any:
        item = self.dataset[index]
        return item[1] if isinstance(item, (tuple, list)) and len(item) > 1 else None

    def _pairs(self) -> Sequence[Any] | None:
        """(path or whatever else is loaded, label), as torchvision's folders keep them."""
        pairs = _first_attribute(self.dataset, ("samples", "imgs"), self._length)
        return pairs if pairs is not None and isinstance(pairs[0], (tuple, list)) and len(pairs[0]) > 1 else None

    def _paths(self) -> list[Path] | None:
        pairs = self._pairs()
        if pairs is None or not isinstance(pairs[0][0], (str, os.PathLike)):
            return None
        return [Path(pair[0]) for pair in pairs]

    def keys(self) -> list[str] | None:
        paths = self._paths()
        return None if paths is None else _relative(paths, getattr(self.dataset, "root", None))

    def identities(self) -> list[str] | None:
        paths, keys = self._paths(), self.keys()
        if paths is not None and keys is not None:
            return _sizes(paths, keys)
        data = getattr(self.dataset, "data", None)
        if isinstance(data, (Tensor, np.ndarray)) and data.ndim >= 3 and len(data) == self._length:  # pixels, no names
            return [hashlib.sha256(bytes_of(image)).hexdigest() for image in data]
        if isinstance(self.dataset, (list, tuple)):
            return [self._identity_in_memory(index) for index in range(self._length)]
        return None

    def _identity_in_memory(self, index: int) -> str:
        try:
            return self.content(index).hex()
        except UNREADABLE:
            return "unreadable"


class _Timm(Images):
    """timm's ImageDataset, read behind its back: it answers an unreadable file with the next sample."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(len(dataset))
        self.reader = dataset.reader
        if hasattr(self.reader, "cache_tarfiles"):  # an open tar's position would be shared with forked workers
            self.reader = copy.copy(self.reader)
            self.reader.cache_tarfiles = False
        self.load_bytes = dataset.load_bytes
        self.mode = dataset.input_img_mode
        self.target_transform = dataset.target_transform

    def open(self, index: int) -> Image.Image:
        with self.reader[index][0] as file:
            image = Image.open(file)
            return _rgb(image.convert(self.mode) if self.mode and not self.load_bytes else image)

    def labels(self) -> list[Any] | None:
        if hasattr(self.reader, "iter_targets"):
            targets = list(self.reader.iter_targets())
        elif hasattr(self.reader, "targets"):
            targets = list(self.reader.targets)
        elif hasattr(self.reader, "samples"):
            targets = [sample[1] for sample in self.reader.samples]
        else:
            return None
        return [self._target(target) for target in targets]

    def label(self, index: int) -> Any:
        file, target, *_ = self.reader[index]
        file.close()
        return self._target(target)

    def _target(self, target: Any) -> Any:
        return self.target_transform(target) if self.target_transform and target is not None else target

    def class_names(self) -> list[str] | None:
        numbers = getattr(self.reader, "class_to_idx", None)
        if not numbers or self.target_transform is not None or sorted(numbers.values()) != list(range(len(numbers))):
            return None
        return sorted(numbers, key=numbers.get)

    def keys(self) -> list[str] | None:
        if hasattr(self.reader, "dataset"):
            return None  # Hugging Face: a path is optional there, and need not be unique
        return [Path(name).as_posix() for name in self.reader.filenames()]

    def identities(self) -> list[str] | None:
        if hasattr(self.reader, "dataset"):
            return [_hf_identity(item) for item in self.reader.dataset.select_columns(self.reader.image_key)]
        keys = self.keys() or []
        if isinstance(self.reader.samples[0][0], str):
            return _sizes([Path(sample[0]) for sample in self.reader.samples], keys)
        sizes = [getattr(sample[0], "size", None) for sample in self.reader.samples]  # members of a tar
        return [f"{key} {size}" for key, size in zip(keys, sizes, strict=True)]


class _Part(Images):
    """Some indices of another data set, as in torch.utils.data.Subset."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        super().__init__(len(indices))
        self.images = images
        self.indices = indices

    def open(self, index: int) -> Image.Image:
        return self.images.open(self.indices[index])

    def labels(self) -> list[Any] | None:
        return self._pick(self.images.labels())

    def class_names(self) -> list[str] | None:
        return self.images.class_names()

    def label(self, index: int) -> Any:
        return self.images.label(self.indices[index])

    def keys(self) -> list[str] | None:
        return self._pick(self.images.keys())

    def identities(self) -> list[str] | None:
        return self._pick(self.images.identities())

    def _pick(self, values: list[Any] | None) -> list[Any] | None:
        return None if values is None else [values[index] for index in self.indices]


class _Chain(Images):
    """Data sets one after the other, as in torch.utils.data.ConcatDataset."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))
        super().__init__(self.ends[-1])

    def _locate(self, index: int) -> tuple[Images, int]:
        part = self.parts[bisect_right(self.ends, index)]
        return part, index - self.ends[bisect_right(self.ends, index)] + len(part)

    def open(self, index: int) -> Image.Image:
        part, index = self._locate(index)
        return part.open(index)

    def label(self, index: int) -> Any:
        part, index = self._locate(index)
        return part.label(index)

    def labels(self) -> list[Any] | None:
        return _joined([part.labels() for part in self.parts])

    def keys(self) -> list[str] | None:
        return _joined([part.keys() for part in self.parts])

    def identities(self) -> list[str] | None:
        return _joined([part.identities() for part in self.parts])


def _joined(parts: Sequence[list[Any] | None]) -> list[Any] | None:
    known = [part for part in parts if part is not None]
    return [entry for part in known for entry in part] if len(known) == len(parts) else None


def _as_it_is(image: Any) -> Any:
    return image


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")  # decodes the pixels as well


def _describe(value: object) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a {type(value).__name__} of dtype {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _first_attribute(dataset: Any, names: Sequence[str], length: int) -> Any:
    for name in names:
        value = getattr(dataset, name, None)
        if isinstance(value, (list, tuple, Tensor, np.ndarray)) and len(value) == length:
            return value
    return None


def _relative(paths: Sequence[Path], root: Any) -> list[str]:
    base = str(root) if isinstance(root, (str, os.PathLike)) else os.path.commonpath([path.parent for path in paths])
    return [Path(os.path.relpath(path, base)).as_posix() for path in paths]


def _sizes(paths: Sequence[Path], keys: Sequence[str]) -> list[str] | None:
    """(name, size) of each file; None where the names are not those of files, as inside an archive."""
    if not paths[0].exists() and not any(path.exists() for path in paths):
        return None
    return [
        f"{key} {path.stat().st_size if path.exists() else 'missing'}" for path, key in zip(paths, keys, strict=True)
    ]


def _hf_identity(item: dict[str, Any]) -> str:
    image = next(iter(item.values()))
    if image.get("bytes"):
        return hashlib.sha256(image["bytes"]).hexdigest()
    path = Path(image["path"])
    return f"{path.name} {path.stat().st_size if path.exists() else 'missing'}"
