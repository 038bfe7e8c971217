"""Where Megatron-Core's buffers put parameters, by its own layout functions. The only place here that imports it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_muon.estimate.stages import GroupShape
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.plan.build import ShardedMatrix, Slice
from megatron_muon.plan.shards import shard_ranges


@dataclass(frozen=True)
class Buffer:
    """How one kind of a stage's parameters lies in its gradient and parameter buffers.

    Attributes:
        numel: Elements of the buffer on a rank, with padding.
        padding_numel: Those that belong to no parameter.
        shards: For each parameter, the data-parallel ranks that store a part of it: (rank, start, stop), where start
            and stop are positions in the parameter's local tensor, flattened.
    """

    numel: int
    padding_numel: int
    shards: tuple[tuple[tuple[int, int, int], ...], ...]


class _Parameter:
    """What Megatron's layout functions read of a parameter: how many elements it has."""

    def __init__(self, numel: int) -> None:
        self._numel = numel

    @property
    def data(self) -> _Parameter:
        return self

    def nelement(self) -> int:
        return self._numel


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences what Megatron and torch say about the lack of CUDA, Transformer Engine, apex and a rank."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@cache
def _megatron() -> tuple[Any, Any, Any]:
    """(DistributedOptimizer, LayerWiseDistributedOptimizer, a DDP config).

    Raises:
        RuntimeError: If this Megatron-Core has no layout functions.
    """
    with quiet_imports():
        import megatron.core
        from megatron.core.distributed import DistributedDataParallelConfig
        from megatron.core.optimizer import distrib_optimizer, layer_wise_optimizer
    optimizers = (distrib_optimizer.DistributedOptimizer, layer_wise_optimizer.LayerWiseDistributedOptimizer)
    for optimizer in optimizers:
        if not hasattr(optimizer, "_compute_per_buffer_param_layout"):
            raise RuntimeError(
                f"megatron-core {megatron.core.__version__}: {optimizer.__name__} has no "
                "_compute_per_buffer_param_layout; plans are made with megatron-core 0.19"
            )
    return (*optimizers, DistributedDataParallelConfig(use_distributed_optimizer=True))


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
    return _buffer(_megatron()[0], numels, dp, bucket_size)


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
    return _buffer(_megatron()[1], numels, dp, bucket_size)


def _buffer(optimizer: Any, numels: Sequence[int], dp: int, bucket_size: int | None) -> Buffer:
    parameters = [_Parameter(numel) for numel in numels]
    with quiet_imports():
        layout = optimizer._compute_per_buffer_param_layout(parameters, bucket_size, dp, _megatron()[2])
    shards = []
    for parameter in parameters:
        begin, end, bucket_id = layout.param_index_map[parameter]
        bucket_begin, bucket_end = layout.bucket_indices[bucket_id]
        shard_numel = (bucket_end - bucket_begin) // dp
        shards.append(tuple(shard_ranges(begin - bucket_begin, end - bucket_begin, shard_numel)))
    numel = layout.bucket_indices[-1][1] if layout.bucket_indices else 0
    return Buffer(numel, numel - sum(numels), tuple(shards))


def sharded_matrices(specs: Sequence[MatrixSpec], buffer: Buffer, grid: GroupShape) -> list[ShardedMatrix]:
    """The matrices with the slice that each rank of the grid stores, as the plugin gives them to `build_plan`."""
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
