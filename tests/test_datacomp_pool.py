"""Reading pools: stored, deflated, remote; and what is broken is named."""

import time

import fsspec
import numpy as np
import pyarrow
import pytest
from made_pools import made_columns, write_pool, write_shard
from pyarrow import parquet

from selectsampler.datacomp import ShardError, format_uids, open_pool, parse_uids, read_pool, verify_pool

KEYS = ["uid", "text", "clip_l14_similarity_score", "l14_img", "l14_txt"]


@pytest.fixture(params=["stored", "deflated", "remote"])
def pool(request, tmp_path):
    expected = write_pool(tmp_path / "pool", [120, 75, 200], deflated=request.param == "deflated")
    if request.param != "remote":
        return tmp_path / "pool", expected
    memory = fsspec.filesystem("memory")
    folder = f"memory://{tmp_path.name}"
    for path in (tmp_path / "pool").iterdir():
        memory.pipe(f"{folder}/{path.name}", path.read_bytes())
    return folder, expected


def test_a_pool_is_read_shard_by_shard(pool):
    folder, expected = pool
    names, shards = zip(*read_pool(folder, KEYS), strict=True)
    assert names == ("s0", "s1", "s2")
    assert list(shards[0]) == KEYS
    read = {key: np.concatenate([shard[key] for shard in shards]) for key in KEYS}
    assert format_uids(read.pop("uid")) == expected["uid"].tolist()
    for key, values in read.items():
        assert np.array_equal(values, expected[key])


def test_stored_members_are_memory_maps_and_deflated_ones_are_not(tmp_path):
    write_pool(tmp_path / "stored", [50])
    write_pool(tmp_path / "deflated", [50], deflated=True)
    assert isinstance(next(read_pool(tmp_path / "stored", ["l14_img"]))[1]["l14_img"], np.memmap)
    assert not isinstance(next(read_pool(tmp_path / "deflated", ["l14_img"]))[1]["l14_img"], np.memmap)


def test_rows_blocks_and_inflated_members_hold_the_same(pool, tmp_path):
    folder, expected = pool
    opened = open_pool(folder, members=["l14_img"])
    shard, whole, rows = opened.shards[1], expected["l14_img"][120:195], np.array([0, 3, 74])
    assert np.array_equal(np.concatenate(list(opened.blocks(shard, "l14_img"))), whole)
    opened.inflate(shard, "l14_img", tmp_path / "raw")
    assert np.array_equal(opened.rows_of(shard, "l14_img", rows, tmp_path / "raw"), whole[rows])
    if shard.members["l14_img"].offset is not None:
        assert np.array_equal(opened.rows_of(shard, "l14_img", rows), whole[rows])


def test_columns_of_some_rows_are_read_alone(tmp_path):
    expected = write_pool(tmp_path, [300])
    opened = open_pool(tmp_path)
    mask = np.arange(300) % 7 == 0
    found = np.concatenate([block["uid"] for block in opened.columns(opened.shards[0], ["uid"], mask)])
    assert np.array_equal(found, parse_uids(expected["uid"][mask]))


def test_metadata_alone_needs_no_npz(tmp_path):
    write_pool(tmp_path, [50, 60])
    (tmp_path / "s1.npz").unlink()
    assert sum(len(shard["uid"]) for _, shard in read_pool(tmp_path, ["uid"])) == 110


@pytest.mark.parametrize("deflated", [False, True])
def test_a_shard_without_rows_has_all_keys(tmp_path, deflated):
    columns = write_pool(tmp_path, [20])
    write_shard(tmp_path, "s1", {name: column[:0] for name, column in columns.items()}, deflated)
    empty = dict(read_pool(tmp_path, KEYS))["s1"]
    assert {key: values.shape for key, values in empty.items()} == {
        key: (0, 16) if key.startswith("l14") else (0,) for key in KEYS
    }
    assert verify_pool(tmp_path)["problems"] == {}


def break_npz(folder):
    (folder / "s1.npz").unlink()


def cut_npz(folder):
    content = (folder / "s1.npz").read_bytes()
    (folder / "s1.npz").write_bytes(content[: len(content) // 2])


def cut_parquet(folder):
    content = (folder / "s1.parquet").read_bytes()
    (folder / "s1.parquet").write_bytes(content[:-20])


def change_rows(folder):
    columns = made_columns(30, 16, np.random.default_rng(0))
    np.savez(folder / "s1.npz", l14_img=columns["l14_img"], l14_txt=columns["l14_txt"])


def drop_member(folder):
    np.savez(folder / "s1.npz", l14_img=made_columns(40, 16, np.random.default_rng(0))["l14_img"])


def turn_integer(folder):
    np.savez(folder / "s1.npz", l14_img=np.zeros((40, 16), dtype=int), l14_txt=np.zeros((40, 16), dtype=int))


def drop_column(folder):
    columns = made_columns(40, 16, np.random.default_rng(0))
    del columns["clip_l14_similarity_score"]
    write_shard(folder, "s1", columns)


def cast_uids(folder, kind):
    table = parquet.read_table(folder / "s1.parquet")
    uids = pyarrow.array(table["uid"].to_pylist(), type=kind)
    parquet.write_table(table.set_column(0, "uid", uids), folder / "s1.parquet")


def turn_uids_into_a_view(folder):
    cast_uids(folder, pyarrow.string_view())


def turn_uids_into_bytes(folder):
    cast_uids(folder, pyarrow.binary(32))


def turn_similarities_into(folder, make):
    table = parquet.read_table(folder / "s1.parquet")
    values = pyarrow.array([make(value) for value in table["clip_l14_similarity_score"].to_pylist()])
    place = table.schema.get_field_index("clip_l14_similarity_score")
    parquet.write_table(table.set_column(place, "clip_l14_similarity_score", values), folder / "s1.parquet")


def turn_similarities_into_strings(folder):
    turn_similarities_into(folder, str)


def turn_similarities_into_lists(folder):
    turn_similarities_into(folder, lambda value: [value])


def double_a_column(folder):
    table = parquet.read_table(folder / "s1.parquet")
    parquet.write_table(table.append_column("uid", table["uid"]), folder / "s1.parquet")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (turn_uids_into_a_view, "its column 'uid' is string_view, but must be string"),
        (turn_uids_into_bytes, r"its column 'uid' is fixed_size_binary\[32\], but must be string"),
        (break_npz, "npz is missing"),
        (cut_npz, "its npz is cut short, damaged or of another format .*not a zip file.* Fetch it again"),
        (turn_similarities_into_strings, "'clip_l14_similarity_score' is string, but must be a number"),
        (turn_similarities_into_lists, "'clip_l14_similarity_score' is list.*, but must be a number"),
        (double_a_column, "has the column 'uid' 2 times"),
        (cut_parquet, "[Pp]arquet"),
        (change_rows, "30 rows, but the parquet has 40"),
        (drop_member, "lacks l14_txt"),
        (turn_integer, "must be floats"),
        (drop_column, "lacks the column 'clip_l14_similarity_score'"),
    ],
)
def test_a_broken_shard_is_named_or_left_out_and_listed(tmp_path, damage, message):
    write_pool(tmp_path, [50, 40, 60])
    damage(tmp_path)
    asked = {"members": ["l14_img", "l14_txt"], "columns": ["uid", "clip_l14_similarity_score"]}
    with pytest.raises(ShardError, match=f"Shard s1 cannot be used: .*{message}"):
        open_pool(tmp_path, **asked)
    left = open_pool(tmp_path, **asked, skip_broken=True)
    assert [shard.name for shard in left.shards] == ["s0", "s2"]
    assert left.rows == 110
    assert list(left.broken) == ["s1"]
    assert [name for name, _ in read_pool(tmp_path, KEYS, skip_broken=True)] == ["s0", "s2"]


def test_a_damaged_byte_is_found_by_its_checksum(tmp_path):
    write_pool(tmp_path, [400])
    content = bytearray((tmp_path / "s0.npz").read_bytes())
    content[3000] ^= 1
    (tmp_path / "s0.npz").write_bytes(content)
    opened = open_pool(tmp_path, members=["l14_img"])
    with pytest.raises(ShardError, match="CRC"):
        list(opened.blocks(opened.shards[0], "l14_img"))


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_uids_may_be_any_strings_that_can_be_filtered(tmp_path, kind):
    expected = write_pool(tmp_path, [20, 30])["uid"]
    table = parquet.read_table(tmp_path / "s1.parquet")
    uids = table["uid"].cast(kind) if kind == pyarrow.large_string() else table["uid"].dictionary_encode()
    parquet.write_table(table.set_column(0, "uid", uids), tmp_path / "s1.parquet")
    opened = open_pool(tmp_path)
    blocks = [block["uid"] for shard in opened.shards for block in opened.columns(shard, ["uid"], np.ones(30, bool))]
    assert format_uids(np.concatenate(blocks)) == expected.tolist()


@pytest.mark.parametrize("tolerance", [np.nan, np.inf, -1])
def test_a_tolerance_that_would_pass_everything_or_nothing_is_refused(tmp_path, tolerance):
    write_pool(tmp_path, [20])
    with pytest.raises(ValueError, match=f"tolerance is {tolerance}"):
        verify_pool(tmp_path, tolerance=tolerance)
    assert verify_pool(tmp_path, tolerance=0.01)["problems"] == {}


def test_hidden_files_are_no_shards(tmp_path):
    write_pool(tmp_path, [20])
    for suffix in ("parquet", "npz"):
        (tmp_path / f".s0.{suffix}").write_bytes(b"left by another system")
    assert [shard.name for shard in open_pool(tmp_path, members=["l14_img"]).shards] == ["s0"]
    assert list(verify_pool(tmp_path)["archs"]) == ["l14"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_file_is_no_pool(tmp_path, remote):
    write_pool(tmp_path, [20])
    path = str(tmp_path / "s0.parquet")
    if remote:
        path = f"memory://{tmp_path.name}/s0.parquet"
        fsspec.filesystem("memory").pipe(path, (tmp_path / "s0.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"s0.parquet is a file, but a pool is a flat folder"):
        open_pool(path)


def test_mixed_dimensions_and_empty_folders_are_refused(tmp_path):
    for look in (open_pool, verify_pool):
        with pytest.raises(ValueError, match=r"holds no .parquet file"):
            look(tmp_path)
    write_pool(tmp_path, [20])
    write_shard(tmp_path, "t0", made_columns(20, 8, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="differ in dimension"):
        open_pool(tmp_path, members=["l14_img"])


def test_headers_are_parsed_by_one_thread_at_a_time(tmp_path, monkeypatch):
    write_pool(tmp_path / "pool", [10] * 6)
    parse, inside, most = np.lib.format.read_array_header_1_0, [], []

    def slow_parse(stream):
        inside.append(stream)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return parse(stream)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slow_parse)
    open_pool(tmp_path / "pool", members=["l14_img", "l14_txt"])
    assert len(most) == 12
    assert max(most) == 1
