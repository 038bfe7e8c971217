"""How many bytes a collective moves within a node and between nodes, and how long that takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_muon.plan.cost_model import CostModel
from megatron_muon.plan.links_file import LinkFigures, MeasuredLinks
from megatron_muon.plan.machines import GPUS_PER_NODE, LINK_EFFICIENCY, GpuModel
from megatron_muon.plan.ownership import Transfers


@dataclass(frozen=True)
class CollectiveBytes:
    """A collective, or several that are alike, by what the busiest rank moves in the busier direction.

    Attributes:
        nvlink_bytes: Bytes within the node, in all.
        network_bytes: Bytes to or from other nodes, in all.
        count: Number of collectives; one that moves nothing is not issued.
    """

    nvlink_bytes: float
    network_bytes: float
    count: int = 1

    @property
    def issued(self) -> int:
        """The number of collectives that are issued."""
        return self.count if self.nvlink_bytes or self.network_bytes else 0


def ring(sent_bytes: float, size: int, stride: int) -> CollectiveBytes:
    """A ring collective, such as an all-gather, over ranks that are `stride` apart.

    With k ranks of the group in a node, k rings leave it through k adapters, so that each rank's adapter carries 1/k.

    Args:
        sent_bytes: Bytes that each rank sends.
        size: Ranks of the group.
        stride: Distance of neighbouring ranks in global rank.
    """
    if size == 1:
        return CollectiveBytes(0.0, 0.0)
    if size * stride <= GPUS_PER_NODE:
        return CollectiveBytes(sent_bytes, 0.0)
    in_node = max(1, GPUS_PER_NODE // stride)
    return CollectiveBytes(sent_bytes * (in_node - 1) / in_node, sent_bytes / in_node)


def all_to_all(moved: Transfers, element_size: int, places: NDArray[np.int64]) -> CollectiveBytes:
    """An all-to-all.

    Args:
        moved: Who sends how much to whom; what a rank keeps counts nothing.
        element_size: Bytes of an element.
        places: Global rank of each rank, counted from the start of a node.
    """
    nodes = places // GPUS_PER_NODE
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


def exchange_ms(
    gpu: GpuModel, collectives: Iterable[CollectiveBytes], rates: CostModel, links: MeasuredLinks | None = None
) -> float:
    """Predicted time of collectives that run one after the other, not overlapped with anything.

    Args:
        gpu: GPU whose data sheet gives the bandwidths that were not measured, less what collectives do not reach.
        collectives: The collectives.
        rates: Latencies: the planner's defaults, or as measured.
        links: Measured figures.
    """

    def bytes_per_s(measured: LinkFigures | None, nominal: float) -> float:
        return nominal * LINK_EFFICIENCY if measured is None else measured.bandwidth_gb_per_s * 1e9

    nvlink = bytes_per_s(links.intra_node if links else None, gpu.nvlink_bytes_per_s)
    network = bytes_per_s(links.inter_node if links else None, gpu.network_bytes_per_s)
    seconds = 0.0
    for c in collectives:
        # Both links are used at once.
        seconds += max(c.nvlink_bytes / nvlink, c.network_bytes / network)
        seconds += c.issued * (rates.latency_s if c.network_bytes else rates.node_latency_s)
    return 1e3 * seconds
