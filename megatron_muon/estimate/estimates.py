"""Estimates for each pipeline stage of a model under a layout, for every scheme: dense and expert matrices together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_muon.estimate.collectives import CollectiveBytes, ring
from megatron_muon.estimate.groups import (
    MatrixGroup,
    PlanSettings,
    distinct_stages,
    flops_once,
    matrix_groups,
    stage_plans,
)
from megatron_muon.estimate.models import Model
from megatron_muon.estimate.schemes import SchemeDemand, all_gather, combined, distributed_muon, layer_wise
from megatron_muon.estimate.stages import Layout, check_experts, split_layers
from megatron_muon.plan.build import OwnershipPlan

OURS, UPSTREAM, MOONLIGHT = "megatron_muon", "megatron_layer_wise", "moonlight_all_gather"
SCHEMES = (OURS, UPSTREAM, MOONLIGHT)


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
        schemes: Demands by name of the scheme; None where the scheme refuses the layout.
    """

    stages: tuple[int, ...]
    num_layers: int
    num_logical_matrices: int
    param_numel: tuple[int, int]
    ideal_flops: float
    adamw_bytes: float
    adamw_collectives: tuple[CollectiveBytes, ...]
    schemes: Mapping[str, SchemeDemand | None]

    def imbalance(self, scheme: str) -> float | None:
        """Newton-Schulz FLOPs of the most loaded rank over the ideal; None where the scheme refuses the layout."""
        demand = self.schemes[scheme]
        return None if demand is None else max(demand.flops) / self.ideal_flops


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
    stages = [
        _estimate_stage(matrix_groups(layers, layout, settings, bucket_size), indices, len(layers))
        for (layers, bucket_size), indices in distinct_stages(model, layout, settings).items()
    ]
    if layout.instances > 1:
        # Megatron's layer-wise optimizer refuses several instances.
        stages = [replace(stage, schemes={**stage.schemes, UPSTREAM: None}) for stage in stages]
    return ModelEstimate(model, layout, settings, tuple(stages), _notes(model, layout))


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


def _estimate_stage(groups: Sequence[MatrixGroup], stages: Sequence[int], num_layers: int) -> StageEstimate:
    plans = stage_plans(groups)
    # The plans that are made last have the others' loads in theirs.
    busiest = float(max(load for of_group in plans for plan in of_group for load in plan.loads))
    ours = [(group.grid, _our_demands(group, own)) for group, own in zip(groups, plans, strict=True)]
    schemes: dict[str, SchemeDemand | None] = {OURS: combined(ours, busiest)}
    for name, scheme in ((UPSTREAM, layer_wise), (MOONLIGHT, all_gather)):
        schemes[name] = combined([(group.grid, [scheme(group)] * group.grid.ep) for group in groups])
    numels = [0, 0]
    for group in groups:
        numels[group.grid.expert] = sum(group.numels)
    adamw = [(group.adamw_sent_bytes(sum(group.numels)), group.grid) for group in groups]
    return StageEstimate(
        stages=tuple(stages),
        num_layers=num_layers,
        num_logical_matrices=sum(
            group.grid.ep * spec.logical_shape(part)[0]
            for group in groups
            for spec in group.specs
            for part in range(len(spec.parts))
        ),
        param_numel=(numels[0], numels[1]),
        ideal_flops=flops_once(groups) / (groups[0].grid.size * groups[0].grid.ep),
        adamw_bytes=sum(sent for sent, _ in adamw),
        adamw_collectives=tuple(ring(sent, grid.dp, grid.stride) for sent, grid in adamw),
        schemes=schemes,
    )


def _our_demands(group: MatrixGroup, plans: Sequence[OwnershipPlan]) -> list[SchemeDemand]:
    """A demand for each plan of a group; expert-parallel ranks that share a plan lie alike in their nodes."""
    made: dict[int, SchemeDemand] = {}
    for ep_rank, plan in enumerate(plans):
        if id(plan) not in made:
            made[id(plan)] = distributed_muon(group, plan, ep_rank)
    return [made[id(plan)] for plan in plans]
