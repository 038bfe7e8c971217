"""What it costs to orthogonalize a part alone or as a share, in floating-point operations and in time. No ranks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from megatron_muon.newton_schulz.cost import newton_schulz_flops
from megatron_muon.newton_schulz.names import DTYPE_BYTES, Iteration
from megatron_muon.plan.links_file import MeasuredLinks
from megatron_muon.plan.machines import REACHED
from megatron_muon.plan.seats import Seat

_NORM_BYTES = 8
LAUNCHES_PER_STAGE = 3
"""Small kernels around a team's all-to-all: one packs what is sent, one adds or one places what has come, one spare."""


class Messages(NamedTuple):
    """What a team member sends: bytes in all, and the number of all-to-alls."""

    sent_bytes: int
    stages: int


@dataclass(frozen=True)
class CostModel:
    """Rates of a cluster, for choices between computing and communicating. Their ratios matter, not their values.

    The defaults are what an H100 node reaches, see `machines.REACHED`.

    Attributes:
        flops_per_s: Of Newton-Schulz's matrix products on one rank.
        bytes_per_s: What one rank sends to ranks of other nodes.
        node_bytes_per_s: What one rank sends to ranks of its node.
        latency_s: Time of a small all-to-all between nodes.
        node_latency_s: Time of a small all-to-all within a node.
        launch_s: Time that a small kernel adds to a stream.
        device_type: `torch.device.type`; some products cost fewer operations on a CPU.
    """

    flops_per_s: float = REACHED["cuda"].flops_per_s
    bytes_per_s: float = REACHED["cuda"].bytes_per_s
    node_bytes_per_s: float = REACHED["cuda"].node_bytes_per_s
    latency_s: float = REACHED["cuda"].latency_s
    node_latency_s: float = REACHED["cuda"].node_latency_s
    launch_s: float = REACHED["cuda"].launch_s
    device_type: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s", "node_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"CostModel.{name}: got {getattr(self, name)!r}, expected a positive number")
        for name in ("latency_s", "node_latency_s", "launch_s"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"CostModel.{name}: got {getattr(self, name)!r}, expected a number that is not negative"
                )

    @classmethod
    def for_device(cls, device_type: str, links: MeasuredLinks | None = None) -> CostModel:
        """What a rank of such devices reaches.

        Args:
            device_type: `torch.device.type`; whatever is not "cuda" counts as "cpu".
            links: Measured figures, which replace the defaults of `machines.REACHED` where they are not None.
        """
        rates = asdict(REACHED["cuda" if device_type == "cuda" else "cpu"])
        if links is not None:
            for figures, bandwidth, latency in (
                (links.intra_node, "node_bytes_per_s", "node_latency_s"),
                (links.inter_node, "bytes_per_s", "latency_s"),
            ):
                if figures is not None:
                    rates |= {bandwidth: figures.bandwidth_gb_per_s * 1e9, latency: figures.latency_us / 1e6}
            if links.launch_us is not None:
                rates["launch_s"] = links.launch_us / 1e6
        return cls(**rates, device_type=device_type)

    def with_free_messages(self) -> CostModel:
        """The same devices, on links and streams that take no time."""
        return replace(
            self, bytes_per_s=math.inf, node_bytes_per_s=math.inf, latency_s=0.0, node_latency_s=0.0, launch_s=0.0
        )

    def as_flops(self, near: Messages, far: Messages) -> int:
        """The operations that a rank could do while it sends within its node (`near`) and to other nodes (`far`)."""
        seconds = near.sent_bytes / self.node_bytes_per_s + far.sent_bytes / self.bytes_per_s
        seconds += near.stages * self.node_latency_s + far.stages * self.latency_s
        seconds += (near.stages + far.stages) * LAUNCHES_PER_STAGE * self.launch_s
        return round(seconds * self.flops_per_s)


@lru_cache(maxsize=1024)
def alone_flops(
    count: int, rows: int, cols: int, steps: int, dtype: str, device_type: str, iteration: Iteration = "auto"
) -> int:
    """Floating-point operations of `count` logical matrices on one rank."""
    return count * newton_schulz_flops(rows, cols, steps, iteration, dtype=dtype, device_type=device_type)


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
    near, far = _stages_by_reach(steps, divided=divided, groups=groups)
    return near + far


def _stages_by_reach(steps: int, *, divided: bool, groups: int) -> tuple[int, int]:
    """All-to-alls of a team within each of its groups, and between groups or over all members."""
    within = steps * (3 if divided else 2)
    return (within, 1 + within) if groups > 1 else (0, 1 + within)


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


def band_received_bytes(short: int, seat: Seat, steps: int, itemsize: int, *, divided: bool, lines: bool) -> list[int]:
    """Bytes that a member receives in each stage, also from itself.

    Args:
        short: The short side of the matrix.
        seat: The member's place.
        steps: Number of iterations.
        itemsize: Of their data type.
        divided: See `team`.
        lines: Whether sums over lines follow the iterations, for NorMuon.
    """
    near = [_area(seat.near_rows(short, member)) for member in seat.near]
    far = [own_area(short, seat, member) for member in seat.far]
    own = seat.member % seat.group_size
    reduce_scatter = [len(near) * near[own]]
    all_gather = [sum(near)]
    if seat.groups > 1:
        reduce_scatter.append(len(far) * far[seat.member // seat.group_size])
        all_gather.insert(0, sum(far))
    step = [*reduce_scatter, *all_gather * (2 if divided else 1)]
    few = _NORM_BYTES * seat.size
    return [few, *(area * itemsize for area in step * steps), *([few] if lines else [])]


def own_area(short: int, seat: Seat, member: int) -> int:
    """Elements that a member has of a symmetric matrix of `short` rows: its rows' columns up to the last row's."""
    return _area(seat.rows(short, member))


def _area(rows: tuple[int, int]) -> int:
    return (rows[1] - rows[0]) * rows[1]


TeamPlacement = Literal["across", "node", "nodes"]
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

    def of(self, placement: TeamPlacement, size: int) -> int:
        """The cost for each of `size` owners."""
        if placement == "nodes":
            return self.nodes[size // self.node_size - 2]
        return (self.node if placement == "node" else self.across)[size - 1]


def band_cost(
    short: int, long: int, size: int, placement: TeamPlacement, groups: int, steps: int, itemsize: int, cost: CostModel
) -> tuple[int, bool]:
    """The cost of a member that has most to do, and whether dividing the polynomial makes it that cheap."""
    seat = Seat(size - 1, size, groups)
    area = own_area(short, seat, seat.member)
    options = []
    for divided in (False, True):
        near_bytes, far_bytes = band_sent_bytes(short, seat, steps, itemsize, divided=divided)
        near_stages, far_stages = _stages_by_reach(steps, divided=divided, groups=groups)
        near, far = Messages(near_bytes, near_stages), Messages(far_bytes, far_stages)
        if placement != "nodes":
            # All members in one node, or members anywhere, who count as if none were near.
            total, nothing = Messages(near_bytes + far_bytes, near_stages + far_stages), Messages(0, 0)
            near, far = (total, nothing) if placement == "node" else (nothing, total)
        flops = band_flops(short, -(-long // size), area, steps, divided=divided)
        options.append((flops + cost.as_flops(near, far), divided))
    return min(options)


@lru_cache(maxsize=1024)
def share_costs(
    logical_shape: tuple[int, int, int],
    most: int,
    node_size: int,
    steps: int,
    dtype: str,
    cost: CostModel,
    iteration: Iteration = "auto",
) -> ShareCosts:
    """The costs of a part, for up to `most` owners.

    Args:
        logical_shape: (count, rows, cols) of its logical matrices.
        most: Largest number of owners.
        node_size: Ranks of a node; 1 if nodes are not known.
        steps: Number of iterations.
        dtype: Their data type, a key of `DTYPE_BYTES`.
        cost: Rates of the cluster.
        iteration: Iteration of a matrix that one rank does; a team's is the standard one.
    """
    count, rows, cols = logical_shape

    def whole(matrices: int) -> int:
        return alone_flops(matrices, rows, cols, steps, dtype, cost.device_type, iteration)

    alone = whole(count)
    in_node = min(node_size, most)
    if count > 1:
        # Whole matrices each, and nothing to say to each other.
        across = [whole(-(-count // k)) for k in range(1, most + 1)]
        return ShareCosts(tuple(across), tuple(across[:in_node]), node_size=node_size)
    short, long = sorted((rows, cols))

    def of(size: int, placement: TeamPlacement, groups: int = 1) -> int:
        return (
            band_cost(short, long, size, placement, groups, steps, DTYPE_BYTES[dtype], cost)[0] if size > 1 else alone
        )

    return ShareCosts(
        across=tuple(of(size, "across") for size in range(1, most + 1)),
        node=tuple(of(size, "node") for size in range(1, in_node + 1)),
        nodes=tuple(of(n * node_size, "nodes", n) for n in range(2, most // node_size + 1)) if node_size > 1 else (),
        node_size=node_size,
    )
