"""Layouts of buffers: those of the installed Megatron-Core, for any parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

from megatron_muon.estimate.buffers import Buffer, distributed_buffer, layer_wise_buffer

CONFIG = DistributedDataParallelConfig(use_distributed_optimizer=True)


def megatrons(optimizer: Any, numels: list[int], dp: int, bucket_size: int | None) -> Buffer:
    """The layout by Megatron's function, with the shards that its buckets are cut into, rank by rank."""
    parameters = [torch.nn.Parameter(torch.empty(numel, device="meta")) for numel in numels]
    layout = optimizer._compute_per_buffer_param_layout(parameters, bucket_size, dp, CONFIG)
    shards = []
    for parameter in parameters:
        begin, end, bucket_id = layout.param_index_map[parameter]
        first, last = layout.bucket_indices[bucket_id]
        size = (last - first) // dp
        stored = []
        for rank in range(dp):
            low, high = max(first + rank * size, begin), min(first + (rank + 1) * size, end)
            if low < high:
                stored.append((rank, low - begin, high - begin))
        shards.append(tuple(stored))
    numel = layout.bucket_indices[-1][1]
    return Buffer(numel, numel - sum(numels), tuple(shards))


sizes = st.lists(st.integers(1, 5000), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(sizes, st.integers(1, 9), st.none() | st.integers(1, 20000))
def test_layouts_are_megatrons(numels: list[int], dp: int, bucket_size: int | None) -> None:
    assert distributed_buffer(numels, dp, bucket_size) == megatrons(DistributedOptimizer, numels, dp, bucket_size)
    if dp > 1:
        expected = megatrons(LayerWiseDistributedOptimizer, numels, dp, bucket_size)
        assert layer_wise_buffer(numels, dp, bucket_size) == expected


def test_layer_wise_layout_is_dropped_without_data_parallelism() -> None:
    assert layer_wise_buffer([100, 64], 1, None) == distributed_buffer([100, 64], 1, None)


@pytest.mark.parametrize("dp", [64, 96])
def test_large_buffers_are_megatrons(dp: int) -> None:
    numels = [4096 * (1 + i % 7) * 1000 + i for i in range(200)]
    for bucket_size in (None, 40_000_000):
        assert distributed_buffer(numels, dp, bucket_size) == megatrons(DistributedOptimizer, numels, dp, bucket_size)
        expected = megatrons(LayerWiseDistributedOptimizer, numels, dp, bucket_size)
        assert layer_wise_buffer(numels, dp, bucket_size) == expected
