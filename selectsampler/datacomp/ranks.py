"""What the ranks of a pool run tell each other: small facts, and parts that rank 0 does not have."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from selectsampler.distributed import process_count, process_rank

__all__ = ["collect", "everyone", "first_on_its_machine", "from_first", "join", "split_by_size", "total"]

T = TypeVar("T")


def join() -> bool:
    """Join the process group that torchrun announces; True where this call made it, so that it has to leave as well."""
    if process_count() == 1 or dist.is_initialized():
        return False
    # ranks wait for the slowest, as long as it takes; a dead one is noticed by its closed connection
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    return True


def everyone(fact: T) -> list[T]:
    """What each rank says, in the order of ranks."""
    if process_count() == 1:
        return [fact]
    facts: list[Any] = [None] * process_count()
    _with_all_alive(lambda: dist.all_gather_object(facts, fact))
    return facts


def first_on_its_machine() -> bool:
    """Whether this rank tidies up for its machine: folders may be shared by all ranks, or by those of a machine."""
    return process_count() == 1 or os.environ.get("LOCAL_RANK", str(process_rank())) == "0"


def from_first(decide: Callable[[], T]) -> T:
    """What rank 0 finds by `decide`, or the error that it finds, on every rank."""
    if process_count() == 1:
        return decide()
    facts: list[Any] = [None, None]
    if process_rank() == 0:
        try:
            facts[0] = decide()
        except Exception as error:
            facts[1] = error
    _with_all_alive(lambda: dist.broadcast_object_list(facts, src=0))
    if facts[1] is not None:
        raise facts[1]
    return facts[0]


def total(numbers: Tensor) -> Tensor:
    """The sum over ranks of an integer tensor, in place: exact, so that the order does not matter."""
    if process_count() > 1:
        _with_all_alive(lambda: dist.all_reduce(numbers))
    return numbers


def collect(
    names: Sequence[str], here: set[str], read: Callable[[str], Tensor], write: Callable[[str, Tensor], None]
) -> None:
    """Send rank 0 the float32 vectors that it lacks: nothing on one machine, or where the folder is shared."""
    holders = everyone(here)
    for name in names:
        if name in holders[0]:
            continue
        sender = next(rank for rank, names_there in enumerate(holders) if name in names_there)
        if process_rank() == sender:
            _send(read(name))
        elif process_rank() == 0:
            write(name, _receive(sender))


def _send(part: Tensor) -> None:
    _with_all_alive(lambda: dist.send(torch.tensor([len(part)]), 0))
    _with_all_alive(lambda: dist.send(part, 0))


def _receive(sender: int) -> Tensor:
    size = torch.zeros(1, dtype=torch.int64)
    _with_all_alive(lambda: dist.recv(size, sender))
    part = torch.empty(int(size))
    _with_all_alive(lambda: dist.recv(part, sender))
    return part


def split_by_size(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which items each rank takes: the largest first, each to the rank that has least.

    >>> split_by_size([5, 3, 3, 1], ranks=2)
    [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        rank = loads.index(min(loads))
        shares[rank].append(item)
        loads[rank] += sizes[item]
    return [sorted(share) for share in shares]


def _with_all_alive(exchange: Callable[[], Any]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise ConnectionError(
            f"Rank {process_rank()} lost contact: another rank died, see its message. What was finished is kept: start "
            f"the same command again, and it goes on from there. ({error})"
        ) from error
