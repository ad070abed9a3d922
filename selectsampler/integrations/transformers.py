"""Reselection in the Hugging Face Trainer.

    class SelectTrainer(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return sampler                       # SelectSampler(selection, num_replicas=1, rank=0)

    trainer = SelectTrainer(..., callbacks=[ReselectCallback(reselect)])

accelerate, on which the Trainer stands, shards batches itself: the sampler must not shard a second time. The Trainer
reads the number of batches once: selections keep their length.
"""

from typing import Any

from transformers import TrainerCallback

from selectsampler.reselect import Reselect

__all__ = ["ReselectCallback"]


class ReselectCallback(TrainerCallback):
    """Calls a `Reselect` at the start of each epoch."""

    def __init__(self, reselect: Reselect) -> None:
        if reselect.sampler.num_replicas != 1:
            raise ValueError("The Trainer shards batches itself: make the sampler with num_replicas=1, rank=0.")
        self.reselect = reselect

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch, which a resumed Trainer would not pass on to the sampler, and select if it is due."""
        self.reselect.on_epoch_start(int(state.epoch or 0))
