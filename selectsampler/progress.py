"""How far long work is: a bar on a terminal, and a line a minute where there is none, as in a batch job's log."""

import sys
from collections.abc import Callable
from threading import Lock
from time import monotonic
from typing import Any, TextIO

from tqdm import tqdm

from selectsampler.distributed import process_rank

__all__ = ["ProgressLines", "progress_bar"]

EVERY = 60.0  # seconds between two lines, at least
LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {remaining} left"


def progress_bar(
    description: str, total: int, *, unit: str, initial: int = 0, show: bool = True
) -> "tqdm | ProgressLines":
    """A tqdm bar on standard error, from the third second on; where that is no terminal, lines, of rank 0 alone."""
    on_terminal = sys.stderr.isatty()
    if show and not on_terminal and process_rank() == 0:
        return ProgressLines(description, total, unit=unit, initial=initial, stream=sys.stderr)
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit=unit,
        delay=2.0,
        disable=not (show and on_terminal),
        dynamic_ncols=True,
        smoothing=0.05,
        leave=False,
    )


class ProgressLines:
    """What a bar would show, in plain lines: share done, rate and time left, one a minute at most, none before that.

    >>> with ProgressLines("embed", 1000, unit="image", stream=sys.stderr) as progress:
    ...     progress.update(64)
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        unit: str,
        initial: int = 0,
        stream: TextIO,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.initial = self.n = initial
        self._stream, self._clock, self._lock = stream, clock, Lock()
        self._start = self._last = clock()

    def update(self, n: int = 1) -> None:
        """So much more is done; from any thread."""
        with self._lock:
            self.n += n
            now = self._clock()
            if now - self._last < EVERY:
                return
            self._last = now
            line = tqdm.format_meter(
                self.n,
                self.total,
                now - self._start,
                prefix=self.description,
                unit=self.unit,
                bar_format=LINE,
                initial=self.initial,
            )
            print(" ".join(line.split()), file=self._stream, flush=True)

    def __enter__(self) -> "ProgressLines":
        return self

    def __exit__(self, *_: Any) -> None:
        pass
