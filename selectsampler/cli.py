"""The command line: `selectsampler VERB`, arguments to one call each.

Exit codes: 0, done; 1, the input is at fault, and the message says how; 2, the command is; 130, interrupted (what was
done is kept).
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selectsampler.datacomp.command import add_datacomp_parser
from selectsampler.integrations.timm_command import add_timm_train_parser, split_script_arguments

__all__ = ["main"]

EXAMPLE = """\
from an image folder (one sub-folder a class) to a list of files to train on:
  selectsampler embed  train/ --clip ViT-B-32/openai --out embeddings.safetensors --cache-dir cache/
  selectsampler score  embeddings.safetensors --out scores.safetensors
  selectsampler select scores.safetensors --keep 0.7 --out selection.safetensors
  selectsampler export selection.safetensors --out files.txt
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words, script_arguments = split_script_arguments(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words, argparse.Namespace(script_arguments=script_arguments))
    if script_arguments is None:  # else a script is run, whose warnings are its own
        warnings.showwarning = _show_warning
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"selectsampler {arguments.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"selectsampler {arguments.verb}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selectsampler",
        description="Train on the part of the data that is worth training on.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_demo(verbs)
    _add_embed(verbs)
    _add_score(verbs)
    _add_select(verbs)
    _add_export(verbs)
    add_datacomp_parser(verbs)
    add_timm_train_parser(verbs)
    return parser


def _add_demo(verbs: Any) -> None:
    verb = verbs.add_parser("demo", help="train on a selection of noisy digits, beside all, random and clean ones")
    verb.add_argument("--out", type=Path, default=Path("selectsampler-demo"), help="folder for results (%(default)s)")
    verb.add_argument("--noise", type=float, default=0.4, help="share of training labels to flip (%(default)s)")
    verb.add_argument("--keep", default="0.5", help="fraction of the training set to select (%(default)s)")
    verb.add_argument("--seeds", type=int, default=3, help="training runs of each kind (%(default)s)")
    verb.set_defaults(run=_demo)


def _add_embed(verbs: Any) -> None:
    verb = verbs.add_parser("embed", help="run CLIP over an image folder, once")
    verb.add_argument("folder", type=Path, help="image folder: one sub-folder a class, named as the class")
    verb.add_argument("--clip", required=True, metavar="MODEL", help="ARCH/TAG, local-dir:PATH or hf-hub:ORG/NAME")
    verb.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    verb.add_argument("--class-names", type=Path, metavar="FILE", help="a name a line, in the order of the folders")
    verb.add_argument("--template", action="append", metavar="TEXT", help="prompt with a {}; several are averaged")
    verb.add_argument("--cache-dir", type=Path, help="keep finished shards here, to go on after a kill")
    verb.add_argument("--unreadable", choices=("raise", "drop"), default="raise", help="images that cannot be decoded")
    verb.add_argument("--fingerprint", default="auto", help="auto, content, or a text of your own (%(default)s)")
    verb.add_argument("--batch-size", type=int, default=256, help="(%(default)s)")
    verb.add_argument("--num-workers", type=int, default=0, help="processes that decode (%(default)s)")
    verb.add_argument("--device", default="auto", help="(%(default)s: CUDA, then MPS, then the CPU)")
    verb.add_argument("--precision", choices=("fp32", "amp", "amp_bf16"), help="amp on CUDA, else fp32")
    verb.set_defaults(run=_embed)


def _add_score(verbs: Any) -> None:
    verb = verbs.add_parser("score", help="score every sample: alignment with its label, diversity, trust in its label")
    verb.add_argument("embeddings", type=Path)
    verb.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    verb.add_argument(
        "--adapt",
        choices=("none", "cross_fit", "info_nce"),
        default="none",
        help="adapters for alignment (%(default)s)",
    )
    verb.add_argument(
        "--k", type=int, help="neighbours of the diversity scores (the paper's number for the class size)"
    )
    verb.add_argument("--scaling", choices=("min_max", "rank"), default="min_max", help="(%(default)s)")
    verb.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    verb.set_defaults(run=_score)


def _add_select(verbs: Any) -> None:
    verb = verbs.add_parser("select", help="choose the samples to train on")
    verb.add_argument("scores", type=Path)
    budget = verb.add_mutually_exclusive_group(required=True)
    budget.add_argument("--keep", metavar="FRACTION", help="in (0, 1], an exact decimal")
    budget.add_argument("--count", type=int, help="a number of samples instead")
    verb.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    verb.add_argument(
        "--weight",
        action="append",
        metavar="SCORE=NUMBER",
        help="maximise the sum of the scores that are named, so weighted, in place of a draw by trust and intactness",
    )
    verb.add_argument(
        "--balance",
        choices=("auto", "trusted", "given", "none"),
        default="auto",
        help="share of each class: by its sum of trust, as labelled, or any (%(default)s: trusted, if trust is known)",
    )
    verb.add_argument("--quota", action="append", metavar="CLASS=NUMBER", help="of every class instead, by its name")
    verb.add_argument(
        "--method",
        choices=("auto", "draw", "exact", "group", "straight_through"),
        default="auto",
        help="(%(default)s: draw, by lot among what is safe, if trust is known and no weights are given)",
    )
    verb.add_argument("--seed", type=int, default=0, help="of method draw (%(default)s)")
    verb.add_argument("--risk", type=float, default=0.005, help="wrong labels that method draw may add (%(default)s)")
    verb.add_argument("--embeddings", type=Path, metavar="FILE", help="what was scored: what method group is to cover")
    verb.set_defaults(run=_select)


def _add_export(verbs: Any) -> None:
    verb = verbs.add_parser("export", help="write a selection or scores for other programs")
    verb.add_argument("file", type=Path, help="a selection or scores")
    verb.add_argument(
        "--out",
        type=Path,
        required=True,
        help="selection: .txt (file names), .npy (indices), .csv, .parquet; scores: .csv, .parquet",
    )
    verb.set_defaults(run=_export)


def _demo(arguments: argparse.Namespace) -> None:
    try:
        from selectsampler.recipes.digits import run  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(f"{error}. The demo needs more packages: pip install 'selectsampler[demo]'.") from error
    run(arguments.out, noise=arguments.noise, keep=arguments.keep, seeds=arguments.seeds)


def _embed(arguments: argparse.Namespace) -> None:
    from timm.data import create_dataset

    from selectsampler.embeddings import embed

    if not arguments.folder.is_dir():
        raise FileNotFoundError(f"There is no folder {arguments.folder}.")
    _check_target(arguments.out)
    try:
        dataset = create_dataset("", root=str(arguments.folder))
    except RuntimeError as error:
        raise ValueError(f"{error} An image folder has one sub-folder a class.") from None
    folders = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
    names = folders
    if arguments.class_names is not None:
        names = [
            line.strip() for line in arguments.class_names.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        if len(names) != len(folders):
            raise ValueError(
                f"{arguments.class_names} has {len(names)} names, but there are {len(folders)} class folders."
            )
    options = ("cache_dir", "unreadable", "fingerprint", "batch_size", "num_workers", "device", "precision")
    embeddings = embed(
        dataset,
        arguments.clip,
        class_names=names,
        templates=arguments.template,
        **{name: getattr(arguments, name) for name in options},
    )
    embeddings.save(arguments.out)
    _tell(
        f"{len(embeddings)} images of {len(names)} classes, {embeddings.image.shape[1]} features each: {arguments.out}"
    )


def _score(arguments: argparse.Namespace) -> None:
    from selectsampler import Embeddings, adapt, score

    _check_target(arguments.out)
    adapted = adapt(Embeddings.load(arguments.embeddings), method=arguments.adapt, seed=arguments.seed)
    scores = score(adapted, k=arguments.k, scaling=arguments.scaling, seed=arguments.seed)
    scores.save(arguments.out)
    _tell(f"{len(scores)} samples, scores {', '.join(scores.columns)}: {arguments.out}")


def _select(arguments: argparse.Namespace) -> None:
    from selectsampler import Embeddings, Scores, select

    _check_target(arguments.out)
    quotas = _numbers(arguments.quota, int, "--quota takes CLASS=NUMBER")
    selection = select(
        Scores.load(arguments.scores),
        arguments.keep,
        count=arguments.count,
        score_weights=_numbers(arguments.weight, float, "--weight takes SCORE=NUMBER"),
        balance=quotas or (None if arguments.balance == "none" else arguments.balance),
        method=arguments.method,
        image_features=None if arguments.embeddings is None else Embeddings.load(arguments.embeddings).image,
        seed=arguments.seed,
        risk=arguments.risk,
    )
    selection.save(arguments.out)
    _tell(f"{selection}: {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from selectsampler import Scores, Selection
    from selectsampler.store import kind_of

    classes: dict[str, Any] = {"scores": Scores, "selection": Selection}
    kind = kind_of(arguments.file)
    if kind not in classes:
        raise ValueError(f"{arguments.file} holds {kind}, but a selection or scores can be exported.")
    _check_target(arguments.out)
    classes[kind].load(arguments.file).export(arguments.out)
    _tell(f"{kind}: {arguments.out}")


def _numbers(given: Sequence[str] | None, kind: type, usage: str) -> dict[str, Any] | None:
    """What NAME=NUMBER options say; a name may hold an equals sign."""
    if not given:
        return None
    try:
        return {name: kind(number) for name, number in (text.rsplit("=", 1) for text in given)}
    except ValueError:
        raise ValueError(f"{usage}, not {' '.join(given)}.") from None


def _check_target(path: Path) -> None:
    """Fail before the work, not after it, where the result could not be written."""
    if path.is_dir() or not (path.parent.is_dir() or not path.parent.exists()):
        raise ValueError(f"{path} cannot be written: it is, or lies in, something that is no file or folder.")


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"selectsampler: warning: {message}", file=sys.stderr)
