"""Scores of samples, one file a score, each a pure function of tensors; `table` puts them side by side."""

from selectsampler.scores.alignment import semantic_alignment
from selectsampler.scores.diversity import default_neighbours, sample_diversity
from selectsampler.scores.norm_sim import norm_sim
from selectsampler.scores.s_clip_loss import s_clip_loss
from selectsampler.scores.table import Scores, score

__all__ = [
    "Scores",
    "default_neighbours",
    "norm_sim",
    "s_clip_loss",
    "sample_diversity",
    "score",
    "semantic_alignment",
]
