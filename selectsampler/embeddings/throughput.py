"""How fast the stages of embedding went, and which of them the others waited for."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from time import perf_counter

from tqdm import tqdm

from selectsampler.distributed import process_count, process_rank

__all__ = ["Throughput"]

WORTH_A_LINE = 2.0  # seconds


class Throughput:
    """Seconds of preparing, encoding and writing, which overlap.

    >>> throughput = Throughput(1000, side_by_side=1)
    >>> throughput.add("prepare", 0.5)
    >>> throughput.add("encode", 2.0)
    >>> throughput.summary(seconds=2.5)
    'embedded 1,000 images at 400/s; prepare 2,000/s, encode 500/s: bound by encode'

    Args:
        images: how many go through all stages.
        side_by_side: processes that prepare.
    """

    def __init__(self, images: int, *, side_by_side: int) -> None:
        self.images = images
        self.side_by_side = side_by_side
        self.seconds: dict[str, float] = {}
        self.started = perf_counter()
        self._lock = Lock()
        self._busy: dict[str, tuple[int, float]] = {}  # how many threads are at a stage, and since when any is

    def add(self, stage: str, seconds: float) -> None:
        """Count seconds that a stage was at work, of all processes together."""
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Count what is done within; seconds in which two threads are at one stage count once."""
        with self._lock:
            threads, since = self._busy.get(stage, (0, 0.0))
            self._busy[stage] = threads + 1, since if threads else perf_counter()
        yield
        with self._lock:
            threads, since = self._busy[stage]
            self._busy[stage] = threads - 1, since
        if threads == 1:
            self.add(stage, perf_counter() - since)

    def summary(self, seconds: float) -> str:
        """One line; the rate of a stage is what it would have done had it never waited."""
        at_work = {
            stage: max(of_stage, 1e-9) / (self.side_by_side if stage == "prepare" else 1)
            for stage, of_stage in self.seconds.items()
        }
        rates = ", ".join(f"{stage} {self.images / of_stage:,.0f}/s" for stage, of_stage in at_work.items())
        slowest = max(at_work, key=lambda stage: at_work[stage])
        return f"embedded {self.images:,} images at {self.images / seconds:,.0f}/s; {rates}: bound by {slowest}"

    def report(self) -> None:
        """Print the line on standard error, if all took longer than two seconds."""
        seconds = perf_counter() - self.started
        if self.seconds and seconds > WORTH_A_LINE:
            rank = f"rank {process_rank()}: " if process_count() > 1 else ""
            tqdm.write(rank + self.summary(seconds), file=sys.stderr)
