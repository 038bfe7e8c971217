"""Ranges of slices: as Megatron's own walk over all ranks finds them, and plans that follow from them."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer, Range

from megatron_muon.matrices.spec import MatrixSpec, whole
from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer
from megatron_muon.plan.build import ShardedMatrix, Slice, build_plan
from megatron_muon.plan.shards import shard_ranges

Bounds = list[list[int]]


def walked(bounds: Bounds, offsets: list[int], shards: list[int], dp: int) -> list[dict[int, tuple[int, int]]]:
    """For each parameter of each bucket, dp rank -> range, by Megatron's function, asked for every rank."""
    out: list[dict[int, tuple[int, int]]] = []
    for own, offset, shard in zip(bounds, offsets, shards, strict=True):
        index_map = {i: (begin, end, 0) for i, (begin, end) in enumerate(pairwise(own))}
        found: list[dict[int, tuple[int, int]]] = [{} for _ in index_map]
        for rank in range(dp):
            begin = offset + rank * shard
            stored = DistributedOptimizer._build_model_gbuf_param_range_map(
                index_map, Range(begin, begin + shard), offset
            )
            for i, entry in stored.items():
                found[i][rank] = (entry["param"].start, entry["param"].end)
        out += found
    return out


def ours(bounds: Bounds, offsets: list[int], shards: list[int], dp: int) -> list[dict[int, tuple[int, int]]]:
    """The same from the optimizer's method, over stand-ins of Megatron's buffers."""
    parameters = [[object() for _ in pairwise(own)] for own in bounds]
    buckets = [
        SimpleNamespace(offset=offset, params_list=members, grad_data=torch.empty(shard * dp, device="meta"))
        for members, offset, shard in zip(parameters, offsets, shards, strict=True)
    ]
    index_map = {
        parameter: (begin, end, bucket_id)
        for bucket_id, (members, own) in enumerate(zip(parameters, bounds, strict=True))
        for parameter, (begin, end) in zip(members, pairwise(own), strict=True)
    }
    group = SimpleNamespace(size=lambda: dp)
    buffer = SimpleNamespace(data_parallel_group=group, buckets=buckets, param_index_map=index_map)
    ranges = MuonDistributedOptimizer._ranges_by_dp_rank(SimpleNamespace(buffers=[buffer]))  # type: ignore[arg-type]
    return [ranges[parameter] for members in parameters for parameter in members]  # type: ignore[index]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_ranges_are_those_of_megatrons_walk(data: st.DataObject) -> None:
    dp, at = data.draw(st.integers(1, 9)), 0
    bounds, offsets, shards = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
        own = [at]
        for size in sizes:
            own.append(own[-1] + size)
        shard = -(-sum(sizes) // dp) + data.draw(st.integers(0, 2))
        bounds.append(own)
        offsets.append(at)
        shards.append(shard)
        at += shard * dp
    expected = walked(bounds, offsets, shards, dp)
    assert ours(bounds, offsets, shards, dp) == expected
    assert [list(found) for found in expected] == [sorted(found) for found in expected]


def test_nothing_is_stored_of_an_empty_parameter() -> None:
    assert shard_ranges(5, 5, 3) == []


@pytest.mark.parametrize("dp", [1, 3, 16])
def test_plans_are_those_of_megatrons_walk(dp: int) -> None:
    specs = [MatrixSpec(f"m{i}", (24 + i, 8 * (1 + i % 3)), 1, None, whole(24 + i)) for i in range(12)]
    bounds = [0]
    for spec in specs:
        bounds.append(bounds[-1] + spec.local_numel)
    shard = -(-bounds[-1] // dp)

    def fingerprint(ranges: list[dict[int, tuple[int, int]]]) -> str:
        matrices = [
            ShardedMatrix(spec, tuple(Slice(rank, *found[rank]) for rank in found))
            for spec, found in zip(specs, ranges, strict=True)
        ]
        return build_plan(matrices, [0] * dp, ns_steps=5).fingerprint

    assert fingerprint(ours([bounds], [0], [shard], dp)) == fingerprint(walked([bounds], [0], [shard], dp))
