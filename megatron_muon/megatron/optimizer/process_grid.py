"""The ranks that share Muon's matrices, and the process groups over them."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.distributed as dist

from megatron_muon.exchange.team_groups import group_timeout

_Ranks = tuple[int, ...]


@dataclass(frozen=True)
class ProcessGrid:
    """The ranks that share Muon matrices: data-parallel times tensor-parallel, within an optimizer instance.

    Attributes:
        group: The process group over all of them.
        dp_ranks: For each rank of `group`, its data-parallel rank.
        tp_ranks: For each rank of `group`, its tensor-parallel rank.
        node_of: For each rank of `group`, a number of the node it runs on; None if that is not known.
    """

    group: dist.ProcessGroup
    dp_ranks: _Ranks
    tp_ranks: _Ranks
    node_of: _Ranks | None = None

    @cached_property
    def rank_at(self) -> dict[tuple[int, int], int]:
        """(data-parallel rank, tensor-parallel rank) -> rank of `group`."""
        return {at: rank for rank, at in enumerate(zip(self.dp_ranks, self.tp_ranks, strict=True))}


def make_grids(
    pairs: Mapping[str, tuple[dist.ProcessGroup, dist.ProcessGroup]],
    existing: Sequence[dist.ProcessGroup | None] = (),
) -> dict[str, ProcessGrid]:
    """Makes grids of tensor-parallel and data-parallel groups: the former's ranks of each of the latter's members.

    Collective over the world: one `all_gather_object`, and the making of the groups that do not exist yet. These get
    the timeout of the data-parallel group, and a description with the grid's name. A group of the same ranks, of a pair
    or of `existing`, is used instead of a new one, since a communicator costs memory.

    Args:
        pairs: Name -> (tensor-parallel group, data-parallel group) of this rank. The same names on every rank.
        existing: Other groups of this rank, the same kinds in the same order on every rank; None where it has none.
    """
    own_groups = {name: (*pair, *existing) for name, pair in pairs.items()}
    own = {name: tuple(map(_ranks, groups)) for name, groups in own_groups.items()}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, platform.node()))
    hosts = [host for _, host in gathered]
    grids = {}
    for name in sorted(pairs):
        layouts: list[tuple[_Ranks, ...]] = [layout[name] for layout, _ in gathered]
        places = _places(layouts, layouts[dist.get_rank()][1])
        made = {
            ranks: _group(name, ranks, layouts, own_groups[name])
            for ranks in sorted({tuple(sorted(_places(layouts, layout[1]))) for layout in layouts})
        }
        group = made[tuple(sorted(places))]
        order = _ranks(group)
        grids[name] = ProcessGrid(
            group,
            dp_ranks=tuple(places[rank][0] for rank in order),
            tp_ranks=tuple(places[rank][1] for rank in order),
            node_of=tuple(hosts.index(hosts[rank]) for rank in order),
        )
    return grids


def _ranks(group: dist.ProcessGroup | None) -> _Ranks:
    return () if group is None else tuple(dist.get_process_group_ranks(group))


def _places(layouts: Sequence[tuple[_Ranks, ...]], dp_ranks: _Ranks) -> dict[int, tuple[int, int]]:
    """Global rank -> (data-parallel rank, tensor-parallel rank), of the grid with these data-parallel ranks."""
    return {
        rank: (dp_rank, tp_rank)
        for dp_rank, head in enumerate(dp_ranks)
        for tp_rank, rank in enumerate(layouts[head][0])
    }


def _group(
    name: str, ranks: _Ranks, layouts: Sequence[tuple[_Ranks, ...]], own_groups: Sequence[dist.ProcessGroup | None]
) -> dist.ProcessGroup:
    """An existing group of exactly these ranks if its members have it, else a new one.

    Collective over the world if a group is made; whether one is made follows from `layouts`, the same everywhere.
    """
    for index, group in enumerate(own_groups):
        if all(tuple(sorted(layouts[rank][index])) == ranks for rank in ranks):
            # Of the others' groups, ranks that are no members get one of their own, and never use it.
            return group  # type: ignore[return-value]
    from megatron.core.parallel_state import create_group

    dp_group = own_groups[1]
    assert dp_group is not None
    # Any: torch's type includes the placeholder that non-members get; they never use it.
    description = f"MUON_{name.upper()}_TP_DP_GROUP"
    made: Any = create_group(list(ranks), timeout=group_timeout(dp_group), group_desc=description)
    return made  # type: ignore[no-any-return]
