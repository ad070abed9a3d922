"""Ready configurations: arguments of adapt, score and select. `SelectSampler.from_dataset` takes one as `preset`."""

from typing import Any

__all__ = ["default", "paper"]

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
