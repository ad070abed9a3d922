"""From files to uid files: equal to the definition, exact in size, whatever breaks, and on any number of threads."""

import gc
import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_pools import corrupt_uids, lose_uid, made_columns, write_pool, write_shard
from safetensors.torch import save_file
from torch.nn.functional import normalize

from selectsampler.datacomp import (
    UID,
    Pool,
    ShardError,
    Stage,
    filter_pool,
    format_uids,
    open_pool,
    read_target,
    read_uids,
    verify_uids,
    write_uids,
)
from selectsampler.datacomp import dynamic as dynamic_module
from selectsampler.datacomp import pool as pool_module
from selectsampler.datacomp import scoring as scoring_module
from selectsampler.datacomp import uid_files as uid_files_module
from selectsampler.datacomp import uids as uids_module
from selectsampler.datacomp.filtering import choose
from selectsampler.datacomp.scoring import Run, group_shards, score_s_clip_loss
from selectsampler.scores import norm_sim, s_clip_loss
from selectsampler.scores.s_clip_loss import deal

CLIP = [Stage("s-clip-loss", keep="0.3")]
SMALL = {"temperature": 0.1, "batch_size": 64, "repeats": 2, "progress": False}


def scores_of(folder: Path, work: Path, *, group_size: int = 8, batch_size: int = 64, repeats: int = 2):
    pool = open_pool(folder, members=["l14_img", "l14_txt"])
    deal = {"temperature": 0.1, "batch_size": batch_size, "repeats": repeats, "seed": 0, "group_size": group_size}
    return score_s_clip_loss(pool, Run(work), image="l14_img", text="l14_txt", **deal)


def definition(image: np.ndarray, text: np.ndarray, temperature: float) -> torch.Tensor:
    image, text = (normalize(torch.from_numpy(features).double(), dim=1) for features in (image, text))
    logits = image @ text.T / temperature
    return temperature * (logits.diag() - (logits.logsumexp(dim=0) + logits.logsumexp(dim=1)) / 2)


def test_one_group_and_one_batch_equal_the_function_in_memory(tmp_path):
    columns = write_pool(tmp_path / "pool", [100, 80, 120])
    scores, details = scores_of(tmp_path / "pool", tmp_path, batch_size=1000)
    image, text = (torch.from_numpy(columns[name]) for name in ("l14_img", "l14_txt"))
    expected = s_clip_loss(image, text, temperature=0.1, batch_size=1000)
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-6)
    assert details == {"batch_sizes": [300], "group_shards": [3]}


def test_groups_and_batches_equal_the_definition(tmp_path):
    sizes = [100, 80, 120, 60, 90]
    columns = write_pool(tmp_path / "pool", sizes)
    scores, details = scores_of(tmp_path / "pool", tmp_path, group_size=2, repeats=3)
    offsets = np.cumsum([0, *sizes])
    expected = torch.zeros(sum(sizes), dtype=torch.float64)
    for repeat in range(3):
        for number, group in enumerate(group_shards(5, 2, seed=(0, repeat))):
            rows = np.concatenate([np.arange(offsets[shard], offsets[shard + 1]) for shard in group])
            for batch in deal(len(rows), 64, seed=(0, repeat, number)):
                some = rows[batch.numpy()]
                expected[some] += definition(columns["l14_img"][some], columns["l14_txt"][some], 0.1) / 3
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)
    assert details["group_shards"] == [2, 3]
    assert max(details["batch_sizes"]) <= 64


def test_a_shard_that_broken_ones_leave_alone_joins_another_group(tmp_path):
    write_pool(tmp_path / "pool", [100, 80, 120, 60])
    (tmp_path / "pool" / "s1.npz").unlink()
    pool = open_pool(tmp_path / "pool", members=["l14_img", "l14_txt"], skip_broken=True)
    arguments = {"temperature": 0.1, "batch_size": 64, "repeats": 1, "seed": 0, "group_size": 2}
    _, details = score_s_clip_loss(pool, Run(tmp_path), image="l14_img", text="l14_txt", **arguments)
    assert details["group_shards"] == [3]


def test_batches_are_computed_on_one_thread_whatever_the_process_has(tmp_path, monkeypatch):
    write_pool(tmp_path / "pool", [100, 80])
    before, seen, whole = torch.get_num_threads(), [], scoring_module.s_clip_loss_of_batch

    def watched(*arguments, **keywords):
        seen.append(torch.get_num_threads())
        return whole(*arguments, **keywords)

    monkeypatch.setattr(scoring_module, "s_clip_loss_of_batch", watched)
    filter_pool(tmp_path / "pool", CLIP, work=tmp_path / "work", **SMALL)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


@given(shards=st.integers(2, 60), size=st.integers(2, 9), repeat=st.integers(0, 9))
def test_no_group_is_a_single_shard(shards, size, repeat):
    groups = group_shards(shards, size, seed=(0, repeat))
    assert sorted(shard for group in groups for shard in group) == list(range(shards))
    assert min(map(len, groups)) >= min(size, shards)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


@pytest.mark.parametrize("rows", [[130, 90, 61, 70], [64, 1, 64, 200], [300, 20, 350, 33]])
def test_batches_of_groups_differ_by_less_than_their_rounding(tmp_path, rows):
    write_pool(tmp_path / "pool", rows)
    _, details = scores_of(tmp_path / "pool", tmp_path, group_size=2, repeats=3)
    dealt = [group for repeat in range(3) for group in group_shards(4, 2, seed=(0, repeat))]
    fewest = min(-(-sum(rows[shard] for shard in group) // 64) for group in dealt)
    assert max(details["batch_sizes"]) <= 64
    assert min(details["batch_sizes"]) >= int(64 - 64 / fewest)


def test_groups_are_drawn_anew_each_repetition():
    assert group_shards(20, 4, seed=(0, 0)) != group_shards(20, 4, seed=(0, 1))


def test_the_published_combination_equals_its_definition(tmp_path):
    columns = write_pool(tmp_path / "pool", [200, 150, 250])
    target = made_columns(40, 16, np.random.default_rng(5))["l14_img"]
    np.save(tmp_path / "target.npy", target)
    stages = [Stage("s-clip-loss", keep="0.3"), Stage("norm-sim", keep="0.2", target=str(tmp_path / "target.npy"))]
    filtered = filter_pool(tmp_path / "pool", stages, tmp_path / "out.npy", **SMALL | {"batch_size": 1000})
    scores = definition(columns["l14_img"], columns["l14_txt"], 0.1)
    survivors = scores.topk(180).indices
    near = norm_sim(torch.from_numpy(columns["l14_img"])[survivors], torch.from_numpy(target))
    expected = columns["uid"][survivors[near.topk(120).indices].numpy()]
    assert sorted(format_uids(filtered.uids)) == sorted(expected)
    assert format_uids(read_uids(tmp_path / "out.npy")) == sorted(expected)
    record = json.loads((tmp_path / "out.json").read_text())
    assert [stage["kept"] for stage in record["stages"]] == [180, 120]
    assert record["stages"][0]["batch_sizes"] == [600]
    assert record["s_clip_loss"]["group_size"] == 8
    assert not (tmp_path / "out.npy.work").exists()


def test_the_provenance_has_the_digests_of_all_files_that_were_gone_by(tmp_path):
    columns = write_pool(tmp_path / "pool", [60, 40])
    np.save(tmp_path / "target.npy", columns["l14_img"][:9])
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "a.npy", columns["l14_img"][:9])
    write_uids(tmp_path / "dfn.npy", open_uids(columns["uid"]))
    target, folder, within = (str(tmp_path / name) for name in ("target.npy", "folder", "dfn.npy"))
    stages = [Stage("norm-sim", keep=0.5, target=target), Stage("image-based", target=folder, centroids=target)]
    records = filter_pool(tmp_path / "pool", stages, within=within, **SMALL, work=tmp_path / "w").provenance["stages"]
    digest = hashlib.sha256(Path(target).read_bytes()).hexdigest()
    assert records[0]["sha256"] == {within: hashlib.sha256(Path(within).read_bytes()).hexdigest()}
    assert records[1]["sha256"] == {target: digest}
    assert records[2]["sha256"] == {f"{folder}/a.npy": digest, target: digest}


def test_targets_words_centroids_and_other_filters_may_be_remote(tmp_path):
    columns = write_pool(tmp_path / "pool", [60, 40])
    np.save(tmp_path / "features.npy", columns["l14_img"][:9])
    (tmp_path / "words.txt").write_text("photo\n")
    write_uids(tmp_path / "dfn.npy", open_uids(columns["uid"][:80]))
    save_file({"image": torch.from_numpy(columns["l14_img"])}, tmp_path / "images.safetensors")
    memory = fsspec.filesystem("memory")
    for name in ("features.npy", "words.txt", "dfn.npy", "images.safetensors"):
        memory.pipe(f"memory://{tmp_path.name}/in/{name}", (tmp_path / name).read_bytes())

    def uids(folder: str) -> np.ndarray:
        features = f"{folder}/features.npy"
        stages = [
            *[Stage("norm-sim", keep=0.6, target=features), Stage("text-based", target=f"{folder}/words.txt")],
            Stage("image-based", target=f"{folder}/images.safetensors", centroids=features),
        ]
        return filter_pool(tmp_path / "pool", stages, within=f"{folder}/dfn.npy", **SMALL, work=tmp_path / "w").uids

    assert len(uids(str(tmp_path))) > 5
    assert np.array_equal(uids(str(tmp_path)), uids(f"memory://{tmp_path.name}/in"))
    with pytest.raises(FileNotFoundError, match="no memory://"):
        uids(f"memory://{tmp_path.name}/nowhere")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.decimals(0, 1, places=4) | st.sampled_from(["0", "1", "0.29"]))
def test_any_fraction_is_kept_exactly(tmp_path, keep):
    if not (tmp_path / "pool").exists():
        write_pool(tmp_path / "pool", [60, 40, 100])
    kept = filter_pool(tmp_path / "pool", [Stage("clip-score", keep=str(keep))], tmp_path / "out.npy", **SMALL)
    assert len(kept.uids) == len(read_uids(tmp_path / "out.npy")) == int(Fraction(str(keep)) * 200)
    assert verify_uids(tmp_path / "out.npy")["problems"] == []


@given(values=st.lists(st.integers(0, 5), min_size=1, max_size=40), share=st.floats(0, 1), data=st.data())
def test_choose_takes_the_best_and_of_ties_the_lower_rows(values, share, data):
    candidates = np.array(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    count = int(share * candidates.sum())
    rows = sorted(np.flatnonzero(candidates), key=lambda row: (-values[row], row))[:count]
    kept = choose(np.array(values, dtype=np.float32), count, candidates)
    assert np.flatnonzero(kept).tolist() == sorted(rows)


def test_thresholds_keep_everything_from_them_on(tmp_path):
    columns = write_pool(tmp_path / "pool", [100, 50])
    similarity = columns["clip_l14_similarity_score"]
    kept = filter_pool(tmp_path / "pool", [Stage("clip-score", threshold=float(similarity[7]))], **SMALL, work=tmp_path)
    assert format_uids(kept.uids) == columns["uid"][similarity >= similarity[7]].tolist()


@pytest.mark.parametrize("change", ["threads", "deflated", "remote"])
def test_threads_compression_and_place_change_no_bit(tmp_path, change):
    folder = tmp_path / "pool"
    write_pool(folder, [200, 150, 250, 100])
    np.save(tmp_path / "target.npy", made_columns(40, 16, np.random.default_rng(5))["l14_img"])
    stages = [*CLIP, Stage("norm-sim", keep="0.2", target=str(tmp_path / "target.npy"))]
    options = SMALL | {"group_size": 2}
    first = filter_pool(folder, stages, tmp_path / "a.npy", **options, threads=1)
    if change == "deflated":
        write_pool(folder, [200, 150, 250, 100], deflated=True)
    if change == "remote":
        memory = fsspec.filesystem("memory")
        for path in folder.iterdir():
            memory.pipe(f"memory://{tmp_path.name}/{path.name}", path.read_bytes())
        folder = f"memory://{tmp_path.name}"
    second = filter_pool(folder, stages, tmp_path / "b.npy", **options, threads=3)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert first.provenance["stages"] == second.provenance["stages"]
    assert not list(tmp_path.glob("*.work"))


def test_what_is_decompressed_can_be_kept_for_all_repetitions(tmp_path, monkeypatch):
    write_pool(tmp_path / "pool", [200, 150, 250, 100], deflated=True)
    written = []
    inflate = Pool.inflate
    monkeypatch.setattr(Pool, "inflate", lambda *arguments: (written.append(arguments[1:3]), inflate(*arguments)))
    options = SMALL | {"group_size": 2, "repeats": 3}
    first = filter_pool(tmp_path / "pool", CLIP, work=tmp_path / "one", **options)
    assert len(written) == 3 * 4 * 2
    written.clear()
    second = filter_pool(tmp_path / "pool", CLIP, work=tmp_path / "two", scratch=tmp_path / "scratch", **options)
    assert len(written) == 4 * 2
    assert np.array_equal(first.uids, second.uids)
    assert [path.suffix for path in (tmp_path / "one").iterdir() if path.is_dir()] == []


def test_a_run_that_died_goes_on_where_it_was(tmp_path, monkeypatch):
    write_pool(tmp_path / "pool", [200, 150, 250, 100])
    options = SMALL | {"group_size": 2, "threads": 1, "repeats": 3}
    expected = filter_pool(tmp_path / "pool", CLIP, tmp_path / "a.npy", **options)
    monkeypatch.setattr(scoring_module, "PART_ROWS", 1)  # a part a batch
    batches, whole = [], scoring_module.s_clip_loss_of_batch

    def dying(*arguments, **keywords):
        batches.append(1)
        if len(batches) == 9:
            raise KeyboardInterrupt
        return whole(*arguments, **keywords)

    monkeypatch.setattr(scoring_module, "s_clip_loss_of_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        filter_pool(tmp_path / "pool", CLIP, tmp_path / "b.npy", **options)
    assert not (tmp_path / "b.npy").exists()
    again = filter_pool(tmp_path / "pool", CLIP, tmp_path / "b.npy", **options)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert np.array_equal(expected.uids, again.uids)
    total = 3 * sum(-(-rows // 64) for rows in (350, 350))
    assert total <= len(batches) <= total + 3  # what was finished is not computed again


@pytest.mark.parametrize("score", ["s-clip-loss", "clip-score", "norm-sim-dynamic"])
def test_parts_that_were_damaged_are_computed_anew(tmp_path, monkeypatch, score):
    write_pool(tmp_path / "pool", [200, 150], deflated=True)
    stages, work = [Stage(score, keep="0.3", rounds=20 if score == "norm-sim-dynamic" else None)], tmp_path / "work"
    options = SMALL | {"work": work, "scratch": work / "scratch"}
    with monkeypatch.context() as killed:
        killed.setattr(dynamic_module, "sweep", lambda *_: None)
        expected = filter_pool(tmp_path / "pool", stages, **options)
    for number, path in enumerate(sorted(path for path in work.rglob("*") if path.is_file())):
        path.write_bytes(path.read_bytes()[:-1] if number % 2 else b"")
    again = filter_pool(tmp_path / "pool", stages, **options)
    assert np.array_equal(again.uids, expected.uids)


def test_changed_arguments_or_files_are_computed_anew(tmp_path):
    write_pool(tmp_path / "pool", [200, 150])
    work = {"work": tmp_path / "work"}
    one = filter_pool(tmp_path / "pool", CLIP, **SMALL, **work)
    other = filter_pool(tmp_path / "pool", CLIP, **SMALL | {"seed": 1}, **work)
    assert not np.array_equal(one.uids, other.uids)
    write_shard(tmp_path / "pool", "s1", made_columns(150, 16, np.random.default_rng(9)))
    changed = filter_pool(tmp_path / "pool", CLIP, **SMALL, **work)
    fresh = filter_pool(tmp_path / "pool", CLIP, **SMALL, work=tmp_path / "other")
    assert np.array_equal(changed.uids, fresh.uids)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_parquet_alone_is_scored_anew(tmp_path, same_size):
    columns = write_pool(tmp_path / "pool", [200])
    stages, work = [Stage("clip-score", keep="0.3")], {"work": tmp_path / "work"}
    filter_pool(tmp_path / "pool", stages, **SMALL, **work)
    shown = columns["clip_l14_similarity_score"]
    better, worse = np.argsort(-shown)[[30, 130]]  # kept and not, and no extremes that a footer tells
    shown[[better, worse]] = shown[[worse, better]]
    write_shard(tmp_path / "pool", "s0", columns if same_size else columns | {"more": np.arange(200)})
    changed = filter_pool(tmp_path / "pool", stages, **SMALL, **work)
    assert set(format_uids(changed.uids)) == set(columns["uid"][np.argsort(-shown)[:60]])


def test_the_similarities_of_two_models_are_not_mixed_up(tmp_path):
    columns = write_pool(tmp_path / "pool", [200])
    columns["clip_b32_similarity_score"] = -columns["clip_l14_similarity_score"]
    write_shard(tmp_path / "pool", "s0", columns)
    stages, work = [Stage("clip-score", keep="0.5")], {"work": tmp_path / "work"}
    kept = [filter_pool(tmp_path / "pool", stages, arch=arch, **SMALL, **work).uids for arch in ("l14", "b32")]
    assert not set(format_uids(kept[0])) & set(format_uids(kept[1]))


@pytest.mark.parametrize("given", [True, False])
def test_what_a_killed_run_left_is_gone_in_the_end(tmp_path, monkeypatch, given):
    write_pool(tmp_path / "pool", [100, 80], deflated=True)
    out = tmp_path / "out.npy"
    work = tmp_path / "given" if given else tmp_path / "out.npy.work"
    options = SMALL | {"work": work if given else None}
    with monkeypatch.context() as killed:
        killed.setattr(scoring_module, "rmtree", lambda *_, **__: None)
        killed.setattr(scoring_module, "sweep", lambda *_: None)
        killed.setattr("selectsampler.datacomp.filtering._remove", lambda _: None)
        filter_pool(tmp_path / "pool", CLIP, out, **options)
    parts = sorted(work.glob("*.safetensors"))
    assert list(work.glob("scratch-*"))
    (work / f".{parts[0].name}.0123.partial").write_bytes(b"cut")
    filter_pool(tmp_path / "pool", CLIP, out, **options)
    assert sorted(work.iterdir()) == parts if given else not work.exists()


def test_a_shard_that_breaks_while_it_is_read_is_named_or_left_out(tmp_path):
    columns = write_pool(tmp_path / "pool", [100, 80, 120, 90])
    broken = made_columns(120, 16, np.random.default_rng(1))
    broken["l14_txt"][33] = np.nan
    write_shard(tmp_path / "pool", "s2", broken)
    with pytest.raises(ShardError, match=r"Shard s2 .* row 33 of l14_txt is zero or not.*skip_broken"):
        filter_pool(tmp_path / "pool", CLIP, tmp_path / "a.npy", **SMALL)
    kept = filter_pool(tmp_path / "pool", CLIP, tmp_path / "a.npy", **SMALL, skip_broken=True)
    assert list(kept.provenance["broken"]) == ["s2"], kept.provenance["broken"]
    assert len(kept.uids) == int(Fraction("0.3") * 270)
    assert set(format_uids(kept.uids)) <= set(np.delete(columns["uid"], range(180, 300)))
    assert kept.provenance["rows"] == 270


@pytest.mark.parametrize(("damage", "message"), [(corrupt_uids, "its parquet fails"), (lose_uid, "row 105 is None")])
@pytest.mark.parametrize("score", ["s-clip-loss", "clip-score", "norm-sim-dynamic"])
def test_uids_that_cannot_be_read_are_found_before_anything_is_scored(tmp_path, monkeypatch, damage, message, score):
    columns = write_pool(tmp_path / "pool", [100, 180, 120])
    damage(tmp_path / "pool", "s1")
    stages, options = [Stage(score, keep="0.3")], SMALL | {"work": tmp_path / "work"}
    kept = filter_pool(tmp_path / "pool", stages, **options, skip_broken=True)
    assert list(kept.provenance["broken"]) == ["s1"]
    assert len(kept.uids) == int(Fraction("0.3") * 220)
    assert set(format_uids(kept.uids)) <= set(np.delete(columns["uid"], range(100, 280)))
    monkeypatch.setattr(scoring_module, "s_clip_loss_of_batch", None)  # not reached
    with pytest.raises(ShardError, match=f"Shard s1 .*{message}.*skip_broken goes on without"):
        filter_pool(tmp_path / "pool", stages, **options)


def test_a_shard_that_vanishes_before_its_uids_are_taken_is_left_out(tmp_path, monkeypatch):
    write_pool(tmp_path / "pool", [100, 80, 120])
    whole = Pool.columns

    def vanishing(pool, shard, names, rows=None):
        if rows is not None:
            (tmp_path / "pool" / "s1.parquet").unlink(missing_ok=True)
        return whole(pool, shard, names, rows)

    monkeypatch.setattr(Pool, "columns", vanishing)
    kept = filter_pool(tmp_path / "pool", CLIP, **SMALL, work=tmp_path / "work", skip_broken=True)
    assert list(kept.provenance["broken"]) == ["s1"]
    assert len(kept.uids) == int(Fraction("0.3") * 220)


def damage_npz(path: Path) -> None:
    """Change one bit of a feature, beyond what is read with the header."""
    content = bytearray(path.read_bytes())
    content[6000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("deflated", [False, True])
def test_no_member_is_scored_whose_checksum_is_wrong(tmp_path, deflated):
    write_pool(tmp_path / "pool", [100, 280, 120], deflated=deflated)
    damage_npz(tmp_path / "pool" / "s1.npz")
    with pytest.raises(ShardError, match=r"Shard s1 .*l14_img cannot be read"):
        filter_pool(tmp_path / "pool", CLIP, **SMALL, work=tmp_path / "work")
    kept = filter_pool(tmp_path / "pool", CLIP, **SMALL, work=tmp_path / "work", skip_broken=True)
    assert list(kept.provenance["broken"]) == ["s1"]


def test_a_shard_that_breaks_in_a_later_stage_is_left_out_of_all(tmp_path):
    write_pool(tmp_path / "pool", [100, 280, 120])
    np.save(tmp_path / "target.npy", np.ones((1, 16), dtype=np.float16))
    damage_npz(tmp_path / "pool" / "s1.npz")
    stages = [Stage("clip-score", keep="0.3"), Stage("norm-sim", keep="0.2", target=str(tmp_path / "target.npy"))]
    kept = filter_pool(tmp_path / "pool", stages, **SMALL, work=tmp_path / "work", skip_broken=True)
    assert list(kept.provenance["broken"]) == ["s1"]
    assert [stage["kept"] for stage in kept.provenance["stages"]] == [66, 44]


def test_only_what_stands_in_another_filters_file_is_kept(tmp_path):
    columns = write_pool(tmp_path / "pool", [100, 80])
    write_uids(tmp_path / "dfn.npy", open_uids(columns["uid"][::2]))
    kept = filter_pool(
        tmp_path / "pool", [Stage("clip-score", keep="0.3")], within=tmp_path / "dfn.npy", **SMALL, work=tmp_path
    )
    similarity = np.where(np.arange(180) % 2, -1, columns["clip_l14_similarity_score"])
    assert set(format_uids(kept.uids)) == set(columns["uid"][np.argsort(-similarity)[:54]])


@pytest.mark.parametrize("remote", [False, True])
def test_an_unsorted_file_of_another_filter_is_sorted_on_disk(tmp_path, monkeypatch, remote):
    monkeypatch.setattr(uid_files_module, "BLOCK", 16_384)
    monkeypatch.setattr(uids_module, "BLOCK", 16_384)
    columns = write_pool(tmp_path / "pool", [100, 80])
    others = np.random.default_rng(0).integers(2**62, 2**63, size=2_000_000, dtype=np.uint64).view(UID)
    path = str(tmp_path / "dfn.npy")
    np.save(path, np.concatenate([others, open_uids(columns["uid"][::-2])]))
    if remote:
        fsspec.filesystem("memory").put(path, f"memory://{tmp_path.name}/dfn.npy")
        path = f"memory://{tmp_path.name}/dfn.npy"
    tracemalloc.start()
    stages, work = [Stage("clip-score", threshold=-1)], tmp_path / "work"
    kept = filter_pool(tmp_path / "pool", stages, within=path, **SMALL, work=work)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert format_uids(kept.uids) == columns["uid"][1::2].tolist()
    assert peak < 13_000_000  # of the file's 16 million bytes, or 40 million where it is sorted in memory
    assert [path.suffix for path in work.iterdir() if path.suffix != ".safetensors"] == []


@pytest.mark.parametrize("score", ["s-clip-loss", "norm-sim-dynamic"])
def test_where_another_filter_left_too_few_it_is_named_before_anything_is_scored(tmp_path, monkeypatch, score):
    columns = write_pool(tmp_path / "pool", [100])
    write_uids(tmp_path / "dfn.npy", open_uids(columns["uid"][:20]))
    monkeypatch.setattr(scoring_module, "s_clip_loss_of_batch", None)  # not reached
    with pytest.raises(ValueError, match=r"30 samples are asked for, but .*dfn.npy \(within\) .* left 20"):
        filter_pool(
            tmp_path / "pool", [Stage(score, keep=0.3)], within=tmp_path / "dfn.npy", **SMALL, work=tmp_path / "w"
        )


def uids_cut_short(path):
    np.save(path, np.zeros(99, dtype=UID))
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"There is no .*dfn.npy"),
        (lambda path: path.write_bytes(b"junk" * 50), "cannot be read as an array"),
        (lambda path: np.save(path, np.zeros(9)), r"holds float64 of shape \(9,\)"),
        (uids_cut_short, "cut short, 5 bytes are missing"),
    ],
)
def test_a_wrong_file_of_another_filter_is_told_before_uids_are_read(tmp_path, write, message):
    write_pool(tmp_path / "pool", [60, 40])
    write(tmp_path / "dfn.npy")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        filter_pool(tmp_path / "pool", CLIP, within=tmp_path / "dfn.npy", **SMALL, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def open_uids(strings: np.ndarray) -> np.ndarray:
    from selectsampler.datacomp import parse_uids

    return parse_uids(strings)


def test_the_baselines_of_datacomp_keep_what_they_say(tmp_path):
    columns = write_pool(tmp_path / "pool", [100, 80])
    (tmp_path / "words.txt").write_text("photo\nZebra\n")
    np.save(tmp_path / "centroids.npy", columns["l14_img"][:10].astype(np.float32))
    np.save(tmp_path / "target.npy", columns["l14_img"][[3, 4]])
    stages = {
        "basic": Stage("basic"),
        "text-based": Stage("text-based", target=str(tmp_path / "words.txt")),
        "image-based": Stage(
            "image-based", target=str(tmp_path / "target.npy"), centroids=str(tmp_path / "centroids.npy")
        ),
    }
    shorter, longer = (f(columns["original_width"], columns["original_height"]) for f in (np.minimum, np.maximum))
    photo = np.array(["photo" in text for text in columns["text"]])
    nearest = (columns["l14_img"].astype(np.float32) @ columns["l14_img"][:10].astype(np.float32).T).argmax(axis=1)
    expected = {
        "basic": photo & (shorter >= 200) & (longer / shorter <= 3),
        "text-based": photo,
        "image-based": np.isin(nearest, [3, 4]),
    }
    for name, stage in stages.items():
        kept = filter_pool(tmp_path / "pool", [stage], **SMALL, work=tmp_path / name)
        assert format_uids(kept.uids) == columns["uid"][expected[name]].tolist()


def test_a_caption_that_is_null_counts_as_an_empty_one(tmp_path):
    columns = write_pool(tmp_path / "pool", [40])
    columns["original_width"][:] = columns["original_height"][:] = 300
    texts = np.array(["a photo of things", None] * 20, dtype=object)
    write_shard(tmp_path / "pool", "s0", columns | {"text": texts})
    (tmp_path / "words.txt").write_text("photo\n")
    empty = made_columns(30, 16, np.random.default_rng(1)) | {"text": pyarrow.nulls(30)}
    write_shard(tmp_path / "pool", "s1", empty)
    for stage in (Stage("basic"), Stage("text-based", target=str(tmp_path / "words.txt"))):
        kept = filter_pool(tmp_path / "pool", [stage], **SMALL, work=tmp_path / "work")
        assert format_uids(kept.uids) == columns["uid"][::2].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "size"}, "must be one of"),
        ({"score": "s-clip-loss"}, "either keep"),
        ({"score": "s-clip-loss", "keep": 0.3, "threshold": 0.1}, "either keep"),
        ({"score": "s-clip-loss", "keep": 1.2}, "keep is 1.2"),
        ({"score": "s-clip-loss", "keep": "a third"}, "keep is 'a third'"),
        ({"score": "norm-sim", "keep": 0.2}, "needs a target"),
        ({"score": "norm-sim", "keep": 0.2, "target": "t.npy", "p": 1}, "p is 1"),
        ({"score": "basic", "keep": 0.2}, "neither keep nor threshold"),
        ({"score": "image-based", "target": "t.npy"}, "needs centroids"),
        ({"score": "clip-score", "keep": "1/0"}, "keep is '1/0'"),
        ({"score": "clip-score", "threshold": np.nan}, "threshold is nan"),
        ({"score": "clip-score", "threshold": -np.inf}, "threshold is -inf, but must be finite"),
        ({"score": "s-clip-loss", "keep": 0.2, "target": "t.npy"}, "s-clip-loss takes no target"),
        ({"score": "s-clip-loss", "keep": 0.2, "centroids": "c.npy"}, "s-clip-loss takes no centroids"),
        ({"score": "clip-score", "keep": 0.2, "p": 2}, "clip-score takes no p"),
        ({"score": "clip-score", "keep": 0.2, "rounds": 2}, "clip-score takes no rounds"),
        ({"score": "norm-sim-dynamic", "threshold": 0.2}, "norm-sim-dynamic needs keep"),
        ({"score": "norm-sim-dynamic", "keep": 0.2, "rounds": 0}, "rounds is 0"),
    ],
)
def test_stages_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stage(**arguments)


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        ([], {}, "no stages"),
        (CLIP, {"arch": "g14"}, "arch is 'g14'"),
        (CLIP, {"group_size": 1}, "single shard"),
        (CLIP, {"batch_size": 0}, "batch_size is 0"),
        (CLIP, {"seed": -1}, "seed is -1, but it must be at least 0"),
        (CLIP[0], {}, r"a single Stage, but must be a list: give \[Stage\('s-clip-loss'"),
        (CLIP, {"temperature": 100}, "logit scale"),
        ([*CLIP, Stage("clip-score", keep=0.5)], {}, "the stages before left 30"),
        ([*CLIP, Stage("norm-sim", keep=0.2, target="nowhere.npy")], {}, "no target nowhere.npy"),
        (CLIP, {"duplicates": "some"}, "duplicates is 'some'"),
        (CLIP, {"threads": 0}, "threads is 0"),
        (CLIP, {"device": "cudaa"}, "device is 'cudaa'"),
        (CLIP, {"device": "cuda:x"}, "device is 'cuda:x'"),
        (CLIP, {"device": "cuda:99"}, "torch finds [0-9]+ CUDA devices"),
        (CLIP, {"output": "s3://bucket/a.npy"}, "output is s3://bucket/a.npy, but it must be a local path"),
        (CLIP, {"output": Path("s3://bucket/a.npy")}, "must be a local path"),
        (CLIP, {"scratch": "memory://here"}, "scratch is memory://here"),
    ],
)
def test_requests_that_make_no_sense_are_refused_before_anything_is_computed(tmp_path, stages, options, message):
    write_pool(tmp_path / "pool", [60, 40])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        filter_pool(tmp_path / "pool", stages, **{**SMALL, "work": tmp_path / "work"} | options)
    assert not (tmp_path / "work").exists()


def faulty(row: float) -> np.ndarray:
    features = np.ones((5, 16), dtype=np.float32)
    features[3] = row
    return features


@pytest.mark.parametrize(
    ("score", "files", "message"),
    [
        ("norm-sim", {"target": faulty(np.nan)}, r"The target .*target.npy\[3\] holds NaN"),
        ("norm-sim", {"target": faulty(0)}, r"target.npy\[3\] is zero"),
        ("norm-sim", {"target": np.ones((5, 8), dtype=np.float32)}, "dimension 8, but l14_img has 16"),
        ("norm-sim", {"target": np.ones((0, 16), dtype=np.float32)}, "is empty"),
        ("image-based", {"target": faulty(np.nan), "centroids": faulty(1)}, r"target.npy\[3\] holds NaN"),
        ("image-based", {"target": faulty(1), "centroids": np.ones((5, 8), dtype=np.float32)}, r"\(C, 16\)"),
        ("image-based", {"target": faulty(1), "centroids": faulty(np.inf)}, "Centroid 3 of .* is not finite"),
        ("text-based", {"target": "cat\npolar bear\n"}, "Line 2 of .* is 'polar bear'"),
        ("text-based", {"target": "\n"}, "holds no word"),
    ],
)
def test_faults_of_a_later_stages_files_are_told_first_and_not_blamed_on_shards(tmp_path, score, files, message):
    write_pool(tmp_path / "pool", [60, 40])
    paths = {}
    for name, content in files.items():
        paths[name] = str(tmp_path / f"{name}.{'txt' if isinstance(content, str) else 'npy'}")
        Path(paths[name]).write_text(content) if isinstance(content, str) else np.save(paths[name], content)
    stage = Stage(score, keep="0.2" if score == "norm-sim" else None, **paths)
    with pytest.raises(ValueError, match=message):
        filter_pool(tmp_path / "pool", [*CLIP, stage], **SMALL, work=tmp_path / "work", skip_broken=True)
    assert not (tmp_path / "work").exists()


def test_a_pool_of_broken_shards_only_is_told_as_that(tmp_path):
    columns = made_columns(50, 16, np.random.default_rng(0))
    columns["l14_img"][7] = 0
    (tmp_path / "pool").mkdir()
    write_shard(tmp_path / "pool", "s0", columns)
    write_shard(tmp_path / "pool", "s1", columns)
    with pytest.raises(
        ValueError, match=r"No shard of .* can be used \(2 are broken\). The first, s0: row 7 of l14_img"
    ):
        filter_pool(tmp_path / "pool", CLIP, **SMALL, work=tmp_path / "work", skip_broken=True)


def test_a_row_without_direction_or_similarity_is_named_as_the_shard_counts_it(tmp_path):
    write_pool(tmp_path / "pool", [60])
    columns = made_columns(50, 16, np.random.default_rng(0))
    columns["l14_img"][17] = 0
    columns["clip_l14_similarity_score"][17] = 1
    write_shard(tmp_path / "pool", "s1", columns)
    np.save(tmp_path / "target.npy", faulty(1))
    stages = [Stage("clip-score", threshold=0.5), Stage("norm-sim", keep="0.01", target=str(tmp_path / "target.npy"))]
    with pytest.raises(ShardError, match=r"Shard s1 .*row 17 of l14_img is zero"):
        filter_pool(tmp_path / "pool", stages, **SMALL, work=tmp_path / "work")
    columns["clip_l14_similarity_score"][23] = np.nan
    write_shard(tmp_path / "pool", "s1", columns)
    with pytest.raises(ShardError, match=r"Shard s1 .*row 23 of clip_l14_similarity_score"):
        filter_pool(tmp_path / "pool", stages, **SMALL, work=tmp_path / "work")


@pytest.mark.parametrize("deflated", [False, True])
def test_a_shard_without_rows_changes_nothing_in_any_stage(tmp_path, deflated):
    columns = write_pool(tmp_path / "pool", [60, 40], deflated=deflated)
    (tmp_path / "words.txt").write_text("photo\n")
    np.save(tmp_path / "features.npy", columns["l14_img"][:9])
    features = {"target": str(tmp_path / "features.npy")}
    options = SMALL | {"within": tmp_path / "within.npy"}
    write_uids(tmp_path / "within.npy", open_uids(columns["uid"][:90]))
    stages = [
        *[Stage("s-clip-loss", keep="0.8"), Stage("clip-score", keep="0.7"), Stage("basic")],
        Stage("text-based", target=str(tmp_path / "words.txt")),
        Stage("image-based", **features, centroids=features["target"]),
        Stage("norm-sim", threshold=0.1, **features),
    ]
    without = filter_pool(tmp_path / "pool", stages, **options, work=tmp_path / "without")
    write_shard(tmp_path / "pool", "s9", {name: column[:0] for name, column in columns.items()}, deflated)
    with_it = filter_pool(tmp_path / "pool", stages, **options, work=tmp_path / "with")
    assert len(without.uids) > 5
    assert np.array_equal(without.uids, with_it.uids)


def test_targets_are_read_from_files_and_folders(tmp_path):
    columns = write_pool(tmp_path / "pool", [20, 30])
    assert np.array_equal(read_target(tmp_path / "pool", "l14_img"), columns["l14_img"])
    assert np.array_equal(read_target(tmp_path / "pool" / "s0.npz", "l14_txt"), columns["l14_txt"][:20])
    with pytest.raises(ValueError, match="not 'b32_img'"):
        read_target(tmp_path / "pool" / "s0.npz", "b32_img")
    half = torch.from_numpy(columns["l14_img"]).bfloat16()
    save_file({"image": half}, tmp_path / "half.safetensors")
    assert np.array_equal(read_target(tmp_path / "half.safetensors", "l14_img"), half.float().numpy())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "half.safetensors").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"cut.safetensors cannot be read"):
        read_target(tmp_path / "cut.safetensors", "l14_img")
    (tmp_path / "junk.npy").write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=r"junk.npy cannot be read"):
        read_target(tmp_path / "junk.npy", "l14_img")
    np.save(tmp_path / "flat.npy", np.zeros(4))
    with pytest.raises(ValueError, match=r"floats of shape \(T, D\)"):
        read_target(tmp_path / "flat.npy", "l14_img")
    np.save(tmp_path / "pool" / ".half-written.npy", np.zeros(4))
    assert len(read_target(tmp_path / "pool", "l14_img")) == 50


def test_a_planted_pool_is_separated_as_the_paper_says(tmp_path):
    from selectsampler.recipes.datacomp import kinds_of, make_pool

    from selectsampler.datacomp import contains

    target = make_pool(tmp_path / "pool", shards=4, rows=1500, dim=96)
    kinds = kinds_of(tmp_path / "pool")
    filters = {
        "cosine": [Stage("clip-score", keep="0.2")],
        "loss": [Stage("s-clip-loss", keep="0.2")],
        "near": [Stage("s-clip-loss", keep="0.3"), Stage("norm-sim", keep="0.2", target=target)],
    }
    share = {}
    for name, stages in filters.items():
        kept = filter_pool(tmp_path / "pool", stages, batch_size=2000, repeats=1, progress=False, work=tmp_path / name)
        share[name] = {kind: (contains(np.sort(kept.uids), uids) > 0).mean() for kind, uids in kinds.items()}
    assert share["cosine"]["generic"] > 5 * share["loss"]["generic"]
    assert share["loss"]["mismatched"] < 0.01
    assert share["near"]["near_target"] > 1.3 * share["loss"]["near_target"]


@pytest.mark.parametrize(
    "stages",
    [
        [Stage("s-clip-loss", keep=1)],
        [Stage("clip-score", keep=1), Stage("norm-sim", keep=1, target="target.npy")],
        [Stage("norm-sim-dynamic", keep=1, rounds=2)],
    ],
    ids=lambda stages: stages[-1].score,
)
def test_a_sample_takes_at_most_24_bytes_even_where_all_are_kept(tmp_path, monkeypatch, stages):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pool_module, "BLOCK", 256)  # what is read at once would hide what grows
    monkeypatch.setattr(uid_files_module, "BLOCK", 1024)
    monkeypatch.setattr(dynamic_module, "BLOCK", 256)
    np.save("target.npy", np.ones((2, 16), dtype=np.float16))
    options = SMALL | {"group_size": 2, "repeats": 1, "threads": 1, "batch_size": 512}
    peaks = []
    for name, count in (("warm", 1), ("small", 8), ("large", 24)):
        write_pool(tmp_path / name, [4_000] * count)
        gc.collect()
        tracemalloc.start()
        filter_pool(tmp_path / name, stages, f"{name}.npy", **options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert 4 < (peaks[2] - peaks[1]) / 64_000 <= 24  # and it does see what grows


MEMORY = """
import sys
import pyarrow.parquet, fsspec, torch
from selectsampler.datacomp import Stage, filter_pool

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

pool, target = sys.argv[1:]
filter_pool
before = status("VmRSS")
stages = [Stage("s-clip-loss", keep="0.3"), Stage("norm-sim", keep="0.2", target=target)]
filter_pool(pool, stages, pool + ".npy", batch_size=512, repeats=1, threads=1)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from Linux")
def test_embeddings_are_never_in_memory_all_at_once(tmp_path):
    (tmp_path / "pool").mkdir()
    for number in range(4):
        few = made_columns(500, 512, np.random.default_rng(number))
        columns = {name: np.concatenate([column] * 60) for name, column in few.items()}
        write_shard(tmp_path / "pool", f"s{number}", columns)
    embeddings = sum(path.stat().st_size for path in (tmp_path / "pool").glob("*.npz")) / 2**20
    np.save(tmp_path / "target.npy", few["l14_img"][:50])
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "pool"), str(tmp_path / "target.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.8 * embeddings
