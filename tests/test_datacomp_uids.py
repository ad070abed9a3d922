"""Uid files: whatever is written, DataComp's reader finds every sample in it as often as it stands there."""

import hashlib
import json
import operator
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections import Counter
from functools import reduce

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selectsampler.datacomp import (
    UID,
    UidFilter,
    contains,
    format_uids,
    merge_uid_files,
    merge_uids,
    parse_uids,
    read_uids,
    uid_files,
    verify_uids,
    write_uids,
)
from selectsampler.datacomp import uids as uids_module

FEW = [f"{number:032x}" for number in (0, 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, 2**127, 2**128 - 1)]
uids_of_text = st.text("0123456789abcdef", min_size=32, max_size=32)
MERGES = {"union": operator.or_, "intersection": operator.and_, "sum": operator.add}
several = st.lists(st.sampled_from(FEW) | uids_of_text, max_size=30)


def count_as_the_resharder_does(path, uid: str) -> int:
    subset = np.load(path, mmap_mode="r")
    assert subset.dtype == np.dtype("u8,u8")
    key = np.array([divmod(int(uid, 16), 2**64)], np.dtype("u8,u8"))[0]
    return int(np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left"))


@settings(deadline=None)
@given(uids=several)
def test_the_resharder_finds_every_uid_as_often_as_it_stands(tmp_path_factory, uids):
    path = tmp_path_factory.mktemp("uids") / "subset.npy"
    write_uids(path, parse_uids(uids))
    expected = Counter(uids)
    for uid in {*uids, *FEW}:
        assert count_as_the_resharder_does(path, uid) == expected[uid]
    assert Counter(format_uids(read_uids(path))) == expected


@given(uids=several)
def test_parsing_and_formatting_are_inverse(uids):
    assert format_uids(parse_uids(uids)) == uids
    assert parse_uids(uids).tolist() == [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids]
    assert np.array_equal(parse_uids([uid.upper() for uid in uids]), parse_uids(uids))


@pytest.mark.parametrize("bad", ["", "12", "g" * 32, "0x" + "0" * 30, "é" * 16, "0" * 33])
def test_what_is_no_uid_is_named_with_its_row(bad):
    with pytest.raises(ValueError, match=r"row 12 .* 32 hex digits"):
        parse_uids([FEW[0], FEW[1], bad], first=10)


@settings(deadline=None)
@given(files=st.lists(several, min_size=1, max_size=4))
def test_merges_are_those_of_multisets(tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("merge")
    for number, uids in enumerate(files):
        np.save(folder / f"{number}.npy", parse_uids(uids))  # unsorted, as others write them
    counters = [Counter(uids) for uids in files]
    expected = {"union": Counter(), "intersection": counters[0], "sum": Counter()}
    for counter in counters:
        expected["union"] |= counter
        expected["intersection"] &= counter
        expected["sum"] += counter
    for how, counter in expected.items():
        merged = merge_uids([folder / f"{number}.npy" for number in range(len(files))], how=how)
        assert format_uids(merged) == sorted(counter.elements())


@settings(deadline=None, max_examples=40)
@given(files=st.lists(several, min_size=1, max_size=4), block=st.integers(1, 40), how=st.sampled_from(sorted(MERGES)))
def test_files_are_merged_in_blocks_of_any_size_into_what_numpy_would_save(tmp_path_factory, files, block, how):
    folder = tmp_path_factory.mktemp("merge")
    paths = [folder / f"{number}.npy" for number in range(len(files))]
    for path, uids in zip(paths, files, strict=True):
        np.save(path, parse_uids(uids))
    expected = parse_uids(sorted(reduce(MERGES[how], map(Counter, files)).elements()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uid_files, "BLOCK", block)
        assert merge_uid_files(paths, folder / "merged.npy", how) == len(expected)
        write_uids(folder / "written.npy", parse_uids(files[0]), duplicates="drop")
    assert np.array_equal(np.load(folder / "merged.npy"), expected)
    assert format_uids(read_uids(folder / "written.npy")) == sorted(set(files[0]))
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", *[".npy"] * (len(files) + 2)]


def test_a_merge_says_of_which_contents_it_is(tmp_path):
    write_uids(tmp_path / "a.npy", parse_uids(FEW))
    merge_uid_files([tmp_path / "a.npy"] * 2, tmp_path / "b.npy", "sum", keys=True)
    digest = hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()
    record = json.loads((tmp_path / "b.json").read_text())
    path = str(tmp_path / "a.npy")
    assert record == {"merge": "sum", "files": [path, path], "sha256": {path: digest}, "written": 2 * len(FEW)}
    assert (tmp_path / "b.keys.txt").read_text().split() == FEW


def test_remote_uid_files_are_merged(tmp_path):
    write_uids(tmp_path / "a.npy", parse_uids(FEW[:3]))
    remote = f"memory://{tmp_path.name}/b.npy"
    write_uids(tmp_path / "b.npy", parse_uids(FEW[2:4]))
    fsspec.filesystem("memory").pipe(remote, (tmp_path / "b.npy").read_bytes())
    assert format_uids(merge_uids([tmp_path / "a.npy", remote])) == FEW[:4]


def test_uids_whose_first_halves_agree_are_in_the_order_of_the_second(tmp_path):
    uids = parse_uids([f"{1:016x}{low:016x}" for low in (5, 3, 9)] + [FEW[0]])
    assert format_uids(write_uids(tmp_path / "a.npy", uids)) == sorted(format_uids(uids))


MERGE_MEMORY = """
import sys
from selectsampler.datacomp import merge_uid_files

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

merge_uid_files([sys.argv[1]], sys.argv[1] + ".first.npy", "union")
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
merge_uid_files(sys.argv[1:], sys.argv[1] + ".merged.npy", "union")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to reset the peak")
def test_a_merge_takes_less_memory_than_its_files(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(3):
        uids = np.sort(generator.integers(0, 2**63, size=4_000_000, dtype=np.uint64))
        pairs = np.stack([uids, uids], axis=1)
        np.save(tmp_path / f"{number}.npy", pairs.view(UID).reshape(-1))
    files = [str(tmp_path / f"{number}.npy") for number in range(3)]
    done = subprocess.run([sys.executable, "-c", MERGE_MEMORY, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 160  # the files hold 183 MiB, and took five times that


def random_uids(count):
    return np.random.default_rng(0).integers(0, 2**63, size=2 * count, dtype=np.uint64).view(UID)


def test_the_sorted_blocks_of_a_file_are_not_open_one_by_one(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(uid_files, "BLOCK", 64)
    uids = random_uids(2000)
    np.save(tmp_path / "a.npy", uids)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest_free:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free.fileno() + 12, limits[1]))
    try:
        assert np.array_equal(write_uids(tmp_path / "b.npy", uids), np.sort(uids))
        assert verify_uids(tmp_path / "a.npy")["distinct"] == 2000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("use", [verify_uids, lambda url: merge_uid_files([url, url], "merged.npy")])
def test_a_remote_uid_file_is_not_held_in_memory(tmp_path, monkeypatch, use):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(uid_files, "BLOCK", 32_768)
    monkeypatch.setattr(uids_module, "BLOCK", 32_768)
    np.save(tmp_path / "a.npy", random_uids(1_200_000))
    fsspec.filesystem("memory").put(str(tmp_path / "a.npy"), f"memory://{tmp_path.name}/a.npy")
    (tmp_path / "a.npy").unlink()
    tracemalloc.start()
    use(f"memory://{tmp_path.name}/a.npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12_000_000  # the file has 19 million bytes
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".npy", ".json")] == []


def test_duplicates_are_treated_as_asked(tmp_path):
    uids = parse_uids([FEW[2], FEW[1], FEW[2]])
    assert format_uids(write_uids(tmp_path / "keep.npy", uids)) == [FEW[1], FEW[2], FEW[2]]
    assert format_uids(write_uids(tmp_path / "drop.npy", uids, duplicates="drop")) == [FEW[1], FEW[2]]
    with pytest.raises(ValueError, match=f"{FEW[2]} stands 2 times"):
        write_uids(tmp_path / "refuse.npy", uids, duplicates="refuse")
    assert not (tmp_path / "refuse.npy").exists()


def test_provenance_and_keys_lie_beside_the_file(tmp_path):
    write_uids(tmp_path / "a.npy", parse_uids([FEW[2], FEW[1], FEW[2]]), provenance={"seed": 1}, keys=True)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record == {"seed": 1, "duplicates": "keep", "written": 3}
    assert (tmp_path / "a.keys.txt").read_text().split() == [FEW[1], FEW[2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.keys.txt", "a.npy"]


def test_provenance_is_json_or_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_uids(tmp_path / "a.npy", parse_uids(FEW), provenance={"threshold": np.inf})
    assert not list(tmp_path.iterdir())


def test_nothing_of_another_uid_file_stays_beside_the_one_that_is_written(tmp_path):
    beside = [tmp_path / "a.json", tmp_path / "a.keys.txt"]
    for provenance, keys in (({}, False), (None, True), (None, False)):
        write_uids(tmp_path / "a.npy", parse_uids(FEW), provenance={"seed": 1}, keys=True)
        with pytest.raises(ValueError, match="stands 2 times"):  # nothing is written, nothing is removed
            write_uids(tmp_path / "a.npy", parse_uids(FEW * 2), duplicates="refuse")
        assert all(path.exists() for path in beside)
        write_uids(tmp_path / "a.npy", parse_uids(FEW[:1]), provenance=provenance, keys=keys)
        assert [path.exists() for path in beside] == [provenance is not None, keys]


def test_an_unsorted_file_is_refused_unless_it_may_be_sorted(tmp_path):
    np.save(tmp_path / "a.npy", parse_uids([FEW[1], FEW[3], FEW[2]]))
    with pytest.raises(ValueError, match="entry 2 is lower"):
        read_uids(tmp_path / "a.npy")
    assert format_uids(read_uids(tmp_path / "a.npy", sort=True)) == [FEW[1], FEW[2], FEW[3]]


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((2, 2), dtype=UID), np.zeros(3, dtype=">u8,>u8")])
def test_what_is_no_uid_file_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="is no uid file"):
        read_uids(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match="cannot be read"):
        read_uids(tmp_path / "b.npy")


def test_wrong_requests_are_named(tmp_path):
    with pytest.raises(ValueError, match="how is 'xor'"):
        merge_uids([tmp_path / "a.npy"], how="xor")
    with pytest.raises(ValueError, match="no uid files"):
        merge_uids([])
    with pytest.raises(ValueError, match=r"paths is 'a.npy', but must be a list"):
        merge_uids("a.npy")
    with pytest.raises(ValueError, match=r"uids are a list, but must be an array .* see parse_uids"):
        write_uids(tmp_path / "a.npy", FEW)
    with pytest.raises(ValueError, match=r"written as .npy"):
        write_uids(tmp_path / "a.bin", parse_uids(FEW))
    with pytest.raises(ValueError, match="see parse_uids"):
        write_uids(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match="duplicates is 'some'"):
        write_uids(tmp_path / "a.npy", parse_uids(FEW), duplicates="some")


def test_a_place_that_cannot_be_written_is_told_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "dir.npy").mkdir()
    (tmp_path / "file").touch()
    np.save(tmp_path / "a.npy", parse_uids(FEW))
    with pytest.raises(ValueError, match=r"dir.npy/ is a folder"):
        merge_uid_files([tmp_path / "a.npy"], f"{tmp_path}/dir.npy/", keys=True)
    with pytest.raises(ValueError, match="file is no folder"):
        merge_uid_files([tmp_path / "a.npy"], tmp_path / "file" / "b.npy")
    with monkeypatch.context() as patch:  # the superuser may write everywhere
        patch.setattr(os, "access", lambda path, mode: path != tmp_path)
        with pytest.raises(ValueError, match="a folder that may not be written to"):
            merge_uid_files([tmp_path / "a.npy"], tmp_path / "new" / "b.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "dir.npy", "file"]


def test_contains_counts():
    held = parse_uids([FEW[1], FEW[3], FEW[3]])
    assert contains(held, parse_uids([FEW[3], FEW[0], FEW[1]])).tolist() == [2, 0, 1]
    assert contains(parse_uids([]), parse_uids(FEW)).tolist() == [0] * len(FEW)


def test_a_loader_passes_what_stands_in_the_file(tmp_path):
    write_uids(tmp_path / "a.npy", parse_uids([FEW[1], FEW[3], FEW[3]]))
    allowed = UidFilter(tmp_path / "a.npy")
    assert allowed(FEW[1])
    assert not allowed(FEW[2])
    assert allowed({"__key__": "000012", "json": json.dumps({"uid": FEW[3]}).encode()})
    assert allowed({"__key__": "000012", "json": {"uid": FEW[3]}})
    assert allowed({"__key__": f"{FEW[3]}-0"})
    assert allowed.count(FEW[3]) == 2


@settings(deadline=None, max_examples=60)
@given(held=several, asked=several)
def test_contains_and_the_loaders_filter_count_as_the_resharder_does(tmp_path_factory, held, asked):
    path = tmp_path_factory.mktemp("uids") / "a.npy"
    uids, allowed = write_uids(path, parse_uids(held)), UidFilter(path)
    expected = [count_as_the_resharder_does(path, uid) for uid in asked]
    assert contains(uids, parse_uids(asked)).tolist() == expected
    assert [allowed.count(uid) for uid in asked] == expected


@pytest.mark.parametrize(
    "sample",
    [
        {"__key__": "000012", "jpg": b""},
        {"jpg": b""},
        {"__key__": "000012", "json": b'{"url": "x"}'},
        {"__key__": "000012", "json": b"cut"},
        {"__key__": "000012", "json": [FEW[1]]},
        {"__key__": "000012", "json": {"uid": None}},
        FEW[1][1:],
    ],
)
def test_a_sample_without_a_uid_is_told_where_it_belongs(tmp_path, sample):
    write_uids(tmp_path / "a.npy", parse_uids(FEW))
    with pytest.raises(ValueError, match=r"has no uid of 32 hex digits .* in its json as 'uid'.* or be its __key__"):
        UidFilter(tmp_path / "a.npy")(sample)


def test_a_filter_is_sent_to_workers_as_a_path_and_not_as_a_copy(tmp_path):
    write_uids(tmp_path / "a.npy", parse_uids([f"{number:032x}" for number in range(5000)]))
    sent = pickle.dumps(UidFilter(tmp_path / "a.npy"))
    assert len(sent) < 1000
    assert pickle.loads(sent)(f"{4999:032x}")
    assert not pickle.loads(sent)(f"{5000:032x}")


def test_a_url_is_refused_where_a_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be a local path"):
        write_uids("s3://bucket/a.npy", parse_uids(FEW))
    with pytest.raises(ValueError, match="must be a local path"):  # before a file is looked at
        merge_uid_files(["nowhere.npy"], "s3://bucket/a.npy")
    assert list(tmp_path.iterdir()) == []
