"""The ImageNet recipe names wnids, trains by timm's A3 protocol on what its sampler yields, and goes on bit for bit."""

import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from PIL import Image
from selectsampler.recipes import imagenet, imagenet_cost
from selectsampler.recipes.experiment import METHODS
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch.testing import assert_close

from selectsampler import SelectSampler

sys.path.insert(0, str(Path(__file__).parents[1]))

from made_imagenet import WNIDS, made_imagenet

SOME = [WNIDS[0], WNIDS[134], WNIDS[517]]
TINY = replace(imagenet.QUICK, train_size=32, test_size=32, updates=None, epochs=3, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_imagenet(tmp_path_factory.mktemp("data") / "imagenet", SOME, train=6, val=2, grain=4.0)


@pytest.fixture(scope="module")
def data(folder):
    return imagenet.load(folder)


def arguments(folder, *words, clip=None):
    line = ["--data", str(folder), "--noise", "symmetric:0.5", "--quick", "--updates", "3", "--batch-size", "4"]
    parsed = imagenet.parse_arguments([*line, "--workers", "0", "--first-per-class", "6", *words])
    parsed.clip = clip
    return parsed


def test_all_thousand_classes_have_names_of_their_own_nearly_all_of_them_open_clips():
    names = imagenet.class_names(WNIDS)
    assert len(set(names)) == 1000
    others = [WNIDS[index] for index in range(1000) if names[index] != open_clip.IMAGENET_CLASSNAMES[index]]
    assert others == ["n04008634", "n04355933", "n04356056"]
    assert (names[657], names[744]) == ("missile", "projectile, missile")


def test_a_part_of_the_classes_keeps_its_names(data):
    assert data.class_names == ["tench", "crane bird", "construction crane"]
    assert data.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert data.validation_labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_first_of_each_class_can_be_taken_alone(folder):
    data = imagenet.load(folder, first_per_class=1)
    assert data.labels.tolist() == data.validation_labels.tolist() == [0, 1, 2]
    with Image.open(folder / "train" / SOME[1] / f"{SOME[1]}_0.JPEG") as expected:
        assert data.training[1][0].tobytes() == expected.convert("RGB").tobytes()


def test_a_folder_without_halves_says_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*train: give the folder that holds train/WNID"):
        imagenet.load(tmp_path)


def test_a_flat_validation_folder_is_explained(tmp_path):
    root = made_imagenet(tmp_path, SOME[:1], train=1, val=0)
    (root / "val").mkdir()
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").touch()
    with pytest.raises(ValueError, match="sort them by their ground truth first"):
        imagenet.load(root)


def test_classes_that_are_in_one_half_only_are_named(tmp_path):
    root = made_imagenet(tmp_path, SOME, train=1, val=1)
    for image in (root / "val" / SOME[2]).iterdir():
        image.unlink()
    (root / "val" / SOME[2]).rmdir()
    with pytest.raises(ValueError, match=f"train has 3 classes and val has 2; {SOME[2]}, for one"):
        imagenet.load(root)


def test_folders_that_are_no_wnids_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'cats' is not one of ImageNet's 1,000 wnids \(1 of 2 folders"):
        imagenet.load(made_imagenet(tmp_path, [SOME[0], "cats"], train=1, val=1))


def test_an_empty_class_is_named(tmp_path):
    root = made_imagenet(tmp_path, SOME, train=1, val=1)
    (root / "train" / WNIDS[7]).mkdir()
    with pytest.raises(ValueError, match=WNIDS[7]):
        imagenet.load(root)


def test_the_arguments_for_timm_train_make_the_same_schedule_optimizer_and_augmentation():
    path = Path(imagenet.__file__).with_name("timm") / "imagenet.yaml"
    given = Namespace(**yaml.safe_load(path.read_text()), clip_grad=None, momentum=0.9)
    optimizer = create_optimizer_v2(torch.nn.Linear(2, 2), **optimizer_kwargs(given))
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(given), updates_per_epoch=43)
    protocol = imagenet.Protocol()
    own, own_schedule = imagenet.create_optimizer(torch.nn.Linear(2, 2), protocol, protocol.count(43 * 2048 + 7))
    assert (epochs, protocol.count(43 * 2048 + 7)) == (100, 4300)
    assert type(own) is type(optimizer)
    assert own.defaults == optimizer.defaults
    rates = []
    for update in range(4301):
        pair = []
        for one, its_schedule in ((own, own_schedule), (optimizer, schedule)):
            if update:
                its_schedule.step_update(update)
            pair.append(one.param_groups[0]["lr"])
        rates.append(pair)
    assert_close(*torch.tensor(rates).T)
    assert max(rates)[0] == pytest.approx(8e-3, rel=0.01)
    assert rates[0][0] == 1e-4
    assert rates[4300][0] == pytest.approx(1e-6)
    assert given.model == protocol.model
    assert given.input_size == [3, protocol.train_size, protocol.train_size]
    assert (given.aa, given.mixup, given.cutmix) == (protocol.augmentation, protocol.mixup, protocol.cutmix)
    assert given.bce_loss
    assert given.bce_target_thresh == imagenet.PRESENT
    assert given.smoothing == 0


def test_batches_are_the_samplers_at_the_training_size_and_validation_is_whole(data):
    sampler = SelectSampler(range(2, 12), seed=5)
    run = imagenet.Run(data, data.labels, sampler, TINY, seed=0, workers=0)
    assert run.loader.sampler is sampler
    assert (run.per_epoch, run.updates) == (2, 6)
    images, _ = next(iter(run.loader))
    assert images.shape == (4, 3, 32, 32)
    assert sum(len(labels) for _, labels in run.validation) == 6


def test_a_mixed_image_holds_both_of_its_classes_whole(data):
    run = imagenet.Run(data, data.labels, SelectSampler(range(18), seed=5), TINY, seed=0, workers=0)
    logits = torch.randn(1, 3)
    mixed, both = torch.tensor([[0.7, 0.3, 0.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    assert_close(run.loss(logits, mixed), torch.nn.functional.binary_cross_entropy_with_logits(logits, both))


def test_the_labels_trained_on_are_those_given(data):
    labels = (data.labels + 1) % 3
    run = imagenet.Run(data, labels, SelectSampler(range(18), seed=5), TINY, seed=0, workers=0)
    order = run.sampler.batch_indices(1, 4)
    _, seen = list(run.loader)[1]
    assert torch.equal(seen, labels[order])


@pytest.mark.parametrize(("model", "size"), [("test_vit", 32), ("test_resnet", 48)])
def test_models_of_a_fixed_size_are_made_and_tested_at_the_training_size(data, model, size):
    protocol = replace(TINY, model=model, test_size=48)
    run = imagenet.Run(data, data.labels, SelectSampler(range(18), seed=5), protocol, seed=0, workers=0)
    images, _ = next(iter(run.validation))
    assert images.shape[2:] == (size, size)
    run.train_epoch(lambda: None)
    assert 0 <= run.accuracy() <= 1


def test_a_selection_smaller_than_a_batch_is_refused(data):
    with pytest.raises(ValueError, match="3 samples, less than one batch of 4"):
        imagenet.train(data, data.labels, SelectSampler(range(3)), TINY, seed=0)


def test_colours_are_learnt(data):
    protocol = replace(TINY, epochs=40, batch_size=6, learning_rate=2e-2)
    trained = imagenet.train(data, data.labels, SelectSampler(range(18), seed=1), protocol, seed=0)
    assert trained.accuracy > 0.8
    assert (trained.updates, trained.visits) == (120, 720)


def killed_in(epoch):
    """A `Run` that is interrupted after the first update of an epoch."""

    class Killed(imagenet.Run):
        def train_epoch(self, advance):
            def interrupt():
                if self.epoch == epoch:
                    raise KeyboardInterrupt

            super().train_epoch(interrupt)

    return Killed


def weights_after(data, checkpoint, *, workers):
    """What a run, begun or gone on with, leaves in its checkpoint."""
    sampler = SelectSampler(range(18), seed=1)
    imagenet.train(data, data.labels, sampler, TINY, seed=0, workers=workers, checkpoint=checkpoint)
    return torch.load(checkpoint, weights_only=True)


@pytest.mark.parametrize(("epoch", "workers"), [(0, 0), (1, 0), (2, 0), (1, 2)])
def test_a_run_killed_in_any_epoch_ends_with_the_same_weights_bit_for_bit(data, tmp_path, monkeypatch, epoch, workers):
    whole = weights_after(data, tmp_path / "whole.pt", workers=workers)
    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "Run", killed_in(epoch))
        with pytest.raises(KeyboardInterrupt):
            weights_after(data, tmp_path / "again.pt", workers=workers)
    assert (tmp_path / "again.pt").exists() == (epoch > 0)
    again = weights_after(data, tmp_path / "again.pt", workers=workers)
    assert whole["epoch"] == again["epoch"] == 3
    assert whole["sampler"] == again["sampler"]
    assert whole["model"].keys() == again["model"].keys()
    for name, weight in whole["model"].items():
        assert torch.equal(weight, again["model"][name]), name


def test_updates_may_end_in_mid_epoch(data, tmp_path):
    protocol = replace(TINY, updates=6)
    trained = imagenet.train(
        data, data.labels, SelectSampler(range(18)), protocol, seed=0, checkpoint=tmp_path / "c.pt"
    )
    assert (trained.updates, trained.visits) == (6, 24)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert [int(group["step"]) for group in state["optimizer"]["param_groups"]] == [6, 6]
    assert (state["epoch"], state["sampler"]["epoch"], state["sampler"]["yielded"]) == (2, 2, 0)


def test_a_checkpoint_of_another_setting_is_not_continued(data, tmp_path):
    options = {"seed": 0, "checkpoint": tmp_path / "c.pt"}
    imagenet.train(data, data.labels, SelectSampler(range(18)), TINY, setting={"keep": "0.5"}, **options)
    with pytest.raises(ValueError, match=r"c\.pt was made with other arguments \(keep\)"):
        imagenet.train(data, data.labels, SelectSampler(range(18)), TINY, setting={"keep": "0.6"}, **options)


def test_methods_choose_equally_many_and_the_oracle_chooses_right_labels_on_whole_images(folder, tiny_clip):
    words = ["--corrupt", "occlusion:5:0.25", "--keep", "0.25", "--method", *METHODS]
    report = imagenet.run(arguments(folder, *words, clip=tiny_clip))
    rows = {row["method"]: row for row in report["runs"]}
    assert [rows[method]["samples"] for method in METHODS] == [18, 4, 4, 4, 4]
    assert {row["updates"] for row in rows.values()} == {3}
    assert rows["full"]["wrong_labels"] == 0.5
    assert rows["full"]["damaged_images"] == pytest.approx(4 / 18)
    assert rows["oracle"]["wrong_labels"] == rows["oracle"]["damaged_images"] == 0
    assert list(rows["ours"]["seconds"]) == ["embed", "adapt", "score", "select", "train", "validate"]
    assert list(rows["random"]["seconds"]) == ["train", "validate"]
    assert "images a second: train" in imagenet.table(report)


def test_an_interrupted_report_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.json"
    chosen = arguments(folder, "--report", str(path), "--method", "full", "random", "--seeds", "2")
    trained, train = [], imagenet.train

    def interrupted(*positional, **named):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(named["description"])
        return train(*positional, **named)

    monkeypatch.setattr(imagenet, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imagenet.run(chosen)
    before = json.loads(path.read_text())["runs"]
    chosen_before = (path.parent / "report-runs" / "random-1" / "selection.safetensors").read_bytes()
    trained.clear()
    imagenet.run(chosen)
    assert trained == ["random, seed 1"]
    after = json.loads(path.read_text())["runs"]
    assert after[:3] == before
    assert [(row["method"], row["seed"]) for row in after] == [("full", 0), ("random", 0), ("full", 1), ("random", 1)]
    assert (path.parent / "report-runs" / "random-1" / "selection.safetensors").read_bytes() == chosen_before


def test_a_report_or_selection_of_another_setting_is_not_continued(folder, tmp_path):
    path = tmp_path / "report.json"
    words = ["--report", str(path), "--method", "full"]
    imagenet.run(arguments(folder, *words))
    with pytest.raises(ValueError, match=r"report\.json was made with other arguments \(keep\)"):
        imagenet.run(arguments(folder, *words, "--keep", "0.25"))
    path.unlink()
    with pytest.raises(ValueError, match=r"selection\.safetensors was made with other arguments \(keep\)"):
        imagenet.run(arguments(folder, *words, "--keep", "0.25"))


def test_what_needs_embeddings_asks_for_a_clip(folder):
    with pytest.raises(ValueError, match="needs --clip"):
        imagenet.run(arguments(folder, "--method", "ours"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "3"], "not both"),
        (["--batch-size", "5"], "must be even"),
        (["--corrupt", "fog"], "'fog' is no corruption"),
    ],
)
def test_arguments_that_do_not_fit_are_named(folder, words, message):
    with pytest.raises(ValueError, match=message):
        imagenet.run(arguments(folder, *words))


def test_a_stage_takes_as_long_as_the_slower_of_workers_and_network():
    rates = imagenet_cost.Rates(300.0, 300.0, 300.0, 150.0, 1000.0, 10.0, 1000.0, 50.0, 200.0)
    seconds = imagenet_cost.cost(rates, 6000, keep=0.5, epochs=10, workers=1)
    assert seconds == pytest.approx(
        {"embed": 60, "score": 16, "select": 6, "train on the selection": 600, "train on all": 1200}
    )
    seconds = imagenet_cost.cost(rates, 6000, keep=0.5, epochs=10, workers=8)
    assert seconds["embed"] == pytest.approx(40)
    assert seconds["train on all"] == pytest.approx(300)
    table = imagenet_cost.cost_table(rates, 6000, 0.5, replace(imagenet.Protocol(), epochs=10), workers=1)
    assert table.endswith("Selecting costs 0.02 h, 14 % of the training that it saves.")


@pytest.mark.slow
def test_every_rate_is_measured(data, shared_clip, monkeypatch):
    monkeypatch.setattr(imagenet_cost, "CLASSES", 120)
    monkeypatch.setattr(imagenet_cost, "CLASS_SIZE", 20)
    monkeypatch.setattr(imagenet_cost, "IMAGENET", 12_000)
    rates = imagenet_cost.measure(data, shared_clip, TINY)
    assert min(vars(rates).values()) >= 0


@pytest.mark.slow
def test_a_thousand_classes_go_through_every_stage(tmp_path, shared_clip):
    folder = made_imagenet(tmp_path / "imagenet", WNIDS, train=2, val=1)
    words = ["--noise", "symmetric:0.2", "--keep", "0.5", "--epochs", "1", "--method", "full", "ours"]
    line = ["--data", str(folder), "--clip", shared_clip, "--quick", "--workers", "0", "--cache-dir", str(tmp_path)]
    report = imagenet.run(imagenet.parse_arguments([*line, *words]))
    rows = {row["method"]: row for row in report["runs"]}
    assert [(row["samples"], row["updates"]) for row in rows.values()] == [(2000, 31), (1000, 15)]
    assert rows["full"]["wrong_labels"] == pytest.approx(0.2)
    assert {"embed", "score", "select", "train", "validate"} <= rows["ours"]["seconds"].keys()
