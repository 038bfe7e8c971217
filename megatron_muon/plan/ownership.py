"""Who orthogonalizes what: the ownership plan, a frozen value that is the same on every rank of a group."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_muon.config import FloatDtype
from megatron_muon.matrices.shares import Share, divide_part, is_single, max_shares, share_positions, share_shape
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.newton_schulz.names import DTYPE_BYTES, Iteration
from megatron_muon.plan.cost_model import (
    CostModel,
    alone_flops,
    band_flops,
    band_sent_bytes,
    band_stages,
    own_area,
)
from megatron_muon.plan.seats import Seat


@dataclass(frozen=True)
class Slice:
    """The flat range [start, stop) of a parameter's local tensor that rank `rank` of the group stores."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardedMatrix:
    """A parameter and how the group's ranks store it. A rank stores at most one slice of a parameter."""

    spec: MatrixSpec
    slices: tuple[Slice, ...]


@dataclass(frozen=True, order=True)
class Item:
    """What one rank collects: share `share` of part `part` of parameter `matrix` (indices into the plan)."""

    matrix: int
    part: int
    share: int = 0


@dataclass(frozen=True)
class Segment:
    """A run on the wire: elements [start, stop) of piece `piece`, in the share's order, stored by `rank`."""

    item: Item
    rank: int
    piece: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Transfers(NamedTuple):
    """Runs on the wire as columns, one entry for each: who sends how many elements to whom."""

    sources: NDArray[np.int64]
    destinations: NDArray[np.int64]
    numels: NDArray[np.int64]


@dataclass(frozen=True)
class TeamMethod:
    """How a team works; see `team`.

    Attributes:
        divided: Whether the polynomial is divided among the members as well.
        groups: Number of nodes the team is made of, of equally many members that follow each other; 1 if it reduces
            over all members at once.
    """

    divided: bool = False
    groups: int = 1


@dataclass(frozen=True)
class Team:
    """The ranks that orthogonalize one logical matrix together, each a band of its long side.

    Attributes:
        ranks: By share; ranks of the group.
        rows: Of the matrix.
        cols: Of the matrix.
        method: How they do it.
    """

    ranks: tuple[int, ...]
    rows: int
    cols: int
    method: TeamMethod

    @property
    def short(self) -> int:
        """The side that is not cut."""
        return min(self.rows, self.cols)

    def seat(self, share: int) -> Seat:
        """The place of the member that has a share."""
        return Seat(share, len(self.ranks), self.method.groups)


@dataclass(frozen=True)
class OwnershipPlan:
    """Assigns every part of every parameter to the ranks that run its Newton-Schulz, in rounds.

    Attributes:
        tp_ranks: For each rank of the group, its tensor-parallel rank; the group spans DP x TP.
        matrices: The parameters with their slices.
        owners: For each parameter, for each of its parts, the owning rank of each of the part's shares.
        rounds: Indices of the parameters exchanged together; a partition of all of them.
        methods: For each parameter, for each of its parts, how its owners work if they are a team.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: Their data type.
        cost: Rates of the cluster by which the owners were chosen; in the fingerprint, so that ranks that read
            different links files are refused.
        ns_method: Iteration of the matrices that one rank does, for the FLOP count.
        loads: What the planner reckoned with for each rank, in FLOPs: other plans' work, its Newton-Schulz, and what
            it could compute while its teams talk. Empty if the plan was not made by `build_plan`.

    Raises:
        ValueError: If slices leave a gap or overlap, names repeat, an owner is no rank or owns two shares of a part,
            a part has more owners than shares, or rounds are no partition.
    """

    tp_ranks: tuple[int, ...]
    matrices: tuple[ShardedMatrix, ...]
    owners: tuple[tuple[tuple[int, ...], ...], ...]
    rounds: tuple[tuple[int, ...], ...]
    methods: tuple[tuple[TeamMethod, ...], ...]
    ns_steps: int
    ns_dtype: FloatDtype = "bf16"
    cost: CostModel = field(default_factory=CostModel)
    ns_method: Iteration = "auto"
    loads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names = [m.spec.name for m in self.matrices]
        repeated = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise ValueError(f"the plan names {', '.join(repeated)} more than once")
        for matrix in self.matrices:
            _check_cover(matrix, self.tp_ranks)
        for matrix, owners, methods in zip(self.matrices, self.owners, self.methods, strict=True):
            parts = range(len(matrix.spec.parts))
            if len(owners) != len(parts) or not all(self._are_owners(matrix.spec, *p) for p in zip(parts, owners)):
                raise ValueError(f"{matrix.spec.name}: got owners {owners} for a group of {self.world_size} ranks")
            if len(methods) != len(parts) or any(len(o) % m.groups for o, m in zip(owners, methods)):
                raise ValueError(
                    f"{matrix.spec.name}: got owners {owners}, which are no groups of equal size {methods}"
                )
        if sorted(i for r in self.rounds for i in r) != list(range(len(self.matrices))):
            raise ValueError(f"the rounds {self.rounds} are not a partition of {len(self.matrices)} parameters")

    def _are_owners(self, spec: MatrixSpec, part: int, ranks: tuple[int, ...]) -> bool:
        return (
            len(ranks) == len(set(ranks))
            and 0 < len(ranks) <= (max_shares(spec, part) if len(ranks) > 1 else 1)
            and all(0 <= rank < self.world_size for rank in ranks)
        )

    @property
    def world_size(self) -> int:
        return len(self.tp_ranks)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the plan; equal on every rank that may exchange by it."""
        content = (
            self.tp_ranks,
            self.matrices,
            self.owners,
            self.rounds,
            self.methods,
            self.ns_steps,
            self.ns_dtype,
            self.cost,
            self.ns_method,
            self.loads,
        )
        return hashlib.sha256(repr(content).encode()).hexdigest()

    @cached_property
    def _shares(self) -> tuple[tuple[tuple[Share, ...], ...], ...]:
        """For each parameter, for each of its parts, the shares; as many as owners."""
        return tuple(
            tuple(divide_part(m.spec, part, len(ranks)) for part, ranks in enumerate(owners))
            for m, owners in zip(self.matrices, self.owners, strict=True)
        )

    def spec(self, item: Item) -> MatrixSpec:
        return self.matrices[item.matrix].spec

    def share(self, item: Item) -> Share:
        return self._shares[item.matrix][item.part][item.share]

    def owner(self, item: Item) -> int:
        """The rank that collects an item."""
        return self.owners[item.matrix][item.part][item.share]

    def shape(self, item: Item) -> tuple[int, int]:
        """(rows, cols) of the tensor in which the owner collects an item."""
        return share_shape(self.spec(item), item.part, self.share(item))

    def team(self, item: Item) -> Team | None:
        """The team that an item's owner is a member of, if its share is a band of a logical matrix."""
        ranks = self.owners[item.matrix][item.part]
        if len(ranks) == 1 or not is_single(self.spec(item), item.part):
            return None
        rows, cols = self.spec(item).joined_shape(item.part)
        return Team(ranks, rows, cols, self.methods[item.matrix][item.part])

    def all_items(self) -> Iterator[Item]:
        """Every item of the plan, in index order."""
        for matrix, parts in enumerate(self.owners):
            for part, ranks in enumerate(parts):
                for share in range(len(ranks)):
                    yield Item(matrix, part, share)

    def items(self, round_index: int, owner: int | None = None) -> list[Item]:
        """What is exchanged in a round, in wire order; only `owner`'s if given."""
        return [
            Item(matrix, part, share)
            for matrix in self.rounds[round_index]
            for part, ranks in enumerate(self.owners[matrix])
            for share, rank in enumerate(ranks)
            if owner is None or rank == owner
        ]

    def team_stages(self, round_index: int) -> int:
        """How many all-to-alls the teams of a round need; every rank of the group takes part in all of them."""
        teams = (self.team(item) for item in self.items(round_index) if item.share == 0)
        return max((self._stages(team.method) for team in teams if team), default=0)

    def _stages(self, method: TeamMethod) -> int:
        return band_stages(self.ns_steps, divided=method.divided, groups=method.groups)

    def item_flops(self, item: Item) -> int:
        """Newton-Schulz FLOPs of an item's owner for it."""
        team = self.team(item)
        share = self.share(item)
        if team is None:
            count, rows, cols = self.spec(item).logical_shape(item.part)
            extent = share.stop - share.start
            count = count * extent // self.spec(item).joined_shape(item.part)[share.dim]
            return alone_flops(count, rows, cols, self.ns_steps, self.ns_dtype, self.cost.device_type, self.ns_method)
        area = own_area(team.short, team.seat(item.share), item.share)
        return band_flops(team.short, share.stop - share.start, area, self.ns_steps, divided=team.method.divided)

    @cached_property
    def rank_flops(self) -> tuple[int, ...]:
        """Newton-Schulz FLOPs of each rank in one step."""
        load = [0] * self.world_size
        for item in self.all_items():
            load[self.owner(item)] += self.item_flops(item)
        return tuple(load)

    @cached_property
    def total_flops(self) -> int:
        """Newton-Schulz FLOPs of one step if no matrix were shared; over the ranks, the ideal load."""
        return sum(
            alone_flops(
                *m.spec.logical_shape(part), self.ns_steps, self.ns_dtype, self.cost.device_type, self.ns_method
            )
            for m in self.matrices
            for part in range(len(m.spec.parts))
        )

    def segments(self, item: Item, *, scatter: bool) -> list[Segment]:
        """The runs of an item, by rank. Of a replicated parameter one copy is gathered, and every copy scattered to.

        The copy gathered is the one of the owner's TP rank, so that it need not leave the owner's node.
        """
        ranks, pieces, starts, stops = (column.tolist() for column in self._runs(item, scatter=scatter))
        return [Segment(item, *run) for run in zip(ranks, pieces, starts, stops)]

    @cached_property
    def _stored(self) -> tuple[tuple[NDArray[np.int64], ...], ...]:
        """For each parameter, the columns (rank, TP rank, start, stop) of its slices."""
        out = []
        for m in self.matrices:
            columns = np.array([(s.rank, self.tp_ranks[s.rank], s.start, s.stop) for s in m.slices], dtype=np.int64)
            out.append(tuple(columns.T))
        return tuple(out)

    @cached_property
    def _scattered_runs(self) -> dict[Item, tuple[NDArray[np.int64], ...]]:
        """What `_runs` has found, since the gather, the scatter and the counts of bytes all ask for it."""
        return {}

    def _runs(self, item: Item, *, scatter: bool) -> tuple[NDArray[np.int64], ...]:
        """The columns (rank, piece, start, stop) of an item's segments; see `segments`."""
        runs = self._scattered_runs.get(item)
        if runs is None:
            runs = self._scattered_runs[item] = self._find_runs(item)
        if scatter or not self.spec(item).replicated:
            return runs
        tp_ranks = np.array(self.tp_ranks)
        kept = tp_ranks[runs[0]] == tp_ranks[self.owner(item)]
        return tuple(column[kept] for column in runs)

    def _find_runs(self, item: Item) -> tuple[NDArray[np.int64], ...]:
        spec, share = self.spec(item), self.share(item)
        ranks, tp_ranks, starts, stops = self._stored[item.matrix]
        pieces = tp_ranks if spec.num_pieces > 1 else np.zeros_like(tp_ranks)
        first, last = np.zeros_like(starts), np.zeros_like(stops)
        for piece in np.unique(pieces):
            here = pieces == piece
            first[here] = share_positions(spec, item.part, share, int(piece), starts[here])
            last[here] = share_positions(spec, item.part, share, int(piece), stops[here])
        kept = first < last
        return ranks[kept], pieces[kept], first[kept], last[kept]

    def transfers(self, items: Iterable[Item], *, scatter: bool) -> Transfers:
        """What the gather (or the scatter) of some items moves, also from a rank to itself."""
        stored, owned, numels = [], [], []
        for item in items:
            ranks, _, starts, stops = self._runs(item, scatter=scatter)
            stored.append(ranks)
            owned.append(np.full_like(ranks, self.owner(item)))
            numels.append(stops - starts)
        empty = [np.zeros(0, dtype=np.int64)]
        at_storage, at_owner = np.concatenate(stored or empty), np.concatenate(owned or empty)
        sources, destinations = (at_owner, at_storage) if scatter else (at_storage, at_owner)
        return Transfers(sources, destinations, np.concatenate(numels or empty))

    def sent_numel(self) -> tuple[int, ...]:
        """Elements that each rank sends to other ranks in one step's exchange, gather and scatter together."""
        total = np.zeros(self.world_size, dtype=np.int64)
        for scatter in (False, True):
            moved = self.transfers(self.all_items(), scatter=scatter)
            np.add.at(total, moved.sources, np.where(moved.sources != moved.destinations, moved.numels, 0))
        return tuple(total.tolist())

    def team_sent_bytes(self, nodes: Sequence[int] | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bytes that each rank sends to other members of its teams in one step: (within its node, to other nodes).

        Args:
            nodes: Node of each rank. None, where only the sum is asked for, counts all as within the node but what
                the groups of a team send each other.
        """
        near, far = [0] * self.world_size, [0] * self.world_size
        for item in self.all_items():
            team, owner = self.team(item), self.owner(item)
            if team is None:
                continue
            seat, divided = team.seat(item.share), team.method.divided
            sent = band_sent_bytes(team.short, seat, self.ns_steps, DTYPE_BYTES[self.ns_dtype], divided=divided)
            if nodes is not None and team.method.groups == 1 and len({nodes[rank] for rank in team.ranks}) > 1:
                # Members anywhere: counted as if none were near.
                sent = 0, sum(sent)
            near[owner] += sent[0]
            far[owner] += sent[1]
        return tuple(near), tuple(far)


def _check_cover(matrix: ShardedMatrix, tp_ranks: Sequence[int]) -> None:
    """Proves that the slices of each TP rank store the local tensor exactly once."""
    spec = matrix.spec
    by_tp_rank: dict[int, list[tuple[int, int]]] = defaultdict(list)
    ranks = [s.rank for s in matrix.slices]
    if len(set(ranks)) != len(ranks) or not all(0 <= r < len(tp_ranks) for r in ranks):
        raise ValueError(f"{spec.name}: got slices on ranks {ranks}, expected each of {len(tp_ranks)} at most once")
    for s in matrix.slices:
        by_tp_rank[tp_ranks[s.rank]].append((s.start, s.stop))
    if sorted(by_tp_rank) != list(range(spec.tp_size)):
        raise ValueError(f"{spec.name}: stored on TP ranks {sorted(by_tp_rank)}, expected 0..{spec.tp_size - 1}")
    for tp_rank, ranges in by_tp_rank.items():
        at = 0
        for start, stop in sorted(ranges):
            if start != at or stop <= start:
                raise ValueError(f"{spec.name}: TP rank {tp_rank}'s slices {sorted(ranges)} overlap or leave a gap")
            at = stop
        if at != spec.local_numel:
            raise ValueError(f"{spec.name}: TP rank {tp_rank} stores {at} elements of {spec.local_numel}")
