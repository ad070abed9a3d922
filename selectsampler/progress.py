"""Progress bars that appear only after two seconds, and only on a terminal."""

import sys

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(description: str, total: int, *, unit: str, initial: int = 0, show: bool = True) -> tqdm:
    """A tqdm bar on standard error; silent where that is no terminal, and for work that ends within two seconds."""
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        delay=2.0,
        disable=not (show and sys.stderr.isatty()),
        dynamic_ncols=True,
        smoothing=0.05,
        leave=False,
    )
