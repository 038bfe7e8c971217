"""What a step of Muon asks of each rank of a group, by three schemes: ours, Megatron-Core's and Moonlight's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from megatron_muon.config import MuonConfig
from megatron_muon.estimate.buffers import Buffer, distributed_buffer, layer_wise_buffer, sharded_matrices
from megatron_muon.estimate.stages import GroupShape, TransformerImpl
from megatron_muon.estimate.transfer_times import CollectiveBytes, all_to_all, ring
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.newton_schulz.names import DTYPE_BYTES
from megatron_muon.plan.build import CostModel, OwnershipPlan, PlanOptions, build_plan
from megatron_muon.plan.cost_model import alone_flops
from megatron_muon.plan.links_file import MeasuredLinks
from megatron_muon.plan.machines import GPUS_PER_NODE
from megatron_muon.plan.wire import SCRATCH_SHARE, Wire

MOMENTUM_BYTES = 4
PARAM_BYTES = 2

# Bytes that element-wise kernels read and write in memory, for each element:
# m = momentum * m + g, then u = g + momentum * m: each reads two fp32 values and writes one.
_MOMENTUM_TRAFFIC = 24
# u in fp32 is read and written to the wire in 16 bits.
_PACK_TRAFFIC = 6
# The owner copies 16-bit slices into a matrix, and the direction back onto the wire.
_OWNER_TRAFFIC = 8
# The update is read in 16 bits, the fp32 weight is read and written, and read again to be cast to bf16.
_WEIGHT_TRAFFIC = 16


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
        device_type: `torch.device.type` of the ranks.
        gpus_per_node: Consecutive global ranks that share a node.
        cost: Rates by which the planner decides which ranks share a matrix; None: from `device_type` and `links`.

    Raises:
        ValueError: If a value is invalid.
    """

    muon: MuonConfig = field(default_factory=MuonConfig)
    impl: TransformerImpl = "transformer_engine"
    overlap_grad_reduce: bool = True
    bucket_size: int | None = None
    grad_bytes: int = 4
    links: MeasuredLinks | None = None
    device_type: str = "cuda"
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
        return self.cost or CostModel.for_device(self.device_type, self.links)

    @property
    def adamw_bytes(self) -> int:
        """Bytes per parameter of AdamW's reduce-scatter of gradients and all-gather of bf16 parameters."""
        return self.grad_bytes + PARAM_BYTES


@dataclass(frozen=True)
class GroupLoad:
    """What one scheme asks of the ranks of a group in a step. Arrays have an entry for each rank of the group.

    Attributes:
        flops: Newton-Schulz FLOPs.
        sent_bytes: Bytes sent beyond AdamW's reduce-scatter and all-gather of the same parameters.
        team_bytes: Bytes sent besides to the ranks that orthogonalize a matrix together.
        momentum_bytes: Size of the momentum.
        exchange_buffer_bytes: Persistent buffers of the exchange.
        memory_traffic_bytes: Bytes that element-wise kernels, copies and the gather of parameters read and write.
        buffer: Layout of the gradient and parameter buffers.
        collectives: What the scheme adds to AdamW's collectives, one after the other.
    """

    flops: NDArray[np.float64]
    sent_bytes: NDArray[np.float64]
    team_bytes: NDArray[np.float64]
    momentum_bytes: NDArray[np.float64]
    exchange_buffer_bytes: NDArray[np.float64]
    memory_traffic_bytes: NDArray[np.float64]
    buffer: Buffer
    collectives: tuple[CollectiveBytes, ...]


def matrix_flops(spec: MatrixSpec, settings: PlanSettings) -> int:
    """Newton-Schulz FLOPs of a parameter's logical matrices, each once and by one rank: what `build_plan` counts."""
    muon, device_type = settings.muon, settings.rates.device_type
    shapes = map(spec.logical_shape, range(len(spec.parts)))
    return sum(alone_flops(*shape, muon.ns_steps, muon.ns_dtype, device_type, muon.ns_method) for shape in shapes)


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
    """The buffer of a group's matrices, and the plan that the plugin makes for them.

    Args:
        specs: The matrices that a rank stores.
        grid: The ranks that share them.
        settings: The settings.
        bucket_size: As for `distributed_buffer`.
        initial_loads: Load that each rank has already, as `OwnershipPlan.loads`.
        ep_rank: Expert-parallel rank of the group.
        max_team_size: Limit on teams in place of the settings'.
    """
    buffer = distributed_buffer([s.local_numel for s in specs], grid.dp, bucket_size)
    nodes = grid.places(ep_rank) // settings.gpus_per_node
    options = PlanOptions.from_config(settings.muon, settings.rates, nodes.tolist())
    if max_team_size is not None:
        options = replace(options, max_team_size=max_team_size)
    plan = build_plan(
        sharded_matrices(specs, buffer, grid),
        grid.tp_ranks,
        ns_steps=settings.muon.ns_steps,
        initial_loads=initial_loads,
        options=options,
    )
    return buffer, plan


def distributed_muon(
    buffer: Buffer, plan: OwnershipPlan, grid: GroupShape, settings: PlanSettings, ep_rank: int = 0
) -> GroupLoad:
    """This project: sharded momentum, an owner or a team per matrix in the whole group, all-to-all there and back.

    Args:
        buffer: As `ownership_plan` returns it.
        plan: As `ownership_plan` returns it.
        grid: The ranks that share the matrices.
        settings: The settings.
        ep_rank: Expert-parallel rank of the group.
    """
    muon, is_muon = settings.muon, settings.muon.variant == "muon"
    element_size, places = DTYPE_BYTES[muon.exchange_dtype], grid.places(ep_rank)
    padding = adamw_sent_bytes(buffer.padding_numel, grid, settings)
    wire = Wire(plan, keep_resident=is_muon)
    collectives = [ring(padding, grid.dp, grid.stride)]
    collectives += [all_to_all(wire.moved(k), element_size, places) for k in range(wire.num_transfers)]
    near, far = (
        np.array(sent, dtype=np.float64) for sent in plan.team_sent_bytes((places // settings.gpus_per_node).tolist())
    )
    stages = sum(map(plan.team_stages, range(len(plan.rounds))))
    collectives.append(CollectiveBytes(float(near.max(initial=0)), float(far.max(initial=0)), stages))
    stored, owned = _stored_numel(buffer, grid), np.zeros(grid.size)
    for item in plan.all_items():
        rows, cols = plan.shape(item)
        owned[plan.owner(item)] += rows * cols
    # As `ShardedMuon.bind` sizes it.
    scratch = muon.exchange_buffer_mb * 2**20 // SCRATCH_SHARE // 4 if is_muon else buffer.numel
    on_slices = _MOMENTUM_TRAFFIC + _PACK_TRAFFIC + _WEIGHT_TRAFFIC
    return GroupLoad(
        flops=np.array(plan.rank_flops, dtype=np.float64),
        sent_bytes=np.array(plan.sent_numel()) * element_size + padding,
        team_bytes=near + far,
        momentum_bytes=stored * MOMENTUM_BYTES,
        exchange_buffer_bytes=np.array(
            [wire.buffer_bytes(rank, element_size, scratch) for rank in range(grid.size)], dtype=np.float64
        ),
        memory_traffic_bytes=on_slices * stored + _OWNER_TRAFFIC * owned + PARAM_BYTES * buffer.numel,
        buffer=buffer,
        collectives=tuple(collectives),
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
    # The layout's promise: a parameter lies in one shard.
    owners = [shards[0][0] for shards in buffer.shards]
    costs = [matrix_flops(s, settings) for s in specs] if flops is None else flops
    gathered = 4 * _sums(owners, [_tp_gather_numel(s) for s in specs], grid)
    stored = _stored_numel(buffer, grid)
    padding = adamw_sent_bytes(buffer.padding_numel, grid, settings)
    on_owned = _MOMENTUM_TRAFFIC + _WEIGHT_TRAFFIC
    return GroupLoad(
        flops=_sums(owners, costs, grid),
        sent_bytes=gathered + padding,
        team_bytes=np.zeros(grid.size),
        momentum_bytes=stored * MOMENTUM_BYTES,
        exchange_buffer_bytes=np.zeros(grid.size),
        memory_traffic_bytes=on_owned * stored + gathered + PARAM_BYTES * buffer.numel,
        buffer=buffer,
        collectives=(ring(float(gathered.max()), grid.tp, 1), ring(padding, grid.dp, grid.stride)),
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
    held = [(rank, spec) for spec, shards in zip(specs, buffer.shards, strict=True) for rank, _, _ in shards]
    holders = [rank for rank, _ in held]
    gathered = 2 * _sums(holders, [_tp_gather_numel(spec) for _, spec in held], grid)
    over_dp = 2 * buffer.numel * (grid.dp - 1) / grid.dp + adamw_sent_bytes(buffer.padding_numel, grid, settings)
    stored = _stored_numel(buffer, grid)
    on_slices = _MOMENTUM_TRAFFIC + _PACK_TRAFFIC + _WEIGHT_TRAFFIC
    return GroupLoad(
        flops=_sums(holders, [matrix_flops(spec, settings) for _, spec in held], grid),
        sent_bytes=gathered + over_dp,
        team_bytes=np.zeros(grid.size),
        momentum_bytes=stored * MOMENTUM_BYTES,
        exchange_buffer_bytes=np.zeros(grid.size),
        memory_traffic_bytes=on_slices * stored + gathered + 2 * PARAM_BYTES * buffer.numel,
        buffer=buffer,
        collectives=(ring(over_dp, grid.dp, grid.stride), ring(float(gathered.max()), grid.tp, 1)),
    )


def _tp_gather_numel(spec: MatrixSpec) -> int:
    """Elements that a rank sends when each tensor-parallel rank gathers the whole matrix."""
    return spec.local_numel * (spec.num_pieces - 1)


def _sums(dp_ranks: Sequence[int], values: Sequence[float], grid: GroupShape) -> NDArray[np.float64]:
    """For each rank of the group, the sum of the values of its data-parallel rank."""
    by_dp_rank = np.bincount(dp_ranks, weights=np.array(values, dtype=np.float64), minlength=grid.dp)
    return np.repeat(by_dp_rank, grid.tp)


def _stored_numel(buffer: Buffer, grid: GroupShape) -> NDArray[np.float64]:
    """Elements of Muon's parameters that each rank of the group stores."""
    shards = [shard for parameter in buffer.shards for shard in parameter]
    return _sums([rank for rank, _, _ in shards], [stop - start for _, start, stop in shards], grid)
