"""Embeddings larger than memory: files are mapped, streamed in and out, merged, and scored in bounded memory."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers import random_embeddings
from torch.testing import assert_close

import selectsampler.store
from selectsampler import Embeddings, score, select
from selectsampler.store import Column, ShardStore, read_tensors, write_tensors

SCALE = Path(__file__).parents[1] / "benchmarks" / "scale.py"
PAPER = ["semantic_alignment", "sample_diversity"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says what memory belongs to no file")
def test_two_million_samples_are_scored_and_selected_in_24_bytes_a_sample(tmp_path):
    words = ["--samples", "2000000", "--class-size", "250", "--sampled", "2000000"]
    subprocess.run([sys.executable, SCALE, *words, "--folder", tmp_path, "--out", tmp_path / "o.json"], check=True)
    stages = {row["stage"]: row for row in json.loads((tmp_path / "o.json").read_text())["stages"]}
    constant = 24 * 2**20  # blocks, distances of a class, and what the allocator keeps
    for name in ("open", "score", "select"):
        assert stages[name]["bytes"] <= 24 * 2_000_000 + constant, name


def test_loaded_embeddings_are_a_map_that_keeps_changes_to_itself(tmp_path):
    made = random_embeddings(50, 3)
    made.save(tmp_path / "e")
    loaded = Embeddings.load(tmp_path / "e")
    loaded.image.zero_()
    assert_close(Embeddings.load(tmp_path / "e").image, made.image, rtol=0, atol=0)


def test_classes_come_one_after_the_other_with_their_rows_and_features():
    with pytest.warns(UserWarning, match="1 of 4 classes have no sample"):
        embeddings = random_embeddings(60, 4).with_labels(torch.tensor([3, 0, 1] * 20))
    seen = list(embeddings.iter_classes())
    assert [label for label, _, _ in seen] == [0, 1, 3]
    for label, rows, features in seen:
        assert torch.equal(rows, (embeddings.labels == label).nonzero()[:, 0])
        assert torch.equal(features, embeddings.image[rows])


def parts_of(whole: Embeddings, bounds: list[int]) -> list[Embeddings]:
    """The rows between bounds, as if each part had been embedded by itself."""
    parts = []
    for start, stop in zip([0, *bounds], [*bounds, len(whole)], strict=True):
        rows = slice(start, stop)
        own = (whole.twins[:, 0] >= start) & (whole.twins[:, 0] < stop)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without samples
            parts.append(
                Embeddings(
                    image=whole.image[rows],
                    text=whole.text,
                    labels=whole.labels[rows],
                    class_names=whole.class_names,
                    image_statistics=whole.image_statistics[rows],
                    twins=whole.twins[own] - torch.tensor([start, 0]),
                    twin_statistics=whole.twin_statistics[own],
                    readable=whole.readable[rows],
                    keys=whole.keys[rows],
                    temperature=whole.temperature,
                    provenance={**whole.provenance, "inputs": str(start)},
                )
            )
    return parts


@pytest.fixture
def whole() -> Embeddings:
    fields = {
        "image_statistics": torch.randn(40, 5, generator=torch.Generator().manual_seed(1)),
        "twins": torch.tensor([[0, 2], [9, 1], [10, 0], [31, 2], [39, 1]]),
        "twin_statistics": torch.randn(5, 5, generator=torch.Generator().manual_seed(2)),
        "readable": torch.arange(40) % 7 != 3,
        "keys": tuple(f"é/{row}.jpg" for row in range(40)),
        "temperature": 0.01,
        "provenance": {"clip": "made", "inputs": "all"},
    }
    return random_embeddings(40, 3, **fields)


def saved(folder: Path, parts: list[Embeddings]) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        part.save(path)
    return paths


def test_merged_shards_are_the_whole(whole, tmp_path):
    paths = saved(tmp_path, parts_of(whole, [10, 11, 30]))
    merged = Embeddings.merge(paths, tmp_path / "whole")
    for name in ("image", "text", "labels", "image_statistics", "twins", "twin_statistics", "readable"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    assert (tuple(merged.keys), merged.class_names, merged.temperature) == (whole.keys, whole.class_names, 0.01)
    assert merged.provenance == {"clip": "made"}  # the fingerprint of a part's inputs is not that of all
    chosen = [select(score(e, columns=PAPER), 0.5, balance="given") for e in (merged, whole)]
    assert chosen[0].fingerprint == chosen[1].fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": torch.zeros(3, 16)}, "1.safetensors is of another model or of other classes"),
        ({"class_names": ["a", "b", "c"]}, "1.safetensors is of another model or of other classes"),
        ({"temperature": 0.07}, "1.safetensors is of another model or of other classes"),
        ({"readable": None}, "1.safetensors has .*, but the first shard"),
        ({"image_statistics": torch.zeros(40, 6)}, "image_statistics has another type or dimension"),
    ],
)
def test_shards_that_do_not_go_together_are_refused(whole, change, message, tmp_path):
    other = Embeddings(**{**vars(whole), **change})
    with pytest.raises(ValueError, match=message):
        Embeddings.merge(saved(tmp_path, [whole, other]), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_no_shards_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no shards to merge"):
        Embeddings.merge([], tmp_path / "whole")


def test_a_column_is_written_part_by_part(tmp_path):
    rows = torch.randn(10, 3, dtype=torch.bfloat16)
    column = Column(rows.dtype, (10, 3), iter(rows.split(4)))
    write_tensors(tmp_path / "a", {"rows": column, "mask": torch.tensor([True, False])}, {"kind": "k", "format": 1})
    read, _ = read_tensors(tmp_path / "a", kind="k")
    assert torch.equal(read["rows"], rows)
    assert read["mask"].tolist() == [True, False]


def test_a_column_with_too_few_rows_leaves_no_file(tmp_path):
    column = Column(torch.float32, (10, 3), [torch.zeros(9, 3)])
    with pytest.raises(ValueError, match="not as many rows as they were said to have"):
        write_tensors(tmp_path / "a", {"rows": column}, {"kind": "k", "format": 1})
    assert not list(tmp_path.iterdir())


def test_a_large_cache_is_put_together_in_a_file_once_and_mapped(tmp_path, monkeypatch):
    rows = torch.randn(10, 3)
    store = ShardStore(tmp_path, {"weights": "w"}, ["a", "b", "c"], rows=10, shard_rows=4)
    for shard in range(3):
        store.write(shard, {"image": rows[store.range(shard)], "readable": torch.ones(len(store.range(shard))) > 0})
    in_memory = store.read()
    monkeypatch.setattr(selectsampler.store, "MAPPED", 10 * 13 - 1)  # bytes
    assert_close(store.read(), in_memory, rtol=0, atol=0)
    (whole,) = store.folder.glob("whole-*")
    before = whole.stat().st_mtime_ns
    assert_close(store.read(), {"image": rows, "readable": torch.ones(10) > 0}, rtol=0, atol=0)
    assert whole.stat().st_mtime_ns == before
