"""timm's train.py, unmodified, trains on the selection and nothing else, from the first epoch to a resumed last."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import timm.data
import timm.utils
import torch
import yaml
from helpers import image_folder
from safetensors.torch import save_file

from selectsampler import Selection, cli, presets
from selectsampler.embeddings import clip as clip_module

SCRIPT = Path(__file__).with_name("timm_train_script.py")
MAKE = ("--select-keep", "0.7", "--select-clip", "tiny")
KEPT = [1, 2, 3, 5, 8, 9, 10, 12, 13, 15, 17, 18, 19]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty images of three classes to train on, six to evaluate."""
    root = tmp_path_factory.mktemp("data")
    image_folder(root / "train", [8, 6, 6])
    image_folder(root / "validation", [2, 2, 2])
    return root


@pytest.fixture(autouse=True)
def offline_clip(monkeypatch, tiny_clip):
    """Any name stands for the tiny model: no weights can be downloaded here."""
    monkeypatch.setattr(clip_module, "_load_open_clip", lambda name: tiny_clip)


@pytest.fixture
def kept(data, tmp_path):
    """A selection file made by hand."""
    Selection(KEPT, population=20).save(tmp_path / "kept.safetensors")
    return tmp_path / "kept.safetensors"


@pytest.fixture
def train(data, tmp_path):
    """Runs `selectsampler timm-train` on the script; returns what the script wrote down, its epochs by number."""

    def run(*script_arguments, select=MAKE, code=0):
        record = tmp_path / "record"
        record.mkdir(exist_ok=True)
        given = ("--data-dir", data, "--output", tmp_path / "out", "--experiment", "run", "--record", record)
        words = ["timm-train", SCRIPT, *select, "--", *given, *script_arguments]
        assert cli.main([str(word) for word in words]) == code
        if code:
            return None
        answer = json.loads((record / "0.json").read_text())
        return answer | {"epochs": {int(epoch): seen for epoch, seen in answer["epochs"].items()}}

    return run


PLAIN = "16, 4, is_training=True, num_workers=0, persistent_workers=False, use_prefetcher=False, device='cpu'"


def written(folder, text):
    """A train.py of a few lines."""
    (folder / "train.py").write_text(text)
    return folder / "train.py"


def selected_in(folder):
    return Selection.load(folder / "selection.safetensors")


# --- what is trained on


@pytest.mark.parametrize("options", [(), ("--no-prefetcher",), ("--workers", 1)], ids=["prefetcher", "none", "worker"])
def test_the_model_is_trained_on_selected_samples_only_and_evaluated_on_all(train, tmp_path, options):
    epochs = train(*options)["epochs"]
    selection = selected_in(tmp_path / "out" / "run")
    assert len(selection) == 14, "70 % of 20"
    for epoch in epochs.values():
        assert len(set(epoch["seen"])) == len(epoch["seen"]) == 12, "timm drops the last batch of two"
        assert set(epoch["seen"]) <= set(selection.indices.tolist())
        assert sorted(epoch["evaluated"]) == list(range(6))
    assert list(epochs) == [0, 1]


def test_the_learning_rate_follows_the_updates_of_the_selection(train):
    record = train("--sched-on-updates", "--lr", 0.01)
    rates = [rate for epoch in record["epochs"].values() for rate in epoch["rates"]]
    assert record["updates_per_epoch"] == 3
    assert {epoch["length"] for epoch in record["epochs"].values()} == {3}
    expected = [0.01 * (1 + math.cos(math.pi * update / 6)) / 2 for update in range(6)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("release", ["1.0.9", "1.0.31"])
def test_each_epoch_has_an_order_of_its_own_that_the_seed_fixes(train, kept, release):
    select = ("--select-from", kept, "--select-seed")
    first, again, other = (
        [epoch["seen"] for epoch in train("--release", release, select=(*select, seed))["epochs"].values()]
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first[0] != first[1]
    assert first != other


def test_an_epoch_may_be_longer_than_the_selection(train, kept):
    epochs = train(select=("--select-from", kept, "--select-epoch-size", 16))["epochs"]
    assert [len(epoch["seen"]) for epoch in epochs.values()] == [16, 16]
    assert set(epochs[0]["seen"]) == set(KEPT), "none comes twice before all came once"


def test_a_data_set_of_several_views_is_judged_by_its_images(data, tmp_path, capsys):
    script = written(
        tmp_path,
        "from timm.data import AugMixDataset, create_dataset, create_loader\n"
        f"dataset = AugMixDataset(create_dataset('', root={str(data)!r}, split='train'), num_splits=2)\n"
        f"loader = create_loader(dataset, {PLAIN}, num_aug_splits=2, auto_augment='augmix-m3')\n"
        "print([len(views) for views, _ in loader])\n",
    )
    assert cli.main(["timm-train", str(script), *MAKE, "--"]) == 0
    assert capsys.readouterr().out == "[2, 2, 2]\n"


def test_the_script_runs_as_if_python_ran_it(tmp_path, capsys):
    (tmp_path / "beside_train.py").write_text("text = 'found'\n")
    script = written(tmp_path, "import sys, beside_train\nprint(__name__, beside_train.text, sys.argv)\n")
    assert cli.main(["timm-train", str(script), *MAKE, "--", "--epochs", "2", "--"]) == 0
    assert capsys.readouterr().out == f"__main__ found {[str(script), '--epochs', '2', '--']}\n"


def test_timm_and_the_interpreter_are_as_before_afterwards(train, kept):
    names = [(timm.data, "create_loader"), (timm.data, "create_naflex_loader"), (sys, "argv"), (sys, "path")]
    names += [(timm.utils, "get_outdir"), (timm.utils, "init_distributed_device")]
    before = [getattr(module, name) for module, name in names]
    train("--epochs", 1, select=("--select-from", kept))
    assert all(getattr(module, name) is value for (module, name), value in zip(names, before, strict=True))


# --- the selection


def test_the_selection_is_saved_and_verified_against_the_data(train, data, tmp_path, capsys):
    train("--epochs", 1)
    selection = selected_in(tmp_path / "out" / "run")
    dataset = timm.data.create_dataset("", root=str(data), split="train")
    selection.verify(dataset)
    assert selection.provenance["selection"]["keep"] == "0.7"
    assert all((data / "train" / key).is_file() for key in selection.keys())  # noqa: SIM118
    assert "saved the selection as" in capsys.readouterr().err


def test_a_selection_that_was_saved_before_is_taken_as_it_is(train, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_module, "_load_open_clip", None)
    epochs = train("--batch-size", 13, select=("--select-from", kept))["epochs"]
    assert [sorted(epoch["seen"]) for epoch in epochs.values()] == [KEPT, KEPT]
    assert selected_in(tmp_path / "out" / "run").indices.tolist() == KEPT


def test_selecting_on_the_way_trains_as_with_the_file_that_it_leaves(train, tmp_path):
    made = train()
    taken = train(select=("--select-from", tmp_path / "out" / "run" / "selection.safetensors"))
    assert made["weights"] == taken["weights"], "selection draws no random numbers from training"


def test_arguments_reach_the_selection(train, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("grey\ndark\nlight\n")
    select = ("--select-count", 6, "--select-clip", "tiny", "--select-class-names", names, "--select-balance", "given")
    select += ("--select-cache-dir", tmp_path / "cache", "--select-preset", "default", "--select-seed", 5)
    train("--epochs", 1, select=select)
    selection = selected_in(tmp_path / "out" / "run")
    details = selection.provenance["selection"]
    assert (details["count"], details["balance"], details["seed"], details["method"]) == (6, "given", 5, "draw")
    assert selection.provenance["prompts"] == ["A photo of a grey"], "of the first class"
    assert [sum(key.startswith(f"class_0{label}") for key in selection.keys()) for label in range(3)] == [2, 2, 2]  # noqa: SIM118
    assert list((tmp_path / "cache").iterdir())


def test_by_default_it_selects_as_from_dataset_does(train, tmp_path):
    train("--epochs", 1, select=("--select-keep", "0.5", "--select-clip", "tiny"))
    details = selected_in(tmp_path / "out" / "run").provenance["selection"]
    assert presets.default["select"] == {"balance": "auto", "method": "auto"}
    assert (details["balance"], details["method"]) == ("trusted", "draw")


def test_the_papers_preset_takes_the_papers_optimizer(train, tmp_path):
    train("--epochs", 1, select=("--select-keep", "0.5", "--select-clip", "tiny", "--select-preset", "paper"))
    assert selected_in(tmp_path / "out" / "run").provenance["selection"]["method"] == "straight_through"


# --- resuming


def test_a_resumed_run_goes_on_with_its_selection_and_later_epochs(train, kept, tmp_path, capsys):
    whole = train("--epochs", 4, select=("--select-from", kept))["epochs"]
    train("--epochs", 2, "--experiment", "cut", select=("--select-from", kept))
    checkpoint = tmp_path / "out" / "cut" / "last.pth.tar"
    kept.unlink()
    capsys.readouterr()
    command = ("--select-count", 13, "--select-clip", "tiny")  # another selection, were it made again
    resumed = train("--epochs", 4, "--experiment", "on", "--resume", checkpoint, select=command)["epochs"]
    assert f"takes the selection from {checkpoint.parent / 'selection.safetensors'}" in capsys.readouterr().err
    assert list(resumed) == [2, 3]
    assert {epoch: parts["seen"] for epoch, parts in resumed.items()} == {e: whole[e]["seen"] for e in (2, 3)}
    assert selected_in(tmp_path / "out" / "on").indices.tolist() == KEPT


def test_a_checkpoint_named_in_a_config_file_is_a_resumed_run_too(train, kept, tmp_path):
    train("--epochs", 1, select=("--select-from", kept))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"resume": str(tmp_path / "out" / "run" / "last.pth.tar"), "epochs": 2}))
    select = ("--select-count", 13, "--select-clip", "tiny")
    epochs = train("--config", config, "--experiment", "on", select=select)["epochs"]
    assert list(epochs) == [1]
    assert set(epochs[1]["seen"]) <= set(KEPT)


@pytest.mark.parametrize("begun", [True, False])
def test_resuming_by_itself_takes_the_selection_of_the_output_folder_where_there_is_a_checkpoint(
    data, kept, tmp_path, begun, monkeypatch, capsys
):
    folder = tmp_path / "out" / "run"
    folder.mkdir(parents=True)
    Selection(KEPT, population=20).save(folder / "selection.safetensors")
    if begun:
        (folder / "last.pth.tar").touch()
    script = written(
        tmp_path,
        "import argparse\n"
        "from timm import utils\n"
        "from timm.data import create_dataset, create_loader\n"
        f"arguments = argparse.Namespace(device='cpu', resume='auto', output={str(tmp_path / 'out')!r}, "
        "experiment='run')\n"
        "utils.init_distributed_device(arguments)\n"
        f"dataset = create_dataset('', root={str(data)!r}, split='train')\n"
        "utils.get_outdir(arguments.output, arguments.experiment)\n"  # here before the loader
        f"create_loader(dataset, {PLAIN})\n",
    )
    words = ["timm-train", script, "--select-count", "13", "--select-clip", "tiny", "--"]
    assert cli.main([str(word) for word in words]) == 0
    assert ("takes the selection from" in capsys.readouterr().err) is begun
    assert (selected_in(folder).indices.tolist() == KEPT) is begun


def test_a_checkpoint_without_a_selection_beside_it_is_said(train, kept, tmp_path, capsys):
    train("--epochs", 1, select=("--select-from", kept))
    (tmp_path / "out" / "run" / "selection.safetensors").unlink()
    train("--epochs", 2, "--resume", tmp_path / "out" / "run" / "last.pth.tar")
    assert "has no selection.safetensors beside it, so that a selection is made now" in capsys.readouterr().err
    assert len(selected_in(tmp_path / "out" / "run")) == 14


# --- refusals


@pytest.fixture
def no_embedding(monkeypatch):
    """Fails a test in which embedding begins."""

    def begin(name):
        raise AssertionError("embedding began")

    monkeypatch.setattr(clip_module, "_load_open_clip", begin)


@pytest.mark.parametrize(
    ("options", "select", "message"),
    [
        (("--aug-repeats", 3), MAKE, "--aug-repeats 3 repeats samples"),
        (("--use-multi-epochs-loader",), MAKE, "MultiEpochsDataLoader starts the next epoch early"),
        (("--sizes", 8, 16), MAKE, "scheduled sizes"),
        (("--batch-size", 15), MAKE, "less than one batch of 15"),
        ((), ("--select-keep", "1.7", "--select-clip", "tiny"), "fraction in (0, 1]"),
        ((), ("--select-count", "21", "--select-clip", "tiny"), "from 1 to the 20 samples"),
        ((), ("--select-from", "{kept}", "--select-keep", "0.5"), "has 13 samples, but"),
        ((), (*MAKE, "--select-class-names", "nowhere.txt"), "There is no file nowhere.txt"),
        ((), ("--select-from", "nowhere.safetensors"), "There is no file nowhere.safetensors"),
        (("--train-split", "validation"), ("--select-from", "{kept}"), "has 6 samples; 20 were there"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_embedded(
    train, kept, no_embedding, capsys, options, select, message
):
    train(*options, select=[word.format(kept=kept) for word in select], code=1)
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_timms_naflex_loader_is_refused(tmp_path, no_embedding, capsys):
    script = written(
        tmp_path, "from timm.data import create_naflex_loader\ncreate_naflex_loader([], is_training=True)\n"
    )
    assert cli.main(["timm-train", str(script), *MAKE, "--"]) == 1
    assert "Leave --naflex-loader out" in capsys.readouterr().err


def test_an_iterable_data_set_is_refused(tmp_path, no_embedding, capsys):
    script = written(
        tmp_path,
        "from timm.data import create_loader\n"
        "from torch.utils.data import IterableDataset\n"
        "class Stream(IterableDataset):\n"
        "    def __iter__(self):\n"
        "        return iter([])\n"
        f"create_loader(Stream(), {PLAIN})\n",
    )
    assert cli.main(["timm-train", str(script), *MAKE, "--"]) == 1
    assert "iterable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--select-keep", "0.7", "--"), "--select-clip"),
        (("--select-clip", "tiny", "--"), "--select-keep"),
        (("--select-keep", "0.7", "--select-count", "7", "--select-clip", "tiny", "--"), "not allowed with"),
        ((*MAKE, "--select-preset", "paper", "--select-balance", "given", "--"), "knows no quotas"),
        (MAKE, "there is no --"),
        ((*MAKE, "--epochs", "2"), "unrecognized arguments: --epochs 2"),
    ],
)
def test_a_wrong_command_ends_with_code_2_and_says_how(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["timm-train", str(SCRIPT), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_several_processes_need_a_folder_to_share_the_embedding_through(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        cli.main(["timm-train", str(SCRIPT), *MAKE, "--"])
    assert "2 processes share the embedding through files: give --select-cache-dir" in capsys.readouterr().err


def test_a_script_that_is_not_there_is_refused(capsys):
    assert cli.main(["timm-train", "nowhere/train.py", *MAKE, "--"]) == 1
    assert "There is no file nowhere/train.py" in capsys.readouterr().err


def test_a_data_set_whose_classes_have_no_names_asks_for_them(tmp_path, no_embedding, capsys):
    script = written(
        tmp_path,
        "from PIL import Image\n"
        "from timm.data import create_loader\n"
        "class Images:\n"
        "    transform = None\n"
        "    __len__ = lambda self: 20\n"
        "    __getitem__ = lambda self, index: (Image.new('RGB', (9, 9)), 0)\n"
        f"create_loader(Images(), {PLAIN})\n",
    )
    assert cli.main(["timm-train", str(script), *MAKE, "--"]) == 1
    assert "Name them in a file" in capsys.readouterr().err


def test_loss_weights_that_no_one_applies_are_said(train, tmp_path):
    Selection(KEPT, population=20, loss_weights=torch.ones(13)).save(tmp_path / "weighted.safetensors")
    with pytest.warns(UserWarning, match="train.py does not apply them"):
        train("--epochs", 1, select=("--select-from", tmp_path / "weighted.safetensors"))


# --- the script's own failures


def test_an_error_of_the_script_keeps_its_traceback(tmp_path, capsys):
    script = written(tmp_path, "def main():\n    raise ValueError('stop-epoch is out of range')\nmain()\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["timm-train", str(script), *MAKE, "--"])
    assert stop.value.code == 1
    errors = capsys.readouterr().err
    assert f'{script}", line 2, in main' in errors
    assert "ValueError: stop-epoch is out of range" in errors


def test_the_exit_code_of_the_script_is_passed_on(train):
    with pytest.raises(SystemExit) as stop:
        train("--no-such-argument")
    assert stop.value.code == 2


def test_a_script_that_makes_no_training_loader_is_told_that_nothing_was_selected(tmp_path, capsys):
    script = written(tmp_path, "from timm.data import create_loader\n")
    assert cli.main(["timm-train", str(script), *MAKE, "--"]) == 0
    assert "warning: nothing was selected" in capsys.readouterr().err


def test_help_shows_how(capsys):
    with pytest.raises(SystemExit):
        cli.main(["timm-train", "--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("--select-from", "torchrun --no-python", "-- --data-dir images/", "--resume"))


# --- several processes


def tiny_clip_folder(folder):
    """A CLIP that other processes can load by its name."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


@pytest.mark.slow
def test_two_processes_share_each_epoch_of_one_selection_also_after_a_resume(data, tmp_path):
    def run(*script_arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "selectsampler", "timm-train", SCRIPT, "--select-keep", "0.7"]
        command += ["--select-clip", clip, "--select-cache-dir", tmp_path / "cache", "--"]
        command += ["--data-dir", data, "--output", tmp_path / "out", "--experiment", "run", "--batch-size", 3]
        command += ["--record", tmp_path, *script_arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
        assert done.stderr.count("trains on 14 of 20 samples") == 1, "one process speaks for all"
        return [{int(epoch): parts for epoch, parts in record["epochs"].items()} for record in records]

    clip = tiny_clip_folder(tmp_path / "clip")
    begun = run("--epochs", 2)
    selected = set(selected_in(tmp_path / "out" / "run").indices.tolist())
    resumed = run("--epochs", 3, "--resume", tmp_path / "out" / "run" / "last.pth.tar")
    assert [list(rank) for rank in (*begun, *resumed)] == [[0, 1], [0, 1], [2], [2]]
    epochs = [[rank[epoch]["seen"] for rank in ranks] for ranks, epoch in ((begun, 0), (begun, 1), (resumed, 2))]
    for first, second in epochs:
        assert len(first) == len(second) == 6, "seven each, of which the last fills no batch"
        assert len({*first, *second}) == 12
        assert {*first, *second} <= selected
    assert epochs[0] != epochs[1] != epochs[2]
