"""Train on the part of the data that is worth training on.

>>> import selectsampler as ss                                                    # doctest: +SKIP
>>> sampler = ss.SelectSampler.from_dataset(
...     dataset, keep=0.7, clip="ViT-B-32/openai", class_names=names, cache_dir="cache"
... )                                                                             # doctest: +SKIP
>>> loader = DataLoader(dataset, batch_size=256, sampler=sampler)                 # doctest: +SKIP

Step by step: `embed`, `adapt`, `score`, `select`, `SelectSampler`, `with_sampler`. Embeddings, scores and
selections can be saved, loaded and looked at.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectsampler import datacomp, optimizers, presets, scores
    from selectsampler.adaptation import Adapted, adapt
    from selectsampler.embeddings import Embeddings, UnreadableImages, embed
    from selectsampler.reselect import LossTracker, Reselect
    from selectsampler.sampler import SelectSampler, with_sampler
    from selectsampler.scores import Scores, score
    from selectsampler.selection import Selection, select

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Embeddings",
    "LossTracker",
    "Reselect",
    "Scores",
    "SelectSampler",
    "Selection",
    "UnreadableImages",
    "adapt",
    "datacomp",
    "embed",
    "optimizers",
    "presets",
    "score",
    "scores",
    "select",
    "with_sampler",
]

_HOMES = {
    "Adapted": "adaptation",
    "adapt": "adaptation",
    "Embeddings": "embeddings",
    "UnreadableImages": "embeddings",
    "embed": "embeddings",
    "LossTracker": "reselect",
    "Reselect": "reselect",
    "SelectSampler": "sampler",
    "with_sampler": "sampler",
    "Scores": "scores",
    "score": "scores",
    "Selection": "selection",
    "select": "selection",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import selectsampler` costs little."""
    if name in _HOMES:
        return getattr(import_module(f"selectsampler.{_HOMES[name]}"), name)
    if name in __all__:
        return import_module(f"selectsampler.{name}")
    raise AttributeError(f"module 'selectsampler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
