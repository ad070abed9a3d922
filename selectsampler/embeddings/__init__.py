"""Embeddings of an image data set: the only place that runs CLIP or sees pixels.

`encode` runs the model over a data set, `datasets` reads raw images out of every kind of data set, `clip` loads the
model, `statistics` looks at an image's own pixels, `features` holds the result.
"""

from selectsampler.embeddings.encode import UnreadableImages, embed
from selectsampler.embeddings.features import Embeddings
from selectsampler.embeddings.statistics import STATISTICS

__all__ = ["STATISTICS", "Embeddings", "UnreadableImages", "embed"]
