"""Reselection in the Hugging Face Trainer.

    class SelectTrainer(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return sampler                       # SelectSampler(selection, num_replicas=1, rank=0)

    trainer = SelectTrainer(..., callbacks=[ReselectCallback(reselect)])

accelerate, on which the Trainer stands, shards batches itself: the sampler must not shard a second time. The Trainer
reads the number of batches once: selections keep their length. `Reselect(sampler)` keeps one selection throughout.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from selectsampler.distributed import from_rank_zero
from selectsampler.reselect import Reselect

__all__ = ["ReselectCallback"]


class ReselectCallback(TrainerCallback):
    """Calls a `Reselect` at the start of each epoch, and keeps its state in checkpoints, as `reselect.pt`."""

    def __init__(self, reselect: Reselect) -> None:
        if reselect.sampler.num_replicas != 1:
            raise ValueError("The Trainer shards batches itself: make the sampler with num_replicas=1, rank=0.")
        self.reselect = reselect

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the Trainer resumes, install what its checkpoint holds."""
        if state.global_step:
            path = self._path(args.output_dir, state)
            if not path.is_file():
                path = Path(args.resume_from_checkpoint or path.parent, "reselect.pt")
            if not path.is_file():
                why = "Name a checkpoint outside output_dir in TrainingArguments(resume_from_checkpoint=...)."
                raise FileNotFoundError(f"The checkpoint's selection, {path}, is not there. {why}")
            saved = from_rank_zero(lambda: torch.load(path, weights_only=True), what=f"the selection of {path}")
            self.reselect.load_state_dict(saved)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the selection, when it was made, and the losses of all ranks."""
        if self.reselect.losses is not None:
            self.reselect.losses.synchronize()
        if state.is_world_process_zero:
            torch.save(self.reselect.state_dict(), self._path(args.output_dir, state))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch, which a resumed Trainer would not pass on to the sampler, and select if it is due."""
        self.reselect.on_epoch_start(int(state.epoch or 0))

    @staticmethod
    def _path(folder: str, state: Any) -> Path:
        return Path(folder, f"checkpoint-{state.global_step}", "reselect.pt")
