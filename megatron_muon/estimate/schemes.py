"""What a step of Muon asks of each rank, under three ways to distribute it: ours, upstream's and Moonlight's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_muon.config import TORCH_DTYPES, MuonConfig
from megatron_muon.estimate.buffers import Buffer, distributed_buffer, layer_wise_buffer, sharded_matrices
from megatron_muon.estimate.stages import GroupShape, TransformerImpl
from megatron_muon.estimate.transfer_times import all_to_all, ring
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.newton_schulz import newton_schulz_flops
from megatron_muon.plan.build import CostModel, OwnershipPlan, PlanOptions, build_plan
from megatron_muon.plan.machines import GPUS_PER_NODE, CollectiveBytes

MOMENTUM_BYTES = 4
PARAM_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What else a plan depends on.

    Attributes:
        muon: Muon's settings.
        impl: Megatron's `--transformer-impl`.
        overlap_grad_reduce: Megatron's flag of this name; without it a buffer is one bucket.
        bucket_size: Megatron's `--ddp-bucket-size`, in elements; None takes its rule.
        grad_bytes: Bytes of a gradient element on the wire and in its buffer: 4, or 2 with `--grad-reduce-in-bf16`.
        cost: By which the plan decides which ranks share a matrix.
        gpus_per_node: Consecutive global ranks that share a node.

    Raises:
        ValueError: If a value is bad.
    """

    muon: MuonConfig = field(default_factory=MuonConfig)
    impl: TransformerImpl = "transformer_engine"
    overlap_grad_reduce: bool = True
    bucket_size: int | None = None
    grad_bytes: int = 4
    cost: CostModel = field(default_factory=CostModel)
    gpus_per_node: int = GPUS_PER_NODE

    def __post_init__(self) -> None:
        if self.bucket_size is not None and self.bucket_size < 1:
            raise ValueError(f"bucket size: got {self.bucket_size}, expected a positive number of elements")
        if self.grad_bytes not in (2, 4):
            raise ValueError(f"grad_bytes: got {self.grad_bytes}, expected 2 or 4")
        if self.gpus_per_node < 1:
            raise ValueError(f"gpus_per_node: got {self.gpus_per_node}, expected a positive number")

    @property
    def adamw_bytes(self) -> int:
        """Bytes per parameter of AdamW's reduce-scatter of gradients and all-gather of bf16 parameters."""
        return self.grad_bytes + PARAM_BYTES


@dataclass(frozen=True)
class GroupLoad:
    """What one scheme asks of the ranks of a grid in a step.

    Attributes:
        flops: Newton-Schulz FLOPs, by rank.
        sent_bytes: Bytes that each rank sends beyond AdamW's reduce-scatter and all-gather of the same buffers.
        team_bytes: Bytes that each rank sends to those with whom it orthogonalizes a matrix, besides.
        momentum_bytes: Of the momentum, by rank.
        buffer: The layout of the gradient and parameter buffers.
        collectives: What the scheme adds to AdamW's collectives, one after the other.
    """

    flops: tuple[float, ...]
    sent_bytes: tuple[float, ...]
    team_bytes: tuple[float, ...]
    momentum_bytes: tuple[int, ...]
    buffer: Buffer
    collectives: tuple[CollectiveBytes, ...]


def matrix_flops(spec: MatrixSpec, muon: MuonConfig) -> int:
    """Newton-Schulz FLOPs of a parameter's logical matrices, each once and by one rank: what `build_plan` counts."""
    shapes = (spec.logical_shape(part) for part in range(len(spec.parts)))
    dtype = TORCH_DTYPES[muon.ns_dtype]
    return sum(
        count * newton_schulz_flops(rows, cols, muon.ns_steps, muon.ns_method, dtype=dtype)
        for count, rows, cols in shapes
    )


def group_stride(grid: GroupShape) -> int:
    """Distance in global rank between neighbours of a grid's data-parallel group."""
    return grid.tp * grid.ep


def adamw_sent_bytes(numel: int, grid: GroupShape, settings: PlanSettings) -> float:
    """Bytes that a rank sends in the reduce-scatter and all-gather of `numel` parameters."""
    return settings.adamw_bytes * numel * (grid.dp - 1) / grid.dp


def ownership_plan(
    specs: Sequence[MatrixSpec],
    grid: GroupShape,
    settings: PlanSettings,
    bucket_size: int | None,
    initial_loads: Sequence[float] | None = None,
    ep_rank: int = 0,
    max_team_size: int | None = None,
) -> tuple[Buffer, OwnershipPlan]:
    """The buffer of a grid's matrices, and the plan that the plugin makes for them.

    Args:
        specs: The matrices that a rank stores.
        grid: The ranks that share them.
        settings: The settings.
        bucket_size: As for `distributed_buffer`.
        initial_loads: What each rank has to do already, as `OwnershipPlan.loads`.
        ep_rank: Which of the grids that are alike.
        max_team_size: Instead of the settings'.
    """
    buffer = distributed_buffer([s.local_numel for s in specs], grid.dp, bucket_size)
    matrices = sharded_matrices(specs, buffer, grid)
    nodes = [grid.stage_rank(rank, ep_rank) // settings.gpus_per_node for rank in range(grid.size)]
    options = PlanOptions.from_config(settings.muon, settings.cost, nodes)
    if max_team_size is not None:
        options = replace(options, max_team_size=max_team_size)
    plan = build_plan(
        matrices, grid.tp_ranks, ns_steps=settings.muon.ns_steps, initial_loads=initial_loads, options=options
    )
    return buffer, plan


def distributed_muon(
    buffer: Buffer, plan: OwnershipPlan, grid: GroupShape, settings: PlanSettings, ep_rank: int = 0
) -> GroupLoad:
    """This project: sharded momentum, an owner or a team per matrix in the whole grid, all-to-all there and back.

    Args:
        buffer: As `ownership_plan` returns it.
        plan: As `ownership_plan` returns it.
        grid: The ranks that share the matrices.
        settings: The settings.
        ep_rank: Which of the grids that are alike.
    """
    element_size = TORCH_DTYPES[settings.muon.exchange_dtype].itemsize
    places = [grid.stage_rank(rank, ep_rank) for rank in range(grid.size)]
    padding = adamw_sent_bytes(buffer.padding_numel, grid, settings)
    collectives = [ring(padding, grid.dp, group_stride(grid))]
    for round_index in range(len(plan.rounds)):
        for scatter in (False, True):
            moved = plan.transfers(plan.items(round_index), scatter=scatter)
            collectives.append(all_to_all(moved, element_size, places))
    nodes = [place // settings.gpus_per_node for place in places]
    near, far = plan.team_sent_bytes(nodes)
    collectives.append(CollectiveBytes(float(max(near)), float(max(far))))
    return GroupLoad(
        tuple(map(float, plan.rank_flops)),
        tuple(n * element_size + padding for n in plan.sent_numel()),
        tuple(float(a + b) for a, b in zip(near, far, strict=True)),
        _sharded_momentum(buffer, grid),
        buffer,
        tuple(collectives),
    )


def layer_wise(
    specs: Sequence[MatrixSpec],
    grid: GroupShape,
    settings: PlanSettings,
    bucket_size: int | None,
    flops: Sequence[float] | None = None,
) -> GroupLoad:
    """Megatron-Core's LayerWiseDistributedOptimizer with `--muon-tp-mode duplicated`, the mode that is exact Muon.

    Whole matrices on one data-parallel rank, chosen by size within a bucket; its tensor-parallel ranks each gather the
    whole in fp32 and each run Newton-Schulz on it. Padding goes through AdamW's collectives too.

    Args:
        specs: The matrices that a rank stores.
        grid: The ranks that share them.
        settings: The settings.
        bucket_size: As for `layer_wise_buffer`.
        flops: Newton-Schulz FLOPs of each parameter; None counts as `matrix_flops` does.
    """
    buffer = layer_wise_buffer([s.local_numel for s in specs], grid.dp, bucket_size)
    if flops is None:
        flops = [matrix_flops(s, settings.muon) for s in specs]
    load, gathered, momentum = [0.0] * grid.dp, [0.0] * grid.dp, [0] * grid.dp
    for spec, cost, shards in zip(specs, flops, buffer.shards, strict=True):
        # The layout's promise: a parameter lies in one shard.
        ((owner, _, _),) = shards
        load[owner] += cost
        momentum[owner] += spec.local_numel * MOMENTUM_BYTES
        gathered[owner] += _tp_gather_numel(spec) * 4
    padding = adamw_sent_bytes(buffer.padding_numel, grid, settings)
    return GroupLoad(
        _over_tp(load, grid),
        tuple(n + padding for n in _over_tp(gathered, grid)),
        (0.0,) * grid.size,
        _over_tp(momentum, grid),
        buffer,
        (ring(max(gathered, default=0.0), grid.tp, 1), ring(padding, grid.dp, group_stride(grid))),
    )


def all_gather(
    specs: Sequence[MatrixSpec], grid: GroupShape, settings: PlanSettings, bucket_size: int | None
) -> GroupLoad:
    """Moonlight's scheme: every rank all-gathers the bf16 directions, and orthogonalizes what it stores a slice of.

    Source: arXiv 2502.16982, algorithm 1, and its Megatron-LM implementation: the buffers' all-gather over the
    data-parallel group, then over the tensor-parallel group for each matrix that the rank holds a slice of.

    Args:
        specs: The matrices that a rank stores.
        grid: The ranks that share them.
        settings: The settings.
        bucket_size: As for `distributed_buffer`.
    """
    buffer = distributed_buffer([s.local_numel for s in specs], grid.dp, bucket_size)
    load, gathered = [0.0] * grid.dp, [0.0] * grid.dp
    for spec, shards in zip(specs, buffer.shards, strict=True):
        cost = matrix_flops(spec, settings.muon)
        for holder, _, _ in shards:
            load[holder] += cost
            gathered[holder] += _tp_gather_numel(spec) * 2
    over_dp = 2 * buffer.numel * (grid.dp - 1) / grid.dp + adamw_sent_bytes(buffer.padding_numel, grid, settings)
    return GroupLoad(
        _over_tp(load, grid),
        tuple(n + over_dp for n in _over_tp(gathered, grid)),
        (0.0,) * grid.size,
        _sharded_momentum(buffer, grid),
        buffer,
        (ring(over_dp, grid.dp, group_stride(grid)), ring(max(gathered, default=0.0), grid.tp, 1)),
    )


def _tp_gather_numel(spec: MatrixSpec) -> int:
    """Elements that a rank sends when each tensor-parallel rank gathers the whole matrix."""
    return spec.local_numel * (spec.num_pieces - 1)


def _over_tp[T](by_dp_rank: Sequence[T], grid: GroupShape) -> tuple[T, ...]:
    """The same for all tensor-parallel ranks of each data-parallel rank, in the grid's order."""
    return tuple(value for value in by_dp_rank for _ in range(grid.tp))


def _sharded_momentum(buffer: Buffer, grid: GroupShape) -> tuple[int, ...]:
    stored = [0] * grid.dp
    for shards in buffer.shards:
        for dp_rank, start, stop in shards:
            stored[dp_rank] += (stop - start) * MOMENTUM_BYTES
    return _over_tp(stored, grid)
