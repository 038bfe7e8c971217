"""What travels between ranks along a plan, and how much memory that takes on each: numbers only, no tensors.

Transfer k is one all-to-all. It carries the gather of round k and the scatter of round k - 2, so that a plan of n
rounds has n + 2 transfers, of which those that move nothing are not issued.

A slice is *resident* if the rank that stores it owns everything in it. It needs no transfer: it is copied into the
collected tensors and back on its rank. All other slices travel whole, also what their own rank owns of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np

from megatron_muon.newton_schulz.names import DTYPE_BYTES
from megatron_muon.plan.cost_model import band_received_bytes
from megatron_muon.plan.ownership import Item, OwnershipPlan, Segment, Transfers

# Stacks of matrices begin at multiples of so many elements, as matrix units and copies want it.
STACK_ALIGNMENT = 64
_SCRATCH_ITEMSIZE = 4

ROUND_SHARE = 4
"""What a rank stores and owns of a round takes at most 1/4 of `exchange_buffer_mb`, on the wire's data type.

Two rounds are in transit at a time, and one is collected, which is half of a round or less. With the scratch, dense and
expert matrices together have 2 x (2/4 + 1/8 + 1/8) = 1.5 times `exchange_buffer_mb` of persistent buffers, and less
where slices are resident. It is more if a single parameter is larger, or if a rank owns much more than it stores.
"""
SCRATCH_SHARE = 8
"""The scratch takes at most 1/8 of `exchange_buffer_mb`, or as much as the largest slice in fp32."""


@dataclass(frozen=True)
class Wire:
    """The transfers of a plan.

    Attributes:
        plan: The plan.
        keep_resident: False makes every slice travel.
    """

    plan: OwnershipPlan
    keep_resident: bool = True

    @property
    def num_transfers(self) -> int:
        return len(self.plan.rounds) + 2 if self.plan.rounds else 0

    @cached_property
    def travelling(self) -> frozenset[tuple[int, int]]:
        """(parameter, rank) of the slices that travel."""
        if not self.keep_resident:
            return frozenset((index, s.rank) for index, m in enumerate(self.plan.matrices) for s in m.slices)
        travelling: set[tuple[int, int]] = set()
        for item in self.plan.all_items():
            moved = self.plan.transfers([item], scatter=True)
            away = moved.destinations[moved.sources != moved.destinations]
            travelling.update((item.matrix, rank) for rank in away.tolist())
        return frozenset(travelling)

    @cached_property
    def _lanes(self) -> dict[tuple[int, bool], tuple[tuple[int, Segment], ...]]:
        return {
            (round_index, scatter): tuple(
                (self.plan.owner(item), segment)
                for item in self.plan.items(round_index)
                for segment in self.plan.segments(item, scatter=scatter)
                if (item.matrix, segment.rank) in self.travelling
            )
            for round_index in range(len(self.plan.rounds))
            for scatter in (False, True)
        }

    @cached_property
    def _columns(self) -> tuple[Transfers, ...]:
        travels = np.zeros((len(self.plan.matrices), self.plan.world_size), dtype=np.bool_)
        for index, rank in self.travelling:
            travels[index, rank] = True
        found: list[list[Transfers]] = [[] for _ in range(self.num_transfers)]
        for round_index in range(len(self.plan.rounds)):
            for item in self.plan.items(round_index):
                for scatter in (False, True):
                    moved = self.plan.transfers([item], scatter=scatter)
                    kept = travels[item.matrix, moved.destinations if scatter else moved.sources]
                    found[round_index + 2 * scatter].append(Transfers(*(column[kept] for column in moved)))
        empty = Transfers(*(np.zeros(0, dtype=np.int64) for _ in Transfers._fields))
        return tuple(Transfers(*map(np.concatenate, zip(*(own or [empty]), strict=True))) for own in found)

    def moved(self, transfer: int) -> Transfers:
        """What a transfer carries, gather and scatter together, also from a rank to itself."""
        return self._columns[transfer]

    def lane(self, transfer: int, *, scatter: bool) -> tuple[tuple[int, Segment], ...]:
        """(owner, segment) of all that a transfer gathers or scatters, in wire order."""
        return self._lanes.get((transfer - 2 if scatter else transfer, scatter), ())

    @cached_property
    def moves(self) -> tuple[bool, ...]:
        """For each transfer, whether any rank sends anything to another one."""
        columns = map(self.moved, range(self.num_transfers))
        return tuple(bool((moved.sources != moved.destinations).any()) for moved in columns)

    @property
    def num_collectives(self) -> int:
        """All-to-alls of one step, beside those of teams."""
        return sum(self.moves)

    @cached_property
    def buffer_numel(self) -> tuple[tuple[int, int], ...]:
        """For each rank, elements of its send and its receive buffer: those of its largest transfer."""
        most = np.zeros((2, self.plan.world_size), dtype=np.int64)
        for moved in map(self.moved, range(self.num_transfers)):
            here = np.zeros_like(most)
            np.add.at(here[0], moved.sources, moved.numels)
            np.add.at(here[1], moved.destinations, moved.numels)
            most = np.maximum(most, here)
        return tuple((send, receive) for send, receive in most.T.tolist())

    @cached_property
    def _owned(self) -> dict[tuple[int, int], list[Item]]:
        """(round, rank) -> items that the rank owns."""
        owned: dict[tuple[int, int], list[Item]] = defaultdict(list)
        for round_index in range(len(self.plan.rounds)):
            for item in self.plan.items(round_index):
                owned[round_index, self.plan.owner(item)].append(item)
        return owned

    @cached_property
    def _held(self) -> tuple[dict[int, int], ...]:
        """For each rank, parameter index -> elements of its slice."""
        held: tuple[dict[int, int], ...] = tuple({} for _ in range(self.plan.world_size))
        for index, matrix in enumerate(self.plan.matrices):
            for s in matrix.slices:
                held[s.rank][index] = s.stop - s.start
        return held

    def placed_items(self, round_index: int, rank: int) -> tuple[dict[Item, int], int]:
        """Where a rank collects what it owns in a round: item -> first element, and the number of elements.

        Matrices of one shape that are done alone lie one after the other, so that they form a stack.
        """
        offsets: dict[Item, int] = {}
        at, before = 0, None
        for key, item in sorted((self._shape_key(item), item) for item in self._owned.get((round_index, rank), ())):
            if key != before:
                at, before = -(-at // STACK_ALIGNMENT) * STACK_ALIGNMENT, key
            offsets[item] = at
            rows, cols = self.plan.shape(item)
            at += rows * cols
        return offsets, at

    def _shape_key(self, item: Item) -> tuple[int, ...]:
        if self.plan.team(item) is not None:
            return (1, *self.plan.shape(item))
        return (0, *self.plan.spec(item).tile_shape(item.part))

    def team_buffer_bytes(self, rank: int, *, lines: bool = False) -> int:
        """Bytes of the buffer in which a rank receives its teams' messages: of the stage that brings most.

        Args:
            rank: Rank of the group.
            lines: See `band_received_bytes`.
        """
        plan, most = self.plan, 0
        for round_index in range(len(plan.rounds)):
            talks = []
            for item in self._owned.get((round_index, rank), ()):
                if (team := plan.team(item)) is not None:
                    seat, itemsize = team.seat(item.share), DTYPE_BYTES[plan.ns_dtype]
                    divided = team.method.divided
                    talks.append(
                        band_received_bytes(team.short, seat, plan.ns_steps, itemsize, divided=divided, lines=lines)
                    )
            most = max([most, *map(sum, zip_longest(*talks, fillvalue=0))])
        return most

    def buffer_bytes(self, rank: int, itemsize: int, scratch_numel: int) -> int:
        """Bytes of the exchange's persistent buffers on a rank: of the wire, collected parts, scratch, teams' messages.

        Args:
            rank: Rank of the group.
            itemsize: Of an element on the wire.
            scratch_numel: See `batches`.
        """
        numel = self._held[rank]
        rounds = range(len(self.plan.rounds))
        collected = max((self.placed_items(r, rank)[1] for r in rounds), default=0)
        scratch = max(
            (sum(numel[i] for i in batch) for r in rounds for batch in self.batches(r, rank, numel, scratch_numel)),
            default=0,
        )
        on_wire = (sum(self.buffer_numel[rank]) + collected) * itemsize
        return on_wire + scratch * _SCRATCH_ITEMSIZE + self.team_buffer_bytes(rank)

    def batches(self, round_index: int, rank: int, numel: Mapping[int, int], limit: int) -> list[tuple[int, ...]]:
        """A rank's slices of a round in groups of at most `limit` elements, or of one slice.

        Args:
            round_index: The round.
            rank: Rank of the group.
            numel: Parameter index -> elements of this rank's slice.
            limit: Elements that the fp32 scratch for a group holds.

        Returns:
            Parameter indices of each group; a group's slices either all travel or are all resident.
        """
        held = [i for i in self.plan.rounds[round_index] if i in numel]
        kinds = ([i for i in held if ((i, rank) in self.travelling) == travels] for travels in (True, False))
        return [batch for members in kinds for batch in _grouped(members, numel, limit)]


def _grouped(members: Iterable[int], numel: Mapping[int, int], limit: int) -> list[tuple[int, ...]]:
    groups: list[list[int]] = []
    total = 0
    for index in members:
        if not groups or total + numel[index] > limit:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += numel[index]
    return [tuple(group) for group in groups]
