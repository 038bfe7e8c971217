"""Algorithm and bus bandwidth of collectives, as nccl-tests defines them. No torch.

Algorithm bandwidth is size over time. Bus bandwidth is what each rank's link must have carried for that, so that it can
be held against the link's nominal rate whatever the collective and the number of ranks. Units: bytes, seconds, and GB/s
of 1e9 bytes.

Source: NVIDIA/nccl-tests, doc/PERFORMANCE.md and the GetBw functions in src/.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

Collective = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_allv", "broadcast", "send_recv"
]
COLLECTIVES: tuple[Collective, ...] = get_args(Collective)


def bus_factor(collective: Collective, world_size: int) -> float:
    """Bus bandwidth over algorithm bandwidth.

    2(n-1)/n for all_reduce, where each rank sends what it reduces and what it gathers; (n-1)/n for all_gather,
    reduce_scatter and all_to_all, whose size counts the part that stays on the rank; 1 for broadcast and send_recv.

    Args:
        collective: Which one.
        world_size: Ranks of the group, n.

    Raises:
        ValueError: If the collective is unknown, or there is no rank.
    """
    if world_size < 1:
        raise ValueError(f"world_size: got {world_size}, expected at least one rank")
    if collective == "all_reduce":
        return 2.0 * (world_size - 1) / world_size
    if collective in ("all_gather", "reduce_scatter", "all_to_all", "all_to_allv"):
        return (world_size - 1) / world_size
    if collective in ("broadcast", "send_recv"):
        return 1.0
    raise ValueError(f"collective: got {collective!r}, expected one of {', '.join(COLLECTIVES)}")


def algorithm_bandwidth_gbps(size_bytes: int, seconds: float) -> float:
    """Size over time, in GB/s (1e9 bytes).

    Args:
        size_bytes: The collective's size: a rank's buffer for all_reduce, broadcast and send_recv; the whole, over all
            ranks, for all_gather and reduce_scatter; what a rank sends for all_to_all; see `all_to_allv_size_bytes`.
        seconds: Duration of one.

    Raises:
        ValueError: If the duration is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds: got {seconds}, expected a positive duration")
    return size_bytes / seconds / 1e9


def bus_bandwidth_gbps(collective: Collective, size_bytes: int, seconds: float, world_size: int) -> float:
    """Algorithm bandwidth times `bus_factor`, in GB/s; arguments as there."""
    return algorithm_bandwidth_gbps(size_bytes, seconds) * bus_factor(collective, world_size)


def all_to_allv_size_bytes(traffic_numel: Sequence[Sequence[int]], element_bytes: int) -> int:
    """The size of an all-to-all with uneven splits: the most that a rank sends or receives, its own part included.

    With even splits this is the size of an even all-to-all, so that both have the same bandwidths.

    Args:
        traffic_numel: Elements that rank i sends to rank j, as `traffic_numel[i][j]`.
        element_bytes: Bytes of an element.
    """
    sent = (sum(row) for row in traffic_numel)
    received = (sum(column) for column in zip(*traffic_numel, strict=True))
    return element_bytes * max((*sent, *received), default=0)


def exchanged_bytes(traffic_numel: Sequence[Sequence[int]], element_bytes: int) -> tuple[int, ...]:
    """Bytes that each rank sends to other ranks; arguments as for `all_to_allv_size_bytes`."""
    return tuple(element_bytes * (sum(row) - row[rank]) for rank, row in enumerate(traffic_numel))
