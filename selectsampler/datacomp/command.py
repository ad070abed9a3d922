"""The verb `selectsampler datacomp`: arguments to one call each."""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from selectsampler.datacomp import SCORES

__all__ = ["add_datacomp_parser"]

EXAMPLE = """\
the settings of the paper (arXiv 2405.19547), 30 % of the pool by s-CLIPLoss and of these 20 % of the pool by NormSim:
  selectsampler datacomp filter metadata/ --score s-clip-loss --keep 0.3 \\
      --then norm-sim --target imagenet.npy --keep 0.2 --out subset.npy
on eight processes:
  torchrun --nproc-per-node=8 -m selectsampler datacomp filter ...
"""


def add_datacomp_parser(verbs: Any) -> None:
    """Add the verb and its own verbs to the command line's."""
    verb = verbs.add_parser(
        "datacomp",
        help="filter an image-text pool of DataComp's format",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = verb.add_subparsers(dest="task", required=True, metavar="TASK")
    _add_filter(tasks)
    _add_merge(tasks)
    _add_verify(tasks)


def _add_filter(tasks: Any) -> None:
    task = tasks.add_parser("filter", help="from the files of a pool to a uid file")
    task.add_argument("pool", help="folder of NAME.parquet and NAME.npz, local or any fsspec URL")
    task.add_argument("--out", required=True, metavar="FILE.npy", help="beside it: .json and .keys.txt")
    stages = task.add_argument_group(
        "stages", "--score begins the first, --then the next; the others belong to the stage before them"
    )
    for flag in ("--score", "--then"):
        stages.add_argument(flag, action=_StageAction, choices=SCORES, dest="stages", default=[])
    stages.add_argument("--keep", action=_OptionAction, metavar="FRACTION", help="of the whole pool, an exact decimal")
    stages.add_argument("--threshold", action=_OptionAction, type=float, help="lowest score, instead of --keep")
    stages.add_argument(
        "--target", action=_OptionAction, metavar="PATH", help="features (.npy, .npz, .safetensors, a folder) or words"
    )
    stages.add_argument("--p", action=_OptionAction, type=float, help="of norm-sim: 2 or inf (inf)")
    stages.add_argument(
        "--rounds", action=_OptionAction, type=int, help="of norm-sim-dynamic: steps in which the pool shrinks (500)"
    )
    stages.add_argument("--centroids", action=_OptionAction, metavar="FILE.npy", help="of image-based")
    task.add_argument("--within", metavar="FILE.npy", help="keep only what stands in this uid file as well")
    task.add_argument("--arch", choices=("l14", "b32"), default="l14", help="which embeddings (%(default)s)")
    task.add_argument("--temperature", type=float, help="of the model (0.01, as OpenAI's models store; DFN's is 0.07)")
    task.add_argument("--batch-size", type=int, default=32768, help="of s-clip-loss (%(default)s)")
    task.add_argument("--repeats", type=int, default=10, help="of s-clip-loss (%(default)s)")
    task.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    task.add_argument(
        "--group-size", type=int, default=8, help="shards whose rows share batches, at least (%(default)s)"
    )
    task.add_argument(
        "--duplicates",
        choices=("keep", "drop", "refuse"),
        default="keep",
        help="what becomes of repeated uids; refuse: stop at the end, where they are found (%(default)s)",
    )
    task.add_argument("--no-keys", action="store_true", help="write no allow-list .keys.txt")
    task.add_argument("--skip-broken", action="store_true", help="go on without broken shards, and list them")
    task.add_argument("--work", metavar="FOLDER", help="keep finished parts here (a folder beside --out)")
    task.add_argument("--scratch", metavar="FOLDER", help="keep what is decompressed, over all repetitions")
    task.add_argument("--threads", type=int, help="parts computed side by side in each process (as many as torch uses)")
    task.add_argument("--device", default="auto", help="(%(default)s: CUDA, then the CPU)")
    task.set_defaults(run=_filter)


def _add_merge(tasks: Any) -> None:
    task = tasks.add_parser("merge", help="uid files of any source into one")
    task.add_argument("files", nargs="+", help="sorted or not, local or any fsspec URL")
    task.add_argument("--how", choices=("union", "intersection", "sum"), default="union", help="(%(default)s)")
    task.add_argument("--out", required=True, metavar="FILE.npy", help="beside it: .json and .keys.txt")
    task.add_argument("--no-keys", action="store_true", help="write no allow-list .keys.txt")
    task.set_defaults(run=_merge)


def _add_verify(tasks: Any) -> None:
    task = tasks.add_parser(
        "verify", help="a pool's similarities from its embeddings, or a uid file's order and duplicates"
    )
    task.add_argument("path", help="a pool, or a uid file (.npy)")
    task.add_argument("--arch", choices=("l14", "b32"), help="(all that the npz hold)")
    task.add_argument("--tolerance", type=float, default=2e-3, help="of a cosine (%(default)s)")
    task.set_defaults(run=_verify)


class _StageAction(argparse.Action):
    """`--score NAME` and `--then NAME`: begin a stage."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        begun = namespace.stages
        if (option_string == "--score") == bool(begun):
            parser.error("--score begins the first stage, and --then every other.")
        namespace.stages = [*begun, {"score": values}]


class _OptionAction(argparse.Action):
    """An option of the stage that was begun last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if not namespace.stages:
            parser.error(f"{option_string} belongs to a stage: put it after --score or --then.")
        if self.dest in namespace.stages[-1]:
            parser.error(f"{option_string} stands twice for {namespace.stages[-1]['score']}.")
        namespace.stages[-1][self.dest] = values


def _filter(arguments: argparse.Namespace) -> None:
    from selectsampler.datacomp import Stage, filter_pool
    from selectsampler.distributed import process_count

    options = [
        "arch",
        "temperature",
        "batch_size",
        "repeats",
        "seed",
        "group_size",
        "within",
        "duplicates",
        "skip_broken",
    ]
    options += ["work", "scratch", "threads", "device"]
    with suppress(ValueError):  # only the main thread may, and only a program's own is told to stop
        signal.signal(signal.SIGTERM, _stop if process_count() > 1 else signal.default_int_handler)
    try:
        filtered = filter_pool(
            arguments.pool,
            [Stage(**stage) for stage in arguments.stages],
            arguments.out,
            keys=not arguments.no_keys,
            **{name: getattr(arguments, name) for name in options},
        )
    except ConnectionError as error:
        sys.exit(f"selectsampler datacomp: {error}")
    if filtered is not None:
        written = filtered.provenance["written"]
        steps = ", ".join(f"{stage['score']} {stage['kept']}" for stage in filtered.provenance["stages"])
        if written < len(filtered.uids):
            steps += f"; {len(filtered.uids) - written} repeated uids dropped"
        print(f"{written} of {filtered.provenance['rows']} samples ({steps}): {arguments.out}", file=sys.stderr)
        for name, reason in filtered.provenance["broken"].items():
            print(f"left out: shard {name}: {reason}", file=sys.stderr)


def _merge(arguments: argparse.Namespace) -> None:
    from selectsampler.datacomp import merge_uid_files

    merged = merge_uid_files(arguments.files, arguments.out, arguments.how, keys=not arguments.no_keys)
    print(f"{merged} uids: {arguments.out}", file=sys.stderr)


def _verify(arguments: argparse.Namespace) -> None:
    from selectsampler.datacomp import verify_pool, verify_uids

    if arguments.path.endswith(".npy"):
        report = verify_uids(arguments.path)
        problems: Sequence[str] = report["problems"]
    else:
        report = verify_pool(arguments.path, arch=arguments.arch, tolerance=arguments.tolerance)
        problems = [f"{name}: {problem}" for name, problem in report["problems"].items()]
    print(json.dumps(report, indent=1))
    if problems:
        how_many = "a problem" if len(problems) == 1 else f"{len(problems)} problems, the first"
        raise ValueError(f"{arguments.path} has {how_many}: {problems[0]}")


def _stop(*_: Any) -> None:
    """torchrun ends the other ranks when one died."""
    from selectsampler.distributed import process_rank

    with suppress(OSError):
        print(
            f"selectsampler datacomp: rank {process_rank()} was told to stop, probably because another rank "
            "died: see its message. What was finished is kept: start the same command again, on any number of ranks.",
            file=sys.stderr,
            flush=True,
        )
    raise SystemExit(1)
