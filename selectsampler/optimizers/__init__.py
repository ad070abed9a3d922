"""Solvers that choose k of N samples, one file each; ties go to the lower index, of `draw` to the lot."""

from selectsampler.optimizers.draw import ExpectedWrong, chances, draw, safe_limit
from selectsampler.optimizers.exact import top_k
from selectsampler.optimizers.group import GroupSelection, group
from selectsampler.optimizers.norm_sim_dynamic import norm_sim_dynamic
from selectsampler.optimizers.quotas import apportion
from selectsampler.optimizers.ranges import prices, top_k_in_ranges
from selectsampler.optimizers.straight_through import StraightThrough, straight_through

__all__ = [
    "ExpectedWrong",
    "GroupSelection",
    "StraightThrough",
    "apportion",
    "chances",
    "draw",
    "group",
    "norm_sim_dynamic",
    "prices",
    "safe_limit",
    "straight_through",
    "top_k",
    "top_k_in_ranges",
]
