"""The matrices of a pipeline stage in the groups of ranks that share them, and the plans that the plugin makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.buffers import Buffer, default_bucket_size, distributed_buffer, sharded_matrices
from megatron_muon.estimate.models import Layer, Model
from megatron_muon.estimate.stages import GroupShape, Layout, TransformerImpl, grids, split_layers, stage_specs
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.plan.build import (
    CostModel,
    OwnershipPlan,
    PlanOptions,
    build_plan,
    fewest_idle,
    largest_matrix_flops,
)
from megatron_muon.plan.cost_model import alone_flops
from megatron_muon.plan.links_file import MeasuredLinks
from megatron_muon.plan.machines import GPUS_PER_NODE

PARAM_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What an estimate depends on, besides the model and the layout.

    Attributes:
        muon: Muon's settings.
        impl: Megatron's `--transformer-impl`.
        overlap_grad_reduce: Megatron's flag of this name; without it a buffer is one bucket.
        bucket_size: Megatron's `--ddp-bucket-size`, in elements; None takes its rule.
        grad_bytes: Bytes of a gradient element on the wire and in its buffer: 4, or 2 with `--grad-reduce-in-bf16`.
        links: Measured figures; None: data sheets for predictions and conservative defaults for the planner.
        gpus_per_node: Consecutive global ranks that share a node.
        cost: Rates by which the planner decides which ranks share a matrix; None: of GPUs, on `links`.

    Raises:
        ValueError: If a value is invalid.
    """

    muon: MuonConfig = field(default_factory=MuonConfig)
    impl: TransformerImpl = "transformer_engine"
    overlap_grad_reduce: bool = True
    bucket_size: int | None = None
    grad_bytes: int = 4
    links: MeasuredLinks | None = None
    gpus_per_node: int = GPUS_PER_NODE
    cost: CostModel | None = None

    def __post_init__(self) -> None:
        if self.bucket_size is not None and self.bucket_size < 1:
            raise ValueError(f"bucket size: got {self.bucket_size}, expected a positive number of elements")
        if self.grad_bytes not in (2, 4):
            raise ValueError(f"grad_bytes: got {self.grad_bytes}, expected 2 or 4")
        if self.gpus_per_node < 1:
            raise ValueError(f"gpus_per_node: got {self.gpus_per_node}, expected a positive number")

    @property
    def rates(self) -> CostModel:
        """The planner's rates."""
        return self.cost or CostModel.for_device("cuda", self.links)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of an element in the gradient and the bf16 parameter buffer: what AdamW reduces and gathers."""
        return self.grad_bytes + PARAM_BYTES


@dataclass(frozen=True)
class MatrixGroup:
    """A stage's dense matrices, or those of one expert-parallel rank's experts, and the ranks that share them.

    Attributes:
        specs: The matrices as a rank stores them.
        grid: The ranks that share them.
        settings: The settings.
        bucket_size: Elements after which a bucket is closed; None for a single one.
    """

    specs: Sequence[MatrixSpec]
    grid: GroupShape
    settings: PlanSettings
    bucket_size: int | None = None

    @cached_property
    def numels(self) -> tuple[int, ...]:
        """Elements of each matrix on a rank."""
        return tuple(spec.local_numel for spec in self.specs)

    @cached_property
    def buffer(self) -> Buffer:
        """The buffer of a DistributedOptimizer."""
        return distributed_buffer(self.numels, self.grid.dp, self.bucket_size)

    @cached_property
    def flops(self) -> tuple[int, ...]:
        """Newton-Schulz FLOPs of each parameter's logical matrices, each once and by one rank, as planned."""
        muon, device_type = self.settings.muon, self.settings.rates.device_type
        return tuple(
            sum(
                alone_flops(*spec.logical_shape(part), muon.ns_steps, muon.ns_dtype, device_type, muon.ns_method)
                for part in range(len(spec.parts))
            )
            for spec in self.specs
        )

    def adamw_sent_bytes(self, numel: int) -> float:
        """Bytes that a rank sends in the reduce-scatter of gradients and the all-gather of parameters."""
        return self.settings.buffer_bytes * numel * (self.grid.dp - 1) / self.grid.dp

    def plan(
        self, ep_rank: int = 0, initial_loads: Sequence[float] | None = None, max_team_size: int | None = None
    ) -> OwnershipPlan:
        """The plan that the plugin makes for the group.

        Args:
            ep_rank: Expert-parallel rank of the group.
            initial_loads: Load that each rank has already, as `OwnershipPlan.loads`.
            max_team_size: Limit on teams in place of the settings'.
        """
        options = PlanOptions.from_config(self.settings.muon, self.settings.rates, self.nodes(ep_rank))
        if max_team_size is not None:
            options = replace(options, max_team_size=max_team_size)
        return build_plan(
            sharded_matrices(self.specs, self.buffer, self.grid),
            self.grid.tp_ranks,
            ns_steps=self.settings.muon.ns_steps,
            initial_loads=initial_loads,
            options=options,
        )

    def nodes(self, ep_rank: int) -> tuple[int, ...]:
        """Node of each rank."""
        nodes: NDArray[np.int64] = self.grid.places(ep_rank) // self.settings.gpus_per_node
        return tuple(nodes.tolist())


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


def matrix_groups(
    layers: Sequence[Layer], layout: Layout, settings: PlanSettings, bucket_size: int | None = None
) -> list[MatrixGroup]:
    """A stage's dense and expert matrices, in this order; without experts' groups of their own, dense ones alone.

    Raises:
        ValueError: If a matrix does not divide over its tensor-parallel ranks, or Muon has no matrix in the stage.
    """
    both = zip(stage_specs(layers, layout, settings.muon, settings.impl), grids(layout), strict=True)
    groups = [MatrixGroup(specs, grid, settings, bucket_size) for specs, grid in both if specs]
    if not groups:
        raise ValueError("a stage has no matrix for Muon; give it a layer with one, or let Muon have the routers")
    return groups


def flops_once(groups: Sequence[MatrixGroup]) -> int:
    """Newton-Schulz FLOPs of a stage if every logical matrix is done once."""
    return sum(group.grid.ep * sum(group.flops) for group in groups)


def stage_plans(groups: Sequence[MatrixGroup]) -> list[tuple[OwnershipPlan, ...]]:
    """The plugin's plans of a stage: first those of the group with the larger matrices, see `fewest_idle`.

    Returns:
        For each group, a plan for each expert-parallel rank; one for dense matrices.
    """
    settings = groups[0].settings
    most, steps = settings.muon.max_team_size, settings.muon.ns_steps
    options = PlanOptions.from_config(settings.muon, settings.rates, None)
    largest = [largest_matrix_flops(group.specs, ns_steps=steps, options=options) for group in groups]
    order = sorted(range(len(groups)), key=lambda index: -largest[index])
    stage_ranks = groups[0].grid.size * groups[0].grid.ep
    ideal = flops_once(groups) / stage_ranks

    def attempt(max_team_size: int) -> tuple[list[tuple[OwnershipPlan, ...]], float]:
        """Plans with a limit on the first group's teams, and the load of the busiest rank over the ideal."""
        made: dict[int, tuple[OwnershipPlan, ...]] = {}
        loads = np.zeros(stage_ranks)
        for index in order:
            limit = max_team_size if index == order[0] else most
            made[index] = _plans(groups[index], loads, limit)
            for ep_rank, plan in enumerate(made[index]):
                loads[groups[index].grid.places(ep_rank)] = plan.loads
        return [made[index] for index in range(len(groups))], float(loads.max()) / ideal

    return fewest_idle(most, attempt) if len(groups) > 1 else attempt(most)[0]


def _plans(group: MatrixGroup, before: NDArray[np.float64], max_team_size: int) -> tuple[OwnershipPlan, ...]:
    """A group's plans. `before`: load that each rank of the stage has already."""
    # Few expert-parallel ranks differ in their loads and nodes, and those that do not have the same plan.
    made: dict[tuple[tuple[float, ...], tuple[int, ...]], OwnershipPlan] = {}
    chosen = []
    for ep_rank in range(group.grid.ep):
        initial = tuple(before[group.grid.places(ep_rank)].tolist())
        key = initial, group.nodes(ep_rank)
        if key not in made:
            made[key] = group.plan(ep_rank, initial, max_team_size)
        chosen.append(made[key])
    return tuple(chosen)
