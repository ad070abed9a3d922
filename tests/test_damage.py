"""Intactness: damage is found without a damaged image to learn from, and rarity is none."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import shared
from PIL import Image
from selectsampler.recipes.corruptions import PAPER_KINDS, Corrupted
from selectsampler.recipes.data import ZippedImageFolder
from sklearn.metrics import roc_auc_score

import selectsampler as ss
from selectsampler.embeddings import STATISTICS, damaging
from selectsampler.embeddings.damaging import DAMAGES, EVERY, twin_of
from selectsampler.embeddings.statistics import image_statistics, statistics_of
from selectsampler.scores import damage
from selectsampler.scores.damage import intactness

DIM = 12


@pytest.fixture
def few_steps(monkeypatch):
    """Enough for a dozen statistics."""
    monkeypatch.setattr(damage, "ROUNDS", ((150, 1.0), (150, 0.5), (300, 0.75)))


def damaged(statistics, kind, generator):
    """Each kind moves the content's own value of two statistics, by more or less."""
    moved = statistics.clone()
    strength = 1 + 2 * torch.rand(len(moved), 1, generator=generator)
    moved[:, 2 * kind : 2 * kind + 1] += strength
    moved[:, 2 * kind + 1 : 2 * kind + 2] -= strength
    return moved


def made_pool(samples=1500, *, share=0.0, kind=0, seed=0):
    """Statistics that hang together in pairs, of which damage tears one apart: (statistics, intact, twins, theirs)."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(samples, DIM // 2, generator=generator).repeat_interleave(2, dim=1)
    statistics = content + 0.4 * torch.randn(samples, DIM, generator=generator)
    intact = torch.rand(samples, generator=generator) >= share
    statistics[~intact] = damaged(statistics[~intact], kind, generator)
    rows = torch.randperm(samples, generator=generator)[: samples // 4].sort().values
    kinds = torch.randint(3, (len(rows),), generator=generator)
    twins = torch.cat([damaged(statistics[row][None], int(k), generator) for row, k in zip(rows, kinds, strict=True)])
    return statistics, intact, torch.stack([rows, kinds], dim=1), twins


# What intactness means


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_damage_is_found_in_a_pool_of_which_a_part_is_damaged_already(few_steps, share):
    statistics, intact, twins, theirs = made_pool(share=share)
    found = intactness(statistics, twins, theirs)
    assert found.dtype == torch.float32
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert roc_auc_score(intact, found) > 0.92
    assert float((found[intact] < 0.5).float().mean()) < 0.03


def test_a_pool_without_damage_is_hardly_flagged(few_steps):
    statistics, _, twins, theirs = made_pool()
    assert float((intactness(statistics, twins, theirs) < 0.5).float().mean()) < 0.03


def test_a_rare_intact_class_is_no_suspect():
    """Three percent of the images lie where no other does, and are as whole as any."""
    statistics, intact, twins, theirs = made_pool(share=0.2)
    rare = torch.zeros_like(intact)
    rare[torch.randperm(len(rare), generator=torch.Generator().manual_seed(1))[:45]] = True
    apart = torch.tensor([3.0, 3.0, -3.0, -3.0, 3.0, 3.0] + [0.0] * (DIM - 6))
    found = intactness(
        torch.where(rare[:, None], statistics + apart, statistics),
        twins,
        torch.where(rare[twins[:, 0]][:, None], theirs + apart, theirs),
    )
    assert float((found[rare & intact] < 0.5).float().mean()) <= 0.05


def test_the_same_seed_gives_the_same_bits_and_draws_nothing_from_the_global_generator(monkeypatch):
    monkeypatch.setattr(damage, "ROUNDS", ((10, 1.0), (10, 0.7)))
    statistics, _, twins, theirs = made_pool(samples=400)
    torch.manual_seed(0)
    first = intactness(statistics, twins, theirs, seed=3)
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == drawn
    torch.manual_seed(1)
    assert torch.equal(intactness(statistics, twins, theirs, seed=3), first)
    assert not torch.equal(intactness(statistics, twins, theirs, seed=4), first)


def test_unit_and_precision_of_a_statistic_hardly_matter(few_steps):
    statistics, intact, twins, theirs = made_pool(samples=600, share=0.2)
    found = intactness((8 * statistics + 2).half(), twins, (8 * theirs + 2).half())
    assert found.dtype == torch.float32
    assert roc_auc_score(intact, found) > 0.91


def test_a_statistic_that_never_differs_does_no_harm(few_steps):
    statistics, intact, twins, theirs = made_pool(samples=600, share=0.2)
    wider, theirs = (torch.cat([x, torch.full((len(x), 1), 7.0)], dim=1) for x in (statistics, theirs))
    found = intactness(wider, twins, theirs)
    assert roc_auc_score(intact, found) > 0.91


def test_images_that_are_not_eligible_get_zero_and_take_no_part(monkeypatch):
    monkeypatch.setattr(damage, "ROUNDS", ((10, 1.0), (10, 0.7)))
    statistics, _, twins, theirs = made_pool(samples=500)
    eligible = torch.arange(500) % 10 > 0
    noise = torch.where(eligible[:, None], statistics, 1e3 * torch.randn_like(statistics))
    first, second = (intactness(x, twins, theirs, eligible=eligible) for x in (statistics, noise))
    assert torch.equal(first, second)
    assert (first[~eligible] == 0).all()
    assert (first[eligible] > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_statistics": None}, "There are no image statistics or no damaged twins: embed"),
        ({"twins": None}, "There are no image statistics or no damaged twins: embed"),
        ({"twins": torch.zeros(3, 2, dtype=torch.int64)}, r"twins must be int64 of shape \(100, 2\), not \(3, 2\)"),
        ({"twins": torch.full((100, 2), 400)}, r"twins\[:, 0\] must lie in \[0, 400\)"),
        ({"image_statistics": torch.full((400, DIM), torch.nan)}, "image_statistics holds NaN or infinity"),
        ({"twin_statistics": torch.ones(100, 3)}, "twin_statistics has dimension 3, but 12 was expected"),
        ({"eligible": torch.ones(3)}, r"eligible must be a bool tensor of shape \(400,\)"),
        ({"eligible": torch.arange(400) < 40}, r"There are damaged twins of \d+ images, but 30 are needed"),
    ],
)
def test_what_cannot_be_judged_is_refused(changes, message):
    statistics, _, twins, theirs = made_pool(samples=400)
    with pytest.raises(ValueError, match=message):
        intactness(**{"image_statistics": statistics, "twins": twins, "twin_statistics": theirs, **changes})


# Twins


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (32, 32), (90, 61)])
def test_every_kind_of_damage_keeps_the_size_and_changes_the_picture(kind, size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    results = [DAMAGES[kind](image, np.random.default_rng(seed)) for seed in range(20)]
    assert {(result.size, result.mode) for result in results} == {(size, "RGB")}
    if min(size) > 4:
        assert all((np.asarray(result) != pixels).any() for result in results)
    assert np.array_equal(np.asarray(image), pixels)


def test_a_twin_follows_from_the_pixels_alone(images_of):
    images = images_of(300)
    first, second = ([twin_of(image) for image in chosen] for chosen in (images, images[::-1]))
    assert [None if t is None else (t[0], t[1].tobytes()) for t in first] == [
        None if t is None else (t[0], t[1].tobytes()) for t in second[::-1]
    ]
    made = [twin for twin in first if twin is not None]
    assert 300 / EVERY / 1.6 < len(made) < 1.6 * 300 / EVERY
    assert {kind for kind, _ in made} == set(range(len(DAMAGES)))


def test_embed_notes_twins_and_keeps_them(images_of, tiny_clip, tmp_path):
    images = images_of(40)
    expected = [(row, *twin) for row, twin in enumerate(map(twin_of, images)) if twin is not None]
    options = {"class_names": ["a", "b"], "labels": [0, 1] * 20, "device": "cpu", "progress": False}
    dataset = [(image, 0) for image in images]
    runs = [ss.embed(dataset, tiny_clip, **options, **more) for more in ({}, *[{"cache_dir": tmp_path}] * 2)]
    runs[0].save(tmp_path / "embeddings")
    for embeddings in (*runs, ss.Embeddings.load(tmp_path / "embeddings")):
        assert embeddings.twins.tolist() == [[row, kind] for row, kind, _ in expected]
        statistics = np.stack([image_statistics(np.asarray(twin)) for _, _, twin in expected])
        assert torch.equal(embeddings.twin_statistics, torch.from_numpy(statistics))


# Statistics


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (7, 40), (8, 8), (9, 300), (300, 8), (500, 333)])
def test_statistics_are_finite_for_every_size(size):
    for pixels in (
        np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8),
        np.zeros((*size, 3), dtype=np.uint8),
    ):
        values = image_statistics(pixels)
        assert values.shape == (len(STATISTICS),) == (len(set(STATISTICS)),)
        assert np.isfinite(values).all()


def test_the_statistics_of_an_image_are_the_same_bits_alone_and_among_others_of_any_size():
    random = np.random.default_rng(0)
    sizes = [(32, 32), (40, 9), (32, 32), (5, 3), (40, 9), (300, 270), (32, 32)]
    images = [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    assert np.array_equal(statistics_of(images), np.stack([image_statistics(pixels) for pixels in images]))


def smooth_levels(change):
    """An image of which all levels between 20 and 235 are in use, after a change of them."""
    values = np.random.default_rng(0).normal(110, 35, (32, 32, 3)).clip(20, 235)
    return np.rint(np.clip(change(values), 0, 255)).astype(np.uint8)


def test_what_an_exposure_does_to_the_levels_is_seen():
    named = [
        dict(zip(STATISTICS, image_statistics(smooth_levels(change)).tolist(), strict=True))
        for change in (lambda x: x, lambda x: x + 90, lambda x: x - 90, lambda x: np.rint(x) * 1.4)
    ]
    plain, lighter, darker, gained = named
    assert lighter["clipped_white"] > plain["clipped_white"] == pytest.approx(0, abs=0.05)
    assert darker["clipped_black"] > plain["clipped_black"] + 1
    assert lighter["deepest"] == pytest.approx(plain["deepest"] + 90 / 255, abs=0.01)
    assert darker["palest"] == pytest.approx(plain["palest"] - 90 / 255, abs=0.01)
    assert plain["deepest"] > plain["luma_2"]  # the largest channel of dark pixels, not their smallest
    assert gained["comb"] > 1.5 * plain["comb"]


def test_statistics_do_not_prefer_rows_to_columns():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    first, second = (dict(zip(STATISTICS, image_statistics(x), strict=True)) for x in (pixels, pixels.swapaxes(0, 1)))
    swaps = {"horizontal": "vertical", "rows": "columns"}
    swaps |= {after: before for before, after in swaps.items()}
    for name, value in first.items():
        other = "_".join(swaps.get(part, part) for part in name.split("_"))
        assert second[other] == pytest.approx(value, abs=2e-3), name


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_log_odds_have_converged_and_stay_within_the_evidence(share, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    twins = 8 + 3 * torch.randn(300, generator=generator)
    images = -4 + 2 * torch.randn(5000, generator=generator)  # far below all twins: nothing says how steep odds are
    images[: int(share * 5000)] = 8 + 3 * torch.randn(int(share * 5000), generator=generator)
    odds = damage._log_odds(images, twins, least=1e-3)
    assert float((odds[1:] - odds[:-1]).abs().max()) <= 1.7 * float((images[1:] - images[:-1]).abs().max())
    assert float(torch.sigmoid(odds.clamp(max=20)).mean()) == pytest.approx(max(share, 1e-3), rel=0.5, abs=1e-3)
    assert float(odds.max()) < 40


def test_evidence_that_knows_nothing_damns_no_image():
    evidence = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    odds = damage._log_odds(evidence, evidence[:200], least=5e-3)
    assert float(torch.sigmoid(odds).mean()) < 0.02


def test_twins_of_which_every_original_looks_damaged_are_learned_from_all_the_same(few_steps):
    statistics, _, twins, theirs = made_pool()
    few = slice(60)
    statistics[twins[few, 0]] = damaged(statistics[twins[few, 0]], 0, torch.Generator().manual_seed(1))
    found = intactness(statistics, twins[few], theirs[few])
    assert found.isfinite().all()


# On real images


@pytest.mark.slow
def test_half_of_a_real_pool_holds_next_to_no_damage():
    """500 images a class, so 800 twins to learn from; `benchmarks/damage.py` measures all, with 4,200."""
    archive, model = shared("data/cifar10.zip"), shared("models/cifar-clip")
    pool = ZippedImageFolder(archive, "cifar10/train", accept=lambda name: int(Path(name).stem) < 500)
    corrupted = Corrupted(pool, "mixed", share=0.2, seed=0)
    embeddings = ss.embed(corrupted, f"local-dir:{model}", class_names=pool.classes, progress=False)
    found = intactness(embeddings.image_statistics, embeddings.twins, embeddings.twin_statistics)
    kept = found >= found.median()
    kinds = np.array(corrupted.kinds, dtype=object)
    stays = {kind: float(kept[torch.from_numpy(kinds == kind)].float().mean()) for kind in PAPER_KINDS}
    assert max(share for kind, share in stays.items() if kind != "fog") <= 0.05, stays
    assert stays["fog"] <= 0.16, stays
    whole = torch.tensor([kind is None for kind in corrupted.kinds])
    flagged = [float((found[whole & (embeddings.labels == label)] < 0.5).float().mean()) for label in range(10)]
    assert max(flagged) <= 0.08, flagged


# Twins of large images


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_twin_of_a_large_image_is_made_of_its_middle_in_the_memory_of_two(kind, monkeypatch):
    monkeypatch.setattr(damaging, "DAMAGES", {kind: DAMAGES[kind]})
    monkeypatch.setattr(damaging, "EVERY", 1)
    image = noise_image(2400, 1800)
    tracemalloc.start()
    _, twin = twin_of(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 3 * 2400 * 1800
    pixels, before = np.asarray(twin), np.asarray(image)
    assert (pixels != before).any()
    rows, columns = np.nonzero((pixels != before).any(axis=2))
    assert rows.min() >= 700
    assert rows.max() < 1100
    assert columns.min() >= 1000
    assert columns.max() < 1400
    assert (image_statistics(pixels) != image_statistics(before)).any()


def noise_image(width, height):
    """Smooth shapes with some grain."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(40, 215, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    grain = random.integers(-8, 9, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + grain).astype(np.uint8))
