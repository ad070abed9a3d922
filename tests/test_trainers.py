"""In each trainer every selected sample appears once an epoch, none other, and in another order each epoch."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from selectsampler import Reselect, Selection, SelectSampler

POPULATION, KEPT, BATCH = 60, 24, 4


class Indexed(Dataset):
    """Sample i is the number i, as a feature and as a label."""

    def __len__(self):
        return POPULATION

    def __getitem__(self, index):
        return {"x": torch.tensor([float(index)]), "labels": torch.tensor(index)}


def start(epoch=0):
    return Selection(torch.arange(KEPT) + epoch, population=POPULATION)


def moving(epoch, state):
    """Another selection each epoch, so that a late or early one shows."""
    return start(epoch)


def check(epochs, selections):
    """`epochs`: the samples that the model saw, in order."""
    for seen, selection in zip(epochs, selections, strict=True):
        assert sorted(seen) == selection.indices.tolist()
        assert seen != sorted(seen), "shuffled"
    orders = [torch.tensor(seen) - min(seen) for seen in epochs]
    assert not any(torch.equal(a, b) for a, b in pairwise(orders)), "a new order each epoch"


def lightning_epochs(folder, *, workers=0, stop=None, resumes=False):
    """The samples that the model saw, by epoch; `stop`: (epoch, steps), or (epoch, None) at its end."""
    lightning = pytest.importorskip("lightning.pytorch")
    from selectsampler.integrations.lightning import ReselectCallback

    seen = {}

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, batch_index):
            seen.setdefault(self.current_epoch, []).extend(batch["labels"].tolist())
            return self.layer(batch["x"]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    class Stop(lightning.Callback):
        def stop_at(self, trainer, steps):
            if stop == (trainer.current_epoch, steps):
                trainer.save_checkpoint(folder / "checkpoint.ckpt")
                trainer.should_stop = True

        def on_train_batch_end(self, trainer, *_):
            self.stop_at(trainer, len(seen[trainer.current_epoch]) // BATCH)

        def on_train_epoch_end(self, trainer, *_):
            self.stop_at(trainer, None)

    sampler = SelectSampler(start(), seed=2)
    loader = StatefulDataLoader(Indexed(), batch_size=BATCH, sampler=sampler, num_workers=workers)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Stop(), ReselectCallback(Reselect(sampler, moving))],
    )
    trainer.fit(Model(), loader, ckpt_path=folder / "checkpoint.ckpt" if resumes else None)
    return seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata under newer versions of torch
@pytest.mark.parametrize("workers", [0, 2])
def test_lightning_sees_each_epochs_own_selection_also_when_it_resumes(tmp_path, workers):
    whole = lightning_epochs(tmp_path, workers=workers)
    check([whole[epoch] for epoch in range(3)], [start(epoch) for epoch in range(3)])
    for stop in [(0, 2), (1, 2), (1, KEPT // BATCH), (1, None)]:
        head = lightning_epochs(tmp_path, workers=workers, stop=stop)
        rest = lightning_epochs(tmp_path, workers=workers, resumes=True)
        assert {epoch: head.get(epoch, []) + rest.get(epoch, []) for epoch in whole} == whole, stop


def hugging_face_epochs(folder, *, stop=None, resumes=False):
    """The samples that the model saw, one after the other; `stop`: after so many steps of all."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from selectsampler.integrations.transformers import ReselectCallback

    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x, labels):
            seen.extend(labels.tolist())
            return {"loss": self.layer(x).mean()}

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            control.should_save = control.should_training_stop = state.global_step == stop

    sampler = SelectSampler(start(), seed=2, num_replicas=1, rank=0)

    class SelectTrainer(transformers.Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return sampler

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )

    def select_fn(epoch, state):
        assert not (resumes and epoch == 1), "selected again in mid-epoch"
        return moving(epoch, state)

    callbacks = [ReselectCallback(Reselect(sampler, select_fn)), Stop()]
    trainer = SelectTrainer(Model(), arguments, train_dataset=Indexed(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resumes)
    return seen


@pytest.mark.slow
def test_the_hugging_face_trainer_sees_each_epochs_own_selection_also_when_it_resumes(tmp_path):
    whole = hugging_face_epochs(tmp_path)
    epochs = [whole[KEPT * epoch : KEPT * (epoch + 1)] for epoch in range(3)]
    check(epochs, [start(epoch) for epoch in range(3)])
    head = hugging_face_epochs(tmp_path, stop=8)
    assert head + hugging_face_epochs(tmp_path, resumes=True) == whole


@pytest.mark.slow
def test_accelerate_sees_each_epochs_own_selection():
    accelerate = pytest.importorskip("accelerate")
    sampler = SelectSampler(start(), seed=2, num_replicas=1, rank=0)
    reselect = Reselect(sampler, moving)
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(Indexed(), batch_size=BATCH, sampler=sampler))
    epochs = []
    for epoch in range(3):
        reselect.on_epoch_start(epoch)
        epochs.append([])
        for step, batch in enumerate(loader):
            assert batch["labels"].tolist() == sampler.batch_indices(step, BATCH).tolist(), "right behind read-ahead"
            epochs[-1] += batch["labels"].tolist()
    check(epochs, [start(epoch) for epoch in range(3)])


def test_the_hugging_face_callback_refuses_a_sampler_that_would_be_sharded_twice():
    pytest.importorskip("transformers")
    from selectsampler.integrations.transformers import ReselectCallback

    with pytest.raises(ValueError, match="num_replicas=1"):
        ReselectCallback(Reselect(SelectSampler(start(), num_replicas=2, rank=1), moving))
