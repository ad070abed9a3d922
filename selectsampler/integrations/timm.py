"""timm's own train.py, unmodified, on a selection: what `selectsampler timm-train` does.

train.py looks its functions up in timm when it runs. So four of them are replaced while it does:

- `timm.data.create_loader`: where the loader is for training, samples are selected, and it gets a sampler of them;
- `timm.data.create_naflex_loader`, which batches by itself, is refused for training;
- `timm.utils.init_distributed_device` is handed train.py's parsed arguments, and so tells what it resumes from;
- `timm.utils.get_outdir` makes the output folder, in which the selection is saved.
"""

import inspect
import runpy
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from selectsampler import presets
from selectsampler.distributed import from_rank_zero, process_count, process_rank
from selectsampler.embeddings.datasets import Images, as_images
from selectsampler.sampler import SelectSampler, with_sampler
from selectsampler.selection import Selection
from selectsampler.validation import resolve_budget

__all__ = ["FILE_NAME", "Launcher", "Request"]

FILE_NAME = "selection.safetensors"


_BALANCES = {"trusted": "trusted", "given": "given", "none": None}


@dataclass(frozen=True)
class Request:
    """What the `--select-*` arguments ask for.

    Args:
        keep, count: the budget, as in `selectsampler.select`; with `selection_file` they only check its size.
        clip, cache_dir, unreadable: as in `selectsampler.embed`.
        selection_file: a selection that was saved before, instead of making one.
        class_names: a file of a name a line, in the order of the labels; by default the data set's own.
        preset: `default` or `paper`.
        balance: `auto`, the preset's; `trusted`, `given` or `none`, as in `selectsampler.select`.
        seed: of the adaptation, the selection and the order of each epoch.
        epoch_size: as in `SelectSampler`.

    Raises:
        ValueError: if something is missing, or does not go together.
    """

    keep: str | None = None
    count: int | None = None
    clip: str | None = None
    selection_file: Path | None = None
    class_names: Path | None = None
    cache_dir: Path | None = None
    preset: str = "default"
    balance: str = "auto"
    unreadable: str = "raise"
    seed: int = 0
    epoch_size: int | None = None

    def __post_init__(self) -> None:
        if self.selection_file is not None:
            return
        if self.keep is None and self.count is None:
            raise ValueError(
                "Nothing says how much to select: give --select-keep FRACTION or --select-count NUMBER, or a selection "
                "that was made before, --select-from FILE."
            )
        if self.clip is None:
            raise ValueError(
                "Nothing says which CLIP model judges the samples: give --select-clip ARCH/TAG, local-dir:PATH or "
                "hf-hub:ORG/NAME, or a selection that was made before, --select-from FILE."
            )
        if self.preset == "paper" and self.balance not in ("auto", "none"):
            raise ValueError(
                "--select-preset paper uses the straight-through optimizer, which knows no quotas: leave "
                "--select-balance out, or use --select-preset default."
            )
        if process_count() > 1 and self.cache_dir is None:
            raise ValueError(
                f"{process_count()} processes share the embedding through files: give --select-cache-dir, a folder "
                "that all of them see."
            )


class Launcher:
    """Runs a train.py whose training loader yields only what is selected.

    >>> launcher = Launcher(Request(keep="0.7", clip="ViT-B-32/openai"))          # doctest: +SKIP
    >>> launcher.run(Path("train.py"), ["--data-dir", "images", "--epochs", "90"])  # doctest: +SKIP

    After it, `selection` is what was trained on, or None where the script never made a training loader; `refusal` is
    the error by which selection itself stopped the script, to be told from the script's own.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.selection: Selection | None = None
        self.refusal: Exception | None = None
        self._script_arguments = Namespace()
        self._folder: Path | None = None

    def run(self, script: Path, arguments: Sequence[str]) -> None:
        """Run `script` as Python would, with `arguments`; whatever it raises is passed on.

        Raises:
            FileNotFoundError: if the script, or a file of the request, is not there.
        """
        for path in (script, self.request.selection_file, self.request.class_names):
            if path is not None and not path.is_file():
                self.refusal = FileNotFoundError(f"There is no file {path}.")
                raise self.refusal
        with ExitStack() as stack:
            stack.enter_context(_replaced(sys, "argv", [str(script), *arguments]))
            # where Python looks first when it runs a script: a timm beside train.py is the one that it uses
            stack.enter_context(_replaced(sys, "path", [str(script.resolve().parent), *sys.path]))
            import timm.data
            import timm.utils

            for module, name, substitute in (
                (timm.data, "create_loader", self._create_loader),
                (timm.data, "create_naflex_loader", self._create_naflex_loader),
                (timm.utils, "init_distributed_device", self._init_distributed_device),
                (timm.utils, "get_outdir", self._get_outdir),
            ):
                if hasattr(module, name):
                    original = getattr(module, name)
                    stack.enter_context(_replaced(module, name, partial(substitute, original)))
            runpy.run_path(str(script), run_name="__main__")
        if self.selection is None:
            _tell(
                f"warning: nothing was selected, for {script} never called timm.data.create_loader(..., "
                "is_training=True). Whatever it trained on, it was not a selection."
            )
        elif self._folder is None:
            _tell(f"warning: {script} made no output folder by timm.utils.get_outdir: the selection was not saved.")

    def _init_distributed_device(self, original: Callable, *arguments: Any, **options: Any) -> Any:
        self._script_arguments = _bound(original, arguments, options)["args"]
        return original(*arguments, **options)

    def _get_outdir(self, original: Callable, *arguments: Any, **options: Any) -> Any:
        folder = original(*arguments, **options)
        self._folder = Path(folder)
        with self._refusing():
            self._save()
        return folder

    def _create_naflex_loader(self, original: Callable, *arguments: Any, **options: Any) -> Any:
        call = _bound(original, arguments, options)
        with self._refusing():
            if call["is_training"]:
                raise ValueError(
                    "timm's NaFlex loader makes batches by itself, in which no sampler can be exchanged. Leave "
                    "--naflex-loader out."
                )
        return original(*arguments, **options)

    def _create_loader(self, original: Callable, *arguments: Any, **options: Any) -> Any:
        call = _bound(original, arguments, options)
        if not call["is_training"]:
            return original(*arguments, **options)
        with self._refusing():
            if call["num_aug_repeats"]:
                raise ValueError(
                    f"--aug-repeats {call['num_aug_repeats']:g} repeats samples by a sampler of timm's own, and the "
                    "selection takes its place. Leave --aug-repeats out."
                )
        loader = original(*arguments, **options)
        with self._refusing():
            return self._select(loader, call)

    def _select(self, loader: Any, call: dict[str, Any]) -> Any:
        """`loader` with a sampler of the selection, which is made here unless there is one."""
        dataset = as_images(_images_of(call["dataset"]))
        selection = from_rank_zero(lambda: self._existing(dataset), what="the selection")
        order: dict[str, Any] = {"seed": self.request.seed, "epoch_size": self.request.epoch_size}
        if selection is None:  # what cannot work fails with any selection of the size, not after an hour of embedding
            size = resolve_budget(self.request.keep, self.request.count, len(dataset))
            rehearsal = SelectSampler(Selection(torch.arange(size), len(dataset)), **order)
            _check_epoch(with_sampler(loader, rehearsal), call["batch_size"])
        self.selection = self._make(dataset, call) if selection is None else selection
        _tell(
            f"trains on {len(self.selection)} of {self.selection.population} samples, fingerprint "
            f"{self.selection.fingerprint:.8}."
        )
        if self.selection.loss_weights is not None:
            warnings.warn("The selection has loss weights, and train.py does not apply them.", stacklevel=2)
        sampler = SelectSampler(self.selection, **order)
        loader = with_sampler(loader, sampler)
        _check_epoch(loader, call["batch_size"])
        if not hasattr(call["dataset"], "set_epoch"):
            # not every release of train.py tells a sampler of the epoch where it runs alone; all tell the data set
            call["dataset"].set_epoch = sampler.set_epoch
        self._save()
        return loader

    def _existing(self, dataset: Images) -> Selection | None:
        """The selection of an earlier training loader, of `--select-from`, or of the run that is resumed."""
        selection, source = self.selection, "the first training loader"
        if selection is None:
            path = self.request.selection_file or self._beside_checkpoint()
            if path is None:
                return None
            selection, source = Selection.load(path), str(path)
            _tell(f"takes the selection from {path}.")
        selection.verify(dataset)
        if self.request.keep is not None or self.request.count is not None:
            budget = resolve_budget(self.request.keep, self.request.count, len(dataset))
            if budget != len(selection):
                raise ValueError(
                    f"The selection of {source} has {len(selection)} samples, but --select-keep or --select-count asks "
                    f"for {budget} of {len(dataset)}. Ask for as many as it has, or make another one in a new run."
                )
        return selection

    def _beside_checkpoint(self) -> Path | None:
        """The selection of the run that `--resume` goes on with."""
        arguments = vars(self._script_arguments)
        resumed = arguments.get("resume")
        if not resumed:
            return None
        checkpoint = Path(resumed)
        if resumed == "auto":  # train.py looks in its own output folder, and starts anew where nothing is
            folder = Path(arguments.get("output") or "./output/train") / (arguments.get("experiment") or "")
            checkpoint = folder / "last.pth.tar"
            if not checkpoint.is_file():
                return None
        path = checkpoint.parent / FILE_NAME
        if path.is_file():
            return path
        _tell(f"warning: {checkpoint} has no {FILE_NAME} beside it, so that a selection is made now.")
        return None

    def _make(self, dataset: Images, call: dict[str, Any]) -> Selection:
        request = self.request
        if request.clip is None:
            raise ValueError("There is no selection to take, and no CLIP model to make one: give --select-clip.")
        preset = getattr(presets, request.preset)
        balance = {} if request.balance == "auto" else {"balance": _BALANCES[request.balance]}
        sampler = SelectSampler.from_dataset(
            dataset,
            request.keep,
            count=request.count,
            clip=request.clip,
            class_names=_class_names(dataset, request.class_names),
            preset={**preset, "select": {**preset["select"], **balance}},
            embed={
                "device": call["device"],
                "num_workers": call["num_workers"],
                "unreadable": request.unreadable,
            },
            cache_dir=request.cache_dir,
            progress=process_rank() == 0,
            seed=request.seed,
        )
        return sampler.selection

    def _save(self) -> None:
        """Once both are known: releases of train.py differ in which comes first, the loader or the folder."""
        if self.selection is not None and self._folder is not None and process_rank() == 0:
            self.selection.save(self._folder / FILE_NAME)
            _tell(f"saved the selection as {self._folder / FILE_NAME}.")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            self.refusal = error
            raise


def _bound(function: Callable, arguments: tuple, options: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names, defaults included."""
    call = inspect.signature(function).bind(*arguments, **options)
    call.apply_defaults()
    return call.arguments


def _images_of(dataset: Any) -> Any:
    """The data set itself, also from within timm's AugMixDataset, which yields several views of each image."""
    return dataset.dataset if type(dataset).__name__ == "AugMixDataset" else dataset


def _class_names(dataset: Images, file: Path | None) -> list[str]:
    if file is not None:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = dataset.class_names()
    if names is None:
        raise ValueError(
            "The data set does not say what its classes are called. Name them in a file, a name a line in the order "
            "of the labels: --select-class-names FILE."
        )
    return names


def _check_epoch(loader: Any, batch_size: int) -> None:
    """train.py drops what does not fill a batch: an epoch of less than one would train on nothing."""
    if len(loader) == 0:
        raise ValueError(
            f"An epoch would have {len(loader.sampler)} samples on each process, which is less than one batch of "
            f"{batch_size}, and train.py drops those that do not fill one. Keep more, or lower --batch-size."
        )


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _tell(text: str) -> None:
    if process_rank() == 0:
        print(f"selectsampler timm-train: {text}", file=sys.stderr, flush=True)
