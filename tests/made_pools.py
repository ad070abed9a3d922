"""Small pools of DataComp's format for tests."""

from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

EMBEDDINGS = ("b32_", "l14_")


def write_pool(
    folder: Path, rows: list[int], *, dim: int = 16, deflated: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Write shards s0, s1, ... of these many rows, and give all columns and members in the order of the pool."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    shards = [
        write_shard(folder, f"s{number}", made_columns(size, dim, generator), deflated)
        for number, size in enumerate(rows)
    ]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def corrupt_uids(folder: Path, name: str) -> None:
    """Overwrite the start of the uid pages of a row group in the middle of a shard's parquet."""
    path = folder / f"{name}.parquet"
    group = parquet.ParquetFile(path).metadata.row_group(1)
    (column,) = (c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "uid")
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)


def lose_uid(folder: Path, name: str) -> None:
    """Make the uid of row 105 of a shard null."""
    path = folder / f"{name}.parquet"
    columns = parquet.read_table(path).to_pydict()
    columns["uid"][105] = None
    parquet.write_table(pyarrow.table(columns), path, row_group_size=97)


def made_columns(rows: int, dim: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    image = generator.normal(size=(rows, dim))
    text = image + 2 * generator.normal(size=(rows, dim))
    image, text = ((v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float16) for v in (image, text))
    digits = generator.bytes(16 * rows).hex()
    return {
        "uid": np.array([digits[32 * row : 32 * row + 32] for row in range(rows)]),
        "text": np.array([f"a photo of thing {row % 7}" if row % 3 else "sale" for row in range(rows)]),
        "original_width": generator.integers(100, 1000, size=rows),
        "original_height": generator.integers(100, 1000, size=rows),
        "clip_l14_similarity_score": np.einsum("nd,nd->n", image, text, dtype=np.float32),
        "l14_img": image,
        "l14_txt": text,
    }


def write_shard(
    folder: Path, name: str, columns: dict[str, np.ndarray], deflated: bool = False
) -> dict[str, np.ndarray]:
    table = {key: column for key, column in columns.items() if not key.startswith(EMBEDDINGS)}
    parquet.write_table(pyarrow.table(table), folder / f"{name}.parquet", row_group_size=97)
    (np.savez_compressed if deflated else np.savez)(
        folder / f"{name}.npz", **{key: column for key, column in columns.items() if key.startswith(EMBEDDINGS)}
    )
    return columns
