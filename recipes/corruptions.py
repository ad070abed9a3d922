"""Damaged images, made on the fly: a PIL image in, a PIL image of the same size out.

    python recipes/corruptions.py photo.jpg --out sheet.png         # every kind at every severity
    python recipes/corruptions.py cifar10.zip --member cifar10/train/cat/0000.jpg --out sheet.png

Five kinds of arXiv 2410.11215 (`PAPER_KINDS`), and four more on which a method that was tuned on those can be tested
(`OTHER_KINDS`). Where ImageNet-C and CIFAR-10-C (arXiv 1903.12261) have the kind, severities 1 to 5 are theirs unless
said otherwise: those of CIFAR-10-C for a shorter side of up to 32 pixels, those of ImageNet-C from 224 on, between the
two in between. In larger images damage is as coarse as it would be at 224 (save `jpeg`), so that training crops show
it. What is drawn at random follows from (seed, index) alone.
"""

import argparse
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch.utils.data import ConcatDataset, Dataset, Subset

from selectsampler.embeddings.datasets import Images, as_images

__all__ = ["OTHER_KINDS", "PAPER_KINDS", "Corrupted", "contact_sheet", "corrupt"]

PAPER_KINDS = ("gaussian_noise", "occlusion", "low_resolution", "fog", "motion_blur")
OTHER_KINDS = ("jpeg", "brightness", "snow", "pixelation")

SMALL, LARGE = 32, 224  # shorter sides in pixels, of CIFAR-10-C and of ImageNet-C
FOG_GRID = 256
REVISION = 1  # part of every fingerprint: another, and features of images damaged by older code are not taken for these


def corrupt(image: Image.Image, kind: str, severity: int, *, seed: int, index: int) -> Image.Image:
    """The image in RGB, damaged, at its own size.

    >>> grey = Image.new("L", (32, 24), 128)
    >>> corrupt(grey, "fog", 3, seed=0, index=7)                                  # doctest: +ELLIPSIS
    <PIL.Image.Image image mode=RGB size=32x24 at ...>

    Args:
        image: any mode; alpha is dropped.
        kind: one of `PAPER_KINDS` or `OTHER_KINDS`.
        severity: 1 to 5. The same (seed, index) at a higher severity is the same damage, and more of it.
        seed, index: what the random part follows from; both from 0 on.

    Raises:
        ValueError: if there is no such kind or severity.
    """
    _check_kind(kind)
    _check_severity(severity)
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, index)))
    return KINDS[kind](image.convert("RGB"), severity - 1, random)


class Corrupted(Images, Dataset):
    """A data set of which an exact share of the images is damaged on the fly.

    >>> damaged = Corrupted(train, "mixed", share=0.2, seed=0)                                   # doctest: +SKIP
    >>> loader = create_loader(damaged, input_size=224, batch_size=256, is_training=True)        # doctest: +SKIP
    >>> embeddings = ss.embed(damaged, clip, class_names=names, cache_dir="cache")               # doctest: +SKIP

    `embed`, timm's loaders and plain ones see the same damage. `transform` is taken over from `dataset`, is applied
    after the damage, and may be replaced, as `create_loader` does. The key of embed's cache changes with the damage.

    Args:
        dataset: what `embed` takes: torchvision's, timm's `ImageDataset`, a zipped folder, a list of (PIL image,
            label), a `Subset` of such. It stays as it is; its images are shown in RGB.
        kind: one kind, or `mixed`: the five of the paper in equal shares, which differ by at most one image.
        share: of the images, in [0, 1]; exactly round(share * N) are damaged.
        severity: 1 to 5.
        seed: of the rows and of their damage; other rows than label noise of the same seed.

    Attributes:
        kinds: N entries: the name of the damage, or None where the image is as it was.
        targets: N labels, or None where they are not known without decoding images; may be replaced by noisy ones.
        classes: the data set's own names of its classes, or None.

    Raises:
        ValueError: if kind, share or severity is out of range, or `dataset` is no map-style data set of images.
    """

    def __init__(self, dataset: Any, kind: str, *, share: float, severity: int = 3, seed: int = 0) -> None:
        if kind != "mixed":
            _check_kind(kind)
        _check_severity(severity)
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}, but it must lie in [0, 1].")
        self.transform = _transform_of(dataset)
        self.images = as_images(dataset)
        super().__init__(len(self.images))
        self.severity = severity
        self.seed = seed
        self.kinds = _deal(PAPER_KINDS if kind == "mixed" else (kind,), share, len(self.images), seed)
        self.targets: Any = self.images.labels()
        self.classes = self.images.class_names()

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image: Any = self.open(index)
        return (image if self.transform is None else self.transform(image)), self.label(index)

    def open(self, index: int) -> Image.Image:
        index = range(len(self))[index]
        image, kind = self.images.open(index), self.kinds[index]
        return image if kind is None else corrupt(image, kind, self.severity, seed=self.seed, index=index)

    def labels(self) -> list[Any] | None:
        return (
            None
            if self.targets is None
            else [label.item() if hasattr(label, "item") else label for label in self.targets]
        )

    def class_names(self) -> list[str] | None:
        return self.classes

    def label(self, index: int) -> Any:
        return self.images.label(index) if self.targets is None else self.targets[index]

    def keys(self) -> list[str] | None:
        return self.images.keys()

    def identities(self) -> list[str] | None:
        identities = self.images.identities()
        if identities is None:
            return None
        damage = f"severity {self.severity} seed {self.seed} revision {REVISION}"
        return [
            identity if kind is None else f"{identity} {kind} {damage} index {index}"
            for index, (identity, kind) in enumerate(zip(identities, self.kinds, strict=True))
        ]


def contact_sheet(image: Image.Image, path: Path | str) -> None:
    """Draw every kind (rows) at every severity (columns, the image itself first) into a picture file."""
    scale = max(96 / max(image.size), min(1.0, 192 / max(image.size)))
    width, height = (max(1, round(scale * length)) for length in image.size)
    margin, gap = 104, 4
    kinds = PAPER_KINDS + OTHER_KINDS
    sheet = Image.new("RGB", (margin + 6 * (width + gap), 16 + len(kinds) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column in range(6):
        draw.text((margin + column * (width + gap), 2), f"severity {column}" if column else "clean", fill="black")
        for row, kind in enumerate(kinds):
            draw.text((2, 16 + row * (height + gap) + height // 2), kind, fill="black")
            cell = corrupt(image, kind, column, seed=0, index=row) if column else image.convert("RGB")
            method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            sheet.paste(
                cell.resize((width, height), method), (margin + column * (width + gap), 16 + row * (height + gap))
            )
    sheet.save(path)


# The kinds: (image in RGB, level 0 to 4, random) -> image in RGB


def _gaussian_noise(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """As in both; the grain is no finer than 1/224 of the shorter side."""
    pixels = _pixels(image)
    deviation = _between((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38), level, image.size)
    height, width = _at_most(LARGE, image.size)
    grain = random.standard_normal((height, width, 3), dtype=np.float32)
    if grain.shape != pixels.shape:
        rows = np.arange(pixels.shape[0]) * height // pixels.shape[0]
        columns = np.arange(pixels.shape[1]) * width // pixels.shape[1]
        grain = grain[rows[:, None], columns[None, :]]
    return _image(pixels + deviation * grain)


def _occlusion(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """A black rectangle over 10 to 50 % of the image, its sides in a ratio between 1:2 and 2:1."""
    area, stretch = 0.1 * (level + 1), 2 ** random.uniform(-0.5, 0.5)
    across, down = random.random(2)
    width, height = image.size
    wide = min(width, max(1, round(width * min(1, area**0.5 * stretch))))
    high = min(height, max(1, round(area * width * height / wide)))
    left, top = round(across * (width - wide)), round(down * (height - high))
    covered = image.copy()
    covered.paste((0, 0, 0), (left, top, left + wide, top + high))
    return covered


def _low_resolution(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """Scaled down to 60, 50, 40, 30 or 25 % of its sides (of 224), and smoothly up again."""
    return _down_and_up(image, (0.6, 0.5, 0.4, 0.3, 0.25)[level], Image.Resampling.BICUBIC)


def _fog(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """As in both: a plasma fractal is added, and the brightest pixel stays as bright as it was."""
    pixels = _pixels(image)
    thickness = _between((0.2, 0.5, 0.75, 1.0, 1.5), (1.5, 2.0, 2.5, 2.5, 3.0), level, image.size)
    decay = _between((3.0, 3.0, 2.5, 2.0, 1.75), (2.0, 2.0, 1.7, 1.5, 1.4), level, image.size)
    height, width = pixels.shape[:2]
    longer = max(height, width)
    side = min(FOG_GRID, 1 << (longer - 1).bit_length())
    plasma = _plasma(side, decay, random)
    if longer > side:
        shape = (round(width * side / longer), round(height * side / longer))
        cut = Image.fromarray(plasma[: max(1, shape[1]), : max(1, shape[0])])
        plasma = np.asarray(cut.resize(image.size, Image.Resampling.BILINEAR))
    brightest = float(pixels.max())
    foggy = pixels + thickness * plasma[:height, :width, None]
    return _image(foggy * brightest / (brightest + thickness))


def _motion_blur(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """As in both, save that CIFAR-10-C's length does not grow from severity 3 to 4, which it does here."""
    angle = np.deg2rad(random.uniform(-45, 45))
    shares = _between(
        (1 / 32, 1.5 / 32, 2 / 32, 2.25 / 32, 2.5 / 32),
        (3 / 224, 5 / 224, 8 / 224, 12 / 224, 15 / 224),
        level,
        image.size,
    )
    return _image(_smear(_pixels(image), shares * min(image.size), angle))


def _jpeg(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """ImageNet-C's qualities at every size."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=(25, 18, 15, 10, 7)[level])
    return Image.open(file).convert("RGB")


def _brightness(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """As in both: the value of HSV is raised, hue and saturation stay."""
    pixels = _pixels(image)
    rise = _between((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5), level, image.size)
    value = pixels.max(axis=2, keepdims=True)
    raised = np.minimum(value + rise, 1)
    return _image(np.where(value > 0, pixels * (raised / np.maximum(value, 1e-6)), raised))


def _snow(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """In the manner of both: smeared flakes, twice, over a paler image; amounts of our own, which only grow."""
    pixels = _pixels(image)
    amount = _between((0.0, 0.08, 0.15, 0.22, 0.3), (0.08, 0.16, 0.22, 0.28, 0.36), level, image.size)
    height, width = _at_most(_between((32,) * 5, (96,) * 5, level, image.size), image.size)
    flakes = amount + 0.3 * random.standard_normal((height, width), dtype=np.float32)
    flakes = np.asarray(Image.fromarray(flakes).resize(image.size, Image.Resampling.BILINEAR))
    flakes = np.clip(np.where(flakes < 0.6, 0, flakes), 0, 1)
    angle = np.deg2rad(random.uniform(45, 135))
    layer = _smear(flakes[..., None], min(image.size) / 24, angle)
    keep = (0.9, 0.85, 0.8, 0.75, 0.7)[level]
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    pale = keep * pixels + (1 - keep) * np.maximum(pixels, grey[..., None] * 1.5 + 0.5)
    return _image(pale + layer + layer[::-1, ::-1])


def _pixelation(image: Image.Image, level: int, random: np.random.Generator) -> Image.Image:
    """As in both."""
    share = _between((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25), level, image.size)
    return _down_and_up(image, share, Image.Resampling.BOX)


KINDS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "gaussian_noise": _gaussian_noise,
    "occlusion": _occlusion,
    "low_resolution": _low_resolution,
    "fog": _fog,
    "motion_blur": _motion_blur,
    "jpeg": _jpeg,
    "brightness": _brightness,
    "snow": _snow,
    "pixelation": _pixelation,
}


# What they share


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3), float32, in [0, 1]."""
    return np.asarray(image, dtype=np.float32) / 255


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))


def _between(small: tuple[float, ...], large: tuple[float, ...], level: int, size: tuple[int, int]) -> float:
    """A setting for an image's size: that of 32 pixels below, of 224 above, along the logarithm between."""
    return float(np.interp(np.log(min(size)), np.log([SMALL, LARGE]), [small[level], large[level]]))


def _at_most(side: float, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the image, scaled down to that shorter side where it is larger."""
    scale = min(1.0, side / min(size))
    return max(1, round(size[1] * scale)), max(1, round(size[0] * scale))


def _down_and_up(image: Image.Image, share: float, up: Image.Resampling) -> Image.Image:
    height, width = _at_most(share * min(LARGE, *image.size), image.size)
    width, height = max(1, min(width, image.size[0] - 1)), max(1, min(height, image.size[1] - 1))
    return image.resize((width, height), Image.Resampling.BOX).resize(image.size, up)


def _plasma(side: int, decay: float, random: np.random.Generator) -> np.ndarray:
    """A fractal landscape by diamonds and squares, (side, side), float32, from 0 to 1; `side` is a power of two.

    Midpoints get the mean of their four neighbours (the landscape wraps around) and a random step, whose size falls by
    `decay` from one scale to the next: a high decay makes a smooth landscape.
    """
    heights = np.zeros((side, side), dtype=np.float32)
    step, amplitude = side, 1.0

    def midpoints(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (first + second) / 4 + amplitude * random.uniform(-1, 1, first.shape)

    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        centres = midpoints(pairs, np.roll(pairs, -1, axis=1))
        heights[half::step, half::step] = centres
        heights[::step, half::step] = midpoints(
            corners + np.roll(corners, -1, axis=1), centres + np.roll(centres, 1, axis=0)
        )
        heights[half::step, ::step] = midpoints(pairs, centres + np.roll(centres, 1, axis=1))
        step, amplitude = half, amplitude / decay
    heights -= heights.min()
    return heights / max(float(heights.max()), 1e-6)


def _smear(pixels: np.ndarray, deviation: float, angle: float) -> np.ndarray:
    """Convolution of (H, W, channels) with a fading line (half a normal curve), its middle at the origin."""
    kernel = _line_kernel(deviation, angle)
    reach = len(kernel) // 2
    padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    shape = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, shape)[..., None]
    smeared = np.fft.irfft2(spectrum, shape, axes=(0, 1))
    return smeared[2 * reach :, 2 * reach :].astype(np.float32)


def _line_kernel(deviation: float, angle: float) -> np.ndarray:
    """(2 R + 1, 2 R + 1), sums to one."""
    along = np.linspace(0, 3 * deviation, max(16, 2 * round(3 * deviation)))
    weights = np.exp(-((along / deviation) ** 2) / 2)
    weights /= weights.sum()
    along -= along @ weights
    reach = int(np.abs(along).max()) + 1
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    x, y = reach + along * np.cos(angle), reach + along * np.sin(angle)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    for column, across in ((left, left + 1 - x), (left + 1, x - left)):
        for row, down in ((top, top + 1 - y), (top + 1, y - top)):
            np.add.at(kernel, (np.minimum(row, 2 * reach), np.minimum(column, 2 * reach)), weights * across * down)
    return kernel


def _deal(kinds: tuple[str, ...], share: float, population: int, seed: int) -> list[str | None]:
    """Each image's damage: round(share * N) random rows, dealt to the kinds in turn."""
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    dealt: list[str | None] = [None] * population
    for place, row in enumerate(random.permutation(population)[: round(share * population)].tolist()):
        dealt[row] = kinds[place % len(kinds)]
    return dealt


def _transform_of(dataset: Any) -> Any:
    """The transform that training would have applied."""
    if isinstance(dataset, Subset):
        return _transform_of(dataset.dataset)
    if isinstance(dataset, ConcatDataset) and any(_transform_of(part) is not None for part in dataset.datasets):
        raise ValueError("Each part of a ConcatDataset has a transform of its own: damage the parts, then join them.")
    return getattr(dataset, "transform", None)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"There is no kind {kind!r} of damage, but {', '.join(KINDS)}.")


def _check_severity(severity: int) -> None:
    if not isinstance(severity, int) or not 1 <= severity <= 5:
        raise ValueError(f"severity is {severity!r}, but it must be a whole number from 1 to 5.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="an image, or a zip file of images")
    parser.add_argument("--member", help="which image of the zip file (its first)")
    parser.add_argument("--out", type=Path, required=True, help="where the picture goes")
    arguments = parser.parse_args()
    try:
        contact_sheet(picture(arguments.image, arguments.member), arguments.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"corruptions.py: {error}") from None


def picture(path: Path, member: str | None) -> Image.Image:
    """An image file, or one image of a zip file."""
    if not zipfile.is_zipfile(path):
        return Image.open(path)
    with zipfile.ZipFile(path) as archive:
        members = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))
        if not members or member not in (None, *members):
            raise ValueError(f"{path} holds no image {member or 'at all'}; it holds {len(members)} images.")
        with archive.open(member or members[0]) as file:
            return Image.open(file).convert("RGB")


if __name__ == "__main__":
    main()
