"""How many bytes a collective moves within a node and between nodes, from who sends what to whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_muon.plan.machines import GPUS_PER_NODE, Collective


def ring(sent_bytes: float, size: int, stride: int) -> Collective:
    """A ring collective, such as an all-gather, over ranks that are `stride` apart.

    With k ranks of the group in a node, k rings leave it through k adapters, so that each rank's adapter carries 1/k.

    Args:
        sent_bytes: Bytes that each rank sends.
        size: Ranks of the group.
        stride: Distance of neighbouring ranks in global rank.
    """
    if size * stride <= GPUS_PER_NODE:
        return Collective(sent_bytes, 0.0)
    in_node = max(1, GPUS_PER_NODE // stride)
    return Collective(sent_bytes * (in_node - 1) / in_node, sent_bytes / in_node)


def all_to_all(traffic: Sequence[Sequence[int]], element_size: int, places: Sequence[int]) -> Collective:
    """An all-to-all.

    Args:
        traffic: Elements that rank i sends to rank j, as `traffic[i][j]`.
        element_size: Bytes of an element.
        places: Global rank of each rank, counted from the start of a node.
    """
    nodes = np.asarray(places) // GPUS_PER_NODE
    # Column sums per node of the sender, so that what stays within the receiver's node can be told apart.
    received = np.zeros(len(places), dtype=np.int64)
    received_near = np.zeros(len(places), dtype=np.int64)
    near = network = 0
    for rank, row in enumerate(traffic):
        sent: NDArray[np.int64] = np.array(row, dtype=np.int64)
        sent[rank] = 0
        received += sent
        same_node = nodes == nodes[rank]
        sent_near = int(sent[same_node].sum())
        received_near[same_node] += sent[same_node]
        near = max(near, sent_near)
        network = max(network, int(sent.sum()) - sent_near)
    if len(places):
        near = max(near, int(received_near.max()))
        network = max(network, int((received - received_near).max()))
    return Collective(float(near * element_size), float(network * element_size))
