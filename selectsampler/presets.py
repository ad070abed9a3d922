"""Ready configurations: arguments of adapt, score and select. `SelectSampler.from_dataset` takes one as `preset`."""

from typing import Any

__all__ = ["default", "paper"]

Preset = dict[str, dict[str, Any]]

paper: Preset = {
    "adapt": {"method": "info_nce"},
    "score": {"scaling": "min_max"},
    "select": {"score_weights": {"semantic_alignment": 1.0, "sample_diversity": 0.1}, "method": "straight_through"},
}
"""arXiv 2410.11215 as released."""

default: Preset = {
    "adapt": {"method": "cross_fit"},
    "score": {"scaling": "min_max"},
    "select": {"score_weights": {"semantic_alignment": 1.0, "sample_diversity": 0.1}, "method": "exact"},
}
"""Ours: adapters that never saw the label they judge, and the exact optimum."""
