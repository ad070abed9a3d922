"""The quality benchmark keeps budgets, shares its work out, goes on where it was stopped, and says who is best."""

import json
from dataclasses import replace

import pytest
from selectsampler.recipes import digits

pytest.importorskip("cleanlab", reason="benchmarks need selectsampler[benchmarks]")
import quality
import quality_data
from quality_tables import Results, join

WORDS = ["digits", "--seeds", "1", "--settings", "symmetric:0.4", "--keep", "0.25"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A CLIP that has learned little, and a few updates."""
    monkeypatch.setattr(digits, "PRETRAIN_STEPS", 20)
    monkeypatch.setattr(quality_data, "DIGITS", replace(quality_data.DIGITS, updates=12))
    monkeypatch.setattr(quality_data.Digits, "protocol", quality_data.DIGITS)
    monkeypatch.setattr(quality_data.Digits, "proxies", quality_data.Proxies(networks=2, early=1, whole=1))


def run(folder, *words):
    quality.work(quality.parse_arguments([*WORDS, "--runs", str(folder), *words]))
    return {path.stem: json.loads(path.read_text()) for path in (folder / "digits").glob("*.json")}


@pytest.mark.slow
def test_every_method_keeps_a_quarter_and_trains_for_as_many_updates_or_epochs(tmp_path):
    rows = run(tmp_path).values()
    by = {(row["method"], row["budget"]): row for row in rows}
    assert {method for method, _ in by} == set(quality.METHODS)
    for (method, budget), row in by.items():
        whole = method == "full" or (method, budget) == ("InfoBatch", "updates")
        assert row["updates"] == (3 if budget == "epochs" else 12)
        assert row["visits"] == 64 * row["updates"]
        assert row["keep"] == ("1" if whole else "0.25")
        if method not in quality.TRAVELLING:
            assert row["samples"] == (800 if whole else 200)
        assert 0 <= row["accuracy"] <= 1
        assert 0 <= row["balance"] <= 1
    assert by["full", "updates"]["noise_left"] == 0.4
    assert by["oracle", "updates"]["noise_left"] == 0
    assert by["random", "updates"]["noise_left"] == pytest.approx(0.4, abs=0.1)
    stages = {method: list(by[method, "epochs"]["seconds"]) for method, budget in by if budget == "epochs"}
    assert stages["random"] == stages["oracle"] == ["train"]
    assert stages["EL2N"] == stages["forgetting"] == stages["CCS"] == ["proxy", "train"]
    assert stages["ours"] == stages["paper"] == ["embed", "adapt", "score", "select", "train"]
    assert stages["zero-shot"] == ["embed", "score", "train"]


def test_interrupted_it_goes_on_with_what_is_missing_and_redoes_what_is_asked(tmp_path, monkeypatch):
    performed, perform = [], quality.perform

    def interrupted(run, group):
        if len(performed) == 3:
            raise KeyboardInterrupt
        performed.append(run.method)
        return perform(run, group)

    words = ["--methods", "full", "random", "oracle", "moderate", "--budgets", "updates"]
    monkeypatch.setattr(quality, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *words)
    before = run(tmp_path, "--methods", "full")
    assert len(before) == 3
    performed.clear()
    after = run(tmp_path, *words)
    assert performed == ["moderate"]
    assert before.items() <= after.items()
    performed.clear()
    run(tmp_path, *words, "--redo", "random")
    assert performed == ["random"]


def test_shards_share_the_settings_and_seeds_and_the_first_seed_comes_first(tmp_path, monkeypatch):
    performed = []

    def noted(run, group):
        performed.append((run.seed, run.setting))
        return {"accuracy": 1.0, "seconds": {}}

    monkeypatch.setattr(quality, "perform", noted)
    words = ["--seeds", "2", "--settings", "none", "symmetric:0.2", "symmetric:0.6", "--methods", "full"]
    shards = []
    for shard in ("0/2", "1/2"):
        run(tmp_path, *words, "--shard", shard)
        shards.append(performed.copy())
        performed.clear()
    assert shards == [
        [(0, "none"), (0, "symmetric:0.6"), (1, "symmetric:0.2")],
        [(0, "symmetric:0.2"), (1, "none"), (1, "symmetric:0.6")],
    ]


def test_damage_is_met_by_fewer_methods_and_a_clean_data_set_needs_no_oracle():
    arguments = quality.parse_arguments([*WORDS, "--runs", "runs"])
    damaged = list(quality.runs_of("fog:3:0.2", 0, arguments))
    assert {run.method for run in damaged} == set(quality.UNDER_DAMAGE)
    assert {run.method for run in quality.runs_of("none", 0, arguments)} == quality.METHODS.keys() - {"oracle"}
    paths = [run.path(quality.Path("runs")) for run in damaged]
    assert len(set(paths)) == len(paths)


def test_runs_of_another_protocol_are_not_gone_on_with(tmp_path, monkeypatch):
    run(tmp_path, "--methods", "random", "--budgets", "updates")
    run(tmp_path, "--methods", "random", "oracle", "--budgets", "updates")
    shorter = quality_data.Digits.experiment | {"protocol": {"updates": 3}}
    monkeypatch.setattr(quality_data.Digits, "experiment", shorter)
    with pytest.raises(ValueError, match="was made with other protocol: name another folder"):
        run(tmp_path, "--methods", "random", "--budgets", "updates")


def test_a_share_has_one_name_and_one_that_is_none_is_refused_at_once(capsys):
    assert quality.parse_arguments([*WORDS, "--runs", "runs", "--keep", "0.50", "1.0", ".3"]).keep == [
        "0.5",
        "1",
        "0.3",
    ]
    for word in ("0", "1.5", "half", "50%"):
        with pytest.raises(SystemExit):
            quality.parse_arguments([*WORDS, "--runs", "runs", "--keep", word])
        assert f"{word!r} is no share" in capsys.readouterr().err


def test_an_oracle_that_finds_too_few_right_labels_trains_for_epochs_of_what_it_has(tmp_path):
    words = ["--settings", "symmetric:0.6", "--keep", "0.75", "--methods", "oracle", "--budgets", "epochs"]
    row = run(tmp_path, *words)["symmetric-0.6__oracle__0.75__epochs__0"]
    assert row["samples"] == 320
    assert row["updates"] == round(12 * 0.4)


def test_folders_and_files_that_are_not_there_are_named(tmp_path, monkeypatch):
    for words in (["tables", "--out", "out"], ["unpack", "--joined", str(tmp_path / "nowhere.json")]):
        monkeypatch.setattr("sys.argv", ["quality.py", *words, "--runs", str(tmp_path / "nowhere")])
        with pytest.raises(SystemExit, match="nowhere"):
            quality.main()


def test_a_setting_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no setting fog:3:0\.2 of digits"):
        run(tmp_path, "--settings", "fog:3:0.2")


def row(method, accuracy, *, seed=0, setting="symmetric:0.4", keep="0.5", budget="updates"):
    figures = {"noise_left": 0.1, "damaged_left": 0.0, "balance": 0.5, "seconds": {"train": 2.0}}
    where = {"setting": setting, "method": method, "keep": keep, "budget": budget, "seed": seed}
    return {**where, "accuracy": accuracy, **figures}


def test_the_best_is_bold_and_the_verdict_says_where_ours_is_not():
    rows = [row("full", 0.6, seed=seed, keep="1") for seed in (0, 1)]
    rows += [row("random", 0.9, seed=0), row("random", 0.86, seed=1), row("oracle", 0.99), row("oracle", 0.99, seed=1)]
    rows += [row("ours", 0.7, seed=0), row("ours", 0.68, seed=1), row("ours", 0.9, budget="epochs")]
    results = Results(rows, list(quality.METHODS))
    lines = results.table("symmetric:0.4")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| full", "| random", "| ours", "| oracle"]
    assert "**88.0 ± 25.4**" in lines[3]
    assert "**90.0** (1)" in lines[4]
    assert lines[2].count("**") == lines[5].count("**") == 0
    behind, one_seed = results.verdict("symmetric:0.4")[0].split("\n\n")
    assert behind.endswith("by seed. Behind (1): 50%, equal updates: 19.0 ± 12.7 behind random.")
    assert one_seed == "One seed (1): 50%, equal epochs: 30.0 ahead of full."


def test_the_best_is_found_over_the_seeds_that_two_methods_share_and_equals_are_both_bold():
    rows = [row("random", accuracy, seed=seed) for seed, accuracy in enumerate((0.9, 0.5, 0.5))]
    rows += [row("paper", 0.8), *(row("ours", accuracy, seed=seed) for seed, accuracy in enumerate((0.5, 0.9, 0.5)))]
    results = Results(rows, list(quality.METHODS))
    assert results.best("symmetric:0.4", "0.5", "updates") == ["random"]
    assert results.verdict("symmetric:0.4")[0].endswith("One seed (1): 50%, equal updates: 30.0 behind paper.")
    without = Results([each for each in rows if each["method"] != "paper"], list(quality.METHODS))
    assert without.best("symmetric:0.4", "0.5", "updates") == ["random", "ours"]
    assert without.verdict("symmetric:0.4")[0].endswith("Within the interval (1): 50%, equal updates: equal to random.")


def test_a_method_alone_is_no_best_and_columns_without_runs_are_left_out():
    results = Results([row("random", 0.9), row("oracle", 0.99), row("full", 0.8, keep="1")], list(quality.METHODS))
    assert results.columns("symmetric:0.4") == [("0.5", "updates")]
    alone = Results([row("random", 0.9), row("oracle", 0.99)], list(quality.METHODS))
    assert alone.best("symmetric:0.4", "0.5", "updates") == []


def test_seconds_are_those_of_the_machine_that_most_methods_were_run_on():
    made_with = [{"machine": {"device": device, "threads": 1, "precision": "float32"}} for device in ("slow", "fast")]
    rows = [row("random", 0.9) | {"made_with": 0, "seconds": {"train": 9.0}}]
    rows += [row("random", 0.9, seed=1) | {"made_with": 1}, row("ours", 0.9) | {"made_with": 1}]
    results = Results(rows, list(quality.METHODS), made_with)
    assert "runs on fast, 1 thread(s), float32 only." in results.costs()[0]
    assert [line.split("|")[-2].strip() for line in results.costs()[4:]] == ["2.00", "2.00"]
    assert "fast, 1 thread(s), float32 (all methods); slow, 1 thread(s), float32 (random)" in results.page("made")
    rows += [row("paper", 0.9) | {"made_with": 0, "seconds": {"train": 9.0}}]
    costs = Results(rows, list(quality.METHODS), made_with).costs()
    assert "not to be compared" in costs[0]
    assert "| paper (on slow, 1 thread(s), float32) |" in " ".join(costs)


def test_training_on_all_of_a_clean_data_set_is_no_competitor_and_stands_for_rs2():
    rows = [row("full", 0.9, setting="none", keep="1"), row("ours", 0.8, setting="none")]
    rows += [row("RS2", 0.7, setting="none", budget="epochs"), row("ours", 0.6, setting="none", budget="epochs")]
    results = Results(rows, list(quality.METHODS))
    assert results.of("none", "RS2", "0.5", "updates") == results.of("none", "full", "0.5", "epochs") != {}
    assert results.competing("none", "updates") == ["ours"]
    assert results.best("none", "0.5", "epochs") == ["RS2"]
    assert results.verdict("none")[0].endswith(
        "Ours against training on everything: 50%, equal updates: 10.0 behind it; 50%, equal epochs: 30.0 behind it."
    )


def test_runs_are_joined_into_json_table_and_pictures(tmp_path):
    folder = tmp_path / "runs" / "digits"
    folder.mkdir(parents=True)
    made_with = {"versions": {"torch": "2"}, "machine": {"device": "x86", "cores": 2, "threads": 1}}
    rows = [row(method, 0.5, seed=seed) for method in ("random", "ours") for seed in range(3)]
    for number, each in enumerate(rows):
        (folder / f"{number}.json").write_text(json.dumps(each | made_with))
    quality.write_tables(tmp_path / "runs", tmp_path / "out", list(quality.METHODS))
    joined = json.loads((tmp_path / "out" / "quality-digits.json").read_text())
    assert joined == join([each | made_with for each in rows])
    assert joined["made_with"] == [made_with]
    assert "Ours against the best" in (tmp_path / "out" / "quality-digits.md").read_text()
    for picture in ("ratio", "time"):
        assert (tmp_path / "out" / f"quality-digits-{picture}.png").stat().st_size > 5000


def test_joined_runs_are_unpacked_again_but_for_those_that_are_there(tmp_path, monkeypatch, capsys):
    folder, again = tmp_path / "runs" / "digits", tmp_path / "again" / "digits"
    folder.mkdir(parents=True)
    again.mkdir(parents=True)
    made_with = {"versions": {"torch": "2"}, "machine": {"device": "x86", "cores": 2, "threads": 1}}
    rows = [row(method, 0.5, seed=seed) | made_with for method in ("random", "ours") for seed in range(2)]
    for each in rows:
        quality.save(quality.run_of(each).path(folder), each)
    quality.write_tables(tmp_path / "runs", tmp_path, list(quality.METHODS))
    (again / quality.run_of(rows[0]).path(again).name).write_text("{}")
    joined = tmp_path / "quality-digits.json"
    words = ["quality.py", "unpack", "--joined", str(joined), "--runs", str(tmp_path / "again")]
    monkeypatch.setattr("sys.argv", words)
    quality.main()
    assert "3 of 4 runs written" in capsys.readouterr().out
    assert [json.loads(quality.run_of(each).path(again).read_text()) for each in rows] == [{}, *rows[1:]]
    joined.write_text('{"runs": [{}]}')
    with pytest.raises(SystemExit, match="does not hold the joined runs"):
        quality.main()
