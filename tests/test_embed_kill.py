"""A run that is killed at any moment goes on from its whole shards and ends with the same bits."""

import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from selectsampler import embed
from selectsampler.embeddings import encode
from selectsampler.store import read_tensors

IMAGES, SHARD, SHARDS = 3000, 1024, 3  # the last one is short
KILLS = 20


class Pictures(torch.utils.data.Dataset):
    """Small arrays in memory."""

    def __init__(self):
        self.data = np.random.default_rng(0).integers(0, 256, (IMAGES, 8, 8, 3), dtype=np.uint8)
        self.targets = [index % 2 for index in range(IMAGES)]

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        return self.data[index], self.targets[index]


class SlowProjection(nn.Module):
    """Encodes by one matrix and a pause, and notes how many images it was given."""

    def __init__(self, log=None):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 192 * 16).sin().reshape(192, 16), requires_grad=False)
        self.logit_scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.log = log

    def encode_image(self, pixels):
        if self.log is not None:
            self.log.open("ab", buffering=0).write(b"%d\n" % len(pixels))
            time.sleep(0.02)
        return pixels.flatten(1) @ self.weight

    def encode_text(self, tokens):
        return tokens.float() @ self.weight[:4]


def to_pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def to_tokens(prompts):
    return torch.tensor([[len(prompt), 1, 2, 3] for prompt in prompts])


def cheap_statistics(images):
    """The real ones would take most of the time, and are not what is tested here."""
    return np.stack([pixels.reshape(-1)[: len(encode.STATISTICS)].astype(np.float32) for pixels in images])


def run(cache_dir=None, log=None):
    clip = SlowProjection(log), to_pixels, to_tokens
    return embed(Pictures(), clip, class_names=["cat", "horse"], cache_dir=cache_dir, batch_size=128, device="cpu")


def run_in_child(cache_dir, log, writes):
    """One run; before write number `writes` is renamed into place, the process kills itself."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # a kill must leave nothing that a later run distrusts
    encode.statistics_of = cheap_statistics
    synchronize, left = os.fsync, iter(range(writes, -1, -1))

    def synchronize_or_die(file):
        synchronize(file)
        if next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    if writes:
        os.fsync = synchronize_or_die
    run(cache_dir, log)


def shards_in(cache_dir):
    """Which files are there under their final names, and since when."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache_dir.glob("*/*.safetensors")}


def rows_of(path):
    return len(read_tensors(path, kind="shard")[0]["image"])


class Attempts:
    """Runs in processes of their own, each checked for what it kept and what it did twice."""

    def __init__(self, cache, log):
        self.cache, self.log = cache, log
        self.context = multiprocessing.get_context("forkserver")  # imports once, forks for each run
        self.context.set_forkserver_preload(["selectsampler.embeddings.encode"])

    def start(self, *, writes=0, kill_after=None):
        """Whether the run came to its end."""
        before = shards_in(self.cache)
        self.log.write_bytes(b"")
        process = self.context.Process(target=run_in_child, args=(self.cache, self.log, writes))
        process.start()
        process.join(kill_after)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        after = shards_in(self.cache)
        assert {path: after.get(path) for path in before} == before, "a whole shard was lost or written again"
        lost = self.images_encoded() - sum(rows_of(path) for path in after.keys() - before.keys())
        assert 0 <= lost <= SHARD if process.exitcode else lost == 0
        return process.exitcode == 0

    def images_encoded(self):
        return sum(map(int, self.log.read_text().split()))


@pytest.mark.slow
def test_twenty_kills_cost_at_most_a_shard_each_and_change_no_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "statistics_of", cheap_statistics)
    cache, generator = tmp_path / "cache", random.Random(0)
    attempts = Attempts(cache, tmp_path / "log")
    attempts.start(kill_after=0)  # imports
    started = time.monotonic()
    assert attempts.start()
    seconds = time.monotonic() - started
    kills = 0
    while kills < KILLS:
        if len(shards_in(cache)) == SHARDS or generator.random() < 0.2:
            shutil.rmtree(cache, ignore_errors=True)  # the next run starts from nothing
        in_a_write = {"writes": generator.randint(1, SHARDS)}
        at_a_moment = {"kill_after": generator.uniform(0, seconds)}
        kills += not attempts.start(**(in_a_write if kills % 4 == 3 else at_a_moment))
    assert attempts.start()
    attempts.log.write_bytes(b"")
    resumed, uninterrupted = run(cache, attempts.log), run()
    assert attempts.images_encoded() == 0
    for name in ("image", "text", "labels", "image_statistics"):
        assert_close(getattr(resumed, name), getattr(uninterrupted, name), rtol=0, atol=0)
