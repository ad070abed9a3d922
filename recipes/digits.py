"""Select from 800 digits of which 40 % are mislabelled, and train a timm model on the half that CLIP trusts.

    selectsampler demo

scikit-learn's digits, split into thirds that share no image: 599 pretrain a small CLIP with open_clip's own loss (on
right labels: a CLIP's knowledge comes from elsewhere), 800 are the training set, 398 the test set. Everything below is
what a user would write; every run makes the same number of updates.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from open_clip.model import CLIP
from PIL import Image
from selectsampler.recipes.noise import symmetric
from timm.data import create_loader
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

import selectsampler as ss
from selectsampler.progress import progress_bar

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
CONTEXT = 24
PRETRAIN_STEPS = 200
UPDATES = 60
BATCH_SIZE = 64
MODEL = "test_resnet"
METHODS = ("all, noisy labels", "random subset", "selection", "clean subset (oracle)")


def run(out: Path, *, noise: float = 0.4, keep: str | float = "0.5", seeds: int = 3) -> dict[str, Any]:
    """Run the demo, print its table, and write results, selection, scores and picture into `out`."""
    if not 0 <= noise < 0.9:
        raise ValueError(f"noise is {noise}, but it must lie in [0, 0.9): at 0.9 a label says nothing of ten classes.")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, but at least one run is needed.")
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    pretrain, training, test = load_splits()
    with timed(seconds, "pretrain the CLIP"):
        clip = pretrain_clip(pretrain)
    with timed(seconds, "embed"):
        embeddings = ss.embed(training, clip, class_names=NAMES)
    runs = []
    for seed in range(seeds):
        noisy = symmetric(training.targets, noise, classes=len(NAMES), seed=seed)
        selection, scores = select_digits(embeddings.with_labels(noisy), keep, seed, seconds)
        if seed == 0:
            selection.save(out / "selection.safetensors")
            scores.save(out / "scores.safetensors")
            draw(out / "digits.png", training, scores, selection)
        for method, indices in subsets(selection, noisy, training.targets, seed).items():
            start = time.perf_counter()
            accuracy = train(
                Digits(training.images, noisy), indices, test, seed=seed, label=f"train {seed + 1}/{seeds}"
            )
            wrong = float((noisy[indices] != training.targets[indices]).float().mean())
            took = time.perf_counter() - start
            row = {"method": method, "seed": seed, "accuracy": accuracy, "wrong_labels": wrong}
            runs.append(row | {"samples": len(indices), "seconds": took})
    results = {"noise": noise, "keep": str(keep), "updates": UPDATES, "seconds": seconds, "runs": runs}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    print(f"\nselection, scores, results.json and digits.png are in {out}/")
    return results


class Digits(Dataset):
    """Digits as 8 x 8 grey PIL images, like torchvision's: with `targets`, and a `transform` that a loader sets."""

    def __init__(self, images: np.ndarray, targets: Tensor) -> None:
        self.images = images  # (N, 8, 8), uint8
        self.data = images
        self.targets = targets
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image: Any = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), int(self.targets[index])


def load_splits() -> tuple[Digits, Digits, Digits]:
    """Three disjoint parts of the 1,797 digits: 599 for the CLIP, 800 to train on, 398 to test on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    parts = np.split(order, [599, 1399])
    pretrain, training, test = (Digits(images[part], torch.from_numpy(digits.target[part]).long()) for part in parts)
    return pretrain, training, test


def pretrain_clip(digits: Digits) -> tuple[nn.Module, Any, Any]:
    """A small CLIP (0.28 M parameters) trained with open_clip's ClipLoss: model, preprocess and tokenizer."""
    torch.manual_seed(0)
    model = CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 32, "patch_size": 8, "layers": 3, "width": 64, "head_width": 16},
        text_cfg={"context_length": CONTEXT, "vocab_size": len(ALPHABET) + 3, "width": 64, "heads": 4, "layers": 2},
    )
    bicubic = transforms.InterpolationMode.BICUBIC
    to_tensor = transforms.Compose(
        [transforms.Resize((32, 32), bicubic), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    pixels = torch.stack([to_tensor(digits[i][0].convert("RGB")) for i in range(len(digits))])
    captions = tokenize([f"A photo of a {name}" for name in NAMES])
    loss_of = open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PRETRAIN_STEPS)
    random = np.random.default_rng(0)
    with progress_bar("pretrain", PRETRAIN_STEPS, unit="step") as bar:
        for _ in range(PRETRAIN_STEPS):
            batch = torch.from_numpy(random.choice(len(digits), BATCH_SIZE, replace=False))
            shift = random.integers(-2, 3, 2).tolist()
            image = model.encode_image(pixels[batch].roll(shift, dims=(2, 3)), normalize=True)
            text = model.encode_text(captions, normalize=True)[digits.targets[batch]]
            loss = loss_of(image, text, model.logit_scale.exp())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return model.eval(), to_tensor, tokenize


def tokenize(texts: list[str]) -> Tensor:
    """A token a letter: (T, 24), int64, between a start and an end token; other letters become spaces."""
    start, end = len(ALPHABET) + 1, len(ALPHABET) + 2
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        letters = [max(0, ALPHABET.find(letter)) + 1 for letter in text.lower()[: CONTEXT - 2]]
        row[: len(letters) + 2] = torch.tensor([start, *letters, end])
    return tokens


def select_digits(
    embeddings: ss.Embeddings, keep: str | float, seed: int, seconds: dict[str, float]
) -> tuple[ss.Selection, ss.Scores]:
    """Adapt, score and select, each step timed."""
    preset = ss.presets.default
    with timed(seconds, "adapt"):
        adapted = ss.adapt(embeddings, seed=seed, **preset["adapt"])
    with timed(seconds, "score"):
        scores = ss.score(adapted, **preset["score"])
    with timed(seconds, "select"):
        selection = ss.select(scores, keep, seed=seed, **preset["select"])
    return selection, scores


def subsets(selection: ss.Selection, noisy: Tensor, truth: Tensor, seed: int) -> dict[str, Tensor]:
    """What each method trains on; all but the first have the size of the selection."""
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(noisy)))
    clean = order[noisy[order] == truth[order]]
    return dict(
        zip(
            METHODS,
            (torch.arange(len(noisy)), order[: len(selection)], selection.indices, clean[: len(selection)]),
            strict=True,
        )
    )


def train(digits: Digits, indices: Tensor, test: Digits, *, seed: int, label: str) -> float:
    """Test accuracy of a timm model after `UPDATES` updates on these samples."""
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, num_classes=len(NAMES), in_chans=1)
    loader = ss.with_sampler(timm_loader(digits, is_training=True), ss.SelectSampler(indices, seed=seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=UPDATES, pct_start=0.1)
    model.train()
    with progress_bar(label, UPDATES, unit="update") as bar:
        for images, targets in endless(loader, UPDATES):
            loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(images).argmax(dim=1) == targets).sum()) for images, targets in timm_loader(test))
    return right / len(test)


def timm_loader(digits: Digits, *, is_training: bool = False) -> Any:
    """What timm's own training script would make of the data set."""
    return create_loader(
        digits,
        input_size=(1, 16, 16),
        batch_size=BATCH_SIZE,
        is_training=is_training,
        no_aug=True,
        interpolation="bicubic",
        mean=(0.5,),
        std=(0.5,),
        crop_pct=1.0,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )


def endless(loader: Any, updates: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`updates` batches, epoch after epoch."""
    epoch = 0
    while updates > 0:
        loader.sampler.set_epoch(epoch)
        for batch, _ in zip(loader, range(updates), strict=False):
            yield batch
            updates -= 1
        epoch += 1


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds that a stage takes."""
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def table(results: dict[str, Any]) -> str:
    """The results as a person reads them."""
    seeds = 1 + max(row["seed"] for row in results["runs"])
    lines = [
        f"digits, {100 * results['noise']:.0f} % of the training labels flipped; {MODEL}, {results['updates']} updates "
        f"of {BATCH_SIZE}; mean ± standard deviation of {seeds} seeds (of noise, subset and training)",
        "",
        f"{'trained on':<24}{'test accuracy':>16}{'wrong labels':>15}{'samples':>10}{'train':>9}",
    ]
    for method in METHODS:
        rows = [row for row in results["runs"] if row["method"] == method]
        accuracy = 100 * np.array([row["accuracy"] for row in rows])
        wrong, took = (np.mean([row[name] for row in rows]) for name in ("wrong_labels", "seconds"))
        spread = accuracy.std(ddof=min(1, seeds - 1))
        lines.append(
            f"{method:<24}{accuracy.mean():>9.1f} ± {spread:<2.1f} %{100 * wrong:>13.1f} %"
            f"{rows[0]['samples']:>10}{took:>7.1f} s"
        )
    stages = results["seconds"]
    each = {stage: stages[stage] / (1 if stage in ("pretrain the CLIP", "embed") else seeds) for stage in stages}
    lines += ["", "cost of selecting: " + ", ".join(f"{stage} {took:.2f} s" for stage, took in each.items())]
    return "\n".join(lines)


def draw(path: Path, digits: Digits, scores: ss.Scores, selection: ss.Selection, shown: int = 8) -> None:
    """The least and the most trusted samples of each class, and how the scores of kept and dropped samples lie."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.5))
    alignment = scores["semantic_alignment"]
    labels = torch.as_tensor(scores.labels)
    for place, title, descending in ((0.04, "least", False), (0.36, "most", True)):
        axes = figure.add_axes((place, 0.03, 0.29, 0.9))
        axes.set_title(f"{title} trusted of each given label (red: wrong)")
        axes.imshow(mosaic(digits, labels, alignment, descending=descending, shown=shown), interpolation="nearest")
        axes.set_yticks([10 * label + 4.5 for label in range(len(NAMES))], NAMES)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.set_frame_on(False)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[selection.indices] = True
    for number, (name, values) in enumerate(scores.columns.items()):
        axes = figure.add_axes((0.72, 0.55 - 0.48 * number, 0.26, 0.38))
        parts = [values[~kept].numpy(), values[kept].numpy()]
        axes.hist(parts, bins=40, label=["dropped", "kept"], color=["#c44e52", "#4c72b0"], stacked=True)
        axes.set_title(name.replace("_", " "))
        axes.set_ylabel("samples")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=90)


def mosaic(digits: Digits, labels: Tensor, scores: Tensor, *, descending: bool, shown: int) -> np.ndarray:
    """Some digits of each label, a row a label, as one picture; those whose label is wrong stand in a red frame."""
    picture = np.full((10 * len(NAMES), 10 * shown, 3), 255, dtype=np.uint8)
    for label in range(len(NAMES)):
        members = (labels == label).nonzero()[:, 0]
        for column, index in enumerate(members[scores[members].argsort(descending=descending)][:shown].tolist()):
            tile = picture[10 * label : 10 * label + 10, 10 * column : 10 * column + 10]
            tile[:] = 255 if int(digits.targets[index]) == label else (196, 78, 82)
            tile[1:9, 1:9] = 255 - digits.images[index][..., None]
    return picture
