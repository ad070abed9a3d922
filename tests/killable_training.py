"""A training under torchrun that renews its selection by losses, and goes on from its last checkpoint.

torchrun --nproc-per-node=2 tests/killable_training.py FOLDER SESSION
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from selectsampler import LossTracker, Reselect, Selection, SelectSampler

POPULATION, KEPT, batch_size, EPOCHS = 240, 117, 4, 4
STEPS = 15  # an epoch, on each of two ranks; the last one is short
EVERY = 4  # steps between checkpoints


def hardest(epoch, state):
    """What was not seen yet first, then the highest losses."""
    return Selection(state.losses.mean.nan_to_num(float("inf")).topk(KEPT).indices, POPULATION)


def main(folder: Path, session: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, checkpoint = distributed.get_rank(), folder / "checkpoint.pt"
    (folder / f"{session}-{rank}.pid").write_text(str(os.getpid()))

    features = torch.randn(POPULATION, 8, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(features, features.sum(1).sin(), torch.arange(POPULATION))
    sampler = SelectSampler.from_process_group(Selection(range(KEPT), POPULATION), seed=5)
    loader = DataLoader(dataset, batch_size, sampler=sampler, num_workers=1)  # it reads ahead
    reselect = Reselect(sampler, hardest, start=1, losses=LossTracker(POPULATION))
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first, done = 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        sampler.load_state_dict(state["sampler"])
        reselect.load_state_dict(state["reselect"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, done = state["sampler"]["epoch"], state["sampler"]["yielded"] // batch_size

    log = (folder / f"{session}-{rank}.jsonl").open("ab", buffering=0)
    for epoch in range(first, EPOCHS):
        reselect.on_epoch_start(epoch)
        for step, (x, y, labels) in enumerate(loader, start=done):
            time.sleep(0.02)
            loss = (model(x).squeeze(1) - y).square()
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            reselect.losses.update(sampler.batch_indices(step, batch_size), loss)
            log.write(json.dumps([epoch * STEPS + step, labels.tolist()]).encode() + b"\n")
            if (epoch * STEPS + step + 1) % EVERY == 0:
                reselect.losses.synchronize()
                if rank == 0:
                    state = {"sampler": sampler.state_dict(yielded=min((step + 1) * batch_size, len(sampler)))}
                    state |= {"reselect": reselect.state_dict(), "optimizer": optimizer.state_dict()}
                    torch.save(state | {"model": model.state_dict()}, folder / "partial.pt")
                    (folder / "partial.pt").replace(checkpoint)
        done = 0
    if rank == 0:
        torch.save(model.state_dict(), folder / "model.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
