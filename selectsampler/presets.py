"""Ready configurations: arguments of adapt, score and select. `SelectSampler.from_dataset` takes one as `preset`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from selectsampler.adaptation import adapt
from selectsampler.scores import score
from selectsampler.selection import select

__all__ = ["checked", "default", "paper"]

Preset = dict[str, dict[str, Any]]

paper: Preset = {
    "adapt": {"method": "info_nce"},
    "score": {"columns": ("semantic_alignment", "sample_diversity"), "scaling": "min_max"},
    "select": {
        "score_weights": {"semantic_alignment": 1.0, "sample_diversity": 0.1},
        "balance": None,
        "method": "straight_through",
    },
}
"""arXiv 2410.11215 as released."""

default: Preset = {
    "adapt": {"method": "none"},
    "score": {"columns": ("semantic_alignment", "semantic_margin", "trust", "trusted_diversity", "intactness")},
    "select": {"balance": "auto", "method": "auto"},
}
"""Ours: a draw by lot among the samples whose labels are safe and whose images do not look damaged, as diverse as all
that is trusted, under quotas by what a class can be trusted for. Trust has cross-fitted heads, so that no adapters are
trained."""


def checked(preset: Preset) -> Preset:
    """The preset, if every argument of it is one of adapt, score or select.

    Raises:
        ValueError: naming what is not.
    """
    steps: dict[str, Callable[..., Any]] = {"adapt": adapt, "score": score, "select": select}
    if not isinstance(preset, Mapping) or not all(isinstance(given, Mapping) for given in preset.values()):
        raise ValueError(f"preset is {preset!r:.100}, but it must be a dict of arguments of {', '.join(steps)}.")
    for step, given in preset.items():
        if step not in steps:
            raise ValueError(f"preset names a step {step!r}, but there are {', '.join(steps)}.")
        known = inspect.signature(steps[step]).parameters
        for name in given:
            if name not in known:
                raise ValueError(f"preset gives {step}() {name!r}, which it does not take: {', '.join(known)}.")
    return preset
