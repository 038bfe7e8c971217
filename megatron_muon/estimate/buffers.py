"""Where Megatron-Core's buffers put parameters. Its layout rules in a few lines, so that a plan needs no Megatron.

A test compares the results with those of the installed Megatron-Core's own functions.
Source: `_compute_per_buffer_param_layout` of DistributedOptimizer and of LayerWiseDistributedOptimizer, and
megatron/core/optimizer/param_layout.py, megatron-core 0.19.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_muon.estimate.stages import GroupShape
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.plan.build import ShardedMatrix, Slice
from megatron_muon.plan.shards import shard_ranges

_START_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
_LEAST_FILL = 0.9
"""The layer-wise layout extends a bucket until it fills so much of what its largest parameter makes it pad."""


@dataclass(frozen=True)
class Buffer:
    """How one kind of a stage's parameters lies in its gradient and parameter buffers.

    Attributes:
        numel: Elements of the buffer on a rank, with padding.
        padding_numel: Elements that belong to no parameter.
        shards: For each parameter, the data-parallel ranks that store a part of it: (rank, start, stop), where start
            and stop are positions in the parameter's local tensor, flattened.
    """

    numel: int
    padding_numel: int
    shards: tuple[tuple[tuple[int, int, int], ...], ...]


_Bucket = tuple[dict[int, int], int]
"""First element of each parameter in its bucket, and the bucket's elements."""


def default_bucket_size(dp: int) -> int:
    """Megatron's bucket size, in elements, where gradient reduction overlaps with the backward pass.

    Source: `resolve_ddp_bucket_size` in megatron/training/training.py, and DistributedDataParallel.

    Args:
        dp: Data-parallel times context-parallel size, over all optimizer instances.
    """
    return max(40_000_000, 1_000_000 * dp)


def distributed_buffer(numels: Sequence[int], dp: int, bucket_size: int | None) -> Buffer:
    """The layout of Megatron's DistributedOptimizer: each bucket is cut into `dp` equal shards, across parameters.

    Args:
        numels: Elements of each parameter, in the model's order.
        dp: Ranks that a buffer is sharded over.
        bucket_size: Elements after which a bucket is closed; None for a single bucket.
    """

    def bucket(members: list[int]) -> _Bucket:
        begins, at = {}, 0
        for index in members:
            begins[index] = _padded(at, _START_ALIGNMENT)
            at = begins[index] + numels[index]
        return begins, _padded(at, math.lcm(dp, _BUCKET_ALIGNMENT))

    def is_full(members: list[int]) -> bool:
        # Alignment adds less than 64 elements a parameter; only near the limit it has to be known.
        most = sum(numels[index] for index in members) + _START_ALIGNMENT * len(members)
        if bucket_size is None or most < bucket_size:
            return False
        return bucket(members)[0][members[-1]] + numels[members[-1]] >= bucket_size

    return _buffer(numels, dp, is_full, bucket)


def layer_wise_buffer(numels: Sequence[int], dp: int, bucket_size: int | None) -> Buffer:
    """The layout of Megatron's LayerWiseDistributedOptimizer: each parameter lies in one shard, the others are padded.

    Args:
        numels: Elements of each parameter, in the model's order.
        dp: Ranks that a buffer is sharded over.
        bucket_size: Elements after which a bucket may be closed; None for a single bucket.
    """
    if dp == 1:
        # Megatron drops the layer-wise layout where there is nothing to distribute.
        return distributed_buffer(numels, dp, bucket_size)

    def bucket(members: list[int]) -> _Bucket:
        """Largest parameters first, each to the shard that is filled least."""
        shards = [(0, shard) for shard in range(dp)]
        placed = {}
        for index in sorted(members, key=lambda index: -numels[index]):
            filled, shard = shards[0]
            start = _padded(filled, _START_ALIGNMENT)
            placed[index] = shard, start
            heapq.heapreplace(shards, (start + numels[index], shard))
        divisor = math.lcm(_START_ALIGNMENT, math.lcm(dp, _BUCKET_ALIGNMENT) // dp)
        size = _padded(max(shards)[0], divisor)
        return {index: shard * size + start for index, (shard, start) in placed.items()}, dp * size

    def is_full(members: list[int]) -> bool:
        sizes = [numels[index] for index in members]
        return bucket_size is not None and sum(sizes) >= max(bucket_size, int(dp * max(sizes) * _LEAST_FILL))

    return _buffer(numels, dp, is_full, bucket)


def _padded(numel: int, divisor: int) -> int:
    return -(-numel // divisor) * divisor


def _buffer(
    numels: Sequence[int], dp: int, is_full: Callable[[list[int]], bool], bucket: Callable[[list[int]], _Bucket]
) -> Buffer:
    """Fills buckets in backward order, the last parameter first."""
    shards: dict[int, tuple[tuple[int, int, int], ...]] = {}
    total = 0
    members: list[int] = []
    for index in reversed(range(len(numels))):
        members.append(index)
        if index == 0 or is_full(members):
            begins, size = bucket(members)
            for member, begin in begins.items():
                shards[member] = tuple(shard_ranges(begin, begin + numels[member], size // dp))
            total += size
            members = []
    return Buffer(total, total - sum(numels), tuple(shards[index] for index in range(len(numels))))


def sharded_matrices(specs: Sequence[MatrixSpec], buffer: Buffer, grid: GroupShape) -> list[ShardedMatrix]:
    """The matrices with the slice that each rank of the group stores, as the plugin gives them to `build_plan`."""
    return [
        ShardedMatrix(
            spec,
            tuple(
                Slice(dp_rank * grid.tp + tp_rank, start, stop)
                for dp_rank, start, stop in shards
                for tp_rank in range(grid.tp)
            ),
        )
        for spec, shards in zip(specs, buffer.shards, strict=True)
    ]
