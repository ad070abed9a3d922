"""Recipes compare methods on the same noise and damage, and go on with a report where they were stopped."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from selectsampler.recipes import cifar
from selectsampler.recipes.experiment import (
    METHODS,
    Setting,
    accuracy_table,
    complete,
    damage,
    first_of_each_class,
    open_report,
    save_report,
    setting_of,
    with_arguments,
)

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "cifar-quick.json"
PICTURES = [(Image.new("RGB", (8, 8), (20 * number, 90, 90)), number % 3) for number in range(12)]


def setting(right, *, keep="0.5", seed=0):
    """What a method chooses from that looks at no embeddings."""
    return Setting(lambda: pytest.fail("the embeddings are not needed"), torch.tensor(right), keep, seed, {})


def row(method, seed, accuracy=0.5, **seconds):
    """A row of a report."""
    shares = {"wrong_labels": 0.25, "damaged_images": 0.0, "samples": 9, "updates": 20, "visits": 180}
    return {"method": method, "seed": seed, "accuracy": accuracy, **shares, "seconds": seconds}


def test_random_and_oracle_draw_in_one_order_that_is_the_seeds():
    right = [True, False] * 10
    for seed in range(3):
        given = setting(right, seed=seed)
        order = given.order.tolist()
        assert sorted(order) == list(range(20))
        assert METHODS["random"](given).tolist() == order[:10]
        assert METHODS["oracle"](given).tolist() == [index for index in order if index % 2 == 0]
    assert not torch.equal(setting(right, seed=0).order, setting(right, seed=1).order)


def test_full_takes_everything_and_the_oracle_no_more_than_is_right():
    given = setting([True, False, False, False], keep="0.75")
    assert METHODS["full"](given).tolist() == [0, 1, 2, 3]
    assert len(METHODS["random"](given)) == 3
    assert METHODS["oracle"](given).tolist() == [0]


def test_the_first_of_each_class_keep_the_data_sets_order():
    folder = Namespace(targets=[1, 0, 0, 1, 0, 2])
    subset, labels = first_of_each_class(folder, 2)
    assert subset.indices == [0, 1, 2, 3, 5]
    assert labels.tolist() == [1, 0, 0, 1, 2]
    everything, labels = first_of_each_class(folder, None)
    assert everything is folder
    assert labels.tolist() == folder.targets


def test_damage_meets_its_share_exactly_and_always_the_same_images():
    (images, damaged), (_, again) = damage(PICTURES, "fog:5:0.25"), damage(PICTURES, "fog:5:0.25")
    assert damaged.sum() == 3
    assert torch.equal(damaged, again)
    changed = [images[index][0].tobytes() != PICTURES[index][0].tobytes() for index in range(12)]
    assert changed == damaged.tolist()


def test_without_damage_the_images_are_left_alone():
    images, damaged = damage(PICTURES, None)
    assert images is PICTURES
    assert damaged.tolist() == [False] * 12


@pytest.mark.parametrize("spec", ["fog", "fog:3", "fog:x:0.2", "fog:3:0.2:0.5"])
def test_damage_that_cannot_be_read_is_named(spec):
    with pytest.raises(ValueError, match=f"'{spec}' is no corruption"):
        damage(PICTURES, spec)


def test_epochs_take_the_place_of_the_updates_that_quick_brings():
    words = ["--data", "c.zip", "--quick", "--epochs", "3", "--batch-size", "64"]
    protocol = with_arguments(cifar.QUICK, cifar.parse_arguments(words))
    assert (protocol.epochs, protocol.updates, protocol.batch_size) == (3, None, 64)
    assert protocol.learning_rate == cifar.QUICK.learning_rate
    with pytest.raises(ValueError, match="not both"):
        with_arguments(cifar.QUICK, cifar.parse_arguments([*words, "--updates", "5"]))


def test_quick_takes_the_first_of_each_class_unless_told_how_many():
    words = ["--data", "c.zip", "--quick"]
    assert cifar.parse_arguments(words).first_per_class == cifar.QUICK_PER_CLASS
    assert cifar.parse_arguments([*words, "--first-per-class", "7"]).first_per_class == 7
    assert cifar.parse_arguments(words[:2]).first_per_class is None


def test_the_committed_report_is_gone_on_with_wherever_its_clip_lies():
    words = ["--data", "elsewhere/cifar10.zip", "--clip", "local-dir:elsewhere/cifar-clip", "--keep", "0.5", "--quick"]
    arguments = cifar.parse_arguments([*words, "--noise", "symmetric:0.4"])
    now = setting_of(arguments) | asdict(with_arguments(cifar.QUICK, arguments))
    report = open_report(COMMITTED, now, packages=())
    assert list(report["setting"]) == list(now), "the order in the file"
    assert {row["method"]: round(100 * row["accuracy"], 2) for row in report["runs"]} == {
        "full": 54.22,
        "random": 53.24,
        "ours": 71.46,
        "oracle": 70.58,
    }
    assert "ours                 71.46 %         2.8 %    0.0 %    12500" in cifar.table(report)


def test_a_new_report_notes_what_it_is_made_with(tmp_path):
    report = open_report(tmp_path / "none.json", {"keep": "0.5"}, packages=(torch,))
    assert report["setting"] == {"keep": "0.5"}
    assert list(report["versions"]) == ["python", "torch"]
    assert report["versions"]["torch"] == torch.__version__
    assert list(report["machine"]) == ["device", "cores", "threads"]
    assert report["runs"] == []


def test_a_report_of_another_setting_is_not_continued(tmp_path):
    path = tmp_path / "report.json"
    save_report(path, {"setting": {"keep": "0.5"}, "runs": []})
    with pytest.raises(ValueError, match=r"report\.json was made with other arguments \(keep, noise\): name another"):
        open_report(path, {"keep": "0.25", "noise": "pair:0.2"}, packages=())


def test_a_report_that_cannot_be_written_leaves_the_last_one(tmp_path):
    path = tmp_path / "report.json"
    save_report(path, {"runs": [1]})
    with pytest.raises(TypeError):
        save_report(path, {"runs": [object()]})
    assert json.loads(path.read_text()) == {"runs": [1]}
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_report_goes_on_with_what_is_missing(tmp_path):
    arguments = Namespace(report=tmp_path / "new" / "report.json", method=["full", "random"], seeds=2)
    done = []

    def run(method, seed):
        if (method, seed) == ("random", 1) and len(done) == 3:
            raise KeyboardInterrupt
        done.append((method, seed))
        return row(method, seed, train=1.0)

    with pytest.raises(KeyboardInterrupt):
        complete(open_report(arguments.report, {}, packages=()), arguments, run)
    before = json.loads(arguments.report.read_text())["runs"]
    assert before == [row("full", 0, train=1.0), row("random", 0, train=1.0), row("full", 1, train=1.0)]
    done.clear()
    report = complete(open_report(arguments.report, {}, packages=()), arguments, run)
    assert done == [("random", 1)]
    assert json.loads(arguments.report.read_text()) == report
    assert report["runs"] == [*before, row("random", 1, train=1.0)]


def test_the_table_gives_mean_and_deviation_and_counts_neither_training_nor_validating_as_selecting():
    runs = [row("ours", 0, 0.25, embed=3.0, select=1.0, train=10.0, validate=7.0), row("full", 0, train=50.0)]
    runs.append(row("ours", 1, 0.75, embed=3.0, select=2.0, train=20.0, validate=7.0))
    kept = {"noise": None, "corrupt": "fog:3:0.2", "keep": "0.5", "epochs": 4, "updates": None, "batch_size": 8}
    lines = accuracy_table({"setting": kept, "runs": runs}, data="digits", model="net", accuracy="top-1").splitlines()
    words, spread = lines[1].rsplit("; ", 1)
    assert words == "digits, noise None, damage fog:3:0.2, keep 0.5; net, 4 epochs of batches of 8"
    assert spread == "mean ± standard deviation over the seeds"
    assert lines[3].split()[2] == "top-1"
    assert " ".join(lines[4].split()) == "ours 50.00 ± 35.36 % 25.0 % 0.0 % 9 20 4.5 s 15.0 s 2"
    assert " ".join(lines[5].split()) == "full 50.00 % 25.0 % 0.0 % 9 20 0.0 s 50.0 s 1"


def test_what_methods_look_at_is_prepared_first_and_only_where_one_of_them_is_missing(tmp_path):
    arguments = Namespace(report=tmp_path / "report.json", method=["full", "ours"], seeds=1)
    happened = []

    def run(method, seed):
        happened.append(method)
        return row(method, seed, train=1.0)

    for _ in range(2):
        report = open_report(arguments.report, {}, packages=())
        complete(report, arguments, run, prepare=lambda: happened.append("prepared"))
    assert happened == ["prepared", "full", "ours"]
