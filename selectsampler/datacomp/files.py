"""Where the files of a pool lie: local folders and whatever fsspec reaches."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

__all__ = ["check_local", "digest_file", "fetch", "file_system", "is_local", "is_of_size", "is_url", "local_copy"]


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path as that system calls it."""
    try:
        import fsspec
    except ImportError:
        raise ImportError("Pools need fsspec and pyarrow: pip install 'selectsampler[datacomp]'.") from None
    fs, root = fsspec.core.url_to_fs(path)
    return fs, root.rstrip("/")


def is_local(fs: Any) -> bool:
    """Whether an fsspec file system is this machine's own, whose files can be mapped."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def is_of_size(path: Path, size: int) -> bool:
    """Whether there is a file of so many bytes."""
    return path.is_file() and path.stat().st_size == size


def is_url(path: Path | str) -> bool:
    """Whether a path names a protocol; a Path has already made one slash of two, and a letter alone is a drive."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def check_local(path: Path | str | None, *, name: str) -> None:
    """Refuse a URL where files are written: it would become a folder of that name."""
    if path is not None and is_url(path):
        raise ValueError(f"{name} is {path}, but it must be a local path: copy the file there afterwards.")


@contextmanager
def local_copy(path: Path | str) -> Iterator[Path]:
    """A path on this machine for a file or a flat folder: its own, or for as long as needed that of a copy."""
    if not is_url(path):
        yield Path(path)
        return
    with TemporaryDirectory() as folder:
        yield fetch(path, Path(folder))


def fetch(url: Path | str, folder: Path) -> Path:
    """Copy a remote file or flat folder into an existing folder, and say where it lies."""
    fs, root = file_system(str(url))
    if not fs.exists(root):
        raise FileNotFoundError(f"There is no {url}.")
    copy = folder / uuid4().hex / Path(root).name
    copy.parent.mkdir()
    if fs.isdir(root):
        copy.mkdir()
        for file in fs.ls(root, detail=False):
            if fs.isfile(file):
                fs.get_file(file, str(copy / Path(file).name))
    else:
        fs.get_file(root, str(copy))
    return copy


def digest_file(path: Path) -> str:
    """sha256 of a local file's content, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
