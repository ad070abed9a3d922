"""The command line leads from an image folder to a list of files, and fails with a message and an exit code."""

import numpy as np
import pytest
import torch
from PIL import Image

from selectsampler import Embeddings, Scores, Selection, cli
from selectsampler.embeddings import clip as clip_module


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def offline_clip(monkeypatch, tiny_clip):
    """Any name stands for the tiny model: no weights can be downloaded here."""
    monkeypatch.setattr(clip_module, "_load_open_clip", lambda name: tiny_clip)


def run(*words):
    return cli.main([str(word) for word in words])


def test_four_verbs_lead_from_a_folder_to_a_list_of_files(folder, tmp_path, offline_clip, capsys):
    embeddings, scores, selection = (tmp_path / f"{name}.safetensors" for name in ("embeddings", "scores", "selection"))
    assert run("embed", folder, "--clip", "tiny", "--out", embeddings, "--cache-dir", tmp_path / "cache") == 0
    assert run("score", embeddings, "--adapt", "none", "--out", scores) == 0
    covering = ("--embeddings", embeddings, "--balance", "given")
    assert run("select", scores, "--keep", "0.5", *covering, "--out", selection) == 0
    assert run("export", selection, "--out", tmp_path / "files.txt") == 0
    files = (tmp_path / "files.txt").read_text().splitlines()
    assert len(files) == 6
    assert all((folder / file).is_file() for file in files)
    assert sorted(file.split("/")[0] for file in files) == ["cat"] * 3 + ["dog"] * 3
    assert capsys.readouterr() == ("", ""), "off a terminal it is quiet"


@pytest.mark.parametrize("ending", ["txt", "npy", "csv", "parquet"])
def test_a_selection_is_exported_as_what_the_ending_says(ending, tmp_path):
    Selection([4, 1], population=9, keys=["e.png", "b.png"]).save(tmp_path / "s.safetensors")
    assert run("export", tmp_path / "s.safetensors", "--out", tmp_path / f"out.{ending}") == 0
    out = tmp_path / f"out.{ending}"
    if ending == "txt":
        assert out.read_text() == "b.png\ne.png\n"
    elif ending == "npy":
        assert np.load(out).tolist() == [1, 4]
    elif ending == "csv":
        assert out.read_text().splitlines() == ["index,key", "1,b.png", "4,e.png"]
    else:
        from pyarrow import parquet

        assert parquet.read_table(out).to_pydict() == {"index": [1, 4], "key": ["b.png", "e.png"]}


def test_weights_and_count_reach_the_selection(tmp_path):
    Scores({"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.tensor([9.0, 1.0, 0.0])}).save(tmp_path / "s.safetensors")
    out = tmp_path / "out.safetensors"
    assert run("select", tmp_path / "s.safetensors", "--count", 1, "--weight", "b=1", "--out", out) == 0
    assert Selection.load(out).indices.tolist() == [0]


def test_risk_and_seed_reach_the_draw(tmp_path):
    Scores({"trust": torch.linspace(0.5, 1.0, 200)}).save(tmp_path / "s.st")
    drawn = []
    for number, options in enumerate((["--risk", 0], ["--risk", 1], ["--risk", 1, "--seed", 7])):
        options += ["--balance", "none", "--keep", "0.5"]
        assert run("select", tmp_path / "s.st", *options, "--out", tmp_path / f"{number}.st") == 0
        drawn.append(Selection.load(tmp_path / f"{number}.st").indices.tolist())
    assert drawn[0] == list(range(100, 200))
    assert drawn[1] not in (drawn[0], drawn[2])


def test_quotas_and_what_to_cover_reach_the_selection(tmp_path):
    Scores({"a": torch.arange(6.0)}, labels=torch.arange(6) % 2, class_names=["a=b", "c"]).save(tmp_path / "s.st")
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0], [1.0, 5.0], [0.0, 1.0]])
    data = Embeddings(image=image, text=torch.eye(2), labels=torch.arange(6) % 2, class_names=["a=b", "c"])
    data.save(tmp_path / "e.st")
    chosen = ["--quota", "a=b=2", "--quota", "c=1", "--count", 3, "--weight", "a=0.001", "--out", tmp_path / "out.st"]
    assert run("select", tmp_path / "s.st", *chosen) == 0
    assert Selection.load(tmp_path / "out.st").indices.tolist() == [2, 4, 5]
    assert run("select", tmp_path / "s.st", *chosen, "--method", "group", "--embeddings", tmp_path / "e.st") == 0
    covering = Selection.load(tmp_path / "out.st")
    assert covering.indices.tolist() in ([2, 3, 4], [2, 4, 5])
    assert covering.bound >= covering.objective > float(torch.arange(6.0)[covering.indices].sum()) / 2500


def test_a_quota_that_is_no_number_is_named(tmp_path, capsys):
    Scores({"a": torch.arange(3.0)}).save(tmp_path / "s.st")
    assert run("select", tmp_path / "s.st", "--count", 1, "--quota", "c=few", "--out", tmp_path / "o.st") == 1
    assert "--quota takes CLASS=NUMBER, not c=few." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embed", "no-such-folder", "--clip", "x", "--out", "e"], "no folder"),
        (["score", "no-such-file", "--out", "s"], "no file"),
        (["export", "no-such-file", "--out", "s.txt"], "no file"),
    ],
)
def test_wrong_input_ends_with_code_1_and_one_line(words, message, capsys):
    assert run(*words) == 1
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_a_name_without_weights_is_refused_before_any_work(folder, tmp_path, capsys):
    assert run("embed", folder, "--clip", "ViT-B-32", "--out", tmp_path / "e.safetensors") == 1
    assert "names no weights" in capsys.readouterr().err


def test_a_wrong_command_ends_with_code_2():
    with pytest.raises(SystemExit) as stop:
        run("select", "scores.safetensors", "--out", "s")
    assert stop.value.code == 2


def test_ctrl_c_ends_with_code_130(tmp_path, monkeypatch, capsys):
    Selection([0], population=1).save(tmp_path / "s.safetensors")

    def interrupted(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Selection, "export", interrupted)
    assert run("export", tmp_path / "s.safetensors", "--out", tmp_path / "s.txt") == 130


def test_help_names_every_verb_and_shows_the_way(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("demo", "embed", "score", "select", "export", "--keep 0.7"))
