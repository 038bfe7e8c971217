"""What it costs to orthogonalize a part alone or as a share, in floating-point operations and in time. No ranks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

from megatron_muon.newton_schulz import Method, newton_schulz_flops
from megatron_muon.plan.machines import REACHED
from megatron_muon.plan.seats import Seat

_NORM_BYTES = 8


@dataclass(frozen=True)
class CostModel:
    """Rates of a cluster, for choices between computing and communicating. Their ratios matter, not their values.

    The defaults are what an H100 node reaches, see `machines.REACHED`.

    Attributes:
        flops_per_s: Of Newton-Schulz's matrix products on one rank.
        bytes_per_s: That one rank sends to ranks of other nodes.
        node_bytes_per_s: That one rank sends to ranks of its node.
        latency_s: Of one all-to-all.
        device_type: `torch.device.type`; some products cost fewer operations on a CPU.
    """

    flops_per_s: float = REACHED["cuda"].flops_per_s
    bytes_per_s: float = REACHED["cuda"].bytes_per_s
    node_bytes_per_s: float = REACHED["cuda"].node_bytes_per_s
    latency_s: float = REACHED["cuda"].latency_s
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s", "node_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"CostModel.{name}: got {getattr(self, name)!r}, expected a positive number")
        if not self.latency_s >= 0:
            raise ValueError(f"CostModel.latency_s: got {self.latency_s!r}, expected a number that is not negative")

    @classmethod
    def for_device(cls, device_type: str) -> CostModel:
        """What a rank of such devices reaches; "cpu" stands for all that are not "cuda"."""
        return cls(**asdict(REACHED["cuda" if device_type == "cuda" else "cpu"]), device_type=device_type)

    def with_free_messages(self) -> CostModel:
        """The same devices, on links that take no time."""
        return replace(self, bytes_per_s=math.inf, node_bytes_per_s=math.inf, latency_s=0.0)

    def as_flops(self, near_bytes: int, far_bytes: int, messages: int) -> int:
        """The operations a rank could do while it sends to its own node and to others in `messages` all-to-alls."""
        seconds = near_bytes / self.node_bytes_per_s + far_bytes / self.bytes_per_s + messages * self.latency_s
        return round(seconds * self.flops_per_s)


def alone_flops(
    count: int, rows: int, cols: int, steps: int, dtype: torch.dtype, device_type: str, method: Method = "auto"
) -> int:
    """Floating-point operations of `count` logical matrices on one rank."""
    return count * newton_schulz_flops(rows, cols, steps, method, dtype=dtype, device_type=device_type)


def band_flops(short: int, band: int, own_area: int, steps: int, *, divided: bool) -> int:
    """Floating-point operations of a team member, `band` of the long side its own and `short` the other side.

    Args:
        short: The short side of the matrix.
        band: Columns that the member holds, along the long side.
        own_area: Elements of the polynomial that the member computes, if it is divided.
        steps: Number of iterations.
        divided: See `team`.
    """
    if divided:
        return steps * (4 * short * short * band + 2 * short * own_area)
    return steps * 6 * short * short * band


def band_stages(steps: int, *, divided: bool, groups: int) -> int:
    """All-to-alls of a team: the norm, then for each step a reduce-scatter and one or two all-gathers."""
    return 1 + steps * (3 if divided else 2) * (2 if groups > 1 else 1)


def band_sent_bytes(short: int, seat: Seat, steps: int, itemsize: int, *, divided: bool) -> tuple[int, int]:
    """Bytes that a member sends in all stages: (to members of its group, to members of other groups)."""
    gathers = 2 if divided else 1
    near_areas = {member: _area(seat.near_rows(short, member)) for member in seat.near}
    far_areas = {member: own_area(short, seat, member) for member in seat.far}
    near = sum(near_areas.values()) + near_areas[seat.member] * (gathers * (seat.group_size - 1) - 1)
    far = sum(far_areas.values()) + far_areas[seat.member] * (gathers * (seat.groups - 1) - 1)
    return (
        _NORM_BYTES * (seat.group_size - 1) + steps * itemsize * near,
        _NORM_BYTES * (seat.size - seat.group_size) + steps * itemsize * far,
    )


def own_area(short: int, seat: Seat, member: int) -> int:
    """Elements that a member has of a symmetric matrix of `short` rows: its rows' columns up to the last row's."""
    return _area(seat.rows(short, member))


def _area(rows: tuple[int, int]) -> int:
    return (rows[1] - rows[0]) * rows[1]


Kind = Literal["across", "node", "nodes"]
"""Where owners are: anywhere, all in one node, or all ranks of several nodes."""


@dataclass(frozen=True)
class ShareCosts:
    """What each owner of a part pays, in FLOPs and FLOPs' worth of communication.

    Attributes:
        across: For 1, 2, ... owners anywhere.
        node: For 1, 2, ... owners within one node; not more than a node has ranks.
        nodes: For all ranks of 2, 3, ... nodes.
        node_size: Ranks of a node.
    """

    across: tuple[int, ...]
    node: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    node_size: int = 1

    def of(self, kind: Kind, size: int) -> int:
        """The cost for each of `size` owners."""
        if kind == "nodes":
            return self.nodes[size // self.node_size - 2]
        return (self.node if kind == "node" else self.across)[size - 1]


def band_cost(
    short: int, long: int, size: int, kind: Kind, groups: int, steps: int, itemsize: int, cost: CostModel
) -> tuple[int, bool]:
    """The cost of a member that has most to do, and whether dividing the polynomial makes it that cheap."""
    seat = Seat(size - 1, size, groups)
    area = own_area(short, seat, seat.member)
    options = []
    for divided in (False, True):
        near, far = band_sent_bytes(short, seat, steps, itemsize, divided=divided)
        if kind == "across":
            near, far = 0, near + far
        flops = band_flops(short, -(-long // size), area, steps, divided=divided)
        stages = band_stages(steps, divided=divided, groups=groups)
        options.append((flops + cost.as_flops(near, far, stages), divided))
    return min(options)


@lru_cache(maxsize=1024)
def share_costs(
    logical_shape: tuple[int, int, int],
    most: int,
    node_size: int,
    steps: int,
    dtype: torch.dtype,
    cost: CostModel,
    method: Method = "auto",
) -> ShareCosts:
    """The costs of a part, for up to `most` owners.

    Args:
        logical_shape: (count, rows, cols) of its logical matrices.
        most: Largest number of owners.
        node_size: Ranks of a node; 1 if nodes are not known.
        steps: Number of iterations.
        dtype: Their data type.
        cost: Rates of the cluster.
        method: Iteration of a matrix that one rank does; a team's is the standard one.
    """
    count, rows, cols = logical_shape

    def whole(matrices: int) -> int:
        return alone_flops(matrices, rows, cols, steps, dtype, cost.device_type, method)

    alone = whole(count)
    in_node = min(node_size, most)
    if count > 1:
        # Whole matrices each, and nothing to say to each other.
        across = [whole(-(-count // k)) for k in range(1, most + 1)]
        return ShareCosts(tuple(across), tuple(across[:in_node]), node_size=node_size)
    short, long = sorted((rows, cols))

    def of(size: int, kind: Kind, groups: int = 1) -> int:
        return band_cost(short, long, size, kind, groups, steps, dtype.itemsize, cost)[0] if size > 1 else alone

    return ShareCosts(
        across=tuple(of(size, "across") for size in range(1, most + 1)),
        node=tuple(of(size, "node") for size in range(1, in_node + 1)),
        nodes=tuple(of(n * node_size, "nodes", n) for n in range(2, most // node_size + 1)) if node_size > 1 else (),
        node_size=node_size,
    )
