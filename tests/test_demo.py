"""The demo does what the README says: a model trained on the selection beats one trained on everything."""

import pytest
from selectsampler.recipes import digits
from selectsampler.recipes.noise import symmetric

from selectsampler import Scores, Selection


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, digits.run(out, seeds=2)


def accuracy(results, method):
    rows = [row["accuracy"] for row in results["runs"] if row["method"] == method]
    return sum(rows) / len(rows)


@pytest.mark.slow
def test_the_selection_beats_all_and_random_and_comes_near_the_oracle(demo):
    _, results = demo
    everything, random, selection, oracle = (accuracy(results, method) for method in digits.METHODS)
    assert selection > everything + 0.02
    assert selection > random + 0.10
    assert selection > oracle - 0.03


@pytest.mark.slow
def test_it_leaves_a_selection_scores_results_and_a_picture(demo):
    out, results = demo
    selection, scores = Selection.load(out / "selection.safetensors"), Scores.load(out / "scores.safetensors")
    assert len(selection) == 400
    assert selection.population == len(scores) == 800
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "results.json").is_file()
    assert {"embed", "adapt", "score", "select"} <= results["seconds"].keys()


@pytest.mark.slow
def test_the_same_seed_selects_the_same_samples(demo):
    out, _ = demo
    pretrain, training, _ = digits.load_splits()
    embeddings = digits.ss.embed(training, digits.pretrain_clip(pretrain), class_names=digits.NAMES)
    noisy = symmetric(training.targets, 0.4, classes=10, seed=0)
    again, _ = digits.select_digits(embeddings.with_labels(noisy), "0.5", 0, {})
    assert again.fingerprint == Selection.load(out / "selection.safetensors").fingerprint


def test_the_three_parts_share_no_image():
    parts = digits.load_splits()
    assert [len(part) for part in parts] == [599, 800, 398]
    assert sum(len(part) for part in parts) == 1797
