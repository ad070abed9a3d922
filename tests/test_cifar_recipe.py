"""The CIFAR recipe trains on what its sampler yields and compares methods fairly."""

import pickle
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from selectsampler.recipes import cifar
from selectsampler.recipes.experiment import METHODS
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.testing import assert_close

import selectsampler as ss
from selectsampler import LossTracker, Reselect, Selection, SelectSampler

NAMES = ["blue", "green", "red"]
TINY = replace(cifar.QUICK, updates=30, batch_size=12, learning_rate=0.1)


def coloured(per_class, *, seed):
    """Images of one of three colours with much noise, and their labels, class by class."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), per_class)
    images = random.integers(0, 120, (len(labels), 32, 32, 3), dtype=np.uint8)
    images[np.arange(len(labels)), :, :, labels] += 100
    return torch.from_numpy(images), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def data():
    return cifar.Cifar(*coloured(24, seed=0), *coloured(8, seed=1), NAMES)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "colours"
    for split, images, labels in (
        ("train", data.images, data.labels),
        ("test", data.test_images, data.test_labels),
    ):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / NAMES[label] / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(path)
    return root


@pytest.fixture(scope="module")
def archive(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(folder.rglob("*.png")):
            file.write(image, image.relative_to(folder.parent))
    return path


def arguments(archive, *words, clip=None):
    line = ["--data", str(archive), "--noise", "symmetric:0.5", "--quick", "--updates", "20", "--batch-size", "12"]
    parsed = cifar.parse_arguments([*line, *words])
    parsed.clip = parsed.clip if clip is None else clip
    return parsed


def test_the_order_is_the_samplers_and_batches_are_whole():
    sampler, twin = (SelectSampler(range(3, 33), seed=5) for _ in range(2))
    seen = list(cifar.batches(sampler, 7, batch_size=8))
    expected = []
    for epoch in range(3):
        twin.set_epoch(epoch)
        order = list(twin)
        expected += [order[start : start + 8] for start in (0, 8, 16)]
    assert [batch.tolist() for batch in seen] == expected[:7]


def test_a_selection_smaller_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="less than one batch of 8"):
        next(cifar.batches(SelectSampler(range(7)), 3, batch_size=8))


def test_crops_are_windows_of_the_image_or_its_mirror_image():
    image = torch.arange(32 * 32 * 3).remainder(251).to(torch.uint8).reshape(1, 32, 32, 3)
    crops = cifar.crop_and_flip(image.expand(600, -1, -1, -1), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image[0], (0, 0, 4, 4, 4, 4))
    windows = {
        (top, left, mirrored): padded[top : top + 32, left : left + 32].flip(1)
        if mirrored
        else padded[top : top + 32, left : left + 32]
        for top in range(9)
        for left in range(9)
        for mirrored in (False, True)
    }
    places = [next(place for place, window in windows.items() if torch.equal(crop, window)) for crop in crops]
    assert len(set(places)) > 140, "of 162 windows"
    assert sum(mirrored for _, _, mirrored in places) == pytest.approx(300, abs=50)


def test_input_is_normalised_and_channels_last(data):
    pixels = cifar.as_input(data.images[:2])
    assert_close(pixels[1, 2, 3, 4], (data.images[1, 3, 4, 2] / 255 - cifar.MEAN[2]) / cifar.STD[2])
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_the_usual_protocol_lowers_the_rate_at_epochs_60_120_and_160():
    protocol = cifar.Protocol()
    updates = protocol.count(12500)
    assert updates == 200 * 97
    rates = [protocol.rate(97 * epoch / updates) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert_close(rates, [0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])


def test_the_arguments_for_timm_train_make_the_same_schedule_and_optimizer():
    path = Path(cifar.__file__).with_name("timm") / "cifar.yaml"
    given = Namespace(**yaml.safe_load(path.read_text()), clip_grad=None, min_lr=0.0, warmup_lr=0.0)
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), **optimizer_kwargs(given))
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(given), updates_per_epoch=97)
    protocol, rates = cifar.Protocol(), []
    for epoch in range(epochs):  # train.py: step(0) before the first epoch, step(epoch) before every other
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert_close(rates, [protocol.rate(epoch / 200) for epoch in range(200)])
    assert optimizer.defaults["nesterov"]
    assert optimizer.defaults["momentum"] == protocol.momentum
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, protocol.weight_decay}
    assert given.batch_size == protocol.batch_size


def test_quick_trains_subsets_of_every_size_equally_long_in_one_cycle():
    assert cifar.QUICK.count(25000) == cifar.QUICK.count(12500)
    rates = [cifar.QUICK.rate(progress) for progress in (0, 0.1, 0.2, 0.6, 1)]
    assert_close(rates, [factor * cifar.QUICK.learning_rate for factor in (0, 0.5, 1, 0.5, 0)])


def test_the_same_seed_trains_the_same_network_and_labels_are_those_given(data):
    runs = [cifar.train(data, data.labels, SelectSampler(range(72), seed=1), TINY, seed=2) for _ in range(2)]
    assert runs[0].accuracy == runs[1].accuracy > 0.9
    assert (runs[0].updates, runs[0].visits) == (30, 360)
    wrong = cifar.train(data, (data.labels + 1) % 3, SelectSampler(range(72), seed=1), TINY, seed=2)
    assert wrong.accuracy < 0.1


def test_what_on_losses_returns_is_what_is_minimised(data):
    labels = data.labels.clone()
    wrong = torch.arange(72) % 4 != 0
    labels[wrong] = (labels[wrong] + 1) % 3
    sampler = SelectSampler(range(72), seed=1)
    heard = cifar.train(data, labels, sampler, TINY, seed=2, on_losses=lambda rows, losses: losses * ~wrong[rows])
    assert heard.accuracy > 0.9
    assert cifar.train(data, labels, sampler, TINY, seed=2).accuracy < 0.5


def test_on_logits_hears_what_the_network_said_of_each_sample_before_the_update(data):
    heard = {}

    def on_logits(rows, logits):
        heard.update(zip(rows.tolist(), logits.argmax(dim=1).tolist(), strict=True))
        assert logits.dtype == torch.float32

    cifar.train(data, data.labels, SelectSampler(range(72), seed=1), TINY, seed=2, on_logits=on_logits)
    assert heard.keys() == set(range(72))
    assert np.mean([heard[row] == int(label) for row, label in enumerate(data.labels)]) > 0.9


def test_the_trained_network_gives_the_accuracy(data):
    trained = cifar.train(data, data.labels, SelectSampler(range(72), seed=1), TINY, seed=2)
    logits = cifar.logits_of(trained.model, data.test_images)
    assert float((logits.argmax(dim=1) == data.test_labels).float().mean()) == trained.accuracy


@pytest.mark.parametrize(
    ("known", "fast"),
    [
        ({}, False),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),  # without AMX it is slower than float32
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
    ],
)
def test_bfloat16_is_used_on_processors_that_multiply_it(known, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    with cifar.mixed_precision(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)


def test_a_selection_can_follow_the_training(data):
    sampler, losses = SelectSampler(Selection(range(36), population=72), seed=1), LossTracker(72)
    seen = []

    def other_half(epoch, state):
        return Selection(torch.arange(36) + 36 * (epoch % 2), population=72)

    def on_losses(indices, values):
        losses.update(indices, values)
        seen.append(indices)
        return values

    reselect = Reselect(sampler, other_half, losses=losses)
    cifar.train(data, data.labels, sampler, TINY, seed=0, on_epoch_start=reselect.on_epoch_start, on_losses=on_losses)
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(36))
    assert sorted(torch.cat(seen[3:6]).tolist()) == list(range(36, 72))
    assert losses.seen.tolist() == [5] * 72


@pytest.mark.parametrize("name", ["resnet18_cifar", "quick_resnet"])
def test_networks_for_small_images_keep_their_resolution(name):
    network = cifar.create_model(name, 7).eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    if name == "resnet18_cifar":
        assert network.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)


def test_a_folder_and_its_zip_hold_the_same_data(data, folder, archive):
    for path in (folder, archive):
        read, damaged = cifar.load(path)
        assert torch.equal(read.images, data.images)
        assert torch.equal(read.test_labels, data.test_labels)
        assert read.class_names == NAMES
        assert not damaged.any()


def test_torchvisions_folder_is_read(data, tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    order = torch.randperm(72, generator=torch.Generator().manual_seed(0))
    parts = {f"data_batch_{number + 1}": order[number::5] for number in range(5)} | {"test_batch": order[:9]}
    for name, rows in parts.items():
        pixels = data.images[rows].permute(0, 3, 1, 2).reshape(len(rows), -1).numpy()
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": data.labels[rows].tolist()}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}))
    read, _ = cifar.load(tmp_path)
    expected = torch.cat([order[number::5] for number in range(5)])
    assert torch.equal(read.images, data.images[expected])
    assert torch.equal(read.labels, data.labels[expected])


def test_the_first_of_each_class_can_be_taken_alone(data, archive):
    read, _ = cifar.load(archive, first_per_class=5)
    rows = torch.cat([start + torch.arange(5) for start in (0, 24, 48)])
    assert torch.equal(read.images, data.images[rows])
    assert len(read.test_images) == 24


def test_a_path_without_images_says_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match="torchvision downloads"):
        cifar.load(tmp_path)


def test_methods_choose_equally_many_and_the_oracle_chooses_right_labels_on_whole_images(archive, tiny_clip):
    words = ["--corrupt", "occlusion:5:0.25", "--keep", "0.25", "--method", *METHODS]
    report = cifar.run(arguments(archive, *words, clip=tiny_clip))
    rows = {row["method"]: row for row in report["runs"]}
    assert [rows[method]["samples"] for method in METHODS] == [72, 18, 18, 18, 18]
    assert {row["updates"] for row in rows.values()} == {20}
    assert rows["full"]["wrong_labels"] == 0.5
    assert rows["full"]["damaged_images"] == 0.25
    assert rows["oracle"]["wrong_labels"] == rows["oracle"]["damaged_images"] == 0
    assert list(rows["ours"]["seconds"]) == ["embed", "adapt", "score", "select", "train"]
    assert list(rows["random"]["seconds"]) == ["train"]
    assert "ours" in cifar.table(report)


def test_a_report_of_another_setting_is_not_continued(archive, tmp_path):
    path = tmp_path / "report.json"
    cifar.run(arguments(archive, "--report", str(path), "--method", "full"))
    with pytest.raises(ValueError, match=r"other arguments \(keep\)"):
        cifar.run(arguments(archive, "--report", str(path), "--method", "full", "--keep", "0.25"))


def test_what_needs_embeddings_asks_for_a_clip(archive):
    with pytest.raises(ValueError, match="needs --clip"):
        cifar.run(arguments(archive, "--method", "ours"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "1.5"], "1.5"),
        (["--keep", "half"], "half"),
        (["--method", "full", "ours"], "needs --clip"),
        (["--model", "nope"], "no model 'nope'"),
        (["--model", "efficientnet_b0_cifar"], "only ResNets"),
        (["--keep", "0.1", "--method", "full", "random"], "--keep 0.1 of 72 images is 7, less than one batch of 12"),
        (["--noise", "asymmetric:0.4"], "not for 3"),
        (["--noise", "symetric:0.4", "--method", "ours", "--clip", "any"], "no noise 'symetric'"),
        (["--noise", "instance:1.5", "--method", "ours", "--clip", "any"], r"rate is 1\.5"),
        (["--noise", "human:nowhere.pt:worse_label"], "nowhere.pt"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_embedded_or_trained(archive, words, message, monkeypatch):
    monkeypatch.setattr(cifar, "as_input", lambda images: pytest.fail("a network saw images"))
    monkeypatch.setattr(ss, "embed", lambda *_, **__: pytest.fail("images were embedded"))
    with pytest.raises((ValueError, OSError), match=message):
        cifar.run(arguments(archive, "--method", "full", *words))


def test_a_report_that_needed_no_clip_goes_on_with_one_but_not_with_another(archive, tmp_path):
    words = ("--method", "full", "--report", str(tmp_path / "report.json"))
    cifar.run(arguments(archive, *words))
    words = (*words, "--method", "full", "random")
    assert cifar.run(arguments(archive, *words, "--clip", "local-dir:some/clip"))["setting"]["clip"] == "local-dir:clip"
    assert len(cifar.run(arguments(archive, *words))["runs"]) == 2
    with pytest.raises(ValueError, match=r"other arguments \(clip\)"):
        cifar.run(arguments(archive, *words, "--clip", "another"))


def test_ctrl_c_says_how_to_go_on(archive, monkeypatch, capsys):
    monkeypatch.setattr(cifar, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr("sys.argv", ["cifar.py", "--data", str(archive), "--method", "full", "--batch-size", "12"])
    with pytest.raises(SystemExit, match="130"):
        cifar.main()
    assert "stopped. With --report the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--learning-rate", "nan"], ["--learning-rate", "0"], ["--learning-rate", "fast"]])
def test_a_learning_rate_is_above_zero(archive, words, capsys):
    with pytest.raises(SystemExit):
        arguments(archive, *words)
    assert "is no number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--updates", "0"], ["--seeds", "-1"], ["--batch-size", "none"]])
def test_numbers_that_count_something_are_counted_from_one(archive, words, capsys):
    with pytest.raises(SystemExit):
        arguments(archive, *words)
    assert "whole number from 1 on" in capsys.readouterr().err


def test_noise_that_follows_the_image_follows_its_pixels(archive):
    words = arguments(archive, "--method", "full")
    words.noise = "instance:0.5"
    report = cifar.run(words)
    assert report["runs"][0]["wrong_labels"] == 0.5


def test_a_transformer_of_a_fixed_size_is_made_for_32_pixels():
    model = cifar.create_model("vit_tiny_patch16_224", 10)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_zip_is_read_past_what_macos_keeps_in_it_and_refused_where_splits_differ(folder, tmp_path):
    path = tmp_path / "colours.zip"
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(folder.rglob("*.png")):
            name = image.relative_to(folder.parent)
            file.write(image, name)
            file.writestr(str(name.parent / f"._{name.name}"), b"not an image")
            file.writestr(f"__MACOSX/{name}", b"not an image")
    loaded, _ = cifar.load(path)
    assert loaded.class_names == NAMES
    assert len(loaded.labels) == 72
    with zipfile.ZipFile(path, "a") as file:
        file.write(image, "colours/train/another/0000.png")
    with pytest.raises(ValueError, match="'another', for one, is a class of training or test only"):
        cifar.load(path)
    with zipfile.ZipFile(path, "a") as file:
        file.write(image, "other/train/red/0000.png")
    with pytest.raises(ValueError, match="must hold one folder train/CLASS/"):
        cifar.load(path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="no zip file"):
        cifar.load(path)


@pytest.mark.slow
def test_on_cifar_the_selection_leaves_wrong_labels_out_and_is_worth_more_than_all(cifar_zip, shared_clip):
    words = ["--data", str(cifar_zip), "--clip", shared_clip, "--noise", "symmetric:0.5", "--keep", "0.4", "--quick"]
    words += ["--first-per-class", "200", "--updates", "150", "--batch-size", "64", "--method", "full", "ours"]
    rows = {row["method"]: row for row in cifar.run(cifar.parse_arguments(words))["runs"]}
    assert rows["ours"]["wrong_labels"] < 0.05
    assert rows["ours"]["accuracy"] > rows["full"]["accuracy"] + 0.05
