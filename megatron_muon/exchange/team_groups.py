"""Communicators for the messages of teams, so that a small stage never waits behind a large transfer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_muon.plan.ownership import OwnershipPlan

DESCRIPTION = "MUON_TEAMS"
"""`group_desc` of these groups, by which NCCL's logs and the flight recorder name them."""


def has_teams(plan: OwnershipPlan) -> bool:
    """Whether any of a plan's matrices is shared by a team."""
    return any(plan.team_stages(round_index) for round_index in range(len(plan.rounds)))


def make_team_groups(
    plans: Sequence[tuple[OwnershipPlan, dist.ProcessGroup]],
) -> list[dist.ProcessGroup | None]:
    """Makes a second group over the ranks of each group whose plan has teams.

    Collective over the world, since torch makes groups so: every rank calls it with as many plans, in the same order.

    Args:
        plans: This rank's plans and the groups they are about.

    Returns:
        For each plan, the group for its teams' messages, with the timeout of the plan's group; None without teams.
    """
    own = [tuple(dist.get_process_group_ranks(group)) if has_teams(plan) else None for plan, group in plans]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    out: list[dist.ProcessGroup | None] = [None] * len(plans)
    for position, (_, group) in enumerate(plans):
        for ranks in sorted({of_rank[position] for of_rank in gathered if of_rank[position] is not None}):
            # Any: torch's type includes the placeholder that non-members get.
            made: Any = dist.new_group(list(ranks), timeout=group_timeout(group), group_desc=DESCRIPTION)
            if ranks == own[position]:
                out[position] = made
    return out


def group_timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The timeout of a group's collectives; None, which is torch's default, if its back end does not tell."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return getattr(options, "_timeout", None)
    return None
