"""Embedding overlaps its stages, stops as a whole, and says what it was bound by."""

import re
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from selectsampler import embed
from selectsampler.embeddings import encode, throughput
from selectsampler.embeddings.background import Background
from selectsampler.embeddings.throughput import Throughput

NAMES = ["cat", "dog"]


class Projection(nn.Module):
    """Encodes by taking a few pixels."""

    def __init__(self, pause=0.0):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.pause = pause
        self.threads, self.cores = [], []

    def encode_image(self, pixels):
        self.threads.append(threading.current_thread())
        self.cores.append(torch.get_num_threads())
        time.sleep(self.pause * len(pixels))
        return pixels.flatten(1)[:, :16]

    def encode_text(self, tokens):
        return tokens.float()


class Slow(list):
    """Pairs that take a while to open, and know which thread asked for them."""

    def __init__(self, pairs, pause=0.0):
        super().__init__(pairs)
        self.pause = pause
        self.threads = set()
        self.opened = 0

    def __getitem__(self, index):
        self.opened += 1
        self.threads.add(threading.current_thread())
        time.sleep(self.pause)
        return super().__getitem__(index)


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def tokens_of(prompts):
    return torch.ones(len(prompts), 16)


def images(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [(Image.fromarray(picture), index % 2) for index, picture in enumerate(pixels)]


def run(dataset, model, preprocess=pixels_of, **options):
    options = {"class_names": NAMES, "device": "cpu", "fingerprint": "mine", "batch_size": 4, **options}
    return embed(dataset, (model, preprocess, tokens_of), **options)


def test_images_are_prepared_while_the_model_is_at_work():
    opened, overlaps = threading.Event(), []

    class Signals(Slow):
        def __getitem__(self, index):
            if index == 4:  # the first of the second batch
                opened.set()
            return super().__getitem__(index)

    model = Projection()

    def encode_image(pixels):
        overlaps.append(opened.wait(timeout=10))
        return pixels.flatten(1)[:, :16]

    model.encode_image = encode_image
    run(Signals(images(8)), model)
    assert overlaps[0]


@pytest.fixture
def cores(request):
    """As if torch had so many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("cores", [3], indirect=True)
def test_the_data_set_is_read_by_the_callers_thread_and_the_model_runs_in_another(cores):
    dataset, model = Slow(images(12)), Projection()
    run(dataset, model)
    assert dataset.threads == {threading.main_thread()}
    assert len(set(model.threads)) == 1
    assert threading.main_thread() not in model.threads
    assert set(model.cores) == {2}


@pytest.mark.parametrize("cores", [2], indirect=True)
def test_with_two_cores_the_owner_runs_a_slow_model_too_and_each_takes_one(cores):
    dataset, model = Slow(images(80)), Projection(0.002)
    run(dataset, model)
    assert dataset.threads == {threading.main_thread()}
    assert len(set(model.threads)) == 2
    assert set(model.cores) == {1}
    assert torch.get_num_threads() == cores


def test_a_cpu_is_given_few_images_at_once(monkeypatch):
    monkeypatch.setattr(encode, "ON_CPU", 5)
    model = Projection()
    run(images(12), model, batch_size=256)
    assert len(model.threads) == 3


def test_few_batches_wait_for_a_slow_model():
    dataset, opened = Slow(images(40)), []
    model = Projection()

    def encode_image(pixels):
        time.sleep(0.03)
        opened.append(dataset.opened)
        return pixels.flatten(1)[:, :16]

    model.encode_image = encode_image
    run(dataset, model)
    seen_before = 1  # as_images looks at the first image
    assert all(seen - seen_before <= 4 * (number + 2 + encode.AHEAD) for number, seen in enumerate(opened))
    assert opened[0] - seen_before > 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stage", ["preprocess", "encode"])
def test_whatever_fails_stops_both_threads_and_comes_out_as_it_is(stage, error, tmp_path):
    model, dataset, calls = Projection(), images(40), []

    def encode_image(pixels):
        calls.append(len(pixels))
        if stage == "encode" and len(calls) == 3:
            raise error
        return pixels.flatten(1)[:, :16]

    def preprocess(image):
        if stage == "preprocess" and image == dataset[7][0]:
            raise error
        return pixels_of(image)

    model.encode_image = encode_image
    with pytest.raises(error):
        run(dataset, model, preprocess, batch_size=2, cache_dir=tmp_path)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embed")]
    assert len(calls) <= 5  # what waited was not begun


def test_a_fault_of_the_preprocessing_names_its_image():
    def fails_on_small(image):
        if image.size == (5, 5):
            raise RuntimeError("a fault of its own")
        return pixels_of(image)

    dataset = [*images(6), (Image.new("RGB", (5, 5)), 0)]
    with pytest.raises(RuntimeError, match="a fault of its own") as caught:
        run(dataset, Projection(), fails_on_small)
    if hasattr(caught.value, "add_note"):
        assert caught.value.__notes__ == ["It was raised by CLIP's preprocess of image 6."]


def test_what_is_done_in_the_background_is_done_in_turn():
    order = []
    with Background(ahead=2) as background:
        for number in range(20):
            background.submit(order.append, number)
    assert order == list(range(20))


@pytest.mark.parametrize("cores", [2], indirect=True)
def test_what_fails_in_the_owners_hands_is_raised_there_and_nothing_hangs(cores):
    def fails_in_the_owner(number):
        time.sleep(0.01)
        if threading.current_thread() is threading.main_thread():
            raise RuntimeError(f"number {number}")

    def work():
        with Background(ahead=2, elsewhere=1, helps=True) as background:
            for number in range(20):
                background.submit(fails_in_the_owner, number)

    with pytest.raises(RuntimeError, match="number"):
        work()
    assert torch.get_num_threads() == cores


@pytest.mark.parametrize("cores", [2], indirect=True)
def test_no_stage_is_said_to_be_slower_than_all(cores, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "WORTH_A_LINE", 0.0)
    run(images(120), Projection(0.002))
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+)/s", capsys.readouterr().err)]
    assert rates[0] <= 1.05 * min(rates[1:])


def test_seconds_in_which_two_threads_are_at_one_stage_count_once():
    embedding, barrier = Throughput(10, side_by_side=1), threading.Barrier(2)

    def encode():
        with embedding.timing("encode"):
            barrier.wait(timeout=10)
            time.sleep(0.2)

    other = threading.Thread(target=encode)
    other.start()
    encode()
    other.join()
    assert 0.2 <= embedding.seconds["encode"] < 0.35


def test_the_slowest_stage_is_what_bounds():
    embedding = Throughput(1000, side_by_side=4)
    embedding.add("prepare", 2.0)
    embedding.add("prepare", 2.0)  # of all four processes
    embedding.add("encode", 0.5)
    embedding.add("write", 0.01)
    expected = "embedded 1,000 images at 800/s; prepare 1,000/s, encode 2,000/s, write 100,000/s: bound by prepare"
    assert embedding.summary(seconds=1.25) == expected


def test_throughput_is_printed_where_it_took_long_and_progress_is_wanted(capsys, monkeypatch, tmp_path):
    run(images(6), Projection(0.001))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(throughput, "WORTH_A_LINE", 0.0)
    run(images(6), Projection(0.001), progress=False)
    assert capsys.readouterr().err == ""
    run(images(6), Projection(0.02), cache_dir=tmp_path)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("embedded 6 images at ")
    assert printed.err.endswith(": bound by encode\n")
    run(images(6), Projection(0.02), cache_dir=tmp_path)
    assert capsys.readouterr().err == ""  # all was there
