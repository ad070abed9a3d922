"""The verb `selectsampler timm-train`: arguments to one call."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["add_timm_train_parser", "split_script_arguments"]

VERB = "timm-train"
EXAMPLE = """\
what follows -- are train.py's own arguments, as ever:
  selectsampler timm-train train.py --select-keep 0.7 --select-clip ViT-B-32/openai --select-cache-dir cache/ \\
      -- --data-dir images/ --model resnet50 --epochs 90 --output output/ --experiment selected
to go on, the same with train.py's --resume; it takes the selection that lies beside the checkpoint:
  selectsampler timm-train train.py ... -- ... --resume output/selected/last.pth.tar
on four processes:
  torchrun --no-python --nproc-per-node=4 selectsampler timm-train train.py ... -- ...
"""


def split_script_arguments(words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The command line of `timm-train` without the script's own arguments, and these; None without a `--`.

    >>> split_script_arguments(["timm-train", "train.py", "--", "--epochs", "2"])
    (['timm-train', 'train.py'], ['--epochs', '2'])
    """
    words = list(words)
    if words[:1] != [VERB] or "--" not in words:
        return words, None
    end = words.index("--")
    return words[:end], words[end + 1 :]


def add_timm_train_parser(verbs: Any) -> None:
    """Add the verb to the command line's."""
    verb = verbs.add_parser(
        VERB,
        help="run timm's own train.py on a selection",
        usage="selectsampler timm-train PATH/TO/train.py --select-keep FRACTION --select-clip MODEL [--select-...] -- "
        "[train.py's own arguments]",
        description="Run timm's train.py as it is, with a training loader that yields only selected samples. The "
        "selection is made when train.py makes that loader, and saved in its output folder as selection.safetensors.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("script", type=Path, metavar="PATH/TO/train.py")
    budget = verb.add_mutually_exclusive_group()
    budget.add_argument("--select-keep", metavar="FRACTION", help="in (0, 1], an exact decimal")
    budget.add_argument("--select-count", type=int, metavar="NUMBER", help="of samples, instead")
    verb.add_argument("--select-clip", metavar="MODEL", help="ARCH/TAG, local-dir:PATH or hf-hub:ORG/NAME")
    verb.add_argument(
        "--select-from",
        type=Path,
        dest="select_selection_file",
        metavar="FILE",
        help="a selection that was saved before, instead of making one",
    )
    verb.add_argument(
        "--select-class-names", type=Path, metavar="FILE", help="a name a line, in the order of the labels (folders')"
    )
    verb.add_argument(
        "--select-cache-dir", type=Path, metavar="FOLDER", help="keep embeddings here; several processes need it"
    )
    verb.add_argument("--select-preset", choices=("default", "paper"), default="default", help="(%(default)s)")
    verb.add_argument(
        "--select-balance",
        choices=("auto", "trusted", "given", "none"),
        default="auto",
        help="share of each class: by its sum of trust, as labelled, or any (%(default)s: the preset's own)",
    )
    verb.add_argument(
        "--select-unreadable", choices=("raise", "drop"), default="raise", help="images that cannot be decoded"
    )
    verb.add_argument(
        "--select-seed", type=int, default=0, metavar="NUMBER", help="of selection and order (%(default)s)"
    )
    verb.add_argument(
        "--select-epoch-size",
        type=int,
        metavar="NUMBER",
        help="samples an epoch, walking through the selection without repetition",
    )
    verb.set_defaults(run=partial(_timm_train, verb))


def _timm_train(verb: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    from selectsampler.integrations.timm import Launcher, Request

    if arguments.script_arguments is None:
        verb.error("there is no --: put train.py's own arguments after one, as in `-- --data-dir images/`.")
    asked = {
        name.removeprefix("select_"): value for name, value in vars(arguments).items() if name.startswith("select_")
    }
    try:
        launcher = Launcher(Request(**asked))
    except ValueError as error:
        verb.error(str(error))
    try:
        launcher.run(arguments.script, arguments.script_arguments)
    except Exception as error:
        if error is launcher.refusal:
            raise
        sys.excepthook(type(error), error, error.__traceback__)  # the script's own fails as it does without us
        raise SystemExit(1) from error
