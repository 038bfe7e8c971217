"""Estimates for each pipeline stage of a model under a layout: dense and expert matrices together, by scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_muon.estimate.buffers import Buffer, default_bucket_size
from megatron_muon.estimate.models import Layer, Model
from megatron_muon.estimate.schemes import (
    PARAM_BYTES,
    GroupLoad,
    PlanSettings,
    adamw_sent_bytes,
    all_gather,
    distributed_muon,
    group_stride,
    layer_wise,
    matrix_flops,
    ownership_plan,
)
from megatron_muon.estimate.stages import GroupShape, Layout, check_experts, grids, split_layers, stage_specs
from megatron_muon.estimate.transfer_times import ring
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.plan.build import OwnershipPlan, PlanOptions, fewest_idle, largest_matrix_flops
from megatron_muon.plan.machines import CollectiveBytes

OURS, UPSTREAM, MOONLIGHT = "megatron_muon", "megatron_layer_wise", "moonlight_all_gather"
SCHEMES = (OURS, UPSTREAM, MOONLIGHT)

Kind = tuple[Sequence[MatrixSpec], GroupShape]
"""Dense matrices, or the experts' of one expert-parallel rank, as a rank stores them; and the ranks that share them."""

_KindPlans = tuple[GroupShape, tuple[OwnershipPlan, ...], Buffer]


@dataclass(frozen=True)
class SchemeEstimate:
    """One scheme's demands on the ranks of a stage, within one optimizer instance.

    Attributes:
        flops: Newton-Schulz FLOPs of each rank.
        busiest: Of the busiest rank, and what it could compute while its teams talk, as the planner reckons.
        sent_bytes: Bytes that each rank sends beyond AdamW's reduce-scatter and all-gather.
        team_bytes: Bytes that each rank sends to those with whom it orthogonalizes a matrix, besides.
        momentum_bytes: Momentum on each rank.
        buffer_bytes: Gradient and parameter buffers of Muon's parameters, the same on each rank.
        padding: Padding of the dense and of the expert buffer over their parameters; None where there are none.
        collectives: What the scheme adds to AdamW's collectives.
    """

    flops: tuple[float, ...]
    busiest: float
    sent_bytes: tuple[float, ...]
    team_bytes: tuple[float, ...]
    momentum_bytes: tuple[int, ...]
    buffer_bytes: int
    padding: tuple[float | None, float | None]
    collectives: tuple[CollectiveBytes, ...]

    @property
    def flops_max(self) -> float:
        return max(self.flops)

    @property
    def flops_mean(self) -> float:
        return mean(self.flops)


@dataclass(frozen=True)
class StageEstimate:
    """A pipeline stage, or several that are alike.

    Attributes:
        stages: Their indices, from 0.
        num_layers: Transformer layers of each.
        num_logical_matrices: Matrices that the stage's ranks orthogonalize in a step, each counted once.
        param_numel: Muon's dense and expert parameters on a rank.
        ideal_flops: Newton-Schulz FLOPs of a rank if every logical matrix is done once and the load is level.
        adamw_bytes: What a rank sends in the reduce-scatter and all-gather of the same parameters, unpadded.
        adamw_collectives: Those collectives.
        schemes: By name; None where the scheme refuses the layout.
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
class ModelPlan:
    """The estimates of a whole model.

    Attributes:
        model: The model.
        layout: The layout.
        settings: What else they depend on.
        stages: Distinct stages, in order.
        notes: What a reader has to know about the layout.
    """

    model: Model
    layout: Layout
    settings: PlanSettings
    stages: tuple[StageEstimate, ...]
    notes: tuple[str, ...]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of a sequence that is not empty."""
    return sum(values) / len(values)


def plan_model(model: Model, layout: Layout, settings: PlanSettings | None = None) -> ModelPlan:
    """Estimates all stages; stages with equal layers and buckets are computed once.

    Args:
        model: The model.
        layout: The layout.
        settings: What else the estimates depend on.

    Raises:
        ValueError: If the model does not divide over the layout.
    """
    settings = settings or PlanSettings()
    check_experts(model, layout)
    stages = tuple(
        _estimate_stage(layers, tuple(indices), layout, settings, bucket_size)
        for (layers, bucket_size), indices in distinct_stages(model, layout, settings).items()
    )
    return ModelPlan(model, layout, settings, stages, _notes(model, layout))


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


def _estimate_stage(
    layers: Sequence[Layer],
    stages: tuple[int, ...],
    layout: Layout,
    settings: PlanSettings,
    bucket_size: int | None,
) -> StageEstimate:
    kinds = stage_kinds(layers, layout, settings)

    def combined(estimate: Callable[[Sequence[MatrixSpec], GroupShape], GroupLoad]) -> SchemeEstimate:
        return _combine([(grid, [estimate(specs, grid)] * grid.ep) for specs, grid in kinds], settings)

    plans = stage_plans(kinds, settings, bucket_size)
    schemes: dict[str, SchemeEstimate | None] = {
        OURS: _combine(
            [(g, _loads(buffer, own, g, settings)) for g, buffer, own in plans],
            settings,
            # The plans made last have the others' loads in theirs.
            busiest=float(max(load for _, _, own in plans for plan in own for load in plan.loads)),
        ),
        UPSTREAM: None,
        MOONLIGHT: combined(lambda specs, grid: all_gather(specs, grid, settings, bucket_size)),
    }
    if layout.instances == 1:
        schemes[UPSTREAM] = combined(lambda specs, grid: layer_wise(specs, grid, settings, bucket_size))
    numels = [0, 0]
    for specs, grid in kinds:
        numels[grid.expert] = sum(s.local_numel for s in specs)
    once = sum(grid.ep * matrix_flops(s, settings.muon) for specs, grid in kinds for s in specs)
    adamw = [(adamw_sent_bytes(numels[grid.expert], grid, settings), grid) for _, grid in kinds]
    return StageEstimate(
        stages=stages,
        num_layers=len(layers),
        num_logical_matrices=sum(
            grid.ep * s.logical_shape(part)[0] for specs, grid in kinds for s in specs for part in range(len(s.parts))
        ),
        param_numel=(numels[0], numels[1]),
        ideal_flops=once / layout.stage_ranks,
        adamw_bytes=sum(sent for sent, _ in adamw),
        adamw_collectives=tuple(ring(sent, grid.dp, group_stride(grid)) for sent, grid in adamw),
        schemes=schemes,
    )


def stage_kinds(layers: Sequence[Layer], layout: Layout, settings: PlanSettings) -> list[Kind]:
    """The kinds of matrices that a stage has, dense before experts', each with the grid that shares them.

    Raises:
        ValueError: If a matrix does not divide over its tensor-parallel ranks, or there is none of Muon's.
    """
    specs = stage_specs(layers, layout, settings.muon, settings.impl)
    kinds: list[Kind] = [(own, grid) for own, grid in zip(specs, grids(layout), strict=True) if own]
    if not kinds:
        raise ValueError("a stage has no matrix for Muon; give it a layer with one, or let Muon have the routers")
    return kinds


def stage_plans(
    kinds: Sequence[Kind], settings: PlanSettings, bucket_size: int | None
) -> list[tuple[GroupShape, Buffer, tuple[OwnershipPlan, ...]]]:
    """The plugin's ownership plans of a stage: first that of the kind with the larger matrices, see `fewest_idle`.

    Args:
        kinds: As `stage_kinds` returns them.
        settings: What else the plans depend on.
        bucket_size: Elements after which a bucket is closed; None for a single one.

    Returns:
        For each kind, in their order, its grid, its buffer, and a plan for each expert-parallel rank; for dense
        matrices there is one.
    """
    options = PlanOptions.from_config(settings.muon, settings.cost, None)

    def largest(kind: Kind) -> int:
        return largest_matrix_flops(kind[0], ns_steps=settings.muon.ns_steps, options=options)

    order = sorted(kinds, key=largest, reverse=True)
    once = sum(grid.ep * matrix_flops(s, settings.muon) for specs, grid in kinds for s in specs)
    ideal = once / (kinds[0][1].size * kinds[0][1].ep)

    def attempt(max_team_size: int) -> tuple[dict[bool, _KindPlans], float]:
        plans: dict[bool, _KindPlans] = {}
        loads = None
        for kind, limit in zip(order, (max_team_size, settings.muon.max_team_size), strict=False):
            plans[kind[1].expert] = _kind_plans(kind, settings, bucket_size, loads, limit)
            loads = _loads_by_stage_rank(*plans[kind[1].expert])
        return plans, max(loads or [0.0]) / ideal

    most = settings.muon.max_team_size
    plans = fewest_idle(most, attempt) if len(order) > 1 else attempt(most)[0]
    return [(plans[grid.expert][0], plans[grid.expert][2], plans[grid.expert][1]) for _, grid in kinds]


def _kind_plans(
    kind: Kind, settings: PlanSettings, bucket_size: int | None, before: Sequence[float] | None, max_team_size: int
) -> _KindPlans:
    """A kind's grid, a plan for each expert-parallel rank and the buffer. `before`: load of each rank of the stage."""
    specs, grid = kind
    # Few loads differ, and where they do not, neither do the plans.
    made: dict[tuple[Any, ...], tuple[Buffer, OwnershipPlan]] = {}
    chosen = []
    for ep_rank in range(grid.ep):
        at = [grid.stage_rank(rank, ep_rank) for rank in range(grid.size)]
        initial = [before[place] for place in at] if before else None
        key = (tuple(initial or ()), tuple(place // settings.gpus_per_node for place in at))
        if key not in made:
            made[key] = ownership_plan(specs, grid, settings, bucket_size, initial, ep_rank, max_team_size)
        chosen.append(made[key])
    return grid, tuple(plan for _, plan in chosen), chosen[0][0]


def _loads_by_stage_rank(grid: GroupShape, plans: Sequence[OwnershipPlan], _: Buffer) -> list[float]:
    out = [0.0] * (grid.size * grid.ep)
    for ep_rank, plan in enumerate(plans):
        for rank, load in enumerate(plan.loads):
            out[grid.stage_rank(rank, ep_rank)] = float(load)
    return out


def _loads(buffer: Buffer, plans: Sequence[OwnershipPlan], grid: GroupShape, settings: PlanSettings) -> list[GroupLoad]:
    """A load for each plan; equal plans are looked at once."""
    made: dict[tuple[Any, ...], GroupLoad] = {}
    out = []
    for ep_rank, plan in enumerate(plans):
        key = (id(plan), grid.stage_rank(0, ep_rank) // settings.gpus_per_node)
        if key not in made:
            made[key] = distributed_muon(buffer, plan, grid, settings, ep_rank)
        out.append(made[key])
    return out


def _combine(
    loads: Sequence[tuple[GroupShape, Sequence[GroupLoad]]], settings: PlanSettings, busiest: float | None = None
) -> SchemeEstimate:
    """Adds dense and expert loads up, by rank of the stage. A grid has a load for each expert-parallel rank."""

    def total(values: Callable[[GroupLoad], Sequence[Any]]) -> tuple[Any, ...]:
        out = [0] * (loads[0][0].size * loads[0][0].ep)
        for grid, of_grid in loads:
            for ep_rank, load in enumerate(of_grid):
                for rank, value in enumerate(values(load)):
                    out[grid.stage_rank(rank, ep_rank)] += value
        return tuple(out)

    padding: list[float | None] = [None, None]
    for grid, of_grid in loads:
        buffer = of_grid[0].buffer
        padding[grid.expert] = buffer.padding_numel / (buffer.numel - buffer.padding_numel)
    flops = total(lambda load: load.flops)
    return SchemeEstimate(
        flops=flops,
        busiest=max(flops) if busiest is None else busiest,
        sent_bytes=total(lambda load: load.sent_bytes),
        team_bytes=total(lambda load: load.team_bytes),
        momentum_bytes=total(lambda load: load.momentum_bytes),
        buffer_bytes=sum(of_grid[0].buffer.numel for _, of_grid in loads) * (settings.grad_bytes + PARAM_BYTES),
        padding=(padding[0], padding[1]),
        # Grids that are alike exchange at the same time: the one that moves most counts.
        collectives=tuple(c for _, of_grid in loads for c in max(of_grid, key=_moved).collectives),
    )


def _moved(load: GroupLoad) -> float:
    return sum(c.nvlink_bytes + c.network_bytes for c in load.collectives)
