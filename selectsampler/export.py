"""Results in files that other programs read: CSV, Parquet, NumPy and plain lists."""

import csv
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np

from selectsampler.store import replace_atomically

__all__ = ["write_array", "write_lines", "write_table"]


def write_table(path: Path | str, table: Mapping[str, Sequence[Any]]) -> None:
    """Write columns of equal length as `.csv` or `.parquet`, atomically."""
    path = Path(path)
    if path.suffix == ".csv":
        with replace_atomically(path) as file:
            text = TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
            writer = csv.writer(text)
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
            text.detach()  # the binary file is closed by its own owner
    elif path.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ImportError(
                "Parquet needs pyarrow: pip install 'selectsampler[parquet]'. Or export to .csv."
            ) from None
        with replace_atomically(path) as file:
            parquet.write_table(pyarrow.table(dict(table)), file)
    else:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, but a table is written as .csv or .parquet.")


def write_lines(path: Path | str, lines: Sequence[str]) -> None:
    """Write one string a line, atomically; a string that holds a line break is refused."""
    broken = next((line for line in lines if "\n" in line or "\r" in line), None)
    if broken is not None:
        raise ValueError(f"{broken!r} holds a line break and cannot stand in a list. Export to .csv or .parquet.")
    with replace_atomically(Path(path)) as file:
        file.writelines(f"{line}\n".encode() for line in lines)


def write_array(path: Path | str, array: np.ndarray) -> None:
    """Write one array as `.npy`, atomically."""
    with replace_atomically(Path(path)) as file:
        np.save(file, array, allow_pickle=False)
