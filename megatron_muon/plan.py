"""Who orthogonalizes what: the ownership plan, a frozen value that is the same on every rank of a group.

A plan is made from static metadata alone (shapes and storage ranges), without communication, so it can be built and
tested for any number of ranks in one process.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_muon.matrices import MatrixSpec
from megatron_muon.newton_schulz import newton_schulz_flops


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
    """What has one owner: part `part` of parameter `matrix` (indices into the plan)."""

    matrix: int
    part: int


@dataclass(frozen=True)
class Segment:
    """A contiguous run of a part on the wire: `rank` stores [start, stop) of piece `piece`, in the part's order."""

    item: Item
    rank: int
    piece: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class OwnershipPlan:
    """Assigns every part of every parameter to the rank that runs its Newton-Schulz, in rounds.

    Attributes:
        tp_ranks: For each rank of the group, its tensor-parallel rank; the group spans DP x TP.
        matrices: The parameters with their slices.
        owners: For each parameter, the owning rank of each of its parts.
        rounds: Indices of the parameters exchanged together; a partition of all of them.
        flops: For each parameter, the Newton-Schulz FLOPs of each of its parts.

    Raises:
        ValueError: If slices leave a gap or overlap, names repeat, an owner is no rank, or rounds are no partition.
    """

    tp_ranks: tuple[int, ...]
    matrices: tuple[ShardedMatrix, ...]
    owners: tuple[tuple[int, ...], ...]
    rounds: tuple[tuple[int, ...], ...]
    flops: tuple[tuple[int, ...], ...] = field(repr=False)

    def __post_init__(self) -> None:
        names = [m.spec.name for m in self.matrices]
        repeated = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise ValueError(f"the plan names {', '.join(repeated)} more than once")
        for matrix in self.matrices:
            _check_cover(matrix, self.tp_ranks)
        for matrix, owners in zip(self.matrices, self.owners, strict=True):
            if len(owners) != len(matrix.spec.parts) or not all(0 <= o < self.world_size for o in owners):
                raise ValueError(f"{matrix.spec.name}: got owners {owners} for a group of {self.world_size} ranks")
        if sorted(i for r in self.rounds for i in r) != list(range(len(self.matrices))):
            raise ValueError(f"the rounds {self.rounds} are not a partition of {len(self.matrices)} parameters")

    @property
    def world_size(self) -> int:
        return len(self.tp_ranks)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything in the plan; equal on every rank that may exchange by it."""
        content = (self.tp_ranks, self.matrices, self.owners, self.rounds)
        return hashlib.sha256(repr(content).encode()).hexdigest()

    @cached_property
    def rank_flops(self) -> tuple[int, ...]:
        """Newton-Schulz FLOPs of each rank in one step."""
        load = [0] * self.world_size
        for owners, flops in zip(self.owners, self.flops, strict=True):
            for owner, cost in zip(owners, flops, strict=True):
                load[owner] += cost
        return tuple(load)

    @property
    def num_logical_matrices(self) -> int:
        return sum(m.spec.logical_shape(p)[0] for m in self.matrices for p in range(len(m.spec.parts)))

    def items(self, round_index: int, owner: int | None = None) -> list[Item]:
        """The parts exchanged in a round, in wire order; only `owner`'s if given."""
        return [
            Item(m, p)
            for m in self.rounds[round_index]
            for p, o in enumerate(self.owners[m])
            if owner is None or o == owner
        ]

    def segments(self, item: Item, *, scatter: bool) -> list[Segment]:
        """The runs of a part, by rank. Of a replicated parameter one copy is gathered, and every copy scattered to.

        The copy gathered is the one of the owner's TP rank, so that it need not leave the owner's node.
        """
        matrix = self.matrices[item.matrix]
        spec = matrix.spec
        owner_tp_rank = self.tp_ranks[self.owners[item.matrix][item.part]]
        out = []
        for s in matrix.slices:
            tp_rank = self.tp_ranks[s.rank]
            if spec.replicated and not scatter and tp_rank != owner_tp_rank:
                continue
            start, stop = spec.part_offset(item.part, s.start), spec.part_offset(item.part, s.stop)
            if start < stop:
                piece = tp_rank if spec.num_pieces > 1 else 0
                out.append(Segment(item, s.rank, piece, start, stop))
        return out

    def traffic(self, round_index: int, *, scatter: bool) -> list[list[int]]:
        """Elements that rank i sends to rank j in a round's gather (or scatter), as `traffic[i][j]`."""
        sent = [[0] * self.world_size for _ in range(self.world_size)]
        for item in self.items(round_index):
            owner = self.owners[item.matrix][item.part]
            for segment in self.segments(item, scatter=scatter):
                if scatter:
                    sent[owner][segment.rank] += segment.numel
                else:
                    sent[segment.rank][owner] += segment.numel
        return sent

    def sent_numel(self) -> tuple[int, ...]:
        """Elements that each rank sends to other ranks in one step, gather and scatter together."""
        total = [0] * self.world_size
        for r in range(len(self.rounds)):
            for scatter in (False, True):
                for rank, row in enumerate(self.traffic(r, scatter=scatter)):
                    total[rank] += sum(row) - row[rank]
        return tuple(total)


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


def build_plan(
    matrices: Sequence[ShardedMatrix],
    tp_ranks: Sequence[int],
    *,
    ns_steps: int,
    initial_flops: Sequence[float] | None = None,
) -> OwnershipPlan:
    """Chooses owners that balance Newton-Schulz FLOPs over the whole DP x TP grid.

    Largest first to the least loaded rank; among equally loaded ranks the one that stores most of the part, then the
    lowest. The result depends on the arguments only, not on the rank that calls.

    Args:
        matrices: Parameters with their slices, in the same order on every rank.
        tp_ranks: Tensor-parallel rank of each rank of the group.
        ns_steps: Newton-Schulz iterations, for the FLOP count.
        initial_flops: Work that each rank has already (its experts'), in FLOPs.

    Raises:
        ValueError: If the slices do not cover the parameters.
    """
    world_size = len(tp_ranks)
    flops = [tuple(_part_flops(m.spec, part, ns_steps) for part in range(len(m.spec.parts))) for m in matrices]
    load = list(initial_flops) if initial_flops is not None else [0.0] * world_size
    if len(load) != world_size:
        raise ValueError(f"initial_flops: got {len(load)} values for {world_size} ranks")
    heap = [(load[rank], rank) for rank in range(world_size)]
    heapq.heapify(heap)
    owners = [[-1] * len(parts) for parts in flops]
    order = sorted((-cost, m, p) for m, parts in enumerate(flops) for p, cost in enumerate(parts))
    for negative_cost, m, p in order:
        lightest = [heapq.heappop(heap)]
        while heap and heap[0][0] == lightest[0][0]:
            lightest.append(heapq.heappop(heap))
        held = _held_numel(matrices[m], p) if len(lightest) > 1 else {}
        chosen = min(lightest, key=lambda entry: (-held.get(entry[1], 0), entry[1]))
        owners[m][p] = chosen[1]
        for entry in lightest:
            heapq.heappush(heap, (entry[0] - negative_cost, entry[1]) if entry is chosen else entry)
    return OwnershipPlan(
        tp_ranks=tuple(tp_ranks),
        matrices=tuple(matrices),
        owners=tuple(map(tuple, owners)),
        rounds=(tuple(range(len(matrices))),) if matrices else (),
        flops=tuple(flops),
    )


def _part_flops(spec: MatrixSpec, part: int, ns_steps: int) -> int:
    count, rows, cols = spec.logical_shape(part)
    return count * newton_schulz_flops(rows, cols, ns_steps)


def _held_numel(matrix: ShardedMatrix, part: int) -> dict[int, int]:
    """Elements of a part that each rank stores."""
    spec = matrix.spec
    return {s.rank: spec.part_offset(part, s.stop) - spec.part_offset(part, s.start) for s in matrix.slices}
