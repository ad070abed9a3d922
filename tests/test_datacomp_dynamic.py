"""NormSim_2-D of a pool on disk: equal to the definition, wherever it runs and however often it is interrupted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_pools import made_columns, write_pool, write_shard

from selectsampler.datacomp import ShardError, Stage, dynamic, filter_pool, format_uids, open_pool
from selectsampler.optimizers import norm_sim_dynamic


def survivors(
    folder: Path, keep: float, *, rounds: int = 30, before: list[Stage] | None = None, **options
) -> list[str]:
    stages = [*(before or []), Stage("norm-sim-dynamic", keep=keep, rounds=rounds)]
    where = {"work": folder.parent / f"{folder.name}.work"}
    return format_uids(filter_pool(folder, stages, progress=False, **where | options).uids)


@pytest.mark.parametrize("rounds", [1, 7, 80])
def test_survivors_are_those_of_the_features_in_memory(tmp_path, rounds):
    columns = write_pool(tmp_path / "pool", [200, 1, 150, 90])
    kept = norm_sim_dynamic(torch.from_numpy(columns["l14_img"]), 110, rounds=rounds).numpy()
    assert survivors(tmp_path / "pool", 0.25, rounds=rounds) == columns["uid"][kept].tolist()


def test_small_steps_to_a_small_rest_leave_what_they_leave_in_memory(tmp_path):
    columns = write_pool(tmp_path / "pool", [6000, 4000])
    kept = norm_sim_dynamic(torch.from_numpy(columns["l14_img"]), 50, rounds=150).numpy()
    assert survivors(tmp_path / "pool", 0.005, rounds=150) == columns["uid"][kept].tolist()


def test_only_what_earlier_stages_left_is_the_target(tmp_path):
    columns = write_pool(tmp_path / "pool", [200, 150])
    similarity = columns["clip_l14_similarity_score"]
    rows = np.flatnonzero(similarity >= np.sort(similarity)[-175])
    kept = rows[norm_sim_dynamic(torch.from_numpy(columns["l14_img"][rows]), 70, rounds=30).numpy()]
    found = survivors(tmp_path / "pool", 0.2, before=[Stage("clip-score", keep=0.5)])
    assert found == columns["uid"][kept].tolist()


@pytest.mark.parametrize(("block", "threads", "deflated"), [(8, 1, False), (64, 3, True)])
def test_blocks_threads_and_compression_change_nothing(tmp_path, monkeypatch, block, threads, deflated):
    write_pool(tmp_path / "pool", [200, 150])
    expected = survivors(tmp_path / "pool", 0.3)
    write_pool(tmp_path / "other", [200, 150], deflated=deflated)
    monkeypatch.setattr(dynamic, "BLOCK", block)
    monkeypatch.setattr(dynamic, "PIECE", 2 * block)
    assert survivors(tmp_path / "other", 0.3, threads=threads) == expected


@settings(deadline=None, max_examples=30)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0 + 2**-30, 3.0]), min_size=9, max_size=9),
    count=st.integers(1, 9),
)
def test_the_lowest_are_counted_out_and_of_equal_scores_the_higher_rows(tmp_path_factory, scores, count):
    folder = tmp_path_factory.mktemp("share")
    write_pool(folder, [4, 5], dim=2)
    share = dynamic._Share(
        open_pool(folder, members=["l14_img"]), dynamic.Run(folder), np.ones(9, dtype=bool), "l14_img", folder
    )
    share.scores = {0: np.array(scores[:4]), 1: np.array(scores[4:])}
    gone = share.lowest(count)
    expected = sorted(range(9), key=lambda row: (scores[row], -row))[:count]
    assert np.flatnonzero(np.concatenate([gone[0], gone[1]])).tolist() == sorted(expected)


def test_equal_images_are_dropped_from_the_end(tmp_path):
    columns = made_columns(60, 16, np.random.default_rng(0))
    columns["l14_img"][:] = columns["l14_img"][0]
    (tmp_path / "pool").mkdir()
    write_shard(tmp_path / "pool", "s0", columns)
    assert survivors(tmp_path / "pool", 0.5) == columns["uid"][:30].tolist()


@pytest.mark.parametrize("keep", [0, 1])
def test_nothing_and_everything_may_be_kept(tmp_path, keep):
    columns = write_pool(tmp_path / "pool", [20, 30])
    assert survivors(tmp_path / "pool", keep) == columns["uid"][: 50 * keep].tolist()


def test_a_run_that_died_goes_on_after_the_last_round_that_was_kept(tmp_path, monkeypatch):
    write_pool(tmp_path / "pool", [200, 150])
    expected = survivors(tmp_path / "pool", 0.3, work=tmp_path / "whole")
    rounds, score = [], dynamic._Share.score

    def dying(share, moment):
        rounds.append(1)
        if len(rounds) == 25:
            raise KeyboardInterrupt
        score(share, moment)

    monkeypatch.setattr(dynamic._Share, "score", dying)
    with pytest.raises(KeyboardInterrupt):
        survivors(tmp_path / "pool", 0.3)
    assert len(list((tmp_path / "pool.work").glob("scratch-*/*"))) == 2
    assert survivors(tmp_path / "pool", 0.3) == expected
    assert len(rounds) == 25 + 10  # from round 21 on
    assert survivors(tmp_path / "pool", 0.3) == expected
    assert len(rounds) == 25 + 10
    assert list((tmp_path / "pool.work").glob("scratch-*")) == []


def test_a_broken_shard_is_named_or_left_out(tmp_path):
    columns = write_pool(tmp_path / "pool", [60, 50, 40])
    broken = made_columns(50, 16, np.random.default_rng(1))
    broken["l14_img"][17] = np.nan
    write_shard(tmp_path / "pool", "s1", broken)
    with pytest.raises(ShardError, match=r"Shard s1 .*row 17 of l14_img is zero or not"):
        survivors(tmp_path / "pool", 0.3)
    left = np.delete(np.arange(150), range(60, 110))
    kept = left[norm_sim_dynamic(torch.from_numpy(columns["l14_img"][left]), 30, rounds=30).numpy()]
    assert survivors(tmp_path / "pool", 0.3, skip_broken=True) == columns["uid"][kept].tolist()
