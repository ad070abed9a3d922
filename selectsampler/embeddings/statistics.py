"""Cheap statistics of an image as it is stored, before any preprocessing: what damage leaves its traces in."""

import numpy as np

__all__ = ["STATISTICS", "image_statistics"]

STATISTICS = (
    "brightness",  # mean luma, in [0, 1]
    "contrast",  # standard deviation of luma, in [0, 0.5]
    "colourfulness",  # mean distance of the three channels from luma, in [0, 1]
    "sharpness",  # log10 of the variance of the Laplacian; about -6 for a flat image
    "noise",  # robust standard deviation of the finest diagonal detail, in [0, 1]
    "high_frequency",  # share of gradient energy that a 2 x 2 mean removes, in [0, 1]
    "blockiness",  # luma steps across 8-pixel block borders over steps elsewhere; 1 without blocks
    "flatness",  # share of horizontally neighbouring pixels that are equal, in [0, 1]
    "border",  # share of the outermost pixels that equal their commonest neighbour along the edge, in [0, 1]
)


def image_statistics(pixels: np.ndarray) -> np.ndarray:
    """Statistics of one image: brightness, contrast, colour, sharpness, noise, spectrum, blocks, borders.

    >>> flat = np.full((32, 32, 3), 128, dtype=np.uint8)
    >>> dict(zip(STATISTICS, image_statistics(flat).tolist()))["flatness"]
    1.0

    Args:
        pixels: (H, W, 3), uint8, at the image's own size.

    Returns:
        (S,), float32, in the order of `STATISTICS`; always finite, also for images of one pixel.
    """
    # Large images are looked at through a central window: every pixel's neighbours stay its own, the cost is bounded.
    height, width = pixels.shape[:2]
    top, left = max(0, height - 256) // 16 * 8, max(0, width - 256) // 16 * 8
    window = pixels[top : top + 256, left : left + 256].astype(np.float32) / 255.0
    luma = window @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    steps = np.abs(np.diff(luma, axis=1))
    return np.array(
        [
            luma.mean(),
            luma.std(),
            np.abs(window - luma[..., None]).mean(),
            _sharpness(luma),
            _noise(luma),
            _high_frequency(luma),
            _blockiness(steps),
            _mean(steps < 1 / 512),
            _border(pixels),
        ],
        dtype=np.float32,
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def _sharpness(luma: np.ndarray) -> float:
    if min(luma.shape) < 3:
        return -6.0
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return float(np.log10(laplacian.var() + 1e-6))


def _quads(luma: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The four pixels of every 2 x 2 square."""
    even = luma[: luma.shape[0] // 2 * 2, : luma.shape[1] // 2 * 2]
    return even[::2, ::2], even[::2, 1::2], even[1::2, ::2], even[1::2, 1::2]


def _noise(luma: np.ndarray) -> float:
    """Donoho's estimate: the median of the finest diagonal Haar detail over 0.6745."""
    a, b, c, d = _quads(luma)
    diagonal = np.abs(a - b - c + d) / 2
    return float(np.median(diagonal) / 0.6745) if diagonal.size else 0.0


def _high_frequency(luma: np.ndarray) -> float:
    a, b, c, d = _quads(luma)
    if not a.size:
        return 0.0
    mean = (a + b + c + d) / 4
    detail = sum(float(np.square(quarter - mean).sum()) for quarter in (a, b, c, d))
    total = detail + 4 * float(np.square(mean - mean.mean()).sum())
    return detail / total if total > 1e-9 else 0.0


def _blockiness(steps: np.ndarray) -> float:
    """Steps between columns 7|8, 15|16, ... against all others, as JPEG's blocks would leave them."""
    at_border = steps[:, 7::8]
    if not at_border.size:
        return 1.0
    elsewhere = (steps.sum() - at_border.sum()) / max(1, steps.size - at_border.size)
    return float((at_border.mean() + 1e-3) / (elsewhere + 1e-3))


def _border(pixels: np.ndarray) -> float:
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    return float(np.mean([_mean((np.diff(edge.astype(np.int16), axis=0) == 0).all(axis=-1)) for edge in edges]))
