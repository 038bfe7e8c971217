"""Groups of ranks that share Muon matrices, from Megatron's groups."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from megatron_muon.megatron.optimizer.distributed import Grid

_Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""A rank's tensor-parallel and data-parallel group, as global ranks."""


def make_grid(tp: dist.ProcessGroup, dp: dist.ProcessGroup) -> Grid:
    """The tensor-parallel groups of a data-parallel group's members, and a process group over all their ranks.

    Collective over the world.

    Args:
        tp: Tensor-parallel group of this rank.
        dp: Data-parallel group of this rank.
    """
    own_groups = (tp, dp)
    own_layout = tuple(tuple(dist.get_process_group_ranks(group)) for group in own_groups)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own_layout, platform.node()))
    layouts: list[_Layout] = [layout for layout, _ in gathered]
    hosts = [host for _, host in gathered]

    def members(dp_ranks: tuple[int, ...]) -> dict[int, tuple[int, int]]:
        return {
            rank: (dp_rank, tp_rank)
            for dp_rank, head in enumerate(dp_ranks)
            for tp_rank, rank in enumerate(layouts[head][0])
        }

    own = members(layouts[dist.get_rank()][1])
    made = {
        ranks: _group_over(ranks, layouts, own_groups)
        for ranks in sorted({tuple(sorted(members(dp_ranks))) for _, dp_ranks in layouts})
    }
    group = made[tuple(sorted(own))]
    ranks = dist.get_process_group_ranks(group)
    return Grid(
        group,
        dp_ranks=tuple(own[rank][0] for rank in ranks),
        tp_ranks=tuple(own[rank][1] for rank in ranks),
        node_of=tuple(hosts.index(hosts[rank]) for rank in ranks),
    )


def _group_over(ranks: tuple[int, ...], layouts: list[_Layout], mine: Sequence[dist.ProcessGroup]) -> dist.ProcessGroup:
    """A process group over `ranks`: an existing one of exactly these ranks if its members have it, else a new one.

    A communicator costs memory, so that it is worth looking. Collective over the world if a group is made; whether one
    is made follows from `layouts`, which is the same everywhere.
    """
    for index, group in enumerate(mine):
        if all(tuple(sorted(layouts[rank][index])) == ranks for rank in ranks):
            return group
    # Any: torch's type includes the placeholder that non-members get; they never use it.
    made: Any = dist.new_group(list(ranks))
    return made  # type: ignore[no-any-return]
