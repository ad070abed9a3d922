"""What a pool is filtered by: one stage after another, each checked when it is written down."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from selectsampler.datacomp import SCORES

__all__ = ["MASKS", "Stage", "check_available", "check_keeps"]

MASKS = ("basic", "text-based", "image-based")
TARGETED = ("norm-sim", "text-based", "image-based")
ROUNDS = 500


@dataclass(frozen=True)
class Stage:
    """One filter: what it scores by, and what it keeps.

    >>> paper = [Stage("s-clip-loss", keep="0.3"), Stage("norm-sim", keep="0.2", target="imagenet.npy")]

    Args:
        score: `s-clip-loss`; `norm-sim`, of survivors only, against `target`; `norm-sim-dynamic`, against the survivors
            themselves, in `rounds`; `clip-score`, the parquet's similarity; or DataComp's yes-or-no filters `basic`,
            `text-based` (words in `target`) and `image-based` (images in `target`, clusters in `centroids`), which keep
            what they keep.
        keep: a fraction of the whole pool, in [0, 1], taken as the exact decimal it is written as: the best of what
            the stages before have left.
        threshold: instead of keep: everything that scores at least this.
        target: a file or folder of image features (`.npy`, `.npz`, `.safetensors`), or a file with a word a line; local
            or any fsspec URL.
        p: of norm-sim, 2 or infinity.
        centroids: (C, D) `.npy`, local or any fsspec URL.
        rounds: of norm-sim-dynamic, by default 500: in how many steps the pool shrinks.
    """

    score: str
    keep: str | float | None = None
    threshold: float | None = None
    target: str | None = None
    p: float = math.inf
    centroids: str | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score is {self.score!r}, but it must be one of {', '.join(SCORES)}.")
        self._check_amount()
        self._check_inputs()

    def _check_amount(self) -> None:
        if self.score in MASKS:
            if self.keep is not None or self.threshold is not None:
                raise ValueError(f"{self.score} says yes or no: it takes neither keep nor threshold.")
        elif self.score == "norm-sim-dynamic" and (self.keep is None or self.threshold is not None):
            raise ValueError("norm-sim-dynamic needs keep, a fraction of the pool, as its scores change every round.")
        elif (self.keep is None) == (self.threshold is None):
            raise ValueError(f"{self.score} needs either keep, a fraction of the pool, or threshold, a lowest score.")
        if self.keep is not None and not 0 <= _fraction(self.keep) <= 1:
            raise ValueError(f"keep is {self.keep}, but it must be a fraction of the pool in [0, 1].")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold is {self.threshold}, but must be finite: give the lowest score to keep.")

    def _check_inputs(self) -> None:
        if self.target is not None and self.score not in TARGETED:
            raise ValueError(f"{self.score} takes no target: of {', '.join(TARGETED)} only.")
        if self.centroids is not None and self.score != "image-based":
            raise ValueError(f"{self.score} takes no centroids: of image-based only.")
        if self.p != math.inf and self.score != "norm-sim":
            raise ValueError(f"{self.score} takes no p: of norm-sim only.")
        if self.rounds is not None and self.score != "norm-sim-dynamic":
            raise ValueError(f"{self.score} takes no rounds: of norm-sim-dynamic only.")
        if self.score in TARGETED and self.target is None:
            raise ValueError(f"{self.score} needs a target: a file or folder of features, or of words for text-based.")
        if self.score == "image-based" and self.centroids is None:
            raise ValueError("image-based needs centroids: a .npy file of (C, D) cluster centres.")
        if self.p not in (2, math.inf):
            raise ValueError(f"p is {self.p}, but NormSim is defined here for p=2 and p=float('inf').")
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, but at least one is needed.")
        if self.rounds is None and self.score == "norm-sim-dynamic":
            object.__setattr__(self, "rounds", ROUNDS)

    def count(self, rows: int) -> int | None:
        """How many of a pool's rows `keep` asks for; None without it."""
        return None if self.keep is None else int(_fraction(self.keep) * rows)

    def members(self, arch: str) -> list[str]:
        """The arrays of the npz that it reads."""
        image, text = f"{arch}_img", f"{arch}_txt"
        if self.score == "s-clip-loss":
            return [image, text]
        return [image] if self.score in ("norm-sim", "norm-sim-dynamic", "image-based") else []

    def columns(self, arch: str) -> list[str]:
        """The columns of the parquet that it reads."""
        needed = {
            "clip-score": [f"clip_{arch}_similarity_score"],
            "basic": ["text", "original_width", "original_height"],
            "text-based": ["text"],
        }
        return needed.get(self.score, [])

    def described(self) -> dict[str, Any]:
        """As JSON, for the provenance."""
        described = {name: value for name, value in asdict(self).items() if value is not None}
        if self.score != "norm-sim":
            del described["p"]
        # JSON knows no infinity, and a fraction is what it was written as
        return {name: str(value) if name in ("p", "keep") else value for name, value in described.items()}


def check_keeps(stages: Sequence[Stage], rows: int) -> None:
    """Refuse now what would be refused after hours: more than an earlier stage leaves."""
    available = rows
    for stage in stages:
        count = stage.count(rows)
        if count is not None:
            check_available(count, available)
            available = count


def check_available(count: int, available: int, *, left_by: str = "the stages before") -> None:
    """A stage can keep no more than its predecessors left."""
    if count > available:
        raise ValueError(
            f"{count} samples are asked for, but {left_by} left {available}. Fractions are of the whole pool, also of "
            "what is left of it: ask for fewer."
        )


def _fraction(keep: str | float | None) -> Fraction:
    try:
        return Fraction(str(keep))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"keep is {keep!r}, but it must be a fraction in [0, 1].") from None
