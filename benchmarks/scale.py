"""Score, select and sample more than fits in memory: seconds, and memory beyond the page cache.

    python benchmarks/scale.py --samples 20000000 --sampled 100000000 --out benchmarks/results/scale.json

Features are made (classes of 1,000 around a prompt each, float16), saved in shards and merged into one file, which is
mapped. From it come the paper's two scores, by blocks and by classes, and the exact optimum under a quota for each
class. Then a sampler yields `--sampled` indices, of 1.43 times as many samples. Per sample the folder needs twice
2 D + 8 bytes while shards are merged, and the selection of the sampler 16 bytes of memory while it is made.

Memory is the peak of RssAnon, what a process has allocated, looked at every two milliseconds, above what it had before
the file was opened; pages of the mapped file are the system's to drop, and not counted. Linux only.
"""

import argparse
import ctypes
import json
import platform
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import selectsampler as ss

SHARD = 2**20  # samples
COLUMNS = ["semantic_alignment", "sample_diversity"]


def main() -> None:
    options = parse_arguments()
    folder = Path(tempfile.mkdtemp(prefix="scale-", dir=options.folder))
    try:
        rows = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "selectsampler": ss.__version__}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    arguments = {name: value for name, value in vars(options).items() if name not in ("folder", "out")}
    if options.out:
        options.out.write_text(json.dumps({**versions, **machine, **arguments, "stages": rows}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--class-size", type=int, default=1000)
    parser.add_argument("--keep", default="0.7")
    parser.add_argument("--sampled", type=int, default=100_000_000, help="length of the sampler's selection")
    parser.add_argument("--folder", type=Path, help="where the features go meanwhile; the system's by default")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a stage."""
    prepare()
    watch = Watch()
    shards = watch.stage("make and save", options.samples, lambda: make_shards(options, folder))
    whole = folder / "whole.safetensors"
    watch.stage("merge", options.samples, lambda: ss.Embeddings.merge(shards, whole))
    for shard in shards:
        shard.unlink()
    score_and_select(watch, whole, options)
    sample(watch, options.sampled)
    return watch.rows


def score_and_select(watch: "Watch", file: Path, options: argparse.Namespace) -> None:
    watch.start()
    embeddings = watch.stage("open", options.samples, lambda: ss.Embeddings.load(file))
    scores = watch.stage("score", options.samples, lambda: ss.score(embeddings, columns=COLUMNS, progress=False))
    watch.stage("select", options.samples, lambda: ss.select(scores, options.keep, balance="given"))


def sample(watch: "Watch", count: int) -> None:
    population = count * 143 // 100
    selection = ss.Selection(torch.arange(count) * population // count, population)
    watch.start()
    sampler = ss.SelectSampler(selection)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        watch.stage(f"first batch of epoch {epoch}", count, lambda: first_batch(sampler))
    resumed = ss.SelectSampler(selection)
    resumed.load_state_dict({**sampler.state_dict(), "yielded": count * 9 // 10})
    watch.start()
    watch.stage("first batch after nine tenths", count, lambda: first_batch(resumed))


def prepare() -> None:
    """Load what the first call loads."""
    images, prompts = torch.randn(100, 8), torch.randn(2, 8)
    embeddings = ss.Embeddings(images, prompts, torch.arange(100) % 2, ["a", "b"])
    ss.SelectSampler(ss.select(ss.score(embeddings, columns=COLUMNS), 0.5, balance="given"))


def make_shards(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Embeddings sorted by class, as an image folder gives them, in shards."""
    classes = -(-options.samples // options.class_size)
    prompts = torch.randn(classes, options.dim, generator=torch.Generator().manual_seed(0))
    names = [f"class {number}" for number in range(classes)]
    paths = []
    for start in range(0, options.samples, SHARD):
        labels = torch.arange(start, min(start + SHARD, options.samples)) // options.class_size
        images = torch.empty(len(labels), options.dim, dtype=torch.float16)
        generator = torch.Generator().manual_seed(start + 1)
        for part, own in zip(images.split(2**14), labels.split(2**14), strict=True):
            part.copy_(torch.randn(part.shape, generator=generator) + prompts[own])
        paths.append(folder / f"{start:012}.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a shard holds few of the classes
            ss.Embeddings(images, prompts, labels, names).save(paths[-1])
    return paths


def first_batch(sampler: ss.SelectSampler) -> list[int]:
    stream = iter(sampler)
    return [next(stream) for _ in range(256)]


class Watch:
    """Seconds and peak memory of one stage after another."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.peak = 0
        self.start()
        threading.Thread(target=self._look, daemon=True).start()

    def start(self) -> None:
        """Memory is counted from here on."""
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is nobody's
        self.base = allocated()

    def stage(self, name: str, samples: int, run: Callable[[], Any]) -> Any:
        """What `run` returns; a row about it is noted and printed."""
        ctypes.CDLL(None).malloc_trim(0)
        self.peak, before = allocated(), time.perf_counter()
        result = run()
        seconds = time.perf_counter() - before
        extra = max(self.peak, allocated()) - self.base
        self.rows.append({"stage": name, "samples": samples, "seconds": round(seconds, 2), "bytes": extra})
        print(f"{name:32} {samples:>12,} {seconds:10.2f} s {extra / samples:8.1f} B/sample", flush=True)
        return result

    def _look(self) -> None:
        while True:
            now = allocated()
            if now > self.peak:
                self.peak = now
            time.sleep(0.002)


def allocated() -> int:
    """Bytes of this process that are no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError("This system does not tell what of a process's memory belongs to no file.")
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
