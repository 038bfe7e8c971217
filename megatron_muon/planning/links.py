"""Nominal link and arithmetic rates of GPUs, and how long a collective's bytes take on them. Predictions only.

The model is bandwidth alone: no latency, no contention, all GPUs of a node on one NVLink switch, one network adapter
per GPU, both used at once. It is meant for comparing schemes, and for telling milliseconds from tens of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GPUS_PER_NODE = 8
LINK_EFFICIENCY = 0.8
"""Assumed share of the nominal bandwidth that collectives of large buffers reach."""
COMPUTE_EFFICIENCY = 0.6
"""Assumed share of the nominal bf16 rate that Newton-Schulz's products reach."""


@dataclass(frozen=True)
class Machine:
    """A GPU in a node of eight, by its data sheet.

    Attributes:
        name: The GPU.
        nvlink_bytes_per_s: One direction, per GPU.
        network_bytes_per_s: One direction, per GPU, between nodes.
        bf16_flops_per_s: Dense tensor-core rate.
        source: Where the numbers are from.
    """

    name: str
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    bf16_flops_per_s: float
    source: str

    def newton_schulz_ms(self, flops: float) -> float:
        """Predicted time of a rank's Newton-Schulz products."""
        return 1e3 * flops / (self.bf16_flops_per_s * COMPUTE_EFFICIENCY)

    def exchange_ms(self, collectives: Iterable[Collective]) -> float:
        """Predicted time of collectives that run one after the other."""
        return sum(
            1e3
            * max(c.nvlink_bytes / self.nvlink_bytes_per_s, c.network_bytes / self.network_bytes_per_s)
            / LINK_EFFICIENCY
            for c in collectives
        )


_NVLINK4 = "NVLink 4: 900 GB/s, half each way; ConnectX-7: 400 Gb/s"
MACHINES = (
    Machine("H100", 450e9, 50e9, 989e12, f"NVIDIA H100 SXM and DGX H100 data sheets. {_NVLINK4}"),
    Machine("H200", 450e9, 50e9, 989e12, f"NVIDIA H200 SXM and DGX H200 data sheets. {_NVLINK4}"),
    Machine(
        "B200",
        900e9,
        50e9,
        2250e12,
        "NVIDIA DGX B200 data sheet. NVLink 5: 1.8 TB/s, half each way; ConnectX-7: 400 Gb/s",
    ),
)


@dataclass(frozen=True)
class Collective:
    """A collective, by what its busiest rank moves in the busier direction.

    Attributes:
        nvlink_bytes: Within the node.
        network_bytes: To or from other nodes.
    """

    nvlink_bytes: float
    network_bytes: float


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
