"""The store: files are whole or absent, shards are resumed, and what cannot be proved is named and redone."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from selectsampler.store import (
    ShardStore,
    bytes_of,
    digest_json,
    digest_tensors,
    kind_of,
    pack_strings,
    read_tensors,
    replace_atomically,
    unpack_strings,
    write_tensors,
)

pytestmark = pytest.mark.filterwarnings("error")

KEY = {"weights": "one"}
INPUTS = ["first four", "second four", "last two"]
ROWS = {"image": torch.arange(20.0).reshape(10, 2), "readable": torch.arange(10) % 3 > 0}


def open_store(folder, *, key=KEY, inputs=INPUTS):
    """Ten rows in shards of four."""
    return ShardStore(folder, key, inputs, rows=10, shard_rows=4)


def fill(store, shards=(0, 1, 2)):
    for shard in shards:
        rows = store.range(shard)
        store.write(shard, {name: column[rows.start : rows.stop] for name, column in ROWS.items()})
    return store


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# Shards


def test_rows_are_read_back_in_order_whatever_the_order_of_writing(tmp_path):
    fill(open_store(tmp_path), shards=(2, 0, 1))
    assert_close(open_store(tmp_path).read(), ROWS)


def test_the_last_shard_holds_the_rest(tmp_path):
    store = open_store(tmp_path)
    assert [list(store.range(shard)) for shard in range(len(store))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_new_store_lacks_every_shard_and_says_nothing(tmp_path):
    assert open_store(tmp_path).missing() == [0, 1, 2]


def test_a_second_run_goes_on_from_the_shards_that_are_there(tmp_path):
    fill(open_store(tmp_path), shards=[1])
    second = open_store(tmp_path)
    assert second.missing() == [0, 2]
    assert_close(fill(second, shards=[0, 2]).read(), ROWS)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def replace_by_json(path):
    path.write_text('{"rows": [1, 2]}')


def replace_by_another_models(path):
    other = fill(open_store(path.parent.parent, key={"weights": "another"}))
    path.write_bytes(other.path(1).read_bytes())


def replace_by_a_neighbour(path):
    path.write_bytes(open_store(path.parent.parent).path(0).read_bytes())


def replace_by_another_kind(path):
    write_tensors(path, ROWS, {"kind": "scores", "format": 1})


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "is truncated or no shard"),
        (empty, "is truncated or no shard"),
        (replace_by_json, "is truncated or no shard"),
        (replace_by_another_kind, "is truncated or no shard"),
        (flip_a_bit, "does not match its checksum"),
        (replace_by_another_models, "belongs to another model or to other images"),
        (replace_by_a_neighbour, "belongs to another model or to other images"),
    ],
)
def test_a_shard_that_cannot_be_trusted_is_named_and_redone(tmp_path, damage, problem):
    path = fill(open_store(tmp_path)).path(1)
    damage(path)
    second = open_store(tmp_path)
    with pytest.warns(UserWarning, match=f"^{re.escape(f'{path} (rows 4 to 7) {problem}. It is computed again.')}$"):
        assert second.missing() == [1]
    assert not path.exists()
    assert_close(fill(second, shards=[1]).read(), ROWS)


def test_one_flipped_bit_anywhere_in_a_shard_is_noticed(tmp_path):
    path = fill(open_store(tmp_path)).path(1)
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="computed again"):
            assert open_store(tmp_path).missing() == [1], position
    path.write_bytes(whole)
    assert open_store(tmp_path).missing() == []


@pytest.mark.parametrize("key", [{"weights": "two"}, {"weights": "one", "precision": "amp"}])
def test_another_key_shares_no_shard(tmp_path, key):
    fill(open_store(tmp_path))
    assert open_store(tmp_path, key=key).missing() == [0, 1, 2]


def test_other_inputs_redo_only_the_shards_that_they_change(tmp_path):
    fill(open_store(tmp_path))
    assert open_store(tmp_path, inputs=["first four", "second four, one of them new", "last two"]).missing() == [1]
    assert open_store(tmp_path).missing() == []  # the old ones stay


def test_a_shard_that_grew_is_redone(tmp_path):
    fill(open_store(tmp_path))
    assert ShardStore(tmp_path, KEY, INPUTS, rows=11, shard_rows=4).missing() == [2]


def test_equal_inputs_share_one_shard(tmp_path):
    twins = ShardStore(tmp_path, KEY, ["the same", "the same"], rows=8, shard_rows=4)
    for shard in twins.missing():
        twins.write(shard, {"image": torch.ones(4, 2)})
    flip_a_bit(twins.path(0))
    again = ShardStore(tmp_path, KEY, ["the same", "the same"], rows=8, shard_rows=4)
    with pytest.warns(UserWarning, match="checksum"):
        assert again.missing() == [0, 1]


def test_an_incomplete_store_is_not_read(tmp_path):
    store = fill(open_store(tmp_path), shards=[0])
    with pytest.raises(ValueError, match="lacks 2 of 3 shards, row 4 on"):
        store.read()


def test_a_shard_of_another_length_is_not_written(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(ValueError, match=r"Shard 2 has 2 rows, but was given {'image': 4}"):
        store.write(2, {"image": torch.ones(4, 2)})
    assert files_below(tmp_path) == []


def test_every_shard_needs_to_be_told_what_it_is_made_from(tmp_path):
    with pytest.raises(ValueError, match="10 rows in shards of 4 need 3 inputs"):
        open_store(tmp_path, inputs=INPUTS[:2])


# The manifest


def test_the_manifest_comes_last_and_says_what_is_there(tmp_path):
    store = fill(open_store(tmp_path))
    assert not list(tmp_path.rglob("manifest-*"))
    store.read()
    [manifest] = tmp_path.rglob("manifest-*.json")
    assert json.loads(manifest.read_text()) == {
        "key": {"weights": "one", "format": 1},
        "rows": 10,
        "shard_rows": 4,
        "shards": [store.path(shard).name for shard in range(3)],
    }


def test_the_manifest_is_written_once(tmp_path):
    fill(open_store(tmp_path)).read()
    [manifest] = tmp_path.rglob("manifest-*.json")
    written = manifest.stat().st_ino
    open_store(tmp_path).read()
    assert manifest.stat().st_ino == written


# Single files


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError, GeneratorExit])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_interrupted_write_leaves_the_folder_as_it_was(tmp_path, interruption, before):
    path = tmp_path / "features.bin"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(interruption), replace_atomically(path) as file:  # noqa: PT012, the block is the test
        file.write(b"half of the n")
        file.flush()
        raise interruption
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == (
        {} if before is None else {path.name: before}
    )


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "features.bin"
    path.write_bytes(b"old")
    with replace_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_the_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    steps = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: [steps.append("bytes"), sync(file)][1])
    monkeypatch.setattr(Path, "replace", lambda *paths: [steps.append("name"), replace(*paths)][1])
    with replace_atomically(tmp_path / "features.bin") as file:
        file.write(b"new")
    assert steps == ["bytes", "name"]


def test_tensors_and_metadata_are_read_as_they_were_written(tmp_path):
    tensors = {
        "half": torch.randn(3, 2).half(),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "empty": torch.empty(0, 5),
    }
    metadata = {"kind": "scores", "format": 1, "provenance": {"name": "à la carte", "seed": 3, "none": None}}
    write_tensors(tmp_path / "deep" / "er" / "a.safetensors", tensors, metadata)
    read, found = read_tensors(tmp_path / "deep" / "er" / "a.safetensors", kind="scores")
    assert found == metadata
    assert_close(read, tensors, rtol=0, atol=0)


def test_tensors_that_share_memory_are_written_each(tmp_path):
    rows = torch.arange(12.0).reshape(4, 3)
    write_tensors(
        tmp_path / "a", {"all": rows, "again": rows, "part": rows[1:3], "row": rows[0]}, {"kind": "k", "format": 1}
    )
    read, _ = read_tensors(tmp_path / "a", kind="k")
    assert_close(read, {"all": rows, "again": rows, "part": rows[1:3], "row": rows[0]})


def test_a_file_of_another_kind_is_refused_by_name(tmp_path):
    write_tensors(tmp_path / "a", ROWS, {"kind": "scores", "format": 1})
    with pytest.raises(
        ValueError, match=r"a should hold embeddings in format 1 of selectsampler, but it holds scores, format 1"
    ):
        read_tensors(tmp_path / "a", kind="embeddings")
    assert kind_of(tmp_path / "a") == "scores"


def test_a_file_of_a_later_format_is_refused(tmp_path):
    write_tensors(tmp_path / "a", ROWS, {"kind": "scores", "format": 2})
    with pytest.raises(ValueError, match="it holds scores, format 2"):
        read_tensors(tmp_path / "a", kind="scores")


def test_a_truncated_file_is_called_so(tmp_path):
    write_tensors(tmp_path / "a", ROWS, {"kind": "scores", "format": 1})
    truncate(tmp_path / "a")
    with pytest.raises(ValueError, match="a cannot be read: it is truncated or no safetensors file"):
        read_tensors(tmp_path / "a", kind="scores")
    assert kind_of(tmp_path / "a") == "something else"


@pytest.mark.parametrize("read", [kind_of, lambda path: read_tensors(path, kind="scores")])
def test_a_file_that_is_not_there_is_called_so(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere\."):
        read(tmp_path / "nowhere")


class Trap:
    """Its pickle, once loaded, creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_the_place_of_a_shard_is_never_loaded(tmp_path):
    trap = Trap(tmp_path / "sprung")
    path = fill(open_store(tmp_path)).path(0)
    for bomb in (pickle.dumps(trap), torch_file_of(trap)):
        path.write_bytes(bomb)
        with pytest.warns(UserWarning, match="truncated or no shard"):
            assert open_store(tmp_path).missing() == [0]
    assert not trap.path.exists()
    pickle.loads(pickle.dumps(trap))
    assert trap.path.exists()  # the trap would have worked


def torch_file_of(value):
    from io import BytesIO

    file = BytesIO()
    torch.save(value, file)
    return file.getvalue()


# Strings and digests


@pytest.mark.parametrize(
    "strings",
    [
        [],
        [""],
        ["", ""],
        ["cat/0001.jpg", "", "größe\n\t.png", "猫/🐈 (1).jpg", " a\\b'\" "],
        [os.fsdecode(b"caf\xe9.jpg")],  # a file name in Latin-1
    ],
)
def test_strings_of_any_kind_come_back_as_they_were(strings):
    assert unpack_strings(pack_strings(strings)) == strings


@given(st.lists(st.text(st.characters(exclude_characters="\0"))))
def test_all_strings_come_back_as_they_were(strings):
    assert unpack_strings(pack_strings(strings)) == strings


def test_a_string_with_a_nul_is_refused():
    with pytest.raises(ValueError, match=r"'b\\x00c' holds a NUL character"):
        pack_strings(["a", "b\0c"])


def test_the_digest_of_tensors_tells_names_types_shapes_and_values_apart():
    ones = torch.ones(2, 3)
    others = [
        {"b": ones},
        {"a": ones.view(torch.int32)},
        {"a": ones.reshape(3, 2)},
        {"a": 2 * ones},
        {"a": ones, "b": ones},
    ]
    digests = {digest_tensors(tensors) for tensors in [{"a": ones}, *others]}
    assert len(digests) == 6


def test_the_digest_of_tensors_depends_on_nothing_else():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)
    assert digest_tensors({"a": a, "b": b}) == digest_tensors({"b": b.clone(), "a": a.T.contiguous().T})


def test_the_digest_of_a_value_ignores_the_order_of_names():
    assert digest_json({"a": 1, "b": [2, None]}) == digest_json({"b": [2, None], "a": 1}) != digest_json({"a": 1})


def test_bytes_are_those_of_the_values_in_order():
    columns = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert bytes(bytes_of(columns.T)) == bytes([0, 3, 1, 4, 2, 5])
    assert bytes(bytes_of(torch.from_numpy(columns).T)) == bytes([0, 3, 1, 4, 2, 5])
