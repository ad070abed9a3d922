"""Images damaged on purpose: what a detector of damage learns from, without a single damaged image of the user's.

A twin is an image of the data set itself after one kind of damage of random strength, from hardly visible to plain. The
kinds are families of what physics and software do to an image: detail lost (to a lens, to movement, to larger pixels,
smooth or square), noise, covers, veils, light, few bits, small things in front. Parameters are drawn at random, so that
no filter is learned by heart. They are not meant to be all that can happen to an image: `selectsampler.scores.damage`
must also find what none of them is.
"""

import io
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

__all__ = ["DAMAGES", "REVISION", "twin_of"]

EVERY = 4  # one image of so many gets a twin
SEED = 3  # of what is drawn at random
REVISION = 4  # part of the key of embed's cache: another whenever the damage changes
LOOKED_AT = 384  # pixels: the middle of a larger image alone is damaged; statistics look at its inner 256


def twin_of(image: Image.Image) -> tuple[int, Image.Image] | None:
    """The place of a kind of damage in `DAMAGES` and the image after it, or None for three images of four.

    >>> twins = [twin_of(Image.new("RGB", (32, 24), (level, 0, 0))) for level in range(100)]
    >>> {twin[1].size for twin in twins if twin is not None}
    {(32, 24)}

    All follows from the pixels alone, so that neither order, nor workers, nor a cache change it. Of an image larger
    than 384 pixels the middle is damaged, as an image of that size would be, so that the work does not grow.

    Args:
        image: in RGB, of any size.
    """
    checksum = zlib.crc32(image.tobytes())
    if checksum % EVERY:
        return None
    random = np.random.default_rng((checksum, SEED))
    kind = int(random.integers(len(DAMAGES)))
    width, height = image.size
    left, top = (max(0, side - LOOKED_AT) // 16 * 8 for side in image.size)
    middle = (left, top, min(width, left + LOOKED_AT), min(height, top + LOOKED_AT))
    twin = image.copy()
    twin.paste(list(DAMAGES.values())[kind](image.crop(middle), random), middle)
    return kind, twin


def _noise(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Sensor noise: normal, uniform, in proportion to the light, or single pixels lost; of one channel or of each."""
    pixels = _pixels(image)
    shape = pixels.shape if random.random() < 0.7 else (*pixels.shape[:2], 1)
    strength = _between(random, 0.04, 0.25)
    kind = random.integers(4)
    if kind == 0:
        pixels = pixels + strength * random.standard_normal(shape)
    elif kind == 1:
        pixels = pixels + strength * 3**0.5 * random.uniform(-1, 1, shape)
    elif kind == 2:
        pixels = pixels + 1.5 * strength * np.sqrt(pixels) * random.standard_normal(shape)
    else:
        pixels = np.where(random.random(shape) < strength / 2, random.integers(0, 2, shape), pixels)
    return _image(pixels)


def _cover(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """A rectangle hidden: by one colour, by noise, or by another part of the image."""
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    area, aspect = _between(random, 0.06, 0.5), _between(random, 0.5, 2.0)
    rows = int(np.clip(round((area * aspect) ** 0.5 * height), 1, height))
    columns = int(np.clip(round((area / aspect) ** 0.5 * width), 1, width))
    top, left, other_top, other_left = random.integers(0, [height - rows + 1, width - columns + 1] * 2)
    if random.random() < 0.5:  # a dead area of a sensor, or nothing where something was
        filling = np.full(3, float(random.random() < 0.3))
    else:
        fillings: list[np.ndarray] = [
            np.full(3, random.random()),
            random.random(3),
            pixels.mean(axis=(0, 1)),
            random.random((rows, columns, 3)),
            pixels[other_top : other_top + rows, other_left : other_left + columns].copy(),
        ]
        filling = fillings[random.integers(len(fillings))]
    pixels[top : top + rows, left : left + columns] = filling
    return _image(pixels)


def _coarse(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Resolution lost: made smaller, and as large again by interpolation."""
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    factor = _between(random, 1.4, max(4.0, min(image.size) / 48))
    small = [max(1, round(side / factor)) for side in image.size]
    down, up = random.integers(0, 4), random.integers(0, 3)
    return image.resize(small, (*filters, Image.Resampling.BOX)[down]).resize(image.size, filters[up])


def _veil(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Contrast lost to something light or grey in front, even or in clouds."""
    pixels = _pixels(image)
    clouds = _clouds(image.size, random) - 0.5
    unevenness = random.random() if random.random() < 0.5 else 0.0
    share = np.clip(_between(random, 0.25, 0.8) * (1 + unevenness * clouds), 0, 0.95)
    light = random.uniform(0.4, 1.0) + random.random() * clouds + 0.05 * random.standard_normal(3)
    return _image((1 - share) * pixels + share * light)


def _clouds(size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """(H, W, 1), from 0 to 1: random landscapes on top of each other, the finer the lower."""
    total = np.zeros(size[::-1], dtype=np.float32)
    cells, finest, decay = int(random.integers(2, 5)), int(random.integers(4, 65)), random.uniform(1.4, 3.0)
    height = 1.0
    while cells <= min(finest, *size):
        grid = Image.fromarray(random.random((cells, cells)).astype(np.float32))
        total += height * np.asarray(grid.resize(size, Image.Resampling.BICUBIC))
        cells, height = 2 * cells, height / decay
    total -= total.min()
    return (total / max(float(total.max()), 1e-6))[..., None]


def _blur(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Out of focus, or moved along a line while the shutter was open."""
    largest = max(2.0, min(image.size) / 30)
    if random.random() < 0.4:
        focus = (ImageFilter.GaussianBlur, ImageFilter.BoxBlur)[random.integers(2)]
        return image.filter(focus(_between(random, 0.7, largest)))
    angle, length = random.uniform(0, np.pi), _between(random, 2.0, 3 * largest)
    return _image(_moved(_pixels(image), length, angle))


def _mosaic(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Pixels lost: made smaller, and as large again by repeating them."""
    factor = _between(random, 1.1, max(4.0, min(image.size) / 32))
    small = [max(1, min(side - 1, round(side / factor))) for side in image.size]
    down = (Image.Resampling.BOX, Image.Resampling.NEAREST, Image.Resampling.BILINEAR)[random.integers(3)]
    return image.resize(small, down).resize(image.size, Image.Resampling.NEAREST)


def _exposure(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Too much light, too little, or of another colour: added, multiplied or bent, and cut off at white and black."""
    pixels = _pixels(image)
    tint = 1 + (random.random() < 0.3) * 0.3 * random.standard_normal(3)
    strength = _between(random, 0.1, 0.5) * random.choice([-1, 1]) * tint
    kind = random.integers(4)
    if kind == 0:
        return _image(pixels + strength)
    if kind == 1:
        return _image(pixels * np.exp(2 * strength))
    if kind == 2:
        return _image(pixels ** np.exp(-2 * strength))
    value = pixels.max(axis=2, keepdims=True)  # as editors do it: hue and saturation stay
    return _image(pixels * (np.clip(value + strength, 0, 1) / np.maximum(value, 1e-3)))


def _few_bits(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Compressed in blocks of 8 x 8 pixels, or of a few levels of light."""
    if random.random() < 0.75:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(_between(random, 4, 45)), subsampling=int(random.integers(3)))
        return Image.open(file).convert("RGB")
    levels = _between(random, 3, 24)
    return _image(np.rint(_pixels(image) * levels) / levels)


def _specks(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Many small things in front, light or dark, and moving perhaps: flakes, drops, dust, scratches."""
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    scale = max(1.0, min(height, width) / _between(random, 24, 64))
    grid = (max(1, round(height / scale)), max(1, round(width / scale)))
    specks = (random.random(grid) < _between(random, 0.01, 0.15)) * random.uniform(0.4, 1.0, grid)
    specks = np.asarray(Image.fromarray(specks.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR))
    layer = _moved(specks, _between(random, 0.5, 8) * scale, random.uniform(0, np.pi))
    layer = np.clip(layer * _between(random, 1, 3), 0, 1)[..., None]
    light = (1.0, 1.0, 0.0, random.random())[random.integers(4)]
    if random.random() < 0.5:
        return _image(pixels + layer * (2 * light - 1))
    return _image((1 - layer) * pixels + layer * light)


DAMAGES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "noise": _noise,
    "cover": _cover,
    "coarse": _coarse,
    "veil": _veil,
    "blur": _blur,
    "mosaic": _mosaic,
    "exposure": _exposure,
    "few_bits": _few_bits,
    "specks": _specks,
}


def _between(random: np.random.Generator, low: float, high: float) -> float:
    """Equally often in every octave."""
    return float(np.exp(random.uniform(np.log(low), np.log(high))))


def _moved(pixels: np.ndarray, length: float, angle: float) -> np.ndarray:
    """The mean of the image while it moves along a line."""
    steps = np.linspace(-length / 2, length / 2, 2 * int(length) + 3)
    shifts = dict.fromkeys((round(step * np.sin(angle)), round(step * np.cos(angle))) for step in steps)
    total = np.zeros_like(pixels)
    for shift in shifts:
        total += _shifted(pixels, *shift)
    return total / len(shifts)


def _shifted(pixels: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved by whole pixels, the outermost repeated."""
    rows = np.clip(np.arange(pixels.shape[0]) - down, 0, pixels.shape[0] - 1)
    columns = np.clip(np.arange(pixels.shape[1]) - right, 0, pixels.shape[1] - 1)
    return pixels[rows][:, columns]


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32) / 255


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))
