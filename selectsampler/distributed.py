"""What several processes need of each other. Every function gives the answer for one process where only one runs."""

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "barrier",
    "broadcast",
    "check_agreement",
    "from_rank_zero",
    "gather",
    "has_group",
    "process_count",
    "process_rank",
]

T = TypeVar("T")
_alone: ContextVar[bool] = ContextVar("_alone", default=False)  # rank 0 at work for all, who wait and cannot answer


def process_count() -> int:
    """How many processes run this program: from the process group, else from torchrun's environment, else 1."""
    if _alone.get():
        return 1
    if has_group():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Which of them this is, from 0."""
    if _alone.get():
        return 0
    if has_group():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def has_group() -> bool:
    """Whether the processes can talk to each other."""
    return dist.is_available() and dist.is_initialized()


def barrier() -> None:
    """Wait until every rank is here."""
    if process_count() > 1:
        _check_group()
        dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    if process_count() == 1:
        return value
    _check_group()
    box = [value if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def from_rank_zero(make: Callable[[], T], *, what: str) -> T:
    """What `make` returns on rank 0, on every rank; where it fails, all ranks stop, instead of waiting for ever.

    Within `make` rank 0 counts as the only process, so that it may call what several would share, as `embed` does.
    """
    if process_count() == 1:
        return make()
    value, problem, failure = None, "", None
    if process_rank() == 0:
        token = _alone.set(True)
        try:
            value = make()
        except Exception as error:
            problem, failure = f"{type(error).__name__}: {error}", error
        finally:
            _alone.reset(token)
    value, problem = broadcast((value, problem))
    if problem:
        raise RuntimeError(f"Rank 0 failed to make {what}: {problem}") from failure
    return value  # type: ignore[return-value]


def gather(tensor: Tensor) -> Tensor:
    """The tensors of all ranks one after the other, in the order of the ranks, on every rank; lengths may differ."""
    return torch.cat(_all(tensor.cpu()))


def check_agreement(value: str, *, what: str) -> None:
    """Raise on every rank, rather than hang or train on, where ranks differ in `what`."""
    values = _all(value)
    if len(set(values)) > 1:
        held = ", ".join(f"rank {rank} {held:.8}" for rank, held in enumerate(values))
        raise ValueError(f"The processes disagree on {what}: {held}. Select on rank 0 only, as Reselect does.")


def _check_group() -> None:
    if not has_group():
        raise ValueError(
            f"{process_count()} processes run, but they cannot talk: call torch.distributed.init_process_group() first."
        )


def _all(value: Any) -> list[Any]:
    if process_count() == 1:
        return [value]
    _check_group()
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
