"""The loaders and trainers of README's table, each in the lines that it needs; under torchrun, a script that runs them.

Every function trains one run: three epochs, or until a stop in mid-epoch that leaves a state behind, or from that
state on. It notes which samples the model was shown, batch by batch.
"""

import contextlib
import datetime
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from selectsampler import LossTracker, Reselect, Selection, SelectSampler, with_sampler

POPULATION, EPOCHS, batch_size = 60, 3, 4
SELECTED = list(range(6, 53))  # 47: neither batches nor two or four processes share them evenly
STOP = (1, 2)  # leave in this epoch, after so many steps
selection = Selection(SELECTED, POPULATION)


class Pictures(Dataset):
    """Grey pictures; the label of each is its index, so that a batch tells which samples it holds."""

    transform: Callable | None = None  # timm's create_loader sets it

    def __len__(self) -> int:
        return POPULATION

    def __getitem__(self, index: int):
        picture = Image.new("RGB", (8, 8))
        return torch.zeros(1) if self.transform is None else self.transform(picture), index


dataset = Pictures()


@dataclass
class Run:
    """One training: where it keeps its state, whether it stops or resumes, and what it saw."""

    folder: Path
    stops: bool = False
    resumes: bool = False
    batches: dict[int, list[list[int]]] = field(default_factory=lambda: defaultdict(list))  # by epoch
    lengths: set[int | None] = field(default_factory=set)  # all that len(loader) ever was
    losses: LossTracker = field(default_factory=lambda: LossTracker(POPULATION))

    def see(self, epoch: int, labels, length: int | None, indices: torch.Tensor | None = None) -> bool:
        """Note a batch, and its losses at `indices`; True where the run stops after it."""
        self.batches[epoch].append(torch.as_tensor(labels).tolist())
        self.lengths.add(length)
        if indices is not None:
            self.losses.update(indices, loss_of(labels))
        return self.stops and (epoch, len(self.batches[epoch])) == STOP

    def save(self, state: dict) -> None:
        self.losses.synchronize()
        torch.save(state | {"losses": self.losses.state_dict()}, self.folder / f"state-{rank()}.pt")

    def load(self) -> dict:
        state = torch.load(self.folder / f"state-{rank()}.pt", weights_only=False)
        self.losses.load_state_dict(state["losses"])
        return state


def loss_of(labels: torch.Tensor) -> torch.Tensor:
    """A loss that tells which sample it is of."""
    return labels.float() * 0.37


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


# --- loops of one's own


def loop(run: Run, loader, sampler: SelectSampler) -> None:
    first, done = 0, 0
    if run.resumes:
        state = run.load()
        sampler.load_state_dict(state)
        first, done = state["epoch"], state["yielded"] // batch_size
    for epoch in range(first, EPOCHS):
        sampler.set_epoch(epoch)
        for step, (_, labels) in enumerate(loader, start=done):
            if run.see(epoch, labels, len(loader), sampler.batch_indices(step, batch_size)):
                steps = step + 1
                run.save(sampler.state_dict(yielded=min(steps * batch_size, len(sampler))))
                return
        done = 0


def plain(run: Run, **options) -> None:
    sampler = SelectSampler.from_process_group(selection)
    loader = DataLoader(dataset, batch_size, sampler=sampler, **options)
    loop(run, loader, sampler)


def timm(run: Run, **options) -> None:
    from timm.data import create_loader

    sampler = SelectSampler(selection)
    arguments = {"input_size": (3, 8, 8), "batch_size": batch_size, "is_training": True, "device": torch.device("cpu")}
    loader = create_loader(Pictures(), **arguments | {"num_workers": 0, "persistent_workers": False} | options)
    loader = with_sampler(loader, sampler)
    loop(run, loader, sampler)


def repeated_augmentation(run: Run) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timm(run, distributed=True, num_aug_repeats=3)
    assert any("every sample now stands once" in str(warning.message) for warning in caught)


# --- torchdata


def stateful(run: Run, workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    sampler = SelectSampler.from_process_group(selection)
    loader = StatefulDataLoader(dataset, batch_size, sampler=sampler, num_workers=workers)
    first = 0
    if run.resumes:
        state = run.load()
        first = state["epoch"]
        loader.load_state_dict(state["loader"])
    for epoch in range(first, EPOCHS):
        sampler.set_epoch(epoch)
        for _, labels in loader:
            if run.see(epoch, labels, len(loader)):
                run.save({"epoch": epoch, "loader": loader.state_dict()})
                return


def nodes(run: Run) -> None:
    from torchdata.nodes import Batcher, Loader, Mapper, SamplerWrapper

    sampler = SelectSampler.from_process_group(selection)
    node = Mapper(SamplerWrapper(sampler), dataset.__getitem__)
    loader = Loader(Batcher(node, batch_size, drop_last=False))
    first = 0
    if run.resumes:
        state = run.load()
        first = state["epoch"]
        loader.load_state_dict(state["loader"])
    for epoch in range(first, EPOCHS):  # SamplerWrapper counts the sampler's epochs itself
        for batch in loader:
            if run.see(epoch, [label for _, label in batch], None):  # a Loader has no length
                run.save({"epoch": epoch, "loader": loader.state_dict()})
                return


# --- trainers


def lightning(run: Run, **options) -> None:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from torchdata.stateful_dataloader import StatefulDataLoader

    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, step):
            self.stop = run.see(self.current_epoch, batch[1], self.trainer.num_training_batches)
            return self.layer(batch[0]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.stop:
                trainer.save_checkpoint(run.folder / "lightning.ckpt")
                trainer.should_stop = True

    sampler = SelectSampler.from_process_group(selection)
    loader = StatefulDataLoader(dataset, batch_size, sampler=sampler)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    arguments = {"max_epochs": EPOCHS, "accelerator": "cpu", "enable_checkpointing": False, "callbacks": [Stop()]}
    trainer = Trainer(**arguments, **quiet, **options)
    trainer.fit(Model(), loader, ckpt_path=run.folder / "lightning.ckpt" if run.resumes else None)


def hugging_face(run: Run) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from selectsampler.integrations.transformers import ReselectCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x, labels):
            length = len(trainer.callback_handler.train_dataloader)
            self.stop = run.see(int(trainer.state.epoch or 0), labels, length)
            return {"loss": self.layer(x).mean()}

    class Stop(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            control.should_save = control.should_training_stop = model.stop

    def collate(samples):
        return {"x": torch.stack([x for x, _ in samples]), "labels": torch.tensor([label for _, label in samples])}

    sampler = SelectSampler(selection, num_replicas=1, rank=0)

    class SelectTrainer(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return sampler

    arguments = TrainingArguments(
        str(run.folder / "hugging_face"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=batch_size,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model = Model()
    trainer = SelectTrainer(model, arguments, train_dataset=dataset, data_collator=collate)
    trainer.add_callback(ReselectCallback(Reselect(sampler)))
    trainer.add_callback(Stop())
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=run.resumes)


def accelerate(run: Run) -> None:
    from accelerate import Accelerator, skip_first_batches

    accelerator = Accelerator(cpu=True)
    sampler = SelectSampler(selection, num_replicas=1, rank=0)
    loader = accelerator.prepare(DataLoader(dataset, batch_size, sampler=sampler))
    first, done = 0, 0
    if run.resumes:
        state = run.load()
        first, done = state["epoch"], state["steps"]
    shard = {"num_shards": accelerator.num_processes, "shard": accelerator.process_index}
    for epoch in range(first, EPOCHS):
        loader.set_epoch(epoch)
        rest = skip_first_batches(loader, done) if done else loader
        for step, (_, labels) in enumerate(rest, start=done):
            if run.see(epoch, labels, len(loader), sampler.batch_indices(step, batch_size, **shard)):
                run.save({"epoch": epoch, "steps": step + 1})
                return
        done = 0


# --- the table


@dataclass(frozen=True)
class Case:
    """One thing that is run: a row of the table on a number of processes, with options."""

    row: str
    train: Callable[..., None]
    processes: int = 1
    options: dict = field(default_factory=dict)
    refused: str = ""  # with these words, which README repeats
    drop_last: bool = False
    has_length: bool = True
    needs: str = "torch"  # a module without which it is left out

    @property
    def available(self) -> bool:
        return find_spec(self.needs.split(".")[0]) is not None and find_spec(self.needs) is not None

    @property
    def tracks_losses(self) -> bool:
        return self.train in (plain, timm, repeated_augmentation, accelerate)

    @property
    def name(self) -> str:
        options = "-".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.train.__name__}-{self.processes}" + (f"-{options}" if options else "")


CASES = [
    *[Case("`DataLoader`", plain, processes) for processes in (1, 2, 4)],
    Case("`DataLoader`", plain, options={"num_workers": 2}),
    Case("`DataLoader`", plain, options={"num_workers": 2, "persistent_workers": True}),
    Case("timm `create_loader`", timm, options={"use_prefetcher": True}, drop_last=True),
    Case("timm `create_loader`", timm, options={"use_prefetcher": False}, drop_last=True),
    Case("timm `create_loader`", timm, options={"num_workers": 2, "persistent_workers": True}, drop_last=True),
    Case("timm `create_loader`", timm, 2, {"distributed": True}, drop_last=True),
    Case("timm `num_aug_repeats`", repeated_augmentation, 2, drop_last=True),
    Case(
        "timm `use_multi_epochs_loader`",
        timm,
        options={"use_multi_epochs_loader": True},
        refused="starts the next epoch early",
    ),
    Case(
        "timm `input_size_choices`",
        timm,
        options={"input_size_choices": [8, 12]},
        refused="scheduled sizes",
        needs="timm.data.scheduled_sampler",
    ),
    Case("torchdata `StatefulDataLoader`", stateful, options={"workers": 0}),
    Case("torchdata `StatefulDataLoader`", stateful, options={"workers": 2}),
    Case("torchdata `StatefulDataLoader`", stateful, 2, {"workers": 0}),
    Case("`torchdata.nodes`", nodes, has_length=False, needs="torchdata.nodes"),
    Case("Lightning `Trainer`", lightning, needs="lightning"),
    Case("Lightning `Trainer`", lightning, 2, {"strategy": "ddp", "devices": 2}, needs="lightning"),
    Case("Hugging Face `Trainer`", hugging_face, 1, needs="transformers"),
    Case("Hugging Face `Trainer`", hugging_face, 2, needs="transformers"),
    Case("accelerate `prepare`", accelerate, 1, needs="accelerate"),
    Case("accelerate `prepare`", accelerate, 2, needs="accelerate"),
]
RUNS = {"whole": {}, "again": {}, "stopped": {"stops": True}, "resumed": {"resumes": True}}


def run_case(case: Case, folder: Path) -> dict[str, dict]:
    """What each run of the case saw on this process."""
    folder = folder / case.name
    folder.mkdir(parents=True, exist_ok=True)
    seen = {}
    for kind, how in RUNS.items():
        run = Run(folder, **how)
        case.train(run, **case.options)
        run.losses.synchronize()
        seen[kind] = {"epochs": dict(run.batches), "lengths": run.lengths, "losses": run.losses.mean}
    return seen


def main(folder: Path) -> None:
    """Run all cases of this number of processes; what each saw goes to files, one a case and rank."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for case in CASES:
        if case.processes == torch.distributed.get_world_size() and case.available:
            torch.save(run_case(case, folder), folder / f"{case.name}-{rank()}.pt")
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch_lightning(folder: Path) -> None:
    """Lightning starts the second process itself, after this one has made its sampler."""
    run = Run(folder)
    lightning(run, strategy="ddp", devices=2)
    torch.save(dict(run.batches), folder / f"launched-{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    {"torchrun": main, "lightning": launch_lightning}[sys.argv[1]](Path(sys.argv[2]))
