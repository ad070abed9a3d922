"""Image-text pools: DataComp's files in, uid files out, from one machine to many.

>>> from selectsampler.datacomp import Stage, filter_pool                                            # doctest: +SKIP
>>> stages = [Stage("s-clip-loss", keep=0.3), Stage("norm-sim", keep=0.2, target="imagenet.npy")]    # doctest: +SKIP
>>> filter_pool("metadata", stages, "subset.npy")                                                    # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectsampler.datacomp.filtering import Filtered, filter_pool
    from selectsampler.datacomp.pool import Pool, Shard, ShardError, open_pool, read_pool
    from selectsampler.datacomp.stages import Stage
    from selectsampler.datacomp.targets import read_target
    from selectsampler.datacomp.uid_files import merge_uid_files, merge_uids, write_uids
    from selectsampler.datacomp.uids import UID, UidFilter, contains, format_uids, parse_uids, read_uids
    from selectsampler.datacomp.verify import verify_pool, verify_uids

__all__ = [
    "SCORES",
    "UID",
    "Filtered",
    "Pool",
    "Shard",
    "ShardError",
    "Stage",
    "UidFilter",
    "contains",
    "filter_pool",
    "format_uids",
    "merge_uid_files",
    "merge_uids",
    "open_pool",
    "parse_uids",
    "read_pool",
    "read_target",
    "read_uids",
    "verify_pool",
    "verify_uids",
    "write_uids",
]

SCORES = ("s-clip-loss", "norm-sim", "norm-sim-dynamic", "clip-score", "basic", "text-based", "image-based")
"""What a stage can score by."""

_HOMES = {
    "filtering": ("Filtered", "filter_pool"),
    "pool": ("Pool", "Shard", "ShardError", "open_pool", "read_pool"),
    "stages": ("Stage",),
    "targets": ("read_target",),
    "uid_files": ("merge_uid_files", "merge_uids", "write_uids"),
    "uids": ("UID", "UidFilter", "contains", "format_uids", "parse_uids", "read_uids"),
    "verify": ("verify_pool", "verify_uids"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line builds its parser without torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"selectsampler.datacomp.{home}"), name)
    raise AttributeError(f"module 'selectsampler.datacomp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
