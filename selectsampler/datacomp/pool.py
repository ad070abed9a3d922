"""The files of a DataComp pool: parquet metadata and npz embeddings, row by row the same samples."""

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from selectsampler.datacomp.files import file_system, is_local
from selectsampler.datacomp.uids import parse_uids
from selectsampler.store import digest_json, replace_atomically

__all__ = ["Member", "Pool", "Shard", "ShardError", "archs_of", "open_pool", "read_pool"]

MEMBERS = ("b32_img", "b32_txt", "l14_img", "l14_txt")
STRINGS = ("uid", "text")  # columns of the parquet
NUMBERS = ("original_width", "original_height", "clip_b32_similarity_score", "clip_l14_similarity_score")
BLOCK = 16_384  # rows that are read at once where a member is walked through
_HEADERS = Lock()  # numpy parses a header by ast.literal_eval, which at times fails in threads (python/cpython#106905)


class ShardError(ValueError):
    """A shard that cannot be read; `shard` is its name, and the message says why."""

    def __init__(self, shard: str, reason: str) -> None:
        super().__init__(f"Shard {shard} cannot be used: {reason}")
        self.shard = shard
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardError, (self.shard, self.reason)


@dataclass(frozen=True)
class Member:
    """One array of a shard's npz: its header, and where its rows lie if they are stored as they are in a local file."""

    name: str
    rows: int
    dim: int
    dtype: str
    crc: int
    offset: int | None

    @property
    def row_bytes(self) -> int:
        return self.dim * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Shard:
    """`NAME.parquet` and `NAME.npz` of a pool; `parquet` tells the content of the first from another's."""

    name: str
    rows: int
    parquet: str
    members: Mapping[str, Member] = field(default_factory=dict)

    @property
    def identity(self) -> list[Any]:
        """What tells this content from another's: the parquet's, and the checksums that the npz itself holds."""
        members = ([m.name, m.dim, m.dtype, m.crc] for m in self.members.values())
        return [self.name, self.rows, self.parquet, *members]


@dataclass(frozen=True)
class Pool:
    """A folder of shards, in the order of their names; rows are numbered through all of them.

    >>> pool = open_pool("metadata", members=["l14_img", "l14_txt"])        # doctest: +SKIP
    >>> pool.rows, len(pool.shards), pool.broken                            # doctest: +SKIP
    (128000000, 253, {})
    """

    folder: str
    shards: tuple[Shard, ...]
    broken: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def offsets(self) -> np.ndarray:
        """(shards + 1,), int64: the first row of each shard, and the number of rows."""
        return np.cumsum([0, *(shard.rows for shard in self.shards)])

    def without(self, broken: Mapping[str, str]) -> "Pool":
        """The pool without some shards, which are listed instead."""
        shards = tuple(shard for shard in self.shards if shard.name not in broken)
        broken = {**self.broken, **broken}
        if not shards:
            raise _none_left(self.folder, broken)
        return Pool(self.folder, shards, broken)

    def columns(
        self, shard: Shard, names: Sequence[str], rows: np.ndarray | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """Some columns of a shard's parquet, block by block, of all rows or of the mask `rows`; uids as numbers."""
        parquet = _parquet()
        fs, root = file_system(self.folder)
        first = 0
        try:
            with fs.open(f"{root}/{shard.name}.parquet", "rb") as file:
                opened = parquet.ParquetFile(file)
                # at least one block, so that a shard without rows has columns as well
                empty = [] if shard.rows else [_empty_batch(opened.schema_arrow)]
                for batch in empty or opened.iter_batches(BLOCK * 4, columns=list(names)):
                    size = batch.num_rows
                    if rows is not None:
                        batch = batch.filter(_as_arrow(rows[first : first + size]))
                    columns = {name: batch.column(name).to_numpy(zero_copy_only=False) for name in names}
                    yield {k: parse_uids(v, first=first) if k == "uid" else v for k, v in columns.items()}
                    first += size
        except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())  # arrow's have lines
            raise ShardError(shard.name, f"its parquet fails from row {first} on ({reason}).") from error

    def blocks(self, shard: Shard, member: str) -> Iterator[np.ndarray]:
        """(b, D): all rows of one member, block by block, streamed, with the checksum verified at the end."""
        header = shard.members[member]
        try:
            with (
                self._open_npz(shard) as file,
                zipfile.ZipFile(file) as archive,
                archive.open(f"{member}.npy") as stream,
            ):
                _read_header(stream)
                for start in range(0, header.rows, BLOCK):
                    rows = min(BLOCK, header.rows - start)
                    content = _read_exactly(stream, rows * header.row_bytes)
                    yield np.frombuffer(content, dtype=header.dtype).reshape(rows, header.dim)
                if stream.read(1):  # the end of the member, where its checksum is compared
                    raise zipfile.BadZipFile("bytes follow the array")
        except (OSError, EOFError, zipfile.BadZipFile, struct.error, zlib.error) as error:
            raise ShardError(shard.name, f"{member} cannot be read ({error}). Fetch the file again.") from error

    def rows_of(self, shard: Shard, member: str, rows: np.ndarray, inflated: Path | None = None) -> np.ndarray:
        """(n, D): some rows of one member, ascending, through a memory map that is gone again afterwards."""
        header = shard.members[member]
        path, offset = (inflated, 0) if inflated is not None else (self._local_npz(shard), header.offset)
        if not len(rows):
            return np.empty((0, header.dim), dtype=header.dtype)
        try:
            # as bytes: a member of a zip starts anywhere, and numbers want to be aligned
            content = np.memmap(path, np.uint8, "r", offset=offset or 0, shape=(header.rows, header.row_bytes))
        except (OSError, ValueError) as error:
            raise ShardError(shard.name, f"{member} cannot be mapped ({error}). Was the file replaced?") from error
        return content.take(rows, axis=0).view(header.dtype)

    def inflate(self, shard: Shard, member: str, path: Path) -> None:
        """Write one member's rows to a file of their own, for a memory map; whole or not at all."""
        with replace_atomically(path) as file:
            for block in self.blocks(shard, member):
                file.write(block.data)

    def _open_npz(self, shard: Shard) -> BinaryIO:
        fs, root = file_system(self.folder)
        return fs.open(f"{root}/{shard.name}.npz", "rb")

    def _local_npz(self, shard: Shard) -> str:
        return f"{file_system(self.folder)[1]}/{shard.name}.npz"


def open_pool(
    folder: Path | str,
    *,
    members: Sequence[str] = (),
    columns: Sequence[str] = ("uid",),
    skip_broken: bool = False,
    threads: int = 8,
) -> Pool:
    """Look at the headers of all shards: what there is, how many rows, and that parquet and npz agree.

    Args:
        folder: local, or any fsspec URL (`s3://bucket/metadata`); flat, with `NAME.parquet` and `NAME.npz`.
        members: arrays of the npz that will be read; none: the npz need not be there.
        columns: columns of the parquet that will be read.
        skip_broken: list a shard that cannot be used in `Pool.broken` and go on, instead of stopping.
        threads: how many shards are looked at at the same time.

    Raises:
        ShardError: naming the first shard that cannot be used, and why.
        ValueError: if the folder holds no shard.
    """
    names = _names(folder)
    with ThreadPoolExecutor(threads) as executor:
        found = list(executor.map(lambda name: _try_open(str(folder), name, members, columns), names))
    broken = {error.shard: error.reason for error in found if isinstance(error, ShardError)}
    if broken and not skip_broken:
        name, reason = next(iter(broken.items()))
        raise ShardError(name, f"{reason} ({len(broken)} of {len(names)} shards; skip_broken goes on without them.)")
    shards = tuple(shard for shard in found if isinstance(shard, Shard))
    if not shards:
        raise _none_left(folder, broken)
    dims = {(m.name, m.dim) for shard in shards for m in shard.members.values()}
    if len(dims) > len(members):
        raise ValueError(f"The shards of {folder} differ in dimension: {sorted(dims)}. Were two pools mixed?")
    return Pool(str(folder), shards, broken)


def archs_of(folder: Path | str) -> list[str]:
    """Of which models some npz of a pool holds embeddings of images and texts: `b32`, `l14` or both.

    Raises:
        ValueError: if there are none, or the folder holds no parquet, or no npz that can be read.
    """
    fs, _ = file_system(str(folder))
    _names(folder)  # an empty folder is no pool
    held: set[str] = set()
    for path in _files(folder, ".npz"):
        try:
            with fs.open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                held |= {name.removesuffix(".npy") for name in archive.namelist()}
        except (OSError, zipfile.BadZipFile):
            continue  # named when the pool is opened
    archs = [arch for arch in ("b32", "l14") if {f"{arch}_img", f"{arch}_txt"} <= held]
    if not archs:
        found = ", ".join(sorted(held)) or "nothing"
        raise ValueError(f"The npz of {folder} hold {found}, but embeddings are b32_img and b32_txt, or l14's.")
    return archs


def read_pool(
    folder: Path | str, keys: Sequence[str], *, skip_broken: bool = False
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Walk through a pool shard by shard: (name, {key: array}).

    >>> for name, shard in read_pool("metadata", ["uid", "clip_l14_similarity_score", "l14_img"]):    # doctest: +SKIP
    ...     print(name, shard["uid"][0], shard["l14_img"].shape)

    Args:
        folder: local, or any fsspec URL.
        keys: columns of the parquet and members of the npz (`b32_img`, `b32_txt`, `l14_img`, `l14_txt`). Uids come as
            numbers of dtype "u8,u8"; stored members of local files as memory maps, others are read.
        skip_broken: leave a broken shard out instead of stopping; `open_pool` lists them.

    Raises:
        ShardError: naming the shard that cannot be used, and why.
    """
    members = [key for key in keys if key in MEMBERS]
    columns = [key for key in keys if key not in MEMBERS]
    pool = open_pool(folder, members=members, columns=columns, skip_broken=skip_broken)
    for shard in pool.shards:
        try:
            parts = list(pool.columns(shard, columns)) if columns else []
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in columns} if parts else {}
            for name in members:
                arrays[name] = _whole(pool, shard, name)
        except ShardError:
            if not skip_broken:
                raise
            continue
        yield shard.name, {key: arrays[key] for key in keys if key in arrays}


def _whole(pool: Pool, shard: Shard, name: str) -> np.ndarray:
    member = shard.members[name]
    if member.offset is None or not member.rows:
        blocks = [np.empty((0, member.dim), dtype=member.dtype), *pool.blocks(shard, name)]
        return np.concatenate(blocks)
    path = pool._local_npz(shard)
    return np.memmap(path, member.dtype, "r", offset=member.offset, shape=(member.rows, member.dim))


def _files(folder: Path | str, suffix: str) -> list[str]:
    """The files of a pool with this suffix, by name; hidden ones are none, as systems leave them beside others."""
    fs, root = file_system(str(folder))
    paths = fs.ls(root, detail=False)
    if [path.rstrip("/") for path in paths] == [root]:  # what file systems list of a file
        raise ValueError(f"{folder} is a file, but a pool is a flat folder of NAME.parquet and NAME.npz: give that.")
    return sorted(path for path in paths if path.endswith(suffix) and not Path(path).name.startswith("."))


def _names(folder: Path | str) -> list[str]:
    names = [Path(path).stem for path in _files(folder, ".parquet")]
    if not names:
        raise ValueError(f"{folder} holds no .parquet file. A pool is a flat folder of NAME.parquet and NAME.npz.")
    return names


def _none_left(folder: Path | str, broken: Mapping[str, str]) -> ValueError:
    name = min(broken)
    return ValueError(f"No shard of {folder} can be used ({len(broken)} are broken). The first, {name}: {broken[name]}")


def _try_open(folder: str, name: str, members: Sequence[str], columns: Sequence[str]) -> Shard | ShardError:
    try:
        return _open_shard(folder, name, members, columns)
    except ShardError as error:
        return error
    except Exception as error:  # pyarrow and the file systems of fsspec raise what they like
        return ShardError(name, f"{type(error).__name__}: {error}")


def _open_shard(folder: str, name: str, members: Sequence[str], columns: Sequence[str]) -> Shard:
    fs, root = file_system(folder)
    with fs.open(f"{root}/{name}.parquet", "rb") as file:
        metadata = _parquet().ParquetFile(file)
        rows, schema = metadata.metadata.num_rows, metadata.schema_arrow
        footer = str(metadata.metadata.to_dict())
    for column in columns:
        if column not in schema.names:
            there = ", ".join(sorted(schema.names))
            raise ShardError(name, f"its parquet lacks the column {column!r}; it has {there}.")
        if schema.names.count(column) > 1:
            raise ShardError(name, f"its parquet has the column {column!r} {schema.names.count(column)} times.")
        kind = schema.field(column).type
        if column in STRINGS and not _holds_strings(kind, may_be_null=column == "text"):
            raise ShardError(name, f"its column {column!r} is {kind}, but must be string: cast it.")
        if column in NUMBERS and not _holds_numbers(kind):
            raise ShardError(name, f"its column {column!r} is {kind}, but must be a number: cast it.")
    parquet = _digest_of_parquet(fs.info(f"{root}/{name}.parquet"), footer)
    if not members:
        return Shard(name, rows, parquet)
    path = f"{root}/{name}.npz"
    if not fs.exists(path):
        raise ShardError(name, "its npz is missing.")
    try:
        with fs.open(path, "rb") as file:
            found = {member: _open_member(file, member, name, local=is_local(fs)) for member in members}
    except (zipfile.BadZipFile, EOFError, struct.error) as error:
        raise ShardError(
            name, f"its npz is cut short, damaged or of another format ({error}). Fetch it again."
        ) from error
    for member in found.values():
        if member.rows != rows:
            raise ShardError(name, f"{member.name} has {member.rows} rows, but the parquet has {rows}.")
    return Shard(name, rows, parquet, found)


def _digest_of_parquet(info: Mapping[str, Any], footer: str) -> str:
    """Its size, its tag or time, and its footer: a parquet holds no checksum, and is not read for one."""
    names = ("ETag", "etag", "mtime", "LastModified", "created")  # as the file systems of fsspec call them
    written = next((str(info[name]) for name in names if name in info), None)
    return digest_json([info.get("size"), written, footer])[:16]


def _open_member(file: BinaryIO, name: str, shard: str, *, local: bool) -> Member:
    with zipfile.ZipFile(file) as archive:
        if f"{name}.npy" not in archive.namelist():
            raise ShardError(shard, f"its npz lacks {name}; it has {', '.join(archive.namelist())}.")
        entry = archive.getinfo(f"{name}.npy")
        with archive.open(entry) as stream:
            shape, fortran, dtype = _read_header(stream)
            header_bytes = stream.tell()
        if len(shape) != 2 or fortran or dtype.kind != "f" or dtype.byteorder == ">":
            raise ShardError(shard, f"{name} is {dtype} of shape {shape}, but must be floats of shape (N, D) in rows.")
        offset = None
        if local and entry.compress_type == zipfile.ZIP_STORED:
            file.seek(entry.header_offset + 26)  # a local header: 30 bytes, its name and its extra field
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            offset = entry.header_offset + 30 + name_bytes + extra_bytes + header_bytes
            if offset + shape[0] * shape[1] * dtype.itemsize > os.fstat(file.fileno()).st_size:
                raise ShardError(shard, f"{name} is cut short. Fetch the file again.")
        return Member(name, shape[0], shape[1], dtype.str, entry.CRC, offset)


def _read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    with _HEADERS:
        version = np.lib.format.read_magic(stream)
        read: Callable[..., Any] = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(stream)


def _read_exactly(stream: Any, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError(f"{size - len(content)} bytes are missing")
    return content


def _as_arrow(mask: np.ndarray) -> Any:
    import pyarrow

    return pyarrow.array(mask)


def _holds_strings(kind: Any, *, may_be_null: bool) -> bool:
    """Whether a column is of strings that can be filtered, as those of a string_view cannot."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or (may_be_null and types.is_null(kind))


def _holds_numbers(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def _empty_batch(schema: Any) -> Any:
    import pyarrow

    return pyarrow.record_batch([pyarrow.array([], type=field.type) for field in schema], schema=schema)


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ImportError("Pools need fsspec and pyarrow: pip install 'selectsampler[datacomp]'.") from None
    return parquet
