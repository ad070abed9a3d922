"""Reselection in Lightning's Trainer.

    trainer = Trainer(callbacks=[ReselectCallback(reselect)])

Lightning asks for the first epoch's batches before `on_train_epoch_start`, so that epoch is begun in `on_fit_start`. It
caches the number of batches: a selection of another length needs `reload_dataloaders_every_n_epochs=1`.
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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first epoch, or the one that a checkpoint stands in."""
        self._begin(trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin every later epoch."""
        self._begin(trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        """The selection, when it was made, and the losses."""
        return self.reselect.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Install what `state_dict` gave."""
        self.reselect.load_state_dict(state_dict)

    def _begin(self, epoch: int) -> None:
        if epoch != self._begun:
            self._begun = epoch
            self.reselect.on_epoch_start(epoch)
