"""Estimates for each pipeline stage of a model under a layout, for every scheme: dense and expert matrices together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_muon.estimate.buffers import Buffer, default_bucket_size
from megatron_muon.estimate.models import Layer, Model
from megatron_muon.estimate.schemes import (
    PARAM_BYTES,
    GroupLoad,
    PlanSettings,
    adamw_sent_bytes,
    all_gather,
    distributed_muon,
    layer_wise,
    matrix_flops,
    ownership_plan,
)
from megatron_muon.estimate.stages import GroupShape, Layout, check_experts, grids, split_layers, stage_specs
from megatron_muon.estimate.transfer_times import CollectiveBytes, ring
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.plan.build import OwnershipPlan, PlanOptions, fewest_idle, largest_matrix_flops

OURS, UPSTREAM, MOONLIGHT = "megatron_muon", "megatron_layer_wise", "moonlight_all_gather"
SCHEMES = (OURS, UPSTREAM, MOONLIGHT)


class GroupMatrices(NamedTuple):
    """Dense matrices, or those of one expert-parallel rank's experts, and the group of ranks that shares them.

    Attributes:
        specs: The matrices as a rank stores them.
        grid: The ranks that share them.
    """

    specs: Sequence[MatrixSpec]
    grid: GroupShape


class GroupPlans(NamedTuple):
    """How the plugin shares a stage's dense or expert matrices.

    Attributes:
        grid: The ranks that share them.
        buffer: Layout of the buffer, the same for each expert-parallel rank.
        plans: A plan for each expert-parallel rank; one for dense matrices.
    """

    grid: GroupShape
    buffer: Buffer
    plans: tuple[OwnershipPlan, ...]


@dataclass(frozen=True)
class SchemeEstimate:
    """One scheme's demands on the ranks of a stage, within one optimizer instance. Tuples have an entry for each rank.

    Attributes:
        flops: Newton-Schulz FLOPs.
        busiest: FLOPs of the busiest rank, with what it could compute while its teams talk, as the planner counts it.
        sent_bytes: Bytes sent beyond AdamW's reduce-scatter and all-gather.
        team_bytes: Bytes sent besides to the ranks that orthogonalize a matrix together.
        momentum_bytes: Size of the momentum.
        exchange_buffer_bytes: Persistent buffers of the exchange.
        memory_traffic_bytes: Bytes that element-wise kernels, copies and the gather of parameters read and write.
        buffer_bytes: Gradient and parameter buffers of Muon's parameters, the same on each rank.
        padding: Padding of the dense and of the expert buffer over their parameters; None where there are none.
        collectives: What the scheme adds to AdamW's collectives.
    """

    flops: tuple[float, ...]
    busiest: float
    sent_bytes: tuple[float, ...]
    team_bytes: tuple[float, ...]
    momentum_bytes: tuple[float, ...]
    exchange_buffer_bytes: tuple[float, ...]
    memory_traffic_bytes: tuple[float, ...]
    buffer_bytes: int
    padding: tuple[float | None, float | None]
    collectives: tuple[CollectiveBytes, ...]

    @property
    def flops_max(self) -> float:
        return max(self.flops)

    @property
    def flops_mean(self) -> float:
        return mean(self.flops)

    @property
    def num_collectives(self) -> int:
        """Collectives that the scheme adds in a step."""
        return sum(c.issued for c in self.collectives)


@dataclass(frozen=True)
class StageEstimate:
    """A pipeline stage, or several that are alike.

    Attributes:
        stages: Indices of the stages, from 0.
        num_layers: Transformer layers of each.
        num_logical_matrices: Matrices that the stage's ranks orthogonalize in a step, each counted once.
        param_numel: Muon's dense and expert parameters on a rank.
        ideal_flops: Newton-Schulz FLOPs of a rank if every logical matrix is done once and the load is level.
        adamw_bytes: Bytes that a rank sends in the reduce-scatter and all-gather of the same parameters, unpadded.
        adamw_collectives: Those collectives.
        schemes: Estimates by name of the scheme; None where the scheme refuses the layout.
    """

    stages: tuple[int, ...]
    num_layers: int
    num_logical_matrices: int
    param_numel: tuple[int, int]
    ideal_flops: float
    adamw_bytes: float
    adamw_collectives: tuple[CollectiveBytes, ...]
    schemes: Mapping[str, SchemeEstimate | None]

    def imbalance(self, scheme: str) -> float | None:
        """Newton-Schulz FLOPs of the most loaded rank over the ideal; None where the scheme refuses the layout."""
        estimate = self.schemes[scheme]
        return None if estimate is None else estimate.flops_max / self.ideal_flops


@dataclass(frozen=True)
class ModelEstimate:
    """The estimates of a whole model.

    Attributes:
        model: The model.
        layout: The layout.
        settings: Further settings that they depend on.
        stages: Distinct stages, in order.
        notes: Remarks about the layout that a reader has to know.
    """

    model: Model
    layout: Layout
    settings: PlanSettings
    stages: tuple[StageEstimate, ...]
    notes: tuple[str, ...]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of a sequence that is not empty."""
    return sum(values) / len(values)


def estimate_model(model: Model, layout: Layout, settings: PlanSettings | None = None) -> ModelEstimate:
    """Estimates all stages; stages with equal layers and buckets are computed once.

    Args:
        model: The model.
        layout: The layout.
        settings: Further settings that the estimates depend on.

    Raises:
        ValueError: If the model does not divide over the layout.
    """
    settings = settings or PlanSettings()
    check_experts(model, layout)
    stages = tuple(
        _estimate_stage(layers, tuple(indices), layout, settings, bucket_size)
        for (layers, bucket_size), indices in distinct_stages(model, layout, settings).items()
    )
    return ModelEstimate(model, layout, settings, stages, _notes(model, layout))


def distinct_stages(
    model: Model, layout: Layout, settings: PlanSettings
) -> dict[tuple[tuple[Layer, ...], int | None], list[int]]:
    """Pipeline stages that are alike, in order: (layers, bucket size in elements or None) -> indices of the stages.

    Raises:
        ValueError: If the model has no layer for a stage.
    """
    distinct: dict[tuple[tuple[Layer, ...], int | None], list[int]] = {}
    at = 0
    for stage, count in enumerate(split_layers(len(model.layers), layout)):
        # Megatron buckets only on the first stage: the others' reductions are not on the critical path.
        bucket_size = None
        if stage == 0 and settings.overlap_grad_reduce:
            bucket_size = settings.bucket_size or default_bucket_size(layout.dp)
        distinct.setdefault((model.layers[at : at + count], bucket_size), []).append(stage)
        at += count
    return distinct


def _notes(model: Model, layout: Layout) -> tuple[str, ...]:
    counts = split_layers(len(model.layers), layout)
    notes = []
    if layout.layers_per_stage is None and len(set(counts)) > 1:
        runs = " ".join(f"{counts.count(n)}x{n}" for n in sorted(set(counts), reverse=True))
        notes.append(
            f"{len(model.layers)} layers over {layout.pp} stages: {runs}, longer stages first. Megatron needs "
            "--pipeline-model-parallel-layout for that; --layers-per-stage plans another split."
        )
    if layout.instances > 1:
        notes.append(
            f"{layout.instances} optimizer instances: each plans and exchanges on its own, over 1/{layout.instances} "
            "of the ranks. Upstream's layer-wise optimizer refuses several instances. The all-reduce between "
            "instances is the same for every scheme and not counted."
        )
    return tuple(notes)


def stage_kinds(layers: Sequence[Layer], layout: Layout, settings: PlanSettings) -> list[GroupMatrices]:
    """A stage's dense and expert matrices, in this order, each with the group that shares them.

    Raises:
        ValueError: If a matrix does not divide over its tensor-parallel ranks, or there is none of Muon's.
    """
    specs = stage_specs(layers, layout, settings.muon, settings.impl)
    kinds = [GroupMatrices(own, grid) for own, grid in zip(specs, grids(layout), strict=True) if own]
    if not kinds:
        raise ValueError("a stage has no matrix for Muon; give it a layer with one, or let Muon have the routers")
    return kinds


def stage_plans(
    kinds: Sequence[GroupMatrices], settings: PlanSettings, bucket_size: int | None
) -> tuple[GroupPlans, ...]:
    """The plugin's ownership plans of a stage: first that of the kind with the larger matrices, see `fewest_idle`.

    Args:
        kinds: As `stage_kinds` returns them.
        settings: Further settings that the plans depend on.
        bucket_size: Elements after which a bucket is closed; None for a single one.

    Returns:
        The plans of each kind, in the order of `kinds`.
    """
    most = settings.muon.max_team_size
    options = PlanOptions.from_config(settings.muon, settings.rates, None)
    largest = [largest_matrix_flops(kind.specs, ns_steps=settings.muon.ns_steps, options=options) for kind in kinds]
    order = sorted(range(len(kinds)), key=lambda index: -largest[index])
    stage_ranks = kinds[0].grid.size * kinds[0].grid.ep
    ideal = _flops_once(kinds, settings) / stage_ranks

    def attempt(max_team_size: int) -> tuple[tuple[GroupPlans, ...], float]:
        """Plans with a limit on the first kind's teams, and the load of the busiest rank over the ideal."""
        made: dict[int, GroupPlans] = {}
        loads = np.zeros(stage_ranks)
        for index in order:
            limit = max_team_size if index == order[0] else most
            made[index] = _group_plans(kinds[index], settings, bucket_size, loads.tolist(), limit)
            for ep_rank, plan in enumerate(made[index].plans):
                loads[kinds[index].grid.places(ep_rank)] = plan.loads
        return tuple(made[index] for index in range(len(kinds))), float(loads.max()) / ideal

    return fewest_idle(most, attempt) if len(kinds) > 1 else attempt(most)[0]


def _group_plans(
    kind: GroupMatrices,
    settings: PlanSettings,
    bucket_size: int | None,
    before: Sequence[float],
    max_team_size: int,
) -> GroupPlans:
    """A kind's plans. `before`: load that each rank of the stage has already."""
    grid = kind.grid
    # Few expert-parallel ranks differ in their loads and nodes, and those that do not have the same plan.
    made: dict[tuple[tuple[float, ...], tuple[int, ...]], tuple[Buffer, OwnershipPlan]] = {}
    chosen = []
    for ep_rank in range(grid.ep):
        places = grid.places(ep_rank)
        initial = tuple(before[place] for place in places)
        key = initial, tuple((places // settings.gpus_per_node).tolist())
        if key not in made:
            made[key] = ownership_plan(kind.specs, grid, settings, bucket_size, initial, ep_rank, max_team_size)
        chosen.append(made[key])
    return GroupPlans(grid, chosen[0][0], tuple(plan for _, plan in chosen))


def _flops_once(kinds: Sequence[GroupMatrices], settings: PlanSettings) -> float:
    """Newton-Schulz FLOPs of a stage if every logical matrix is done once."""
    return sum(kind.grid.ep * matrix_flops(spec, settings) for kind in kinds for spec in kind.specs)


def _estimate_stage(
    layers: Sequence[Layer],
    stages: tuple[int, ...],
    layout: Layout,
    settings: PlanSettings,
    bucket_size: int | None,
) -> StageEstimate:
    kinds = stage_kinds(layers, layout, settings)
    plans = stage_plans(kinds, settings, bucket_size)
    # The plans that are made last have the others' loads in theirs.
    busiest = float(max(load for group in plans for plan in group.plans for load in plan.loads))
    schemes: dict[str, SchemeEstimate | None] = {
        OURS: _combine([(group.grid, _plan_loads(group, settings)) for group in plans], settings, busiest),
        UPSTREAM: None,
        MOONLIGHT: _combine(
            [(k.grid, [all_gather(k.specs, k.grid, settings, bucket_size)] * k.grid.ep) for k in kinds], settings
        ),
    }
    if layout.instances == 1:
        schemes[UPSTREAM] = _combine(
            [(k.grid, [layer_wise(k.specs, k.grid, settings, bucket_size)] * k.grid.ep) for k in kinds], settings
        )
    numels = [0, 0]
    for specs, grid in kinds:
        numels[grid.expert] = sum(s.local_numel for s in specs)
    adamw = [(adamw_sent_bytes(numels[grid.expert], grid, settings), grid) for _, grid in kinds]
    return StageEstimate(
        stages=stages,
        num_layers=len(layers),
        num_logical_matrices=sum(
            grid.ep * s.logical_shape(part)[0] for specs, grid in kinds for s in specs for part in range(len(s.parts))
        ),
        param_numel=(numels[0], numels[1]),
        ideal_flops=_flops_once(kinds, settings) / layout.stage_ranks,
        adamw_bytes=sum(sent for sent, _ in adamw),
        adamw_collectives=tuple(ring(sent, grid.dp, grid.stride) for sent, grid in adamw),
        schemes=schemes,
    )


def _plan_loads(group: GroupPlans, settings: PlanSettings) -> list[GroupLoad]:
    """A load for each plan of a group; ranks that share a plan and lie alike in their nodes share the load."""
    made: dict[tuple[int, tuple[int, ...]], GroupLoad] = {}
    out = []
    for ep_rank, plan in enumerate(group.plans):
        key = id(plan), tuple((group.grid.places(ep_rank) // settings.gpus_per_node).tolist())
        if key not in made:
            made[key] = distributed_muon(group.buffer, plan, group.grid, settings, ep_rank)
        out.append(made[key])
    return out


def _combine(
    groups: Sequence[tuple[GroupShape, Sequence[GroupLoad]]], settings: PlanSettings, busiest: float | None = None
) -> SchemeEstimate:
    """Adds dense and expert loads by rank of the stage. A group has a load for each expert-parallel rank."""

    def total(name: str) -> tuple[float, ...]:
        out = np.zeros(groups[0][0].size * groups[0][0].ep)
        for grid, loads in groups:
            for ep_rank, load in enumerate(loads):
                out[grid.places(ep_rank)] += getattr(load, name)
        return tuple(out.tolist())

    padding: list[float | None] = [None, None]
    for grid, loads in groups:
        buffer = loads[0].buffer
        padding[grid.expert] = buffer.padding_numel / (buffer.numel - buffer.padding_numel)
    flops = total("flops")
    return SchemeEstimate(
        flops=flops,
        busiest=max(flops) if busiest is None else busiest,
        sent_bytes=total("sent_bytes"),
        team_bytes=total("team_bytes"),
        momentum_bytes=total("momentum_bytes"),
        exchange_buffer_bytes=total("exchange_buffer_bytes"),
        memory_traffic_bytes=total("memory_traffic_bytes"),
        buffer_bytes=sum(loads[0].buffer.numel for _, loads in groups) * (settings.grad_bytes + PARAM_BYTES),
        padding=(padding[0], padding[1]),
        # Groups that are alike exchange at the same time: the one that moves most counts.
        collectives=tuple(c for _, loads in groups for c in max(loads, key=_moved).collectives),
    )


def _moved(load: GroupLoad) -> float:
    return sum(c.nvlink_bytes + c.network_bytes for c in load.collectives)
