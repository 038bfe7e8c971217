"""Work on files that ranks share, with one outcome for all: every rank returns, or every rank raises the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist


class RankProblem(Exception):
    """Says what went wrong on some rank; raised on all ranks."""


def from_first[T](work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Calls `work` on the group's first rank alone and returns its result on every rank.

    Collective over the group. Without a process group this process is the only rank.

    Raises:
        RankProblem: On every rank, if `work` raises ValueError or OSError.
    """
    outcome = _attempt(work) if rank_in(group) == 0 else (None, None)
    if dist.is_initialized():
        payload = [outcome]
        dist.broadcast_object_list(payload, group=group, group_src=0)
        outcome = payload[0]
    value, problem = outcome
    if problem is not None:
        raise RankProblem(problem)
    return value  # type: ignore[return-value]


def from_each[T](work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Calls `work` on every rank and returns all results, by rank, on every rank. Otherwise as `from_first`."""
    gathered: list[Any] = [_attempt(work)]
    if dist.is_initialized():
        outcome, gathered = gathered[0], [None] * size_of(group)
        dist.all_gather_object(gathered, outcome, group=group)
    for rank, (_, problem) in enumerate(gathered):
        if problem is not None:
            raise RankProblem(f"rank {rank}: {problem}")
    return [value for value, _ in gathered]


def rank_in(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in the group; 0 without process groups."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def size_of(group: dist.ProcessGroup | None = None) -> int:
    """The group's number of ranks; 1 without process groups."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def _attempt[T](work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except (ValueError, OSError) as error:
        return None, str(error)
