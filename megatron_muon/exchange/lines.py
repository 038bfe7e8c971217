"""Numbers for lines of matrices, which ride to the owners with the directions and come back with the updates.

NorMuon keeps a running mean square for each line. A rank stores those of the lines that its slices touch, in float32.
In a transfer they follow the elements of their segment, as bits in as many elements of the wire's dtype as they take.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_muon.matrices.lines import num_lines, numbers_in_parameter, touched_lines
from megatron_muon.plan.ownership import Item, OwnershipPlan, Segment


@dataclass(frozen=True)
class _Moves:
    """Positions of float32 numbers here and there, as positions of the wire's elements."""

    here: Tensor
    there: Tensor

    def run(self, here: Tensor, there: Tensor) -> None:
        """Copies bits from `there` to `here`, both in the wire's dtype."""
        here.index_copy_(0, self.here, there.index_select(0, self.there))


class Lines:
    """The lines of one exchange, prepared once.

    Args:
        plan: The plan.
        rank: This rank.
        dtype: Of the wire.
        device: Of the numbers.
        placed: For each round, the items that this rank owns, in the order in which they are collected.
        travelling: Parameter indices of this rank's slices that cross the wire.
    """

    def __init__(
        self,
        plan: OwnershipPlan,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        placed: Sequence[Iterable[Item]],
        travelling: frozenset[int],
    ) -> None:
        self.plan, self.rank, self.dtype, self.device = plan, rank, dtype, device
        self._ratio = torch.float32.itemsize // dtype.itemsize
        self._touched: dict[Segment, Tensor] = {}
        self._grids = [self._offsets(items) for items in placed]
        largest = max((total for _, total in self._grids), default=0)
        self._grid = torch.empty(largest, dtype=torch.float32, device=device)
        self._slices: dict[int, Tensor] = {}
        self._order: list[tuple[list[int], list[int]]] = []
        for round_index, members in enumerate(plan.rounds):
            held = [i for i in members if any(s.rank == rank for s in plan.matrices[i].slices)]
            for index in held:
                self._slices[index] = torch.cat([self._numbers(s) for s in self._stored(index)]).sort().values
            self._order.append(([i for i in held if i in travelling], [i for i in held if i not in travelling]))
            assert sum(map(len, self._order[round_index])) == len(held)
        self._pending: dict[tuple[int, str], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._moves: dict[tuple[int, str], _Moves] = {}

    def _offsets(self, items: Iterable[Item]) -> tuple[dict[Item, int], int]:
        offsets, at = {}, 0
        for item in items:
            offsets[item] = at
            at += num_lines(self.plan.spec(item), item.part, self.plan.share(item))
        return offsets, at

    def _stored(self, index: int) -> list[Segment]:
        """This rank's segments of a parameter."""
        items = (Item(index, part, k) for part, ranks in enumerate(self.plan.owners[index]) for k in range(len(ranks)))
        return [s for item in items for s in self.plan.segments(item, scatter=True) if s.rank == self.rank]

    def _lines(self, segment: Segment) -> Tensor:
        """The lines of the share that a segment touches."""
        if segment not in self._touched:
            item = segment.item
            run = segment.piece, segment.start, segment.stop
            self._touched[segment] = touched_lines(self.plan.spec(item), item.part, self.plan.share(item), *run)
        return self._touched[segment]

    def _numbers(self, segment: Segment) -> Tensor:
        item = segment.item
        return numbers_in_parameter(self.plan.spec(item), item.part, self.plan.share(item), self._lines(segment))

    def wire_numel(self, segment: Segment) -> int:
        """Elements that a segment's lines take on the wire."""
        return self._ratio * len(self._lines(segment))

    def _position(self, segment: Segment, round_index: int, kind: int) -> Tensor:
        """Where a segment's lines lie among those of this rank's slices of a round, one slice after the other."""
        members = self._order[round_index][kind]
        index = segment.item.matrix
        before = sum(len(self._slices[i]) for i in members[: members.index(index)])
        return torch.searchsorted(self._slices[index], self._numbers(segment)) + before

    def _place(self, segment: Segment, round_index: int) -> Tensor:
        """Where a segment's lines lie among those that this rank owns in a round."""
        return self._lines(segment) + self._grids[round_index][0][segment.item]

    def add_travelling(self, segment: Segment, round_index: int, at: int, *, is_stored: bool, is_sent: bool) -> None:
        """Notes where a segment's lines lie on the wire: from element `at` of the send or receive buffer on."""
        on_wire = torch.arange(at, at + self.wire_numel(segment))
        numbers = self._position(segment, round_index, 0) if is_stored else self._place(segment, round_index)
        local = self._elements(numbers)
        name = ("store" if is_stored else "own") + ("_send" if is_sent else "_receive")
        self._pending[round_index, name].append((on_wire, local) if is_sent else (local, on_wire))

    def prepare(self) -> None:
        """Makes the lists of copies, once all segments that travel are added."""
        for round_index in range(len(self.plan.rounds)):
            for index in self._order[round_index][1]:
                for segment in self._stored(index):
                    pair = self._place(segment, round_index), self._position(segment, round_index, 1)
                    self._pending[round_index, "resident"].append((self._elements(pair[0]), self._elements(pair[1])))
        for key, pairs in self._pending.items():
            here, there = (torch.cat(positions) for positions in zip(*pairs, strict=True))
            self._moves[key] = _Moves(here.to(self.device), there.to(self.device))
        self._pending.clear()
        self._touched.clear()

    def _elements(self, numbers: Tensor) -> Tensor:
        """The wire's elements that float32 numbers are, when both are viewed in its dtype."""
        return (numbers[:, None] * self._ratio + torch.arange(self._ratio)).view(-1)

    # What a step calls.

    def pack(self, round_index: int, send: Tensor, states: Mapping[int, Tensor]) -> None:
        """Puts the numbers of travelling slices on the wire, for the gather."""
        if (moves := self._moves.get((round_index, "store_send"))) is not None:
            moves.run(send, self._joined(round_index, 0, states))

    def receive(self, round_index: int, received: Tensor) -> None:
        """Takes the numbers of the lines that this rank owns off the wire."""
        if (moves := self._moves.get((round_index, "own_receive"))) is not None:
            moves.run(self._grid.view(self.dtype), received)

    def send(self, round_index: int, send: Tensor) -> None:
        """Puts the numbers of the lines that this rank owns on the wire, for the scatter."""
        if (moves := self._moves.get((round_index, "own_send"))) is not None:
            moves.run(send, self._grid.view(self.dtype))

    def unpack(self, round_index: int, received: Tensor, states: Mapping[int, Tensor]) -> None:
        """Writes the numbers of travelling slices into `states` (parameter index -> 1-D, float32)."""
        if (moves := self._moves.get((round_index, "store_receive"))) is not None:
            self._write(round_index, 0, states, moves.here, received.index_select(0, moves.there))

    def load_resident(self, round_index: int, states: Mapping[int, Tensor]) -> None:
        """Takes the numbers of resident slices from `states`."""
        if (moves := self._moves.get((round_index, "resident"))) is not None:
            moves.run(self._grid.view(self.dtype), self._joined(round_index, 1, states))

    def store_resident(self, round_index: int, states: Mapping[int, Tensor]) -> None:
        """Writes the numbers of resident slices back into `states`."""
        if (moves := self._moves.get((round_index, "resident"))) is not None:
            here = self._grid.view(self.dtype).index_select(0, moves.here)
            self._write(round_index, 1, states, moves.there, here)

    def owned(self, round_index: int, item: Item) -> Tensor:
        """The numbers of an item that this rank owns, 1-D float32; valid as long as `Exchange.parts`."""
        offset = self._grids[round_index][0][item]
        return self._grid[offset : offset + num_lines(self.plan.spec(item), item.part, self.plan.share(item))]

    def stacked(self, round_index: int, stacks: Sequence[Tensor]) -> list[Tensor]:
        """For each of `Exchange.stacks`, the numbers of its matrices' lines: (count, lines)."""
        out, at = [], 0
        for stack in stacks:
            count, lines = stack.shape[0], max(stack.shape[1:])
            out.append(self._grid[at : at + count * lines].view(count, lines))
            at += count * lines
        return out

    def _joined(self, round_index: int, kind: int, states: Mapping[int, Tensor]) -> Tensor:
        return torch.cat([states[index] for index in self._order[round_index][kind]]).view(self.dtype)

    def _write(
        self, round_index: int, kind: int, states: Mapping[int, Tensor], where: Tensor, elements: Tensor
    ) -> None:
        members = self._order[round_index][kind]
        sizes = [len(self._slices[index]) for index in members]
        flat = torch.empty(sum(sizes) * self._ratio, dtype=self.dtype, device=self.device)
        flat.index_copy_(0, where, elements)
        torch._foreach_copy_([states[i] for i in members], list(torch.split(flat.view(torch.float32), sizes)))
