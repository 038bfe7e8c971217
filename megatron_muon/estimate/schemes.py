"""What a step of Muon asks of each rank of a group, by three schemes: ours, Megatron-Core's and Moonlight's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_muon.estimate.buffers import Buffer, layer_wise_buffer
from megatron_muon.estimate.collectives import CollectiveBytes, all_to_all, ring
from megatron_muon.estimate.groups import PARAM_BYTES, MatrixGroup
from megatron_muon.estimate.stages import GroupShape
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.newton_schulz.names import DTYPE_BYTES
from megatron_muon.plan.build import OwnershipPlan
from megatron_muon.plan.wire import SCRATCH_SHARE, Wire

MOMENTUM_BYTES = 4

# Bytes that element-wise kernels read and write in memory, for each element:
# m = momentum * m + g, then u = g + momentum * m: each reads two fp32 values and writes one.
_MOMENTUM_TRAFFIC = 24
# u in fp32 is read and written to the wire in 16 bits.
_PACK_TRAFFIC = 6
# The owner copies 16-bit slices into a matrix, and the direction back onto the wire.
_OWNER_TRAFFIC = 8
# The update is read in 16 bits, the fp32 weight is read and written, and read again to be cast to bf16.
_WEIGHT_TRAFFIC = 16


@dataclass(frozen=True)
class SchemeDemand:
    """What a scheme asks of the ranks of a group, or of a stage within one optimizer instance, in a step.

    Attributes:
        flops: Newton-Schulz FLOPs of each rank.
        sent_bytes: Bytes that each rank sends beyond AdamW's reduce-scatter and all-gather of the same parameters.
        team_bytes: Bytes that each rank sends besides to the ranks that orthogonalize a matrix with it.
        momentum_bytes: Size of each rank's momentum.
        exchange_buffer_bytes: Size of each rank's persistent buffers of the exchange.
        memory_traffic_bytes: Bytes that each rank's element-wise kernels, copies and gather of parameters read and
            write.
        buffer_bytes: Size of the gradient and parameter buffers of Muon's parameters, the same on each rank.
        padding: Padding of the dense and of the expert buffer over their parameters; None where there are none.
        collectives: What the scheme adds to AdamW's collectives, one after the other.
        busiest: FLOPs of the busiest rank, including what it could compute while its teams exchange messages, as
            the planner counts it.
    """

    flops: tuple[float, ...]
    sent_bytes: tuple[float, ...]
    team_bytes: tuple[float, ...]
    momentum_bytes: tuple[float, ...]
    exchange_buffer_bytes: tuple[float, ...]
    memory_traffic_bytes: tuple[float, ...]
    buffer_bytes: int
    padding: tuple[float | None, float | None]
    collectives: tuple[CollectiveBytes, ...]
    busiest: float

    @property
    def num_collectives(self) -> int:
        """Collectives that the scheme adds in a step."""
        return sum(c.issued for c in self.collectives)


PER_RANK = (
    "flops",
    "sent_bytes",
    "team_bytes",
    "momentum_bytes",
    "exchange_buffer_bytes",
    "memory_traffic_bytes",
)
"""The fields of `SchemeDemand` that have an entry for each rank."""


def _demand(
    group: MatrixGroup, buffer: Buffer, collectives: Iterable[CollectiveBytes], **per_rank: ArrayLike
) -> SchemeDemand:
    """A demand. `per_rank`: the fields of `PER_RANK` that are not 0; the momentum follows from the buffer."""
    per_rank["momentum_bytes"] = MOMENTUM_BYTES * _stored_numel(buffer, group.grid)
    values = {name: np.asarray(per_rank.get(name, 0.0), np.float64) for name in PER_RANK}
    padding: list[float | None] = [None, None]
    padding[group.grid.expert] = buffer.padding_numel / (buffer.numel - buffer.padding_numel)
    return SchemeDemand(
        **{name: tuple(np.broadcast_to(value, group.grid.size).tolist()) for name, value in values.items()},
        buffer_bytes=buffer.numel * group.settings.buffer_bytes,
        padding=(padding[0], padding[1]),
        collectives=tuple(collectives),
        busiest=float(values["flops"].max()),
    )


def distributed_muon(group: MatrixGroup, plan: OwnershipPlan, ep_rank: int = 0) -> SchemeDemand:
    """This project: sharded momentum, an owner or a team per matrix in the whole group, all-to-all there and back.

    Args:
        group: The matrices.
        plan: The plan of the group's expert-parallel rank.
        ep_rank: That rank.
    """
    muon, grid, buffer = group.settings.muon, group.grid, group.buffer
    is_muon, element_size = muon.variant == "muon", DTYPE_BYTES[muon.exchange_dtype]
    padding = group.adamw_sent_bytes(buffer.padding_numel)
    wire = Wire(plan, keep_resident=is_muon)
    collectives = [ring(padding, grid.dp, grid.stride)]
    collectives += [all_to_all(wire.moved(k), element_size, grid.places(ep_rank)) for k in range(wire.num_transfers)]
    near, far = map(np.array, plan.team_sent_bytes(group.nodes(ep_rank)))
    stages = sum(map(plan.team_stages, range(len(plan.rounds))))
    collectives.append(CollectiveBytes(float(near.max(initial=0)), float(far.max(initial=0)), stages))
    owned = np.zeros(grid.size)
    for item in plan.all_items():
        rows, cols = plan.shape(item)
        owned[plan.owner(item)] += rows * cols
    # As `ShardedMuon.bind` sizes it.
    scratch = muon.exchange_buffer_mb * 2**20 // SCRATCH_SHARE // 4 if is_muon else buffer.numel
    on_slices = (_MOMENTUM_TRAFFIC + _PACK_TRAFFIC + _WEIGHT_TRAFFIC) * _stored_numel(buffer, grid)
    return _demand(
        group,
        buffer,
        collectives,
        flops=plan.rank_flops,
        sent_bytes=np.array(plan.sent_numel()) * element_size + padding,
        team_bytes=near + far,
        exchange_buffer_bytes=[wire.buffer_bytes(rank, element_size, scratch) for rank in range(grid.size)],
        memory_traffic_bytes=on_slices + _OWNER_TRAFFIC * owned + PARAM_BYTES * buffer.numel,
    )


def layer_wise(group: MatrixGroup) -> SchemeDemand:
    """Megatron-Core's LayerWiseDistributedOptimizer with `--muon-tp-mode duplicated`, the mode that is exact Muon.

    Whole matrices on one data-parallel rank, chosen by size within a bucket; its tensor-parallel ranks each gather the
    whole in fp32 and each run Newton-Schulz on it. Padding goes through AdamW's collectives too.
    """
    grid = group.grid
    buffer = layer_wise_buffer(group.numels, grid.dp, group.bucket_size)
    # The layout's promise: a parameter lies in one shard.
    owners = [shards[0][0] for shards in buffer.shards]
    gathered = 4 * _sums(owners, [_tp_gather_numel(spec) for spec in group.specs], grid)
    padding = group.adamw_sent_bytes(buffer.padding_numel)
    on_owned = (_MOMENTUM_TRAFFIC + _WEIGHT_TRAFFIC) * _stored_numel(buffer, grid)
    return _demand(
        group,
        buffer,
        (ring(float(gathered.max()), grid.tp, 1), ring(padding, grid.dp, grid.stride)),
        flops=_sums(owners, group.flops, grid),
        sent_bytes=gathered + padding,
        memory_traffic_bytes=on_owned + gathered + PARAM_BYTES * buffer.numel,
    )


def all_gather(group: MatrixGroup) -> SchemeDemand:
    """Moonlight's scheme: every rank all-gathers the bf16 directions, and orthogonalizes what it stores a slice of.

    Source: arXiv 2502.16982, algorithm 1, and its Megatron-LM implementation: the buffers' all-gather over the
    data-parallel group, then over the tensor-parallel group for each matrix that the rank holds a slice of.
    """
    grid, buffer = group.grid, group.buffer
    held = [(rank, index) for index, shards in enumerate(buffer.shards) for rank, _, _ in shards]
    holders = [rank for rank, _ in held]
    gathered = 2 * _sums(holders, [_tp_gather_numel(group.specs[index]) for _, index in held], grid)
    over_dp = 2 * buffer.numel * (grid.dp - 1) / grid.dp + group.adamw_sent_bytes(buffer.padding_numel)
    on_slices = (_MOMENTUM_TRAFFIC + _PACK_TRAFFIC + _WEIGHT_TRAFFIC) * _stored_numel(buffer, grid)
    return _demand(
        group,
        buffer,
        (ring(over_dp, grid.dp, grid.stride), ring(float(gathered.max()), grid.tp, 1)),
        flops=_sums(holders, [group.flops[index] for _, index in held], grid),
        sent_bytes=gathered + over_dp,
        memory_traffic_bytes=on_slices + gathered + 2 * PARAM_BYTES * buffer.numel,
    )


def combined(groups: Sequence[tuple[GroupShape, Sequence[SchemeDemand]]], busiest: float | None = None) -> SchemeDemand:
    """Adds dense and expert demands by rank of the stage.

    Args:
        groups: Each with a demand for each expert-parallel rank.
        busiest: As in `SchemeDemand`; None: the most FLOPs of a rank.
    """
    totals = {name: np.zeros(groups[0][0].size * groups[0][0].ep) for name in PER_RANK}
    padding: list[float | None] = [None, None]
    for grid, demands in groups:
        padding[grid.expert] = demands[0].padding[grid.expert]
        for ep_rank, demand in enumerate(demands):
            for name, total in totals.items():
                total[grid.places(ep_rank)] += getattr(demand, name)

    def moved(demand: SchemeDemand) -> float:
        return sum(c.nvlink_bytes + c.network_bytes for c in demand.collectives)

    return SchemeDemand(
        **{name: tuple(total.tolist()) for name, total in totals.items()},
        buffer_bytes=sum(demands[0].buffer_bytes for _, demands in groups),
        padding=(padding[0], padding[1]),
        # Groups that are alike exchange at the same time: the one that moves most counts.
        collectives=tuple(c for _, demands in groups for c in max(demands, key=moved).collectives),
        busiest=float(totals["flops"].max()) if busiest is None else busiest,
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
