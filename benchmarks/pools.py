"""Speed and memory of image-text pools, as JSON: python benchmarks/pools.py speed | pool | ranks

speed   s-CLIPLoss of one batch of 16,384 pairs (D = 768) beside the bare matrix product of that shape and the direct
        computation with three B x B buffers; medians of interleaved rounds, on the clock and in core seconds, which a
        busy machine disturbs less. On a GPU: 32,768 pairs in float16, beside the bare float16 product. Peak memory
        beyond the features.
pool    A made pool of 2 million pairs in 8 shards (D = 512, float16, 4 GB): from files to uid file with B = 4,096 and
        K = 1, 30 % by s-CLIPLoss and 20 % by NormSim against 10,000 targets. Seconds and peak RSS beyond the
        libraries'.
ranks   The same on a smaller pool with 1 process and with 2 ranks of gloo: equal bits, and the time of each.

Results go to benchmarks/results/pools-TASK.json. Ratios are taken within one run; the machine stands in the file.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from selectsampler.recipes.datacomp import make_pool
from torch import Tensor
from torch.nn.functional import normalize

from selectsampler.scores import s_clip_loss

RESULTS = Path(__file__).parent / "results"

FILTER = """
import json, sys, time
import pyarrow.parquet, fsspec, torch
from selectsampler.datacomp import Stage, filter_pool, verify_uids

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

pool, target, output, threads = sys.argv[1:]
filter_pool  # imported when it is first named
libraries = status("VmRSS")
started = time.perf_counter()
stages = [Stage("s-clip-loss", keep="0.3"), Stage("norm-sim", keep="0.2", target=target)]
kept = filter_pool(pool, stages, output, batch_size=4096, repeats=1, threads=int(threads) or None)
result = {"seconds": time.perf_counter() - started, "libraries_mib": libraries, "peak_mib": status("VmHWM")}
if kept is not None:
    result |= {"rows": kept.provenance["rows"], "kept": len(kept.uids), "problems": verify_uids(output)["problems"]}
    print(json.dumps(result))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("speed", "pool", "ranks"))
    parser.add_argument("--rounds", type=int, default=5, help="of speed (%(default)s)")
    parser.add_argument("--threads", type=int, help="of speed (as many as torch takes)")
    parser.add_argument("--cold", action="store_true", help="of speed: at temperature 0.001 as well, the slow path")
    parser.add_argument("--rows", type=int, help="a shard of the made pool (250,000 for pool, 12,500 for ranks)")
    parser.add_argument("--folder", type=Path, help="where the made pool lies or is to lie (a temporary folder)")
    arguments = parser.parse_args()
    if arguments.task == "speed":
        torch.set_num_threads(arguments.threads or torch.get_num_threads())
        result = measure_speed(arguments.rounds, arguments.cold)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            result = {"pool": measure_pool, "ranks": measure_ranks}[arguments.task](folder, arguments.rows)
    result["machine"] = machine()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"pools-{arguments.task}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown")
    described = {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described | {"load_average": os.getloadavg()[0]}


def measure_speed(rounds: int, cold: bool) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    samples, dim, device = (32768, 768, "cuda") if on_gpu else (16384, 768, "cpu")
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(samples, dim, generator=generator), dim=1).to(device) for _ in range(2))
    if on_gpu:
        image, text = image.half(), text.half()
    tasks: dict[str, Callable[[], Tensor]] = {
        "matrix_product": lambda: image @ text.T,
        "s_clip_loss": lambda: s_clip_loss(image, text, temperature=0.01, batch_size=samples),
        "direct": lambda: direct(image, text, 0.01),
    }
    if not on_gpu:
        near = normalize(image + 0.5 * text, dim=1)  # cosines up to 0.9, for which one shift for all must be found
        tasks["s_clip_loss_near_pairs"] = lambda: s_clip_loss(image, near, temperature=0.01, batch_size=samples)
        if cold:
            tasks["s_clip_loss_coldest"] = lambda: s_clip_loss(image, near, temperature=0.001, batch_size=samples)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    on_cores: dict[str, list[float]] = {name: [] for name in tasks}
    memory: dict[str, float] = {}
    for round_ in range(rounds + 1):
        for name, task in tasks.items():
            elapsed, worked, peak = timed(task, on_gpu)
            if round_ == 0:  # the first round warms up
                memory[name] = peak
            else:
                seconds[name].append(elapsed)
                on_cores[name].append(worked)
    rows = {
        name: {
            "median_seconds": statistics.median(seconds[name]),
            "times_the_product": _ratio(seconds, name),
            "times_the_product_in_core_seconds": _ratio(on_cores, name),
            "seconds": seconds[name],
            "core_seconds": on_cores[name],
            "extra_mib": memory[name],
        }
        for name in tasks
    }
    difference = float((tasks["s_clip_loss"]() - tasks["direct"]()).abs().max())
    shape = {"samples": samples, "dim": dim, "dtype": str(image.dtype), "threads": torch.get_num_threads()}
    return {**shape, "rounds": rounds, "tasks": rows, "largest_difference_from_direct": difference}


def _ratio(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(times[name]) / statistics.median(times["matrix_product"])


def direct(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """The definition as it is usually written, with B x B buffers."""
    logits = (image @ text.T).float() / temperature
    weights = logits.exp()
    return temperature * (logits.diag() - (weights.sum(dim=1).log() + weights.sum(dim=0).log()) / 2)


def timed(task: Callable[[], Tensor], on_gpu: bool) -> tuple[float, float, float]:
    """Seconds on the clock, seconds of all cores together, and peak MiB above what was held before."""
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        task()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return seconds, seconds, (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before_mib = status("VmRSS")
    started, started_on_cores = time.perf_counter(), time.process_time()
    task()
    seconds, on_cores = time.perf_counter() - started, time.process_time() - started_on_cores
    return seconds, on_cores, status("VmHWM") - before_mib


def status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


def measure_pool(folder: Path, rows: int | None) -> dict[str, Any]:
    rows = rows or 250_000
    target = made_pool(folder, rows)
    result = run([sys.executable, "-c", FILTER, folder / "metadata", target, folder / "subset.npy", "0"])
    result["peak_beyond_libraries_mib"] = result["peak_mib"] - result["libraries_mib"]
    return {"shards": 8, "rows_a_shard": rows, "dim": 512, **result}


def measure_ranks(folder: Path, rows: int | None) -> dict[str, Any]:
    """One thread a process, so that two ranks have twice the cores of one."""
    rows = rows or 12_500
    target = made_pool(folder, rows)
    program = folder / "filter.py"
    program.write_text(FILTER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611", program]
    starts = {"1 process": [sys.executable, program], "2 ranks": torchrun}
    results: dict[str, Any] = {}
    for name, start in starts.items():
        output = folder / f"subset-{name[0]}.npy"
        results[name] = run([*start, folder / "metadata", target, output, "1"])
        results[name]["sha256"] = hashlib.sha256(output.read_bytes()).hexdigest()
    equal = results["1 process"]["sha256"] == results["2 ranks"]["sha256"]
    return {"shards": 8, "rows_a_shard": rows, "dim": 512, "equal_bits": equal, "runs": results}


def made_pool(folder: Path, rows: int) -> str:
    target = folder / "metadata-target.npy"
    if not (folder / "metadata").is_dir():
        make_pool(folder / "metadata", shards=8, rows=rows, dim=512, targets=10_000)
    shutil.rmtree(folder / "subset.npy.work", ignore_errors=True)
    return str(target)


def run(command: list[Any]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if "torch.distributed.run" in command else None
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
