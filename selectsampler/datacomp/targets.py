"""What a stage compares a pool with: features of a target, cluster centres, words."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from selectsampler.datacomp.files import digest_file, local_copy
from selectsampler.scores.s_clip_loss import inverse_lengths

__all__ = ["digests_of", "read_centroids", "read_fitting_target", "read_target", "read_words"]


def read_target(path: Path | str, member: str) -> np.ndarray:
    """(T, D): image features of a target, from a file or from all files of a folder, in the order of their names.

    Hidden files are left alone. Local, or any fsspec URL, which is fetched for as long as it is read.

    Args:
        path: `.npy` of (T, D); `.npz` with `member` or one array only; `.safetensors` of `Embeddings.save`, or with one
            tensor only; or a folder of such files, as a DataComp pool is one.
        member: the array to take of an `.npz` with several.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if a file holds no (T, D) floats, or dimensions differ.
    """
    with local_copy(path) as local:
        files = {f"{path}/{file.name}" if local.is_dir() else str(path): file for file in _feature_files(local, path)}
        arrays = {name: _read_features(file, member, name) for name, file in files.items()}
    dim = next(iter(arrays.values())).shape[-1:]
    for name, array in arrays.items():
        if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1:] != dim:
            raise ValueError(
                f"{name} holds {array.dtype} of shape {array.shape}, but a target is floats of shape (T, D)."
            )
    return np.concatenate(list(arrays.values())) if len(arrays) > 1 else next(iter(arrays.values()))


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
    with local_copy(path) as local:
        centroids = _read_features(local, member, str(path))
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
    with local_copy(path) as local:
        lines = local.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if len(line.split()) > 1:
            raise ValueError(
                f"Line {number} of {path} is {line.strip()!r}, but captions are compared word by word: one word a line."
            )
    words = sorted({line.strip() for line in lines} - {""})
    if not words:
        raise ValueError(f"{path} holds no word, so that no caption could be kept.")
    return words


def digests_of(path: Path | str) -> dict[str, str]:
    """sha256 of a target's, a word list's or a uid file's content, by name; of a folder, of what is read of it."""
    with local_copy(path) as local:
        if local.is_file():
            return {str(path): digest_file(local)}
        return {f"{path}/{file.name}": digest_file(file) for file in _feature_files(local, path)}


def _feature_files(local: Path, path: Path | str) -> list[Path]:
    if not local.exists():
        raise FileNotFoundError(f"There is no target {path}.")
    if local.is_file():
        return [local]
    visible = (file for file in local.iterdir() if not file.name.startswith("."))
    files = sorted(file for file in visible if file.suffix in (".npy", ".npz", ".safetensors"))
    if not files:
        raise ValueError(f"The target {path} holds no .npy, .npz or .safetensors file.")
    return files


def _read_features(path: Path, member: str, name: str) -> np.ndarray:
    from safetensors import SafetensorError

    try:
        return _read_tensors(path, member, name) if path.suffix == ".safetensors" else _read_arrays(path, member, name)
    except (SafetensorError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} cannot be read: it is cut short or of another format ({error}).") from None


def _read_tensors(path: Path, member: str, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(_one_of(list(file.keys()), ("image", member), name))
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16


def _read_arrays(path: Path, member: str, name: str) -> np.ndarray:
    try:
        content = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as an array ({error}).") from None
    if isinstance(content, np.ndarray):
        return content
    with content as archive:
        return archive[_one_of(archive.files, (member,), name)]


def _one_of(held: list[str], wanted: tuple[str, ...], name: str) -> str:
    """Which of the arrays that a file holds is meant: one that is wanted, or the only one."""
    found = next((one for one in wanted if one in held), held[0] if len(held) == 1 else None)
    if found is None:
        raise ValueError(f"{name} holds {', '.join(held)}, but not {' or '.join(map(repr, wanted))}.")
    return found
