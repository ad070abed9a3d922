"""Cheap statistics of an image as it is stored, before any preprocessing: what damage leaves its traces in."""

import numpy as np

__all__ = ["STATISTICS", "image_statistics"]

STATISTICS = (
    # Tone. Luma and channels in [0, 1].
    "luma_2", "luma_10", "luma_50", "luma_90", "luma_98",  # percentiles of luma
    "brightness",  # mean luma
    "contrast",  # standard deviation of luma
    "colourfulness",  # mean difference of the largest and the smallest channel
    "colour_spread",  # standard deviation of that difference
    "darkest_channel",  # mean of the smallest channel: a veil lifts it
    "white", "black",  # share of pixels with a channel at 255, and at 0
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


def image_statistics(pixels: np.ndarray) -> np.ndarray:
    """Statistics of one image: tone, detail at three scales, local contrast, traces of what was done to its pixels.

    >>> flat = np.full((32, 32, 3), 128, dtype=np.uint8)
    >>> dict(zip(STATISTICS, image_statistics(flat).tolist()))["flat_squares"]
    1.0

    Args:
        pixels: (H, W, 3), uint8, at the image's own size.

    Returns:
        (S,), float32, in the order of `STATISTICS`; always finite, also for images of one pixel.
    """
    # Large images are looked at through a central window: every pixel's neighbours stay its own, the cost is bounded.
    height, width = pixels.shape[:2]
    top, left = max(0, height - 256) // 16 * 8, max(0, width - 256) // 16 * 8
    window = pixels[top : top + 256, left : left + 256]
    if min(window.shape[:2]) < 8:  # too small for a square and its neighbours: repeated until it is not
        window = np.tile(window, (-(-8 // window.shape[0]), -(-8 // window.shape[1]), 1))
    planes = np.ascontiguousarray(window.transpose(2, 0, 1)).astype(np.float32) / 255.0
    luma = 0.299 * planes[0] + 0.587 * planes[1] + 0.114 * planes[2]
    values = [*_tone(planes, luma), *_detail(luma), _colour_noise(planes), *_places(planes), *_traces(luma)]
    return np.array([*values, _border(pixels)], dtype=np.float32)


def _tone(planes: np.ndarray, luma: np.ndarray) -> list[float]:
    largest, smallest = planes.max(axis=0), planes.min(axis=0)
    colour = largest - smallest
    return [
        *_percentiles(luma[:: max(1, len(luma) // 64)], (2, 10, 50, 90, 98)),
        _mean(luma),
        luma.std(),
        _mean(colour),
        colour.std(),
        _mean(smallest),
        _share(largest >= 1),
        _share(smallest <= 0),
    ]


def _detail(luma: np.ndarray) -> list[float]:
    """Energies at three scales, then how evenly the finest detail is spread, and its median."""
    energies: list[float] = []
    finest: list[float] = []
    for _ in range(3):
        a, b, c, d = _quads(luma)
        rising, falling = a - d, b - c
        details = ((rising - falling) / 2, (rising + falling) / 2, (a - b - c + d) / 2)
        squares = [_mean(detail * detail) for detail in details]
        energies += [_log(square, 1e-6) for square in squares]
        if not finest:
            sizes = [np.abs(detail) for detail in details]
            finest = [_mean(size) ** 2 / (square + 1e-6) for size, square in zip(sizes, squares, strict=True)]
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


def _colour_noise(planes: np.ndarray) -> float:
    """An image's channels share their finest detail, a sensor's noise does not."""
    a, b, c, d = _quads(planes)
    diagonal = a - b - c + d
    common = diagonal[0] + diagonal[1] + diagonal[2]
    return _log(_mean(diagonal * diagonal) - _mean(common * common) / 9, 1e-6)


def _places(planes: np.ndarray) -> list[float]:
    light = (planes[0] + planes[1] + planes[2]) / 3
    means = _halved(_halved(planes))
    luma = (means[0] + means[1] + means[2]) / 3
    spread = np.maximum(_halved(_halved(light * light)) - luma * luma, 0)
    colours = (means - luma).reshape(3, -1)
    local = _percentiles(np.log10(np.sqrt(spread) + 1e-3), (5, 25, 50, 75, 95))
    return [*local, luma.min(), _log(luma.var(), 1e-5), _log(colours.var(axis=1).sum(), 1e-5)]


def _traces(luma: np.ndarray) -> list[float]:
    across, down = np.abs(np.diff(luma, axis=1)), np.abs(np.diff(luma, axis=0)).T
    flat_across, flat_down = across < 1 / 512, down.T < 1 / 512
    squares = flat_across[:-1] & flat_across[1:] & flat_down[:, :-1] & flat_down[:, 1:]
    return [
        _share(flat_across),
        _share(flat_down),
        _share(squares),
        _straight(across),
        _straight(down),
        _blocky(across),
        _blocky(down),
        _periodic(luma),
        _periodic(luma.T),
    ]


def _straight(steps: np.ndarray) -> float:
    """The largest mean excess of the steps of one column over those beside it, over a sixth of the image's height.

    A lens and a camera spread an edge over several pixels; the edge of something pasted in is one pixel wide.
    """
    excess = np.clip(steps[:, 1:-1] - np.maximum(steps[:, :-2], steps[:, 2:]), -0.1, 0.1)
    length = max(4, len(excess) // 6)
    sums = np.zeros((len(excess) + 1, excess.shape[1]), dtype=np.float32)
    np.cumsum(excess, axis=0, out=sums[1:])
    return float((sums[length:] - sums[:-length]).max()) / length


def _blocky(steps: np.ndarray) -> float:
    """Steps between columns 7|8, 15|16, ... against all others, as JPEG's blocks would leave them."""
    at_border = steps[:, 7::8]
    if not at_border.size:
        return 0.0
    elsewhere = (steps.sum() - at_border.sum()) / max(1, steps.size - at_border.size)
    return float(np.log((at_border.mean() + 1e-3) / (elsewhere + 1e-3)))


def _periodic(luma: np.ndarray) -> float:
    """Interpolation leaves second differences that come and go at the pace of the pixels it started from."""
    profile = np.abs(luma[:, 2:] - 2 * luma[:, 1:-1] + luma[:, :-2]).mean(axis=0)
    profile -= profile.mean()
    strongest = np.abs(np.fft.rfft(profile))[3:].max()
    return float(np.log10((strongest + 1e-4) / (np.abs(profile).sum() + 1e-2)))


def _border(pixels: np.ndarray) -> float:
    edges = [edge.astype(np.int16) for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])]
    shares = [(edge[1:] == edge[:-1]).all(axis=-1).mean() if len(edge) > 1 else 0.0 for edge in edges]
    return float(sum(shares) / 4)


def _mean(values: np.ndarray) -> float:
    return float(values.sum()) / values.size


def _share(mask: np.ndarray) -> float:
    return float(np.count_nonzero(mask)) / mask.size


def _log(value: float, floor: float) -> float:
    return float(np.log10(max(value, 0.0) + floor))


def _percentiles(values: np.ndarray, percents: tuple[int, ...]) -> list[float]:
    """The order statistics next to these percentiles, without the cost of np.percentile."""
    ranks = [round(percent / 100 * (values.size - 1)) for percent in percents]
    ordered = np.partition(values.ravel(), ranks)
    return [float(ordered[rank]) for rank in ranks]
