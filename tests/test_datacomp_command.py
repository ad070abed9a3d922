"""The verb `datacomp`, and its ranks under torchrun."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from made_pools import corrupt_uids, lose_uid, made_columns, write_pool, write_shard

from selectsampler.cli import main
from selectsampler.datacomp import read_uids

STAGES = ["--score", "s-clip-loss", "--keep", "0.3", "--then", "norm-sim", "--keep", "0.2", "--temperature", "0.1"]
DYNAMIC = ["--then", "norm-sim-dynamic", "--keep", "0.1", "--rounds", "20"]


@pytest.fixture
def pool(tmp_path):
    columns = write_pool(tmp_path / "pool", [300, 200, 250, 260])
    np.save(tmp_path / "target.npy", columns["l14_img"][:20])
    return tmp_path / "pool"


def arguments(pool, out: str, *more: str) -> list[str]:
    where = ["--target", str(pool.parent / "target.npy"), "--batch-size", "128", "--repeats", "2", "--group-size", "2"]
    return ["datacomp", "filter", str(pool), *STAGES, *where, "--out", str(pool.parent / out), *more]


def test_filter_writes_a_uid_file_that_verify_accepts(pool, capsys):
    assert main(arguments(pool, "out.npy")) == 0
    assert "202 of 1010 samples (s-clip-loss 303, norm-sim 202)" in capsys.readouterr().err
    assert len(read_uids(pool.parent / "out.npy")) == 202
    assert main(["datacomp", "verify", str(pool.parent / "out.npy")]) == 0
    assert json.loads(capsys.readouterr().out)["uids"] == 202


def test_dropped_duplicates_are_counted_as_dropped(tmp_path, capsys):
    columns = write_pool(tmp_path / "pool", [60])
    columns["uid"][:10] = columns["uid"][10:20]
    write_shard(tmp_path / "pool", "s0", columns)
    command = ["datacomp", "filter", str(tmp_path / "pool"), "--score", "clip-score", "--keep", "1"]
    assert main([*command, "--out", str(tmp_path / "out.npy"), "--duplicates", "drop"]) == 0
    assert "50 of 60 samples (clip-score 60; 10 repeated uids dropped)" in capsys.readouterr().err
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["duplicates"], record["written"]) == ("drop", len(read_uids(tmp_path / "out.npy")))
    assert main([*command, "--out", str(tmp_path / "other.npy"), "--duplicates", "refuse"]) == 1
    assert "stands 2 times" in capsys.readouterr().err


def test_verify_compares_similarities_with_embeddings(pool, capsys):
    assert main(["datacomp", "verify", str(pool)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 1010
    assert report["archs"]["l14"]["s1"]["largest_difference"] < 1e-3
    other = write_pool(pool.parent / "other", [300, 200], seed=1)
    os.replace(pool.parent / "other" / "s1.npz", pool / "s1.npz")
    assert len(other["uid"]) == 500
    assert main(["datacomp", "verify", str(pool)]) == 1
    assert "has a problem: s1 (l14): clip_l14_similarity_score differs" in capsys.readouterr().err
    for name in ("s0", "s1"):
        columns = made_columns(30, 16, np.random.default_rng(0))
        columns["l14_img"][7] = 0
        write_shard(pool, name, columns)
    assert main(["datacomp", "verify", str(pool)]) == 1
    assert "has 2 problems, the first: s0 (l14): l14_img[7] is zero" in capsys.readouterr().err
    content = bytearray((pool / "s3.npz").read_bytes())
    content[3000] ^= 1
    (pool / "s3.npz").write_bytes(content)
    assert main(["datacomp", "verify", str(pool)]) == 1
    assert json.loads(capsys.readouterr().out)["problems"]["s3 (l14)"].startswith("l14_img cannot be read (Bad CRC")


def test_verify_looks_at_every_model_unless_told(tmp_path, capsys):
    columns = made_columns(50, 16, np.random.default_rng(0))
    for kind in ("img", "txt"):
        columns[f"b32_{kind}"] = columns[f"l14_{kind}"]
    columns["clip_b32_similarity_score"] = columns["clip_l14_similarity_score"][::-1]
    write_shard(tmp_path, "s0", columns)
    assert main(["datacomp", "verify", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert list(json.loads(told.out)["archs"]) == ["b32", "l14"]
    assert "has a problem: s0 (b32): clip_b32_similarity_score differs" in told.err
    assert main(["datacomp", "verify", str(tmp_path), "--arch", "l14"]) == 0
    np.savez(tmp_path / "s0.npz", other=columns["l14_img"])
    assert main(["datacomp", "verify", str(tmp_path)]) == 1
    assert "hold other, but embeddings are b32_img" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_before_the_merge(capsys):
    assert main(["datacomp", "merge", "nowhere.npy", "--out", "s3://bucket/merged.npy"]) == 1
    assert "s3://bucket/merged.npy, but it must be a local path" in capsys.readouterr().err


def test_merge_joins_files(pool, capsys):
    for out, seed in (("a.npy", "0"), ("b.npy", "1")):
        assert main(arguments(pool, out, "--seed", seed)) == 0
    files = [str(pool.parent / name) for name in ("a.npy", "b.npy")]
    assert main(["datacomp", "merge", *files, "--how", "sum", "--out", str(pool.parent / "c.npy")]) == 0
    assert len(read_uids(pool.parent / "c.npy")) == 404
    np.save(files[0], read_uids(files[0])[::-1])
    assert main(["datacomp", "verify", files[0]]) == 1
    assert "not sorted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0.3", "--score", "s-clip-loss"], "put it after --score"),
        (["--then", "norm-sim"], "--score begins the first stage"),
        (["--score", "basic", "--score", "basic"], "--score begins the first stage"),
        (["--score", "clip-score", "--keep", "0.3", "--keep", "0.2"], "--keep stands twice for clip-score"),
    ],
)
def test_stages_out_of_order_are_explained(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["datacomp", "filter", "pool", *words, "--out", "x.npy"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_broken_shard_stops_with_one_sentence_or_is_listed(pool, capsys):
    (pool / "s2.npz").write_bytes(b"nothing")
    assert main(arguments(pool, "out.npy")) == 1
    assert "Shard s2 cannot be used" in capsys.readouterr().err
    assert main(arguments(pool, "out.npy", "--skip-broken")) == 0
    assert "left out: shard s2" in capsys.readouterr().err


STOPPED = """
import os, signal, sys
from selectsampler.cli import main
from selectsampler.datacomp import scoring

scoring.PART_ROWS = 1  # a part a batch
whole, batches = scoring.s_clip_loss_of_batch, []

def told_to_stop(*arguments, **keywords):
    batches.append(1)
    if len(batches) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(*arguments, **keywords)

scoring.s_clip_loss_of_batch = told_to_stop
sys.exit(main(sys.argv[1:]))
"""


def test_a_process_that_is_told_to_stop_ends_as_by_ctrl_c_and_the_same_command_goes_on(tmp_path):
    columns = write_pool(tmp_path / "pool", [300, 200, 250, 260], deflated=True)
    np.save(tmp_path / "target.npy", columns["l14_img"][:20])
    command = arguments(tmp_path / "pool", "out.npy", "--threads", "1")
    done = subprocess.run([sys.executable, "-c", STOPPED, *command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "selectsampler datacomp: interrupted\n")
    work = tmp_path / "out.npy.work"
    left = {path: path.stat().st_mtime_ns for path in work.iterdir()}
    assert len(left) >= 4 + 3  # the uids of four shards, and batches
    assert {path.suffix for path in left} == {".safetensors"}  # nothing decompressed, nothing partial
    assert main([*command, "--work", str(work)]) == 0
    assert left.items() <= {path: path.stat().st_mtime_ns for path in work.iterdir()}.items()


def torchrun(program: list[str], ranks: int = 2) -> subprocess.CompletedProcess:
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={ranks}",
        "--master-port=29643",
        *program,
    ]
    return subprocess.run(start, capture_output=True, text=True, timeout=150, check=False)


DYING = """
import os, sys
from selectsampler.cli import main
from selectsampler.datacomp import scoring

scoring.PART_ROWS = 1  # a part a batch
whole, batches = scoring.s_clip_loss_of_batch, []

def dies(*arguments, **keywords):
    batches.append(1)
    if os.environ["RANK"] == os.environ["DYING_RANK"] and len(batches) == 4:
        os._exit(9)
    return whole(*arguments, **keywords)

scoring.s_clip_loss_of_batch = dies
sys.exit(main(sys.argv[1:]))
"""


def test_two_ranks_give_the_bits_of_one_and_go_on_after_a_rank_died(pool, monkeypatch):
    assert main(arguments(pool, "one.npy", *DYNAMIC)) == 0
    program = pool.parent / "dying.py"
    program.write_text(DYING)
    work = pool.parent / "work"
    command = [str(program), *arguments(pool, "two.npy", *DYNAMIC, "--threads", "1", "--work", str(work))]
    monkeypatch.setenv("DYING_RANK", "1")
    died = torchrun(command)
    assert died.returncode != 0
    assert "start the same command again" in died.stderr
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    assert len(finished) >= 3
    monkeypatch.setenv("DYING_RANK", "none")
    again = torchrun(command)
    assert again.returncode == 0, again.stderr
    assert (pool.parent / "one.npy").read_bytes() == (pool.parent / "two.npy").read_bytes()
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


SLOW_TO_WRITE = """
import sys, time
from selectsampler.cli import main
from selectsampler.datacomp import filtering

whole = filtering.write_uids

def slow(path, *arguments, **keywords):
    time.sleep(1)
    print("parts", len(list(path.with_name(path.name + ".work").glob("*.safetensors"))))
    return whole(path, *arguments, **keywords)

filtering.write_uids = slow
sys.exit(main(sys.argv[1:]))
"""


def test_parts_stay_until_the_uid_file_stands_whichever_rank_is_faster(pool):
    program = pool.parent / "slow.py"
    program.write_text(SLOW_TO_WRITE)
    done = torchrun([str(program), *arguments(pool, "two.npy")])
    assert done.returncode == 0, done.stderr
    assert "parts 12" in done.stdout  # two groups twice, four shards, and the uids of these
    assert not (pool.parent / "two.npy.work").exists()


def test_every_rank_hears_of_uids_that_cannot_be_read(pool):
    lose_uid(pool, "s1")
    corrupt_uids(pool, "s2")
    program = ["-m", "selectsampler"]
    stopped = torchrun([*program, *arguments(pool, "two.npy")])
    assert stopped.returncode != 0
    assert "cannot be used: its parquet fails" in stopped.stderr
    assert "lost contact" not in stopped.stderr
    left = torchrun([*program, *arguments(pool, "two.npy", "--skip-broken")])
    assert left.returncode == 0, left.stderr
    assert "left out: shard s1" in left.stderr
    assert "left out: shard s2" in left.stderr
    assert main(arguments(pool, "one.npy", "--skip-broken")) == 0
    assert (pool.parent / "one.npy").read_bytes() == (pool.parent / "two.npy").read_bytes()


def test_ranks_without_a_shared_folder_send_what_the_first_lacks(pool):
    assert main(arguments(pool, "one.npy", *DYNAMIC)) == 0
    apart = pool.parent / "apart.py"
    apart.write_text(
        "import os, sys\n"
        "from selectsampler.cli import main\n"
        "sys.exit(main([*sys.argv[1:], '--work', sys.argv[-1] + '.' + os.environ['RANK']]))\n"
    )
    done = torchrun([str(apart), *arguments(pool, "two.npy", *DYNAMIC, "--work", str(pool.parent / "work"))])
    assert done.returncode == 0, done.stderr
    assert (pool.parent / "one.npy").read_bytes() == (pool.parent / "two.npy").read_bytes()
    assert all(any((pool.parent / f"work.{rank}").iterdir()) for rank in (0, 1))
