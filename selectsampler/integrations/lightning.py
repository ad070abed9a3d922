"""Reselection in Lightning's Trainer.

    trainer = Trainer(callbacks=[ReselectCallback(reselect)])

Lightning asks for the first epoch's batches before `on_train_epoch_start`, and before it says which epoch a checkpoint
goes on with: that epoch is read from the checkpoint and begun in `on_fit_start`. In mid-epoch only a
`StatefulDataLoader` goes on. The number of batches is cached: a selection of another length needs
`reload_dataloaders_every_n_epochs=1`.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from selectsampler.reselect import Reselect

__all__ = ["ReselectCallback"]


class ReselectCallback(Callback):
    """Calls a `Reselect` at the start of each epoch, and keeps its state in Lightning's checkpoints."""

    def __init__(self, reselect: Reselect) -> None:
        self.reselect = reselect
        self._begun: int | None = None
        self._resumed: int | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the epoch that the checkpoint goes on with."""
        loop = checkpoint["loops"]["fit_loop"]
        progress, last = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]["is_last_batch"]
        self._resumed = progress["processed"] + (last and progress["processed"] < progress["started"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first epoch, or the one that a checkpoint goes on with."""
        self._begin(trainer.current_epoch if self._resumed is None else self._resumed)
        self._resumed = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin every later epoch."""
        self._begin(trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The selection, when it was made, and the losses of all ranks, which all save together."""
        if self.reselect.losses is not None:
            self.reselect.losses.synchronize()
        return self.reselect.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Install what `state_dict` gave."""
        self.reselect.load_state_dict(state_dict)

    def _begin(self, epoch: int) -> None:
        if epoch != self._begun:
            self._begun = epoch
            self.reselect.on_epoch_start(epoch)
