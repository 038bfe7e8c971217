"""How many bytes a collective moves within a node and between nodes, from who sends what to whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_muon.plan.machines import GPUS_PER_NODE, CollectiveBytes
from megatron_muon.plan.ownership import Transfers


def ring(sent_bytes: float, size: int, stride: int) -> CollectiveBytes:
    """A ring collective, such as an all-gather, over ranks that are `stride` apart.

    With k ranks of the group in a node, k rings leave it through k adapters, so that each rank's adapter carries 1/k.

    Args:
        sent_bytes: Bytes that each rank sends.
        size: Ranks of the group.
        stride: Distance of neighbouring ranks in global rank.
    """
    if size * stride <= GPUS_PER_NODE:
        return CollectiveBytes(sent_bytes, 0.0)
    in_node = max(1, GPUS_PER_NODE // stride)
    return CollectiveBytes(sent_bytes * (in_node - 1) / in_node, sent_bytes / in_node)


def all_to_all(moved: Transfers, element_size: int, places: Sequence[int]) -> CollectiveBytes:
    """An all-to-all.

    Args:
        moved: Who sends how much to whom; what a rank keeps counts nothing.
        element_size: Bytes of an element.
        places: Global rank of each rank, counted from the start of a node.
    """
    nodes = np.asarray(places) // GPUS_PER_NODE
    away = moved.sources != moved.destinations
    near = away & (nodes[moved.sources] == nodes[moved.destinations])

    def most(chosen: NDArray[np.bool_]) -> float:
        """Bytes of the rank that sends or receives most of the chosen transfers."""
        totals = [
            np.bincount(ends[chosen], weights=moved.numels[chosen], minlength=1)
            for ends in (moved.sources, moved.destinations)
        ]
        return float(max(total.max() for total in totals)) * element_size

    return CollectiveBytes(most(near), most(away & ~near))
