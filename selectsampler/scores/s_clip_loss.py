"""s-CLIPLoss: how well a pair fits, beyond how well its image and its text fit anything. One pass, no B x B matrix."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selectsampler.precision import full_precision
from selectsampler.validation import check_features

__all__ = [
    "batch_sizes",
    "deal",
    "inverse_lengths",
    "s_clip_loss",
    "s_clip_loss_of_batch",
    "shuffled",
    "temperature_of",
]

TILE = 2048  # rows and columns of a tile of logits: 16 MiB in float32, which stays in the processor's cache
GPU_SLAB = 16384  # rows and columns of what one launch of the fused kernel takes
SMALLEST_SUM = 1e-25  # a sum of 16,384 exponentials above it lost less than 1e-8 of itself to underflow
LARGEST_SUM = 1e37
LOWEST_LOGIT = -80.0  # beside a logit of 0: lower ones add nothing, and denormal numbers are slow


def s_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    *,
    temperature: float,
    batch_size: int = 32768,
    repeats: int = 10,
    seed: int = 0,
) -> Tensor:
    """How well each image fits its own text and no other's: at most 0 but for rounding, higher is better.

    >>> images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> s_clip_loss(images, images, temperature=0.1, batch_size=3)
    tensor([-0.0018, -0.0127, -0.0143])

    s-CLIPLoss of arXiv 2405.19547 (called negCLIPLoss there): with unit features f_i and g_i and temperature t,

        score(i) = f_i.g_i - t/2 [log sum_j exp(f_i.g_j / t) + log sum_j exp(f_j.g_i / t)],

    j over a random batch that holds i, averaged over `repeats` random batches. A caption that fits many images has a
    high cosine and a low s-CLIPLoss. A seeded permutation is dealt into equal batches, so that no sample is scored
    against fewer others than another is; the published code lets the last batch be short, which inflates its scores.

    Where one batch holds all samples, every repetition is the same and is taken once. On the CPU rounding depends on
    the number of threads (1e-7); `torch.set_num_threads(1)` makes it the same everywhere.

    Args:
        image_features: (N, D), floating point, of any length but zero; computed in float32.
        text_features: (N, D), the texts of these images in the same order, on the same device.
        temperature: the model's own, at least 0.001: 0.01 for OpenAI's CLIP, 0.07 for DFN's; `temperature_of(model)`.
        batch_size: B, the most samples that a batch holds; `batch_sizes(N, B)` says how many it does.
        repeats: K, over how many deals scores are averaged.
        seed: of the deals, from 0 on; repetition k draws from (seed, k).

    Returns:
        (N,), float32, on the device of the input. Extra memory is at most 64 MiB on the CPU, whatever B is, and 256
        MiB on a GPU (B <= 65,536), apart from the result and the deal, 12 bytes a sample.

    Raises:
        ValueError: if shapes or dtypes do not fit, a feature is zero or not finite, or a number is out of its range.
    """
    check_features(image_features, name="image_features")
    check_features(text_features, name="text_features", rows=len(image_features), dim=image_features.shape[1])
    check_temperature(temperature)
    samples = len(image_features)
    for name, value, lowest in (("batch_size", batch_size, 1), ("repeats", repeats, 1), ("seed", seed, 0)):
        if value < lowest:
            raise ValueError(f"{name} is {value}, but it must be at least {lowest}.")
    if not samples:
        return torch.zeros(0, device=image_features.device)
    if samples <= batch_size:
        return s_clip_loss_of_batch(image_features, text_features, temperature=temperature)
    total = torch.zeros(samples, device=image_features.device)
    for repeat in range(repeats):
        for rows in deal(samples, batch_size, seed=(seed, repeat)):
            rows = rows.to(image_features.device)
            total[rows] += s_clip_loss_of_batch(image_features, text_features, rows=rows, temperature=temperature)
    return total / repeats


def batch_sizes(samples: int, batch_size: int) -> list[int]:
    """How many samples each batch holds: as few batches as `batch_size` allows, sizes differing by at most one.

    >>> batch_sizes(10, 4)
    [4, 3, 3]
    """
    batches = max(1, -(-samples // batch_size))
    return [samples // batches + (batch < samples % batches) for batch in range(batches)]


def deal(samples: int, batch_size: int, *, seed: int | tuple[int, ...]) -> list[Tensor]:
    """A seeded permutation of `samples` rows, dealt into equal batches; int64, rows of a batch ascending.

    >>> [len(rows) for rows in deal(10, 4, seed=0)]
    [4, 3, 3]
    """
    order, sizes = shuffled(samples, seed=seed), batch_sizes(samples, batch_size)
    return [torch.from_numpy(np.sort(rows).astype(np.int64)) for rows in np.split(order, np.cumsum(sizes)[:-1])]


def shuffled(samples: int, *, seed: int | tuple[int, ...]) -> np.ndarray:
    """(N,), int32 where that is enough: the seeded permutation that is dealt."""
    rows = np.arange(samples, dtype=np.int32 if samples < 2**31 else np.int64)
    np.random.default_rng(np.random.SeedSequence(seed)).shuffle(rows)
    return rows


def temperature_of(model: object) -> float:
    """The temperature that a CLIP model was trained to: 1 / exp(logit_scale).

    Args:
        model: anything with a `logit_scale` (open_clip, transformers), or `Embeddings`, which keep the `temperature`.

    Raises:
        ValueError: if it has neither.
    """
    stored = getattr(model, "temperature", None)
    if stored is not None:
        return float(stored)
    scale = getattr(model, "logit_scale", None)
    if scale is None:
        raise ValueError(
            f"A {type(model).__name__} stores no logit scale. Pass the temperature: 0.01 for OpenAI's "
            "CLIP, 0.07 for DFN's."
        )
    return math.exp(-float(scale))


def check_temperature(temperature: float) -> None:
    """A temperature is in [0.001, 10): outside, it is a logit scale or a mistake."""
    if not 0.001 <= temperature < 10:
        raise ValueError(
            f"temperature is {temperature}, but it must be at least 0.001 and below 10. A model's logit scale (100 for "
            "OpenAI's CLIP) is its inverse: pass 1 / logit_scale.exp()."
        )


def s_clip_loss_of_batch(
    image_features: Tensor, text_features: Tensor, *, temperature: float, rows: Tensor | None = None
) -> Tensor:
    """(B,), float32: the scores of one batch, `rows` (B,) int64 of the features or all of them."""
    image_scale = inverse_lengths(image_features, rows, name="image_features")
    text_scale = inverse_lengths(text_features, rows, name="text_features")
    with full_precision():
        if _fuses(image_features, text_features):
            return _batch_on_gpu(image_features, text_features, rows, image_scale, text_scale, temperature)
        return _batch_in_tiles(image_features, text_features, rows, image_scale, text_scale, temperature)


def inverse_lengths(features: Tensor, rows: Tensor | None = None, *, name: str) -> Tensor:
    """(B,), float32: 1 / |f| of these rows; features are corrected by it and need not be copied.

    Raises:
        ValueError: naming the first feature that is zero or not finite.
    """
    count = len(features) if rows is None else len(rows)
    lengths = torch.empty(count, dtype=torch.float32, device=features.device)
    for part in _parts(count, TILE):
        lengths[part] = _block(features, rows, part).norm(dim=1)
    bad = ~((lengths > 0) & lengths.isfinite())
    if bad.any():
        place = int(bad.nonzero()[0])
        row = place if rows is None else int(rows[place])
        what = "is zero, so that it has no direction" if lengths[place] == 0 else "holds NaN or infinity"
        raise ValueError(f"{name}[{row}] {what} ({int(bad.sum())} such rows). Leave unreadable samples out.")
    return lengths.reciprocal_()


def _batch_in_tiles(
    image: Tensor, text: Tensor, rows: Tensor | None, image_scale: Tensor, text_scale: Tensor, temperature: float
) -> Tensor:
    """The scores of one batch by tiles of logits in float32: the reference, and the path of the CPU."""
    samples = len(image_scale)
    side = min(samples, TILE, max(64, TILE * 1024 // image.shape[1] // 64 * 64))  # the features of a tile count as well
    own = image_scale.new_empty(samples)
    log_rows, log_columns = (torch.full_like(own, -torch.inf) for _ in range(2))
    tile_sums = _Tile(side, device=image.device)
    for columns in _parts(samples, side):
        texts = _block(text, rows, columns) * text_scale[columns, None]
        for lines in _parts(samples, side):
            images = _block(image, rows, lines) * (image_scale[lines, None] / temperature)
            if lines == columns:
                own[lines] = (images * texts).sum(dim=1)
            row_sums, column_sums = tile_sums(images, texts)
            log_rows[lines] = torch.logaddexp(log_rows[lines], row_sums)
            log_columns[columns] = torch.logaddexp(log_columns[columns], column_sums)
    return temperature * (own - (log_rows + log_columns) / 2)


class _Tile:
    """Log-sum-exp over the rows and over the columns of one tile of logits after another, in one buffer.

    One exponential serves both sums, with one shift for all logits; no maximum is looked for. Whether a sum left the
    range of float32 is seen from the sums. Then the tile is taken again with a shift for every row and every column,
    and the tiles after it with a better shift, or with none shared where their logits lie too far apart for any.
    """

    def __init__(self, side: int, *, device: torch.device) -> None:
        self.buffer = torch.empty(side * side, device=device)
        self.ones = torch.ones(side, device=device)
        self.shift: float | None = 0.0
        self.spare: Tensor | None = None  # a second tile, once one needs a shift for every row

    def __call__(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.buffer[: len(images) * len(texts)].view(len(images), len(texts))
        if self.shift is not None:
            torch.mm(images, texts.T, out=logits)
            if self.shift:
                logits.sub_(self.shift)
            logits.exp_()
            sums = torch.mv(logits, self.ones[: len(texts)]), torch.mv(logits.T, self.ones[: len(images)])
            if all(in_range(part) for part in sums):
                return sums[0].log_().add_(self.shift), sums[1].log_().add_(self.shift)
        torch.mm(images, texts.T, out=logits)
        highest, others = logits.amax(dim=1), logits.amax(dim=0)
        self.spare = torch.empty_like(self.buffer) if self.spare is None else self.spare
        spare = self.spare[: logits.numel()].view_as(logits)
        weights = torch.sub(logits, highest[:, None], out=spare).clamp_(min=LOWEST_LOGIT).exp_()
        row_sums = torch.mv(weights, self.ones[: len(texts)]).log_().add_(highest)
        weights = logits.sub_(others).clamp_(min=LOWEST_LOGIT).exp_()
        column_sums = torch.mv(weights.T, self.ones[: len(images)]).log_().add_(others)
        self.shift = shared_shift(highest, others)
        return row_sums, column_sums


def in_range(sums: Tensor) -> bool:
    """Whether sums of exponentials neither overflowed nor lost what counts to underflow."""
    lowest, highest = sums.aminmax()
    return bool((lowest > SMALLEST_SUM) & (highest < LARGEST_SUM))


def shared_shift(row_maxima: Tensor, column_maxima: Tensor) -> float | None:
    """A shift that keeps the sums of such a tile in range, or None where there is none."""
    highest = float(row_maxima.max())
    lowest = float(torch.minimum(row_maxima.min(), column_maxima.min()))
    return highest - 70 if highest - lowest < 110 else None  # exp(70) * TILE and exp(-40) are both well inside


def _fuses(image: Tensor, text: Tensor) -> bool:
    """Whether the fused kernel takes these features: half precision, on a GPU, where Triton is installed."""
    if not (image.is_cuda and image.dtype == text.dtype and image.dtype in (torch.float16, torch.bfloat16)):
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _batch_on_gpu(
    image: Tensor, text: Tensor, rows: Tensor | None, image_scale: Tensor, text_scale: Tensor, temperature: float
) -> Tensor:
    """The scores of one batch by the fused kernel: products of features as stored, lengths corrected afterwards."""
    from selectsampler.scores.s_clip_loss_triton import slab_sums

    samples = len(image_scale)
    logit_scale = image_scale / temperature
    own = image_scale.new_empty(samples)
    log_rows, log_columns = (torch.full_like(own, -torch.inf) for _ in range(2))
    for part in _parts(samples, TILE):
        own[part] = (_block(image, rows, part) * _block(text, rows, part)).sum(dim=1)
    own *= logit_scale * text_scale
    for columns in _parts(samples, GPU_SLAB):
        texts = (text[columns] if rows is None else text[rows[columns]]).contiguous()
        for lines in _parts(samples, GPU_SLAB):
            images = (image[lines] if rows is None else image[rows[lines]]).contiguous()
            sums = slab_sums(images, texts, logit_scale[lines], text_scale[columns])
            if not all(in_range(part) for part in sums):  # rare: so far apart that the safe tiles must take the batch
                return _batch_in_tiles(image, text, rows, image_scale, text_scale, temperature)
            log_rows[lines] = torch.logaddexp(log_rows[lines], sums[0].log_())
            log_columns[columns] = torch.logaddexp(log_columns[columns], sums[1].log_())
    return temperature * (own - (log_rows + log_columns) / 2)


def _parts(samples: int, size: int) -> Iterator[slice]:
    yield from (slice(start, min(start + size, samples)) for start in range(0, samples, size))


def _block(features: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """(b, D), float32: these rows of the features."""
    return (features[part] if rows is None else features[rows[part]]).float()
