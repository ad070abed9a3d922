"""s-CLIPLoss against its definition in float64, at the edges of float32, in its memory, and in the fused kernel."""

import os
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from selectsampler.scores import s_clip_loss
from selectsampler.scores.s_clip_loss import batch_sizes, deal, temperature_of


def definition(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    logits = normalize(image.double(), dim=1) @ normalize(text.double(), dim=1).T / temperature
    return (logits.diag() - (logits.logsumexp(dim=1) + logits.logsumexp(dim=0)) / 2).mul(temperature).float()


def as_published(image: Tensor, text: Tensor, temperature: float) -> Tensor:
    """The released computation on one full batch: three B x B buffers, no stabilisation."""
    weights = torch.exp(image @ text.T / temperature)
    partition = torch.log(weights.sum(dim=1)) + torch.log(weights.sum(dim=0))
    return (image * text).sum(dim=1) - temperature / 2 * partition


def random_pairs(samples: int, dim: int = 32, *, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(samples, dim, generator=generator)
    return image, image + noise * torch.randn(samples, dim, generator=generator)


@pytest.mark.parametrize("samples", [1, 2, 63, 300, 4100])
@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.07, 1.0])
def test_one_batch_equals_the_definition(samples, temperature):
    image, text = random_pairs(samples)
    scores = s_clip_loss(image, text, temperature=temperature)
    assert scores.dtype == torch.float32
    assert_close(scores, definition(image, text, temperature), atol=1e-5, rtol=0)


def test_a_full_batch_equals_the_published_computation():
    image, text = (normalize(features, dim=1) for features in random_pairs(3000, 64, noise=3.0))
    ours = s_clip_loss(image, text, temperature=0.01, batch_size=3000)
    assert_close(ours, as_published(image, text, 0.01), atol=1e-4, rtol=0)


def test_repeats_average_the_definition_over_the_deals():
    image, text = random_pairs(500)
    expected = torch.zeros(500)
    for repeat in range(3):
        for rows in deal(500, 128, seed=(7, repeat)):
            expected[rows] += definition(image[rows], text[rows], 0.05) / 3
    assert_close(
        s_clip_loss(image, text, temperature=0.05, batch_size=128, repeats=3, seed=7), expected, atol=1e-5, rtol=0
    )


@given(samples=st.integers(1, 400), batch_size=st.integers(1, 500), seed=st.integers(0, 2**32))
def test_a_deal_holds_every_sample_once_in_batches_that_differ_by_at_most_one(samples, batch_size, seed):
    batches = deal(samples, batch_size, seed=seed)
    sizes = [len(rows) for rows in batches]
    assert sizes == batch_sizes(samples, batch_size)
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= batch_size
    assert torch.cat(batches).sort().values.tolist() == list(range(samples))


def test_seeds_and_repetitions_deal_differently_and_the_same_seed_the_same():
    first = torch.cat(deal(100, 10, seed=(0, 0)))
    assert torch.equal(first, torch.cat(deal(100, 10, seed=(0, 0))))
    assert not torch.equal(first, torch.cat(deal(100, 10, seed=(0, 1))))
    assert not torch.equal(first, torch.cat(deal(100, 10, seed=(1, 0))))


def clusters_at_both_ends(samples: int) -> tuple[Tensor, Tensor]:
    """Pairs that agree, and pairs that point away from all others, up to 2 / temperature below."""
    image, text = (normalize(features, dim=1) for features in random_pairs(samples, 8, noise=0.01))
    text[: samples // 3] = -image[0]
    image[samples // 3 : samples // 2] = image[0]
    return image, text


@pytest.mark.parametrize("temperature", [0.001, 0.0013, 0.005, 0.01, 0.02])
@pytest.mark.parametrize("samples", [40, 2500])
def test_no_temperature_overflows_or_underflows(samples, temperature):
    image, text = clusters_at_both_ends(samples)
    scores = s_clip_loss(image, text, temperature=temperature)
    assert scores.isfinite().all()
    assert_close(scores, definition(image, text, temperature), atol=1e-5, rtol=0)


def test_logits_at_the_lower_end_of_float32_keep_their_digits():
    image = normalize(torch.ones(50, 16) + 0.05 * random_pairs(50, 16)[0], dim=1)
    text = -image.flip(0)  # exp(-100) has two bits in float32
    assert_close(s_clip_loss(image, text, temperature=0.01), definition(image, text, 0.01), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.001, 2), scale=st.floats(0.01, 100), noise=st.floats(0, 10))
def test_length_does_not_matter_and_scores_are_at_most_zero(seed, temperature, scale, noise):
    image, text = random_pairs(50, 16, seed=seed, noise=noise)
    scores = s_clip_loss(image * scale, text / scale, temperature=temperature)
    assert_close(scores, definition(image, text, temperature), atol=1e-5, rtol=0)
    assert scores.max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_dtype_are_computed_in_float32(dtype):
    image, text = (normalize(features, dim=1).to(dtype) for features in random_pairs(300))
    scores = s_clip_loss(image, text, temperature=0.01)
    assert scores.dtype == torch.float32
    assert_close(scores, definition(image, text, 0.01), atol=1e-5, rtol=0)


def test_a_generic_caption_ranks_lower_than_its_cosine_says():
    generator = torch.Generator().manual_seed(0)
    centre = normalize(torch.randn(64, generator=generator), dim=0)
    image = normalize(centre + 0.12 * torch.randn(1000, 64, generator=generator), dim=1)
    text = normalize(image + 0.12 * torch.randn(1000, 64, generator=generator), dim=1)
    text[:100] = normalize(centre + 0.01 * torch.randn(100, 64, generator=generator), dim=1)  # "a photo"
    cosine = (image * text).sum(dim=1)
    scores = s_clip_loss(image, text, temperature=0.01)
    share = lambda values: (values.argsort().argsort()[:100] / 1000).mean()  # noqa: E731
    assert share(cosine) > 0.3
    assert share(scores) < 0.12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 100.0}, "logit scale"),
        ({"temperature": 0.0001}, "at least 0.001"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"text_features": torch.ones(5, 4)}, "5 rows"),
        ({"text_features": torch.ones(6, 5)}, "dimension 5"),
        ({"image_features": torch.ones(6, 4).index_fill(0, torch.tensor(3), 0)}, r"image_features\[3\] is zero"),
        ({"image_features": torch.ones(6, 4).index_fill(0, torch.tensor(2), torch.nan)}, "row 2"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"image_features": torch.ones(6, 4), "text_features": torch.ones(6, 4), "temperature": 0.01}
    with pytest.raises(ValueError, match=message):
        s_clip_loss(**(arguments | change))


def test_no_pairs_have_no_scores():
    assert s_clip_loss(torch.ones(0, 4), torch.ones(0, 4), temperature=0.01).shape == (0,)


def test_the_temperature_comes_from_the_model():
    assert temperature_of(SimpleNamespace(logit_scale=torch.tensor(100.0).log())) == pytest.approx(0.01)
    assert temperature_of(SimpleNamespace(temperature=0.07)) == 0.07
    with pytest.raises(ValueError, match="stores no logit scale"):
        temperature_of(SimpleNamespace(temperature=None))


MEMORY = """
import torch
from selectsampler.scores import s_clip_loss

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

temperature = TEMPERATURE
features = [torch.nn.functional.normalize(torch.randn(6144, 768), dim=1) for _ in range(2)]
s_clip_loss(*(f[:2100] for f in features), temperature=temperature)  # libraries load
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
s_clip_loss(*features, temperature=temperature, batch_size=BATCH, repeats=1)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to reset the peak")
@pytest.mark.parametrize(("temperature", "batch_size"), [(0.01, 6144), (0.001, 4000)])
def test_extra_memory_stays_below_64_mib(temperature, batch_size):
    program = MEMORY.replace("TEMPERATURE", str(temperature)).replace("BATCH", str(batch_size))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 64


KERNEL = """
import torch
from torch.nn.functional import normalize
from selectsampler.scores.s_clip_loss_triton import slab_sums

generator = torch.Generator().manual_seed(0)
# ragged in all three sizes, and more than one group of eight blocks of rows
image, text = (torch.randn(n, 72, generator=generator).half() for n in (1150, 140))
scales = (1 / (0.05 * image.float().norm(dim=1)), 1 / text.float().norm(dim=1))
weights = (normalize(image.double(), dim=1) @ normalize(text.double(), dim=1).T / 0.05).exp()
rows, columns = slab_sums(image, text, *scales)
torch.testing.assert_close(rows.double(), weights.sum(dim=1), rtol=1e-4, atol=0)
torch.testing.assert_close(columns.double(), weights.sum(dim=0), rtol=1e-4, atol=0)
"""


def test_the_fused_kernel_equals_the_definition_in_tritons_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNEL], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("samples", [300, 20_000])
def test_the_gpu_equals_the_cpu(samples):
    image, text = (normalize(features, dim=1).half() for features in random_pairs(samples, 64, noise=3.0))
    on_cpu = s_clip_loss(image, text, temperature=0.01)
    assert_close(s_clip_loss(image.cuda(), text.cuda(), temperature=0.01).cpu(), on_cpu, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_takes_tiles_where_its_kernel_overflows(monkeypatch):
    module = import_module("selectsampler.scores.s_clip_loss")  # whose name the function has taken
    in_tiles, taken = module._batch_in_tiles, []
    monkeypatch.setattr(module, "_batch_in_tiles", lambda *given: (taken.append(1), in_tiles(*given))[1])
    image, text = (normalize(features, dim=1).half() for features in random_pairs(3000, 64, noise=0.3))
    on_gpu = s_clip_loss(image.cuda(), text.cuda(), temperature=0.001)  # logits of 900: beyond float32's exponential
    assert len(taken) == 1
    assert_close(on_gpu.cpu(), s_clip_loss(image, text, temperature=0.001), atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("temperature", [0.01, 0.001])
def test_extra_memory_on_the_gpu_stays_below_256_mib(temperature):
    features = torch.randn(2, 131_072, 768, device="cuda", dtype=torch.float16)
    features[1] += features[0]  # cosines of 0.7: at the lower temperature the kernel overflows
    s_clip_loss(features[0, :2100], features[1, :2100], temperature=temperature)  # libraries load
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    s_clip_loss(*features, temperature=temperature, batch_size=65_536, repeats=1)
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20
