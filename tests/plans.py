"""Matrices as data-parallel buffers store them, for tests of plans and of what runs along them."""

from __future__ import annotations

import itertools

from megatron_muon.config import MuonConfig
from megatron_muon.matrices.fused import GatedMlp, parts_of, pattern
from megatron_muon.matrices.spec import MatrixSpec, Part
from megatron_muon.plan.build import CostModel, OwnershipPlan, ShardedMatrix, Slice

FREE = CostModel(flops_per_s=1.0, bytes_per_s=1e30, node_bytes_per_s=1e30, latency_s=0, node_latency_s=0, launch_s=0)
"""With it sharing always pays, so that the planner makes teams of small matrices too."""


def qkv_parts(rows: int, *sizes: int) -> tuple[Part, ...]:
    """Q, K and V of a fused weight of `rows` rows on a rank that repeats so many rows of each."""
    return parts_of("qkv", pattern(list(zip("qkv", sizes, strict=True))), rows, 1, 1)


def gate_and_up(rows: int) -> tuple[Part, ...]:
    """The two halves of a gated MLP's first weight of `rows` rows on a rank."""
    return parts_of("fc1", GatedMlp().split(MuonConfig()), rows, 1, 1)


def sharded(specs: list[MatrixSpec], cuts: list[int], tp: int) -> list[ShardedMatrix]:
    """Rank dp_rank * tp + tp_rank stores [cuts[dp_rank], cuts[dp_rank + 1]) of the specs' local tensors in a row."""
    out, at = [], 0
    for spec in specs:
        slices = []
        for dp_rank, (low, high) in enumerate(itertools.pairwise(cuts)):
            start, stop = max(low - at, 0), min(high - at, spec.local_numel)
            if start < stop:
                slices += [Slice(dp_rank * tp + tp_rank, start, stop) for tp_rank in range(tp)]
        out.append(ShardedMatrix(spec, tuple(slices)))
        at += spec.local_numel
    return out


def evenly(specs: list[MatrixSpec], tp: int, dp: int) -> tuple[list[ShardedMatrix], list[int]]:
    """The specs in one buffer that is cut evenly over `dp` ranks, in the middle of rows, and each rank's TP rank."""
    total = sum(spec.local_numel for spec in specs)
    return sharded(specs, [total * i // dp for i in range(dp + 1)], tp), [rank % tp for rank in range(tp * dp)]


def traffic(plan: OwnershipPlan, round_index: int, *, scatter: bool) -> list[list[int]]:
    """Elements that rank i sends to rank j in a round's gather (or scatter), as `traffic[i][j]`."""
    out = [[0] * plan.world_size for _ in range(plan.world_size)]
    moved = plan.transfers(plan.items(round_index), scatter=scatter)
    for source, destination, numel in zip(*(column.tolist() for column in moved), strict=True):
        out[source][destination] += numel
    return out
