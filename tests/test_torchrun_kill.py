"""A training under torchrun that is killed in mid-epoch goes on from its checkpoint as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise

import killable_training
import pytest
import torch
from killable_training import EPOCHS, EVERY, KEPT, STEPS

LAST = EPOCHS * STEPS


def start(folder, session):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (folder / f"{session}.txt").open("wb") as output:
        return subprocess.Popen(
            [*command, killable_training.__file__, str(folder), str(session)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(process, folder, session):
    assert process.wait(timeout=120) == 0, (folder / f"{session}.txt").read_text()


def log(folder, session, rank):
    """[step counted from the first epoch, its samples] of every step that a session trained; a torn line is none."""
    path = folder / f"{session}-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def kill_at(process, folder, session, step):
    """SIGKILL torchrun and both ranks once rank 0 has trained `step`."""
    end = time.monotonic() + 120
    while not (folder / f"{session}-0.jsonl").exists() or log(folder, session, 0)[-1:] < [[step]]:
        assert process.poll() is None, (folder / f"{session}.txt").read_text()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    for rank in (0, 1):
        os.kill(int((folder / f"{session}-{rank}.pid").read_text()), signal.SIGKILL)
    process.wait()


def sessions_together(folder, sessions, rank):
    """The steps that count: those of a session up to the checkpoint from which the next one went on."""
    logs = [log(folder, session, rank) for session in range(sessions)]
    steps = []
    for one in logs:
        steps = steps[: one[0][0]] + one
    return steps


@pytest.mark.slow
def test_a_training_killed_in_mid_epoch_sees_the_samples_of_one_that_was_not(tmp_path):
    moments = sorted(random.Random(7).sample([step for step in range(9, LAST - 4) if step % STEPS], 3))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, 0), whole, 0)
    for session, moment in enumerate(moments):
        kill_at(start(killed, session), killed, session, moment)
    finish(start(killed, 3), killed, 3)

    begun = [log(killed, session, 0)[0][0] for session in range(4)]
    assert begun[0] == 0
    assert all(moment - EVERY <= start <= moment + EVERY for moment, start in zip(moments, begun[1:], strict=True))
    for rank in (0, 1):
        steps = log(whole, 0, rank)
        assert sessions_together(killed, 4, rank) == steps, "the same samples in the same order"
        assert [number for number, _ in steps] == list(range(LAST))
    selections = []
    for epoch in range(EPOCHS):
        both = [log(whole, 0, rank)[epoch * STEPS : (epoch + 1) * STEPS] for rank in (0, 1)]
        samples = [sample for one in both for _, batch in one for sample in batch]
        assert (len(samples), len(set(samples))) == (KEPT + 1, KEPT), "each once, one of them to be even"
        selections.append(set(samples))
    assert all(a != b for a, b in pairwise(selections)), "renewed at every epoch"
    ends = [torch.load(folder / "model.pt", weights_only=True) for folder in (whole, killed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]), "and it learned the same"
