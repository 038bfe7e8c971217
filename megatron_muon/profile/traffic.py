"""What the exchange of a step sends between which ranks, from the plans of a model under a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.groups import PlanSettings, distinct_stages, matrix_groups, stage_plans
from megatron_muon.estimate.shapes import load_model
from megatron_muon.estimate.stages import Layout, check_experts
from megatron_muon.newton_schulz.names import DTYPE_BYTES
from megatron_muon.plan.build import CostModel
from megatron_muon.plan.machines import GPUS_PER_NODE
from megatron_muon.plan.ownership import OwnershipPlan
from megatron_muon.plan.wire import Wire

SentBytes = tuple[tuple[int, ...], ...]
"""Bytes that rank i of a group sends to rank j, as [i][j]."""


@dataclass(frozen=True)
class Traffic:
    """The exchange of one group. Messages within teams are not part of it.

    Attributes:
        expert: Whether it runs over `expert_tp_dp`; otherwise over `tp_dp`.
        ranks: Global ranks of the group, in its order.
        transfers: All-to-alls of a step, in order: those of `plan.wire.Wire`.
    """

    expert: bool
    ranks: tuple[int, ...]
    transfers: tuple[SentBytes, ...]


def busiest_bytes(matrix: SentBytes) -> int:
    """The most that a rank sends or receives, its own part included: with equal splits, the size of an all-to-all."""
    return max((*map(sum, matrix), *map(sum, zip(*matrix, strict=True))), default=0)


def plan_traffic(plan: OwnershipPlan, *, expert: bool, ranks: Sequence[int], itemsize: int) -> Traffic:
    """What an exchange along a plan sends.

    Args:
        plan: The plan.
        expert: Whether it is about experts.
        ranks: Global ranks of its group, in the plan's order.
        itemsize: Bytes of an element on the wire.

    Raises:
        ValueError: If the number of ranks is not the plan's.
    """
    if len(ranks) != plan.world_size:
        raise ValueError(f"ranks: got {len(ranks)}, expected the plan's {plan.world_size}")
    wire = Wire(plan)
    transfers = []
    for moved in map(wire.moved, range(wire.num_transfers)):
        sent = np.zeros((plan.world_size, plan.world_size), dtype=np.int64)
        np.add.at(sent, (moved.sources, moved.destinations), moved.numels * itemsize)
        transfers.append(tuple(map(tuple, sent.tolist())))
    return Traffic(expert, tuple(ranks), tuple(transfers))


def model_traffic(
    model_name: str, layout: Layout, muon: MuonConfig, *, device_type: str = "cuda", ranks_per_node: int = GPUS_PER_NODE
) -> list[Traffic]:
    """The exchanges of all groups of a layout, as the plugin plans them for a model.

    Layers are Transformer Engine's on a GPU and Megatron's local ones elsewhere; gradient reduction overlaps.

    Args:
        model_name: Model as for `estimate.shapes.load_model`.
        layout: The layout.
        muon: Muon's settings.
        device_type: Type of the ranks' device; whether ranks share matrices depends on it.
        ranks_per_node: Number of consecutive global ranks that share a node.

    Raises:
        ValueError: If there is no such model, or it does not divide over the layout.
    """
    model = load_model(model_name)
    settings = PlanSettings(
        muon=muon,
        impl="transformer_engine" if device_type == "cuda" else "local",
        cost=CostModel.for_device(device_type),
        gpus_per_node=ranks_per_node,
    )
    check_experts(model, layout)
    itemsize = DTYPE_BYTES[muon.exchange_dtype]
    per_stage = layout.dp * layout.tp
    out = []
    for (layers, bucket_size), stages in distinct_stages(model, layout, settings).items():
        groups = matrix_groups(layers, layout, settings, bucket_size)
        for group, plans in zip(groups, stage_plans(groups), strict=True):
            for ep_rank, plan in enumerate(plans):
                places = group.grid.places(ep_rank).tolist()
                for stage in stages:
                    for instance in range(layout.instances):
                        first = stage * per_stage + instance * layout.stage_ranks
                        ranks = [first + place for place in places]
                        out.append(plan_traffic(plan, expert=group.grid.expert, ranks=ranks, itemsize=itemsize))
    return sorted(out, key=lambda t: (t.expert, t.ranks))
