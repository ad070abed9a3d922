"""What a stage compares a pool with: features of a target, cluster centres, words."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from selectsampler.scores.s_clip_loss import inverse_lengths

__all__ = ["read_centroids", "read_fitting_target", "read_target", "read_words"]


def read_target(path: Path | str, member: str) -> np.ndarray:
    """(T, D): image features of a target, from a file or from all files of a folder, in the order of their names.

    Args:
        path: `.npy` of (T, D); `.npz` with `member` or one array only; `.safetensors` of `Embeddings.save`, or with one
            tensor only; or a folder of such files, as a DataComp pool is one.
        member: the array to take of an `.npz` with several.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if a file holds no (T, D) floats, or dimensions differ.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no target {path}.")
    files = (
        [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".npy", ".npz", ".safetensors"))
    )
    if not files:
        raise ValueError(f"The target {path} holds no .npy, .npz or .safetensors file.")
    arrays = [_read_features(file, member) for file in files]
    for file, array in zip(files, arrays, strict=True):
        if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"{file} holds {array.dtype} of shape {array.shape}, but a target is floats of shape (T, D)."
            )
    return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def read_fitting_target(path: Path | str, member: str, dim: int) -> np.ndarray:
    """(T, D): as `read_target`, of a pool's dimension, and every row has a direction.

    Raises:
        ValueError: if the dimension is another, there is no row, or one is zero or not finite.
    """
    features = read_target(path, member)
    if features.shape[1] != dim:
        raise ValueError(f"The target has dimension {features.shape[1]}, but {member} has {dim}: was it another model?")
    if not len(features):
        raise ValueError(f"The target {path} is empty, but at least one image is needed.")
    inverse_lengths(torch.from_numpy(features), name=f"The target {path}")
    return features


def read_centroids(path: Path | str, member: str, dim: int) -> np.ndarray:
    """(C, D), floats: cluster centres of a pool's dimension, from a `.npy`."""
    centroids = _read_features(Path(path), member)
    if centroids.ndim != 2 or centroids.dtype.kind != "f" or centroids.shape[1] != dim or not len(centroids):
        raise ValueError(
            f"{path} holds {centroids.dtype} of shape {centroids.shape}, but centroids of {member} are floats of shape "
            f"(C, {dim}): were they of another model?"
        )
    if not np.isfinite(centroids).all():
        row = int((~np.isfinite(centroids).all(axis=1)).argmax())
        raise ValueError(f"Centroid {row} of {path} is not finite, so that no image can be near it.")
    return centroids


def read_words(path: Path | str) -> list[str]:
    """The words of a file with a word a line, each once, sorted.

    Raises:
        ValueError: if a line holds several words, which no word of a caption would equal, or there is none.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if len(line.split()) > 1:
            raise ValueError(
                f"Line {number} of {path} is {line.strip()!r}, but captions are compared word by word: one word a line."
            )
    words = sorted({line.strip() for line in lines} - {""})
    if not words:
        raise ValueError(f"{path} holds no word, so that no caption could be kept.")
    return words


def _read_features(path: Path, member: str) -> np.ndarray:
    from safetensors import SafetensorError

    try:
        return _read_tensors(path, member) if path.suffix == ".safetensors" else _read_arrays(path, member)
    except (SafetensorError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: it is cut short or of another format ({error}).") from None


def _read_tensors(path: Path, member: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        name = next((name for name in ("image", member) if name in names), names[0] if len(names) == 1 else None)
        if name is None:
            raise ValueError(f"{path} holds {', '.join(names)}, but neither 'image' nor {member!r}.")
        tensor = file.get_tensor(name)
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _read_arrays(path: Path, member: str) -> np.ndarray:
    try:
        content = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as an array ({error}).") from None
    if isinstance(content, np.ndarray):
        return content
    with content as archive:
        names = archive.files
        name = member if member in names else names[0] if len(names) == 1 else None
        if name is None:
            raise ValueError(f"{path} holds {', '.join(names)}, but not {member!r}.")
        return archive[name]
