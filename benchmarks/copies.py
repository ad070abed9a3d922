"""Do copies of an image stay beside it, and do images that merely look alike?

    python benchmarks/copies.py --data cifar10.zip --clip local-dir:cifar-clip --out benchmarks/results/copies.json

A tenth of files 0000 to 2499 of each class of CIFAR-10's training set (the CLIP that the committed results were made
with was pretrained on the others) stands in the data set twice: the second time as the very same image, stored again as
a JPEG of quality 75, mirrored, or shifted by a pixel. Of each of these the table says how often both stay, random
subsets, the paper's preset and ours, and how many were found to repeat another (`near_duplicates`); of the images that
have no copy, how many were. Labels are right.
"""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import interval, pool
from PIL import Image, ImageChops, ImageOps
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset

import selectsampler as ss
from selectsampler.scores.duplicates import near_duplicates

KEPT = (0.3, 0.5)
METHODS = ("random", "presets.paper", "presets.default")


def stored_again(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


COPIES = {
    "the same": lambda image: image,
    "stored again": stored_again,
    "mirrored": ImageOps.mirror,
    "shifted": lambda image: ImageChops.offset(image, 1, 0),
}


class WithCopies(Dataset):
    """The images, and behind them the copies of some."""

    transform = None

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.classes = images, images.classes
        self.copied = np.random.default_rng([seed, 11]).permutation(len(images))[: len(images) // 10]
        self.kinds = np.arange(len(self.copied)) % len(COPIES)
        self.targets = [*images.targets, *(images.targets[row] for row in self.copied)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        behind = index - len(self.images)
        image = self.images[index if behind < 0 else int(self.copied[behind])][0].convert("RGB")
        if behind >= 0:
            image = list(COPIES.values())[self.kinds[behind]](image)
        return image if self.transform is None else self.transform(image), self.targets[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as a zip of an image folder")
    parser.add_argument("--clip", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON; the table goes beside it as .md")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"torch": torch.__version__, "rows": []}
    for seed in range(arguments.seeds):
        results["rows"].append(measure(WithCopies(pool(arguments.data), seed), arguments.clip, seed))
        print(results["rows"][-1], flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(results))
    print(table(results))


def measure(dataset: WithCopies, clip: str, seed: int) -> dict[str, Any]:
    """How many pairs stay whole under each method, and who is found to repeat another."""
    embeddings = ss.embed(dataset, clip, class_names=dataset.classes, progress=False)
    kinds, copied = torch.from_numpy(dataset.kinds), torch.from_numpy(dataset.copied)
    directions = normalize(embeddings.image.float(), dim=1)
    found = near_duplicates(directions, embeddings.labels, torch.ones(len(embeddings)))
    alone = torch.ones(len(dataset.images), dtype=torch.bool)
    alone[copied] = False
    row = {"seed": seed, "alone_named": 100 * float(found[: len(alone)][alone].float().mean())}
    row["named"] = of_kinds(found[copied] | found[len(alone) :], kinds)
    row["both"] = {
        f"{name} {kept:.0%}": of_kinds(stay[copied] & stay[len(alone) :], kinds)
        for name in METHODS
        for kept, stay in stays(embeddings, name, seed).items()
    }
    return row


def stays(embeddings: ss.Embeddings, name: str, seed: int) -> dict[float, Tensor]:
    """(N,), bool, of each share kept: who stays."""
    order = torch.from_numpy(np.random.default_rng([seed, 1]).permutation(len(embeddings)))
    if name != "random":
        preset = getattr(ss.presets, name.removeprefix("presets."))
        adapted = ss.adapt(embeddings, seed=seed, progress=False, **preset["adapt"])
        scores = ss.score(adapted, seed=seed, progress=False, **preset["score"])
    result = {}
    for kept in KEPT:
        if name == "random":
            rows = order[: int(kept * len(order))]
        else:
            rows = ss.select(scores, str(kept), seed=seed, progress=False, **preset["select"]).indices
        result[kept] = torch.zeros(len(order), dtype=torch.bool).index_fill_(0, rows, True)
    return result


def of_kinds(which: Tensor, kinds: Tensor) -> dict[str, float]:
    """Percent of each kind of copy."""
    return {name: 100 * float(which[kinds == number].float().mean()) for number, name in enumerate(COPIES)}


def table(results: dict[str, Any]) -> str:
    """A row a kind of copy: how often both stay, and how often one of the two was found to repeat the other."""
    rows = results["rows"]
    columns = list(rows[0]["both"])
    lines = [
        f"25,000 images and 2,500 copies, {len(rows)} seeds; percent of pairs of which both stay (mean ± 95 % "
        "interval), and of which one is named a near-duplicate.",
        "",
        "| copy | " + " | ".join(columns) + " | named |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for kind in COPIES:
        cells = [interval([row["both"][column][kind] for row in rows], 1) for column in columns]
        cells.append(interval([row["named"][kind] for row in rows], 1))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    named = interval([row["alone_named"] for row in rows])
    lines += ["", f"Of the images without a copy, {named} % are named a near-duplicate."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
