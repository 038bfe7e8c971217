"""Moves slices between the ranks that store them and the ranks that own their matrices, along a plan.

All that a step needs is prepared when the exchange is made: buffers, views of them, and lists of copies. A step then
calls, for each round, what `ShardedMuon` describes, on every rank of the group and in the plan's order.
"""

# More than 400 lines: half of them prepare views of the same buffers that the other half moves.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatron_muon.exchange.copies import Copies, paired
from megatron_muon.exchange.lines import Lines
from megatron_muon.exchange.lockstep import Talk, run_lockstep
from megatron_muon.exchange.phases import LABELS, Flight, Watch, label
from megatron_muon.matrices.shares import Strip, collected_strips, stored_strips
from megatron_muon.plan.ownership import Item, OwnershipPlan, Segment
from megatron_muon.plan.wire import Wire


@dataclass
class ExchangeStats:
    """What this rank has issued so far. Bytes are those sent to other ranks."""

    collectives: int = 0
    bytes_sent: int = 0
    team_collectives: int = 0
    team_bytes_sent: int = 0


@dataclass(frozen=True)
class SliceBatch:
    """Slices of this rank that share the scratch: their directions are packed together, and their updates unpacked.

    Attributes:
        flats: Parameter index -> the slice's place in the scratch, flat, fp32. Another batch may use it after `pack`,
            or after what `unpack` brought has been applied.
        pack: Copies directions from the scratch to the wire, or to the collected tensors if the slices are resident.
        unpack: Copies updates from where they arrive to the scratch.
    """

    flats: dict[int, Tensor]
    pack: Copies = field(default_factory=Copies)
    unpack: Copies = field(default_factory=Copies)


@dataclass(frozen=True)
class _Round:
    """This rank's part of a round, prepared.

    Attributes:
        travelling: Slices that cross the wire.
        resident: Slices that this rank stores and owns.
        parts: Item -> where this rank collects it, (rows, cols), in the wire's dtype.
        stacks: (count, rows, cols) views of `parts`: logical matrices of one shape that this rank does alone.
        pack: Copies updates from the collected tensors to the wire.
        unpack: Copies directions from the wire to the collected tensors.
    """

    travelling: tuple[SliceBatch, ...] = ()
    resident: tuple[SliceBatch, ...] = ()
    parts: dict[Item, Tensor] = field(default_factory=dict)
    stacks: tuple[Tensor, ...] = ()
    pack: Copies = field(default_factory=Copies)
    unpack: Copies = field(default_factory=Copies)


_NOTHING = _Round()

_Lane = list[list[tuple[Segment, bool]]]


@dataclass(frozen=True)
class _Transfer:
    """This rank's part of one all-to-all, prepared.

    Attributes:
        name: What it carries for any rank.
        moves: Whether any rank sends anything to another one.
        send: What this rank sends, by peer.
        receive: What it receives, by peer.
        send_splits: Elements for each peer.
        receive_splits: Elements from each peer.
    """

    name: Flight
    moves: bool
    send: Tensor
    receive: Tensor
    send_splits: list[int]
    receive_splits: list[int]


@dataclass
class Exchange:
    """The all-to-alls of one plan over one process group. See `plan.wire` for what transfers and resident slices are.

    Attributes:
        plan: The same on every rank of the group.
        group: Its ranks are the plan's; None is the default group.
        dtype: Of the elements on the wire and of collected parts.
        device: Of the buffers.
        scratch_numel: Elements of fp32 scratch for directions and updates; a larger slice makes it as large as itself.
        keep_resident: False sends resident slices over the wire too.
        carry_lines: Whether numbers for the lines of matrices ride with the directions; then `lines` is not None.
        stats: Counters of this rank.
        watch: Sees the phases.
        team_group: A group of the same ranks for the messages of teams, so that these do not wait behind transfers on
            one communicator; None takes `group`.

    Raises:
        RuntimeError: On construction, if the group's size is not the plan's.
    """

    plan: OwnershipPlan
    group: dist.ProcessGroup | None
    dtype: torch.dtype
    device: torch.device
    scratch_numel: int = 2**24
    keep_resident: bool = True
    carry_lines: bool = False
    stats: ExchangeStats = field(default_factory=ExchangeStats)
    watch: Watch = LABELS
    team_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        self.rank = dist.get_rank(self.group) if dist.is_initialized() else 0
        world_size = dist.get_world_size(self.group) if dist.is_initialized() else 1
        if world_size != self.plan.world_size:
            raise RuntimeError(f"the group has {world_size} ranks, but the plan was made for {self.plan.world_size}")
        self.wire = Wire(self.plan, self.keep_resident)
        self._held = {
            index: (s.start, s.stop)
            for index, matrix in enumerate(self.plan.matrices)
            for s in matrix.slices
            if s.rank == self.rank
        }
        self._in_flight: dict[int, dist.Work] = {}
        # With lines, the members of a team combine sums over them once more.
        stages = [self.plan.team_stages(r) for r in range(self.num_rounds)]
        self._stages = [count + (count > 0 and self.carry_lines) for count in stages]
        self._team_group = self.team_group if self.team_group is not None else self.group
        self._prepare()

    @property
    def num_rounds(self) -> int:
        return len(self.plan.rounds)

    @property
    def lines(self) -> Lines | None:
        """The numbers for lines, which a step puts on the wire and takes off it beside the batches."""
        return self._lines

    @property
    def buffer_bytes(self) -> int:
        """What the persistent buffers take on this rank; see `Wire.buffer_bytes`."""
        return sum(b.nbytes for b in (self._send, self._receive, self._collected, self._scratch, self._team_receive))

    def connect(self) -> None:
        """Opens the connections between the ranks, with an all-to-all of one element for each pair.

        Collective. Otherwise the first step would pay for it, and a network that does not work would show there.
        """
        if self.plan.world_size > 1 and any(self.wire.moves):
            ones = torch.ones(self.plan.world_size, dtype=self.dtype, device=self.device)
            with record_function("muon/connect"):
                dist.all_to_all_single(torch.empty_like(ones), ones, group=self.group)

    # What a step calls, in this order for each round.

    def travelling(self, round_index: int) -> tuple[SliceBatch, ...]:
        """This rank's slices of a round that cross the wire; none if there is no such round."""
        return self._round(round_index).travelling

    def resident(self, round_index: int) -> tuple[SliceBatch, ...]:
        """This rank's slices of a round that it owns itself; none if there is no such round."""
        return self._round(round_index).resident

    def start(self, transfer: int) -> None:
        """Starts a transfer: the gather of round `transfer` and the scatter of the round two before.

        Collective: every rank calls this, after it has packed both and finished the transfer before.
        """
        prepared = self._transfers[transfer]
        if not prepared.moves:
            # What a rank sends itself.
            if prepared.send.numel():
                prepared.receive.copy_(prepared.send)
            return
        sent = prepared.send.numel() - prepared.send_splits[self.rank]
        issue = partial(
            dist.all_to_all_single,
            prepared.receive,
            prepared.send,
            prepared.receive_splits,
            prepared.send_splits,
            group=self.group,
            async_op=True,
        )
        work = self.watch.collective(prepared.name, transfer, sent * self.dtype.itemsize, issue)
        if work is not None:
            self._in_flight[transfer] = work
        self.stats.collectives += 1
        self.stats.bytes_sent += sent * self.dtype.itemsize

    def finish(self, transfer: int) -> None:
        """Waits for a transfer, then takes what this rank owns out of one round's tensors and puts the next in.

        Round `transfer - 1`, which has been computed, is packed for its scatter; round `transfer` is unpacked. On a
        GPU the stream waits, not the host.
        """
        work = self._in_flight.pop(transfer, None)
        if work is not None:
            with self.watch.phase("wait", transfer):
                work.wait()
        computed, arrived = self._round(transfer - 1), self._round(transfer)
        if computed.pack:
            with self.watch.phase("pack", transfer - 1):
                computed.pack.run()
                if self._lines is not None:
                    self._lines.send(transfer - 1, self._send)
        if arrived.unpack:
            with self.watch.phase("unpack", transfer):
                arrived.unpack.run()
                if self._lines is not None:
                    self._lines.receive(transfer, self._receive)

    def pack_lines(self, round_index: int, states: Mapping[int, Tensor]) -> None:
        """Puts numbers for the lines of travelling slices on the wire (parameter index -> 1-D float32)."""
        if self._lines is not None and 0 <= round_index < self.num_rounds:
            self._lines.pack(round_index, self._send, states)

    def unpack_lines(self, round_index: int, states: Mapping[int, Tensor]) -> None:
        """Writes the numbers for the lines of travelling slices that have come back into `states`."""
        if self._lines is not None and 0 <= round_index < self.num_rounds:
            self._lines.unpack(round_index, self._receive, states)

    def parts(self, round_index: int) -> dict[Item, Tensor]:
        """What this rank owns in a round: item -> (rows, cols) as `OwnershipPlan.shape` says, in the wire's dtype.

        Valid from `finish(round_index)`, with resident slices packed, until `finish(round_index + 1)`.
        """
        return self._round(round_index).parts

    def stacks(self, round_index: int) -> tuple[Tensor, ...]:
        """The logical matrices in `parts` that this rank does alone: views (count, rows, cols) of any strides."""
        return self._round(round_index).stacks

    def run_teams(
        self, round_index: int, talks: Mapping[Item, Talk], meanwhile: Sequence[Callable[[], None]] = ()
    ) -> None:
        """Lets the members of a round's teams exchange their messages, and hides these behind other work.

        Args:
            round_index: The round.
            talks: For each item of a team that this rank owns in the round, its part in it.
            meanwhile: Work that does not depend on the teams, in pieces that are spread over the stages. All of it is
                done when this returns.

        Collective: every rank of the group must call this, also one that is in no team.
        """
        pieces = iter(meanwhile)
        count = self._stages[round_index]
        items = sorted(talks)
        teams = [self.plan.owners[item.matrix][item.part] for item in items]
        start = partial(self._start_stage, round_index)
        stages = run_lockstep(
            [talks[item] for item in items], teams, count, self.plan.world_size, start, self._team_receive
        )
        for stage in range(count):
            with self.watch.phase("teams", round_index):
                next(stages)
            share = len(meanwhile) * (stage + 1) // count - len(meanwhile) * stage // count
            with self.watch.phase("newton_schulz", round_index):
                for piece in islice(pieces, share):
                    piece()
        with self.watch.phase("teams" if count else "newton_schulz", round_index):
            for piece in pieces:
                piece()
            for _ in stages:
                raise AssertionError("a round has more stages than its plan says")

    def collect(self, round_index: int, slices: Mapping[int, Tensor]) -> dict[Item, Tensor]:
        """Gathers tensors other than directions, such as weights, to the owners of a round's matrices.

        Collective: every rank calls this, between steps. What the transfer would scatter is sent too, and is not used.

        Args:
            round_index: The round.
            slices: Parameter index -> flat tensor with the elements of this rank's slice, for all it stores.

        Returns:
            As `parts`; valid until the next step.
        """
        prepared = self._round(round_index)
        for batch in (*prepared.travelling, *prepared.resident):
            torch._foreach_copy_(list(batch.flats.values()), [slices[index] for index in batch.flats])
            batch.pack.run()
        self.start(round_index)
        work = self._in_flight.pop(round_index, None)
        if work is not None:
            work.wait()
        prepared.unpack.run()
        return prepared.parts

    def _round(self, round_index: int) -> _Round:
        return self._rounds[round_index] if 0 <= round_index < self.num_rounds else _NOTHING

    def _start_stage(
        self, round_index: int, receive: Tensor, send: Tensor, received: list[int], sent: list[int]
    ) -> dist.Work | None:
        self.stats.team_collectives += 1
        self.stats.team_bytes_sent += sum(sent) - sent[self.rank]
        with record_function(label("team_stage", round_index)):
            return dist.all_to_all_single(receive, send, received, sent, group=self._team_group, async_op=True)

    # Preparation.

    def _prepare(self) -> None:
        """Makes the buffers, the transfers and the lists of copies."""

        def empty(numel: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(numel, dtype=dtype, device=self.device)

        numel = {index: stop - start for index, (start, stop) in self._held.items()}
        rounds = range(self.num_rounds)
        batches = [self.wire.batches(r, self.rank, numel, self.scratch_numel) for r in rounds]
        places = [self.wire.placed_items(r, self.rank) for r in rounds]
        travelling = frozenset(index for index, rank in self.wire.travelling if rank == self.rank)
        placed = [items for items, _ in places]
        self._lines = (
            Lines(self.plan, self.rank, self.dtype, self.device, placed, travelling) if self.carry_lines else None
        )
        lanes = [self._lanes(k) for k in range(self.wire.num_transfers)]
        send_numel, receive_numel = (
            max((sum(self._wire_numel(s) for peer in lane[side] for s, _ in peer) for lane in lanes), default=0)
            for side in range(2)
        )
        self._send, self._receive = empty(send_numel, self.dtype), empty(receive_numel, self.dtype)
        self._collected = empty(max((total for _, total in places), default=0), self.dtype)
        scratch_numel = max((sum(numel[i] for i in batch) for r in rounds for batch in batches[r]), default=0)
        self._scratch = empty(scratch_numel, torch.float32)
        self._team_receive = empty(self.wire.team_buffer_bytes(self.rank, lines=self.carry_lines), torch.uint8)
        self._rounds = [
            self._prepared_round(r, [self._batch(batch, numel) for batch in batches[r]], places[r][0]) for r in rounds
        ]
        self._transfers = [self._transfer(k, *lane) for k, lane in enumerate(lanes)]
        if self._lines is not None:
            self._lines.prepare()

    def _wire_numel(self, segment: Segment) -> int:
        """Elements of a segment on the wire, its lines' numbers included."""
        return segment.numel + (self._lines.wire_numel(segment) if self._lines is not None else 0)

    def _batch(self, indices: Sequence[int], numel: Mapping[int, int]) -> SliceBatch:
        starts = accumulate((numel[i] for i in indices), initial=0)
        return SliceBatch({i: self._scratch[at : at + numel[i]] for i, at in zip(indices, starts, strict=False)})

    def _prepared_round(self, round_index: int, batches: Sequence[SliceBatch], offsets: Mapping[Item, int]) -> _Round:
        parts = {}
        for item, at in offsets.items():
            shape = self.plan.shape(item)
            parts[item] = self._collected[at : at + math.prod(shape)].view(shape)

        def travels(batch: SliceBatch) -> bool:
            return any((index, self.rank) in self.wire.travelling for index in batch.flats)

        prepared = _Round(
            travelling=tuple(batch for batch in batches if travels(batch)),
            resident=tuple(batch for batch in batches if not travels(batch)),
            parts=parts,
            stacks=tuple(self._stacks(parts)),
        )
        for batch in prepared.resident:
            for item in self.plan.items(round_index, self.rank):
                if item.matrix in batch.flats:
                    self._add_resident(item, batch, parts[item])
        return prepared

    def _add_resident(self, item: Item, batch: SliceBatch, part: Tensor) -> None:
        segments = (s for s in self.plan.segments(item, scatter=True) if s.rank == self.rank)
        for segment in segments:
            for here, there in paired(self._stored(segment), self._collected_strips(segment)):
                in_scratch, in_part = here.view(batch.flats[item.matrix]), there.view(part.view(-1))
                batch.pack.add(in_part, in_scratch)
                batch.unpack.add(in_scratch, in_part)

    def _stacks(self, parts: Mapping[Item, Tensor]) -> Iterator[Tensor]:
        """Consecutive items of one tile shape, each of one column of tiles, make one stack."""
        pending: list[Tensor] = []
        shape = (0, 0)

        def merged() -> Iterator[Tensor]:
            if pending:
                numel = sum(part.numel() for part in pending)
                first = pending[0].storage_offset()
                yield self._collected[first : first + numel].view(-1, *shape)
                pending.clear()

        for item, part in parts.items():
            if self.plan.team(item) is not None:
                continue
            tile = self.plan.spec(item).tile_shape(item.part)
            if tile != shape:
                yield from merged()
                shape = tile
            if part.shape[1] == tile[1]:
                pending.append(part)
                continue
            yield from merged()
            for row in torch.split(part, tile[0]):
                yield row.view(row.shape[0], -1, tile[1]).transpose(0, 1)
        yield from merged()

    def _lanes(self, transfer: int) -> tuple[_Lane, _Lane]:
        """(what this rank sends, what it receives) in a transfer, by peer: (segment, whether it is scattered).

        Gathered before scattered segments, each in the order of the plan: the same on both sides.
        """
        outgoing: _Lane = [[] for _ in range(self.plan.world_size)]
        incoming: _Lane = [[] for _ in range(self.plan.world_size)]
        for scatter in (False, True):
            for owner, segment in self.wire.lane(transfer, scatter=scatter):
                source, destination = (owner, segment.rank) if scatter else (segment.rank, owner)
                if source == self.rank:
                    outgoing[destination].append((segment, scatter))
                if destination == self.rank:
                    incoming[source].append((segment, scatter))
        return outgoing, incoming

    def _transfer(self, transfer: int, outgoing: _Lane, incoming: _Lane) -> _Transfer:
        """The splits of a transfer; adds its copies to the rounds that it gathers and scatters."""
        for buffer, by_peer, is_sent in ((self._send, outgoing, True), (self._receive, incoming, False)):
            at = 0
            for segment, scatter in (entry for entries in by_peer for entry in entries):
                self._add_travelling(segment, scatter, is_sent, buffer[at : at + segment.numel], transfer)
                if self._lines is not None:
                    self._lines.add_travelling(
                        segment,
                        transfer - 2 if scatter else transfer,
                        at + segment.numel,
                        is_stored=scatter != is_sent,
                        is_sent=is_sent,
                    )
                at += self._wire_numel(segment)
        send_splits, receive_splits = (
            [sum(self._wire_numel(segment) for segment, _ in entries) for entries in by_peer]
            for by_peer in (outgoing, incoming)
        )
        carries = [bool(self.wire.lane(transfer, scatter=scatter)) for scatter in (False, True)]
        return _Transfer(
            "exchange" if all(carries) else "scatter" if carries[True] else "gather",
            self.wire.moves[transfer],
            self._send[: sum(send_splits)],
            self._receive[: sum(receive_splits)],
            send_splits,
            receive_splits,
        )

    def _add_travelling(self, segment: Segment, scatter: bool, is_sent: bool, wire: Tensor, transfer: int) -> None:
        """Adds the copies between a segment on the wire and its slice, if this rank has that end of it, or its part."""
        prepared = self._rounds[transfer - 2 if scatter else transfer]
        index = segment.item.matrix
        if scatter != is_sent:
            # This rank stores the segment: it sends it in a gather and receives it in a scatter.
            batch = next(batch for batch in prepared.travelling if index in batch.flats)
            flat, strips = batch.flats[index], self._stored(segment)
            copies = batch.pack if is_sent else batch.unpack
        else:
            flat, strips = prepared.parts[segment.item].view(-1), self._collected_strips(segment)
            copies = prepared.pack if is_sent else prepared.unpack
        at = 0
        for strip in strips:
            pair = wire[at : at + strip.numel].view(strip.shape), strip.view(flat)
            copies.add(*(pair if is_sent else pair[::-1]))
            at += strip.numel

    def _stored(self, segment: Segment) -> list[Strip]:
        item = segment.item
        spec, share = self.plan.spec(item), self.plan.share(item)
        return stored_strips(spec, item.part, share, segment.piece, *self._held[item.matrix])

    def _collected_strips(self, segment: Segment) -> list[Strip]:
        item = segment.item
        spec, share = self.plan.spec(item), self.plan.share(item)
        return collected_strips(spec, item.part, share, segment.piece, segment.start, segment.stop)
