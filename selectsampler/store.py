"""The cache on disk: safetensors shards and a manifest. A file is whole or absent, and what cannot be proved is redone.

Every shard carries its key, its place and a digest of its tensors, so that it can be checked by itself: a run that was
killed leaves whole shards behind, and the next run goes on from them. The manifest comes last and says that all is
there.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selectsampler.distributed import barrier, process_rank

__all__ = [
    "Column",
    "ShardStore",
    "bytes_of",
    "digest_json",
    "digest_tensors",
    "kind_of",
    "pack_strings",
    "read_tensors",
    "replace_atomically",
    "unpack_strings",
    "write_tensors",
]

FORMAT = 1
MAPPED = 2**30  # bytes of a cache from which on it is put together in a file, and not in memory
DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """Write a sibling file and rename it over `path`, so that a reader finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else the name may reach the disk before the bytes
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Column:
    """A tensor in parts, one below the other, that need not be in memory all at once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]


def write_tensors(path: Path | str, tensors: Mapping[str, Tensor | Column], metadata: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to one safetensors file, atomically, without a copy of them in memory."""
    columns = {
        name: value if isinstance(value, Column) else Column(value.dtype, tuple(value.shape), [value])
        for name, value in tensors.items()
    }
    header: dict[str, Any] = {"__metadata__": {"selectsampler": json.dumps(metadata, sort_keys=True)}}
    order, end = sorted(columns, key=lambda name: (-columns[name].dtype.itemsize, name)), 0  # so that all are aligned
    for name in order:
        dtype, shape = columns[name].dtype, columns[name].shape
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    with replace_atomically(Path(path)) as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for name in order:
            for part in columns[name].parts:
                file.write(bytes_of(part))
        if file.tell() != 8 + len(packed) + end:
            raise ValueError(f"{path} was not written: its parts have not as many rows as they were said to have.")


def read_tensors(path: Path | str, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; `kind` is what the metadata must call itself.

    The tensors lie in a private map of the file: they are read from disk where they are touched, and take no memory
    that the system could not use otherwise. What is changed in them changes here alone, not in the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, is no safetensors file, or holds something else than `kind`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("selectsampler", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: it is truncated or no safetensors file ({error}).") from None
    if metadata.get("kind") != kind or metadata.get("format") != FORMAT:
        found = f"{metadata.get('kind', 'something else')}, format {metadata.get('format', 'unknown')}"
        raise ValueError(f"{path} should hold {kind} in format {FORMAT} of selectsampler, but it holds {found}.")
    return tensors, metadata


def kind_of(path: Path | str) -> str:
    """What a file says it holds: `embeddings`, `scores`, `selection`, ... or `something else`."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("selectsampler", "{}")).get("kind", "something else")
    except (SafetensorError, json.JSONDecodeError, OSError):
        return "something else"


def digest_json(value: Any) -> str:
    """sha256 of a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of named tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


class ShardStore:
    """Rows 0 to N of named tensors, in shards that are known by what they were made from.

    >>> store = ShardStore(Path("cache"), {"weights": "1f0c"}, inputs, rows=3000)   # doctest: +SKIP
    >>> for shard in store.missing():                                               # doctest: +SKIP
    ...     store.write(shard, compute(store.range(shard)))
    >>> tensors = store.read()                                                      # doctest: +SKIP

    `key` says what makes the rows, and `inputs`, one string a shard, from what: another model is another folder, other
    inputs are another file. So a data set that changed keeps the shards that it did not change. A shard that is
    truncated, damaged or another's is named in a warning and counts as missing.
    """

    def __init__(
        self, folder: Path | str, key: Mapping[str, Any], inputs: Sequence[str], *, rows: int, shard_rows: int = 1024
    ) -> None:
        self.key = {**key, "format": FORMAT}
        self.folder = Path(folder) / digest_json(self.key)[:16]
        self.rows = rows
        self.shard_rows = shard_rows
        self.digests = [digest_json([self.key, text, len(self.range(i))]) for i, text in enumerate(inputs)]
        if len(self.digests) != -(-rows // shard_rows):
            raise ValueError(f"{rows} rows in shards of {shard_rows} need {-(-rows // shard_rows)} inputs.")
        self._whole: set[int] = set()

    def __len__(self) -> int:
        return len(self.digests)

    def range(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows))

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{self.digests[shard][:24]}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not there or cannot be trusted; the latter are named in a warning."""
        for shard in set(range(len(self))) - self._whole:
            problem = self._problem(shard)
            if problem is None:
                self._whole.add(shard)
            elif problem:
                self.distrust(shard, problem)
        return sorted(set(range(len(self))) - self._whole)

    def distrust(self, shard: int, problem: str) -> None:
        """Say what is wrong with a shard, and remove it."""
        rows = self.range(shard)
        warnings.warn(
            f"{self.path(shard)} (rows {rows.start} to {rows.stop - 1}) {problem}. It is computed again.", stacklevel=3
        )
        self.path(shard).unlink(missing_ok=True)
        self._whole.discard(shard)

    def write(self, shard: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard, whole or not at all."""
        rows = len(self.range(shard))
        wrong = {name: len(tensor) for name, tensor in tensors.items() if len(tensor) != rows}
        if wrong:
            raise ValueError(f"Shard {shard} has {rows} rows, but was given {wrong}.")
        write_tensors(self.path(shard), tensors, self._identity(shard) | {"content": digest_tensors(tensors)})
        self._whole.add(shard)

    def read_shard(self, shard: int) -> dict[str, Tensor]:
        """The rows of one shard."""
        return read_tensors(self.path(shard), kind="shard")[0]

    def read(self) -> dict[str, Tensor]:
        """All rows of all tensors; the first time, the manifest is written as well.

        What takes more than a gibibyte is put together in a file beside the shards, and mapped from there.
        """
        missing = self.missing()
        if missing:
            row = self.range(missing[0]).start
            raise ValueError(f"{self.folder} lacks {len(missing)} of {len(self)} shards, row {row} on.")
        manifest = self.folder / f"manifest-{digest_json(self.digests)[:24]}.json"
        if not manifest.exists():
            shards = [self.path(shard).name for shard in range(len(self))]
            content = {"key": self.key, "rows": self.rows, "shard_rows": self.shard_rows, "shards": shards}
            with replace_atomically(manifest) as file:
                file.write(json.dumps(content, indent=1, sort_keys=True).encode())
        first = self.read_shard(0)
        if self.rows * sum(tensor[0].nbytes for tensor in first.values()) > MAPPED:
            return self._mapped(first)
        parts = [self.read_shard(shard) for shard in range(len(self))]
        return {name: torch.cat([part[name] for part in parts]) for name in first}

    def _mapped(self, first: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All rows of all tensors, in a map of one file, which is written where it is not there."""
        path = self.folder / f"whole-{digest_json(self.digests)[:24]}.safetensors"
        if not path.exists() and process_rank() == 0:
            columns = {name: self._column(name, tensor) for name, tensor in first.items()}
            write_tensors(path, columns, {"kind": "shards", "format": FORMAT})
        barrier()
        return read_tensors(path, kind="shards")[0]

    def _column(self, name: str, first: Tensor) -> Column:
        """All rows of one tensor, shard by shard; `first` is its part of the first shard."""
        parts = (self.read_shard(shard)[name] for shard in range(len(self)))
        return Column(first.dtype, (self.rows, *first.shape[1:]), parts)

    def _identity(self, shard: int) -> dict[str, Any]:
        return {"kind": "shard", "format": FORMAT, "shard": self.digests[shard]}

    def _problem(self, shard: int) -> str | None:
        """What is wrong with a shard: None if it is whole, the empty string if it is simply not there."""
        try:
            tensors, metadata = read_tensors(self.path(shard), kind="shard")
        except FileNotFoundError:
            return ""
        except ValueError:
            return "is truncated or no shard"
        if metadata.get("shard") != self.digests[shard]:
            return "belongs to another model or to other images"
        if metadata.get("content") != digest_tensors(tensors):
            return "does not match its checksum"
        return None


def pack_strings(strings: Sequence[str]) -> Tensor:
    """Strings as one uint8 tensor, for a safetensors file (whose metadata may not grow with N).

    Raises:
        ValueError: for a string with a NUL, which ends a string here (and cannot stand in a file name).
    """
    broken = [string for string in strings if "\0" in string]
    if broken:
        raise ValueError(f"{broken[0]!r} holds a NUL character: rename it.")
    # A file name that is no UTF-8 reaches Python with surrogates, and must come back as it was.
    packed = bytearray("".join(f"{string}\0" for string in strings).encode(errors="surrogatepass"))
    return torch.frombuffer(packed, dtype=torch.uint8) if packed else torch.empty(0, dtype=torch.uint8)


def unpack_strings(packed: Tensor) -> list[str]:
    """What `pack_strings` packed."""
    return packed.numpy().tobytes().decode(errors="surrogatepass").split("\0")[:-1]


def bytes_of(array: np.ndarray | Tensor) -> memoryview:
    """The bytes of an array, for a digest."""
    if isinstance(array, Tensor):  # viewed as bytes first: numpy knows no bfloat16
        array = array.detach().cpu().contiguous().reshape(-1)
        # what numpy made of no elements has a stride of 0, which torch does not view as bytes
        array = (array.view(torch.uint8) if len(array) else torch.empty(0, dtype=torch.uint8)).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
