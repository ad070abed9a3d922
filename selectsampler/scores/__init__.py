"""Scores of samples, one file a score, each a pure function of tensors; `table` puts them side by side."""

from selectsampler.scores.alignment import semantic_alignment, semantic_margin
from selectsampler.scores.diversity import default_neighbours, sample_diversity
from selectsampler.scores.duplicates import near_duplicates
from selectsampler.scores.norm_sim import norm_sim
from selectsampler.scores.s_clip_loss import s_clip_loss
from selectsampler.scores.table import Scores, score
from selectsampler.scores.trust import Trust, label_trust

__all__ = [
    "Scores",
    "Trust",
    "default_neighbours",
    "label_trust",
    "near_duplicates",
    "norm_sim",
    "s_clip_loss",
    "sample_diversity",
    "score",
    "semantic_alignment",
    "semantic_margin",
]
