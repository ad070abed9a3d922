"""Cheap statistics of images as they are stored, before any preprocessing: what damage leaves its traces in."""

from collections.abc import Sequence

import numpy as np

__all__ = ["STATISTICS", "image_statistics", "statistics_of"]

STATISTICS = (
    # Tone. Luma and channels in [0, 1].
    "luma_2", "luma_10", "luma_50", "luma_90", "luma_98",  # percentiles of luma
    "brightness",  # mean luma
    "contrast",  # standard deviation of luma
    "colourfulness",  # mean difference of the largest and the smallest channel
    "colour_spread",  # standard deviation of that difference
    "darkest_channel",  # mean of the smallest channel: a veil lifts it
    "deepest",  # 1st percentile of the largest channel: an offset lifts it
    "palest",  # 99th percentile of the smallest channel
    "white", "black",  # share of pixels with a channel at 255, and at 0
    "clipped_white", "clipped_black",  # log of the share of the last level over that of the eight before it
    "comb",  # mean difference of neighbouring levels' shares: a gain leaves gaps and doubles
    # Detail: log10 of the energy of horizontal, vertical and diagonal Haar detail at three scales, finest first.
    "horizontal_1", "vertical_1", "diagonal_1",
    "horizontal_2", "vertical_2", "diagonal_2",
    "horizontal_4", "vertical_4", "diagonal_4",
    "horizontal_density", "vertical_density", "diagonal_density",  # of the finest: near 0 for few edges, 2/pi for noise
    "noise",  # log10 of the median of the finest diagonal detail
    "colour_noise",  # log10 of the energy of the finest diagonal detail of the channels, less their mean
    # Places: squares of 4 x 4 pixels.
    "local_5", "local_25", "local_50", "local_75", "local_95",  # percentiles of log10 of their standard deviations
    "darkest_square",  # mean luma of the darkest one
    "coarse_contrast",  # log10 of the variance of their luma
    "coarse_colour",  # log10 of the variance of their colours, less their luma
    # Traces of what was done to the pixels.
    "flat_rows", "flat_columns",  # share of neighbours, side by side and one above the other, of equal luma
    "flat_squares",  # share of squares of 2 x 2 pixels of equal luma
    "straight_columns", "straight_rows",  # the sharpest straight edge of a sixth of the image's side
    "blocky_columns", "blocky_rows",  # log of steps across 8-pixel block borders over steps elsewhere
    "periodic_columns", "periodic_rows",  # log10 of the share of one frequency in the second differences
    "border",  # share of the outermost pixels that equal their next neighbour along the edge
)  # fmt: skip


def statistics_of(images: Sequence[np.ndarray]) -> np.ndarray:
    """(N, S) of images of any sizes, those of one size together: the same numbers at a tenth of the cost."""
    result = np.empty((len(images), len(STATISTICS)), dtype=np.float32)
    shapes = [pixels.shape for pixels in images]
    for shape in dict.fromkeys(shapes):
        rows = [row for row, other in enumerate(shapes) if other == shape]
        result[rows] = image_statistics(np.stack([images[row] for row in rows]))
    return result


def image_statistics(pixels: np.ndarray) -> np.ndarray:
    """Statistics of one image or several: tone, detail at three scales, local contrast, traces of what was done to it.

    >>> flat = np.full((32, 32, 3), 128, dtype=np.uint8)
    >>> dict(zip(STATISTICS, image_statistics(flat).tolist()))["flat_squares"]
    1.0

    Args:
        pixels: (..., H, W, 3), uint8, at the images' own size.

    Returns:
        (..., S), float32, in the order of `STATISTICS`; always finite, also for images of one pixel. The numbers of an
        image are the same bits whatever other images are beside it.
    """
    images = pixels.reshape(-1, *pixels.shape[-3:])
    # Large images are looked at through a central window: every pixel's neighbours stay its own, the cost is bounded.
    height, width = images.shape[1:3]
    top, left = max(0, height - 256) // 16 * 8, max(0, width - 256) // 16 * 8
    window = images[:, top : top + 256, left : left + 256]
    if min(window.shape[1:3]) < 8:  # too small for a square and its neighbours: repeated until it is not
        window = np.tile(window, (1, -(-8 // window.shape[1]), -(-8 // window.shape[2]), 1))
    levels = np.ascontiguousarray(window.transpose(3, 0, 1, 2))  # channels first: (3, B, H, W)
    planes = levels.astype(np.float32) * np.float32(1 / 255)
    luma = 0.299 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]
    values = [*_tone(levels, luma), *_detail(luma), _colour_noise(planes), *_places(planes), *_traces(luma)]
    result = np.stack([*values, _border(images)], axis=1).astype(np.float32)
    return result.reshape(*pixels.shape[:-3], len(STATISTICS))


def _tone(levels: np.ndarray, luma: np.ndarray) -> list[np.ndarray]:
    largest = np.maximum(np.maximum(levels[0], levels[1]), levels[2])
    smallest = np.minimum(np.minimum(levels[0], levels[1]), levels[2])
    lumas = _histogram((luma * 255 + 0.5).astype(np.uint8))
    most, least, colour = (_histogram(values) for values in (largest, smallest, largest - smallest))
    channels = (_histogram(levels[0]) + _histogram(levels[1]) + _histogram(levels[2])) / 3
    return [
        *_levels(lumas, (2, 10, 50, 90, 98)),
        *_moments(lumas),
        *_moments(colour),
        _moments(least)[0],
        *_levels(most, (1,)),
        *_levels(least, (99,)),
        most[:, 255],
        least[:, 0],
        np.log((most[:, 255] + 1e-2) / (most[:, 247:255].sum(axis=1) + 1e-2)),
        np.log((least[:, 0] + 1e-2) / (least[:, 1:9].sum(axis=1) + 1e-2)),
        np.abs(np.diff(channels[:, 1:255], axis=1)).sum(axis=1),
    ]


def _histogram(levels: np.ndarray) -> np.ndarray:
    """(B, 256): the share of each level, of (B, H, W), uint8."""
    keys = _flat(levels) + 256 * np.arange(len(levels))[:, None]
    return np.bincount(keys.ravel(), minlength=256 * len(levels)).reshape(-1, 256) / keys.shape[1]


def _levels(histogram: np.ndarray, percents: tuple[int, ...]) -> list[np.ndarray]:
    """The levels, in [0, 1], below which these percents lie."""
    below = histogram.cumsum(axis=1)
    return [(below < percent / 100 - 1e-9).sum(axis=1) / 255 for percent in percents]


def _moments(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, with levels in [0, 1]."""
    levels = np.arange(256) / 255
    mean = (histogram * levels).sum(axis=1)
    return mean, np.sqrt(np.maximum((histogram * levels**2).sum(axis=1) - mean**2, 0))


def _detail(luma: np.ndarray) -> list[np.ndarray]:
    """Energies at three scales, then how evenly the finest detail is spread, and its median."""
    energies: list[np.ndarray] = []
    finest: list[np.ndarray] = []
    for _ in range(3):
        a, b, c, d = _quads(luma)
        rising, falling = a - d, b - c
        details = [_flat(x) for x in ((rising - falling) / 2, (rising + falling) / 2, (a - b - c + d) / 2)]
        squares = [_energy(detail) for detail in details]
        energies += [_log(square, 1e-6) for square in squares]
        if not finest:
            sizes = [np.abs(detail) for detail in details]
            finest = [size.mean(axis=1) ** 2 / (square + 1e-6) for size, square in zip(sizes, squares, strict=True)]
            finest.append(_log(_percentiles(sizes[2], (50,))[0], 1e-3))
        luma = (a + b + c + d) / 4
    return energies + finest


def _quads(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The four pixels of every 2 x 2 square, of the last two axes."""
    even = values[..., : values.shape[-2] // 2 * 2, : values.shape[-1] // 2 * 2]
    return even[..., ::2, ::2], even[..., ::2, 1::2], even[..., 1::2, ::2], even[..., 1::2, 1::2]


def _halved(values: np.ndarray) -> np.ndarray:
    a, b, c, d = _quads(values)
    return (a + b + c + d) / 4


def _colour_noise(planes: np.ndarray) -> np.ndarray:
    """An image's channels share their finest detail, a sensor's noise does not."""
    a, b, c, d = _quads(planes)
    diagonal = a - b - c + d
    common = diagonal[0] + diagonal[1] + diagonal[2]
    of_channels = _energy(_flat(diagonal[0])) + _energy(_flat(diagonal[1])) + _energy(_flat(diagonal[2]))
    return _log(of_channels / 3 - _energy(_flat(common)) / 9, 1e-6)


def _places(planes: np.ndarray) -> list[np.ndarray]:
    light = (planes[0] + planes[1] + planes[2]) / 3
    means = _halved(_halved(planes))
    luma = (means[0] + means[1] + means[2]) / 3
    spread = np.maximum(_halved(_halved(light * light)) - luma * luma, 0)
    local = _percentiles(np.log10(np.sqrt(_flat(spread)) + 1e-3), (5, 25, 50, 75, 95))
    colours = [_flat(channel - luma).var(axis=1) for channel in means]
    coarse = _log(_flat(luma).var(axis=1), 1e-5)
    return [*local, _flat(luma).min(axis=1), coarse, _log(colours[0] + colours[1] + colours[2], 1e-5)]


def _traces(luma: np.ndarray) -> list[np.ndarray]:
    turned = np.ascontiguousarray(luma.swapaxes(1, 2))
    across, down = np.abs(np.diff(luma, axis=2)), np.abs(np.diff(turned, axis=2))
    flat_across, flat_down = across < 1 / 512, down.swapaxes(1, 2) < 1 / 512
    squares = flat_across[:, :-1] & flat_across[:, 1:] & flat_down[:, :, :-1] & flat_down[:, :, 1:]
    return [
        *(_flat(mask).mean(axis=1) for mask in (flat_across, flat_down, squares)),
        _straight(across),
        _straight(down),
        _blocky(across),
        _blocky(down),
        _periodic(luma),
        _periodic(turned),
    ]


def _straight(steps: np.ndarray) -> np.ndarray:
    """The largest mean excess of the steps of one column over those beside it, over a sixth of the image's height.

    A lens and a camera spread an edge over several pixels; the edge of something pasted in is one pixel wide.
    """
    excess = np.clip(steps[:, :, 1:-1] - np.maximum(steps[:, :, :-2], steps[:, :, 2:]), -0.1, 0.1)
    length = max(4, excess.shape[1] // 6)
    sums = np.zeros((len(excess), excess.shape[1] + 1, excess.shape[2]), dtype=np.float32)
    np.cumsum(excess, axis=1, out=sums[:, 1:])
    return _flat(sums[:, length:] - sums[:, :-length]).max(axis=1) / length


def _blocky(steps: np.ndarray) -> np.ndarray:
    """Steps between columns 7|8, 15|16, ... against all others, as JPEG's blocks would leave them."""
    columns = steps.mean(axis=1)
    at_border = columns[:, 7::8]
    if not at_border.size:
        return np.zeros(len(steps), dtype=np.float32)
    elsewhere = (columns.sum(axis=1) - at_border.sum(axis=1)) / max(1, columns.shape[1] - at_border.shape[1])
    return np.log((at_border.mean(axis=1) + 1e-3) / (elsewhere + 1e-3))


def _periodic(luma: np.ndarray) -> np.ndarray:
    """Interpolation leaves second differences that come and go at the pace of the pixels it started from."""
    profile = np.abs(luma[:, :, 2:] - 2 * luma[:, :, 1:-1] + luma[:, :, :-2]).mean(axis=1)
    profile -= profile.mean(axis=1, keepdims=True)
    strongest = np.abs(np.fft.rfft(profile))[:, 3:].max(axis=1)
    return np.log10((strongest + 1e-4) / (np.abs(profile).sum(axis=1) + 1e-2))


def _border(images: np.ndarray) -> np.ndarray:
    total = np.zeros(len(images))
    for edge in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]):
        if edge.shape[1] > 1:
            same = edge[:, 1:] == edge[:, :-1]
            total += (same[..., 0] & same[..., 1] & same[..., 2]).mean(axis=1)
    return total / 4


def _flat(values: np.ndarray) -> np.ndarray:
    """(B, H * W) of (B, H, W): sums over one row do not depend on the other rows."""
    return values.reshape(len(values), -1)


def _energy(values: np.ndarray) -> np.ndarray:
    return np.einsum("bn,bn->b", values, values) / values.shape[1]


def _log(value: np.ndarray, floor: float) -> np.ndarray:
    return np.log10(np.maximum(value, 0) + floor)


def _percentiles(values: np.ndarray, percents: tuple[int, ...]) -> list[np.ndarray]:
    """The order statistics next to these percentiles, without the cost of np.percentile."""
    ranks = [round(percent / 100 * (values.shape[1] - 1)) for percent in percents]
    ordered = np.partition(values, ranks, axis=1)
    return [ordered[:, rank] for rank in ranks]
