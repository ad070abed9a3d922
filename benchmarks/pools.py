"""Image-text pools from files to uid file, as JSON: python benchmarks/pools.py pool | ranks

pool    A made pool of 2 million pairs in 8 shards (D = 512, float16, 4 GB): from files to uid file with B = 4,096 and
        K = 1, 30 % by s-CLIPLoss and 20 % by NormSim against 10,000 targets. Seconds and peak RSS beyond the
        libraries'.
ranks   The same on a smaller pool with 1 process and with 2 ranks of gloo: equal bits, and the time of each.

Results go to benchmarks/results/pools-TASK.json; the machine stands in the file. Scores alone, beside the bare matrix
product: `benchmarks/speed.py --stages s_clip_loss`.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from selectsampler.recipes.datacomp import make_pool
from speed import machine

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
    parser.add_argument("task", choices=("pool", "ranks"))
    parser.add_argument("--rows", type=int, help="a shard of the made pool (250,000 for pool, 12,500 for ranks)")
    parser.add_argument("--folder", type=Path, help="where the made pool lies or is to lie (a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = {"pool": measure_pool, "ranks": measure_ranks}[arguments.task](folder, arguments.rows)
    result["machine"] = machine()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"pools-{arguments.task}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


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
