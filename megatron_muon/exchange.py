"""Moves parts between the ranks that store their slices and the ranks that own them, along a plan.

Each round is one all-to-all towards the owners and one back. Every rank of the group takes part in each of them, in
the plan's order, also with nothing to send.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from megatron_muon.plan import Item, OwnershipPlan, Segment


@dataclass(frozen=True)
class _Route:
    """This rank's side of one all-to-all: runs it holds as storage, and runs it holds as owner, in wire order."""

    stored: tuple[Segment, ...]
    owned: tuple[Segment, ...]
    stored_splits: tuple[int, ...]
    owned_splits: tuple[int, ...]


@dataclass
class ExchangeStats:
    """What this rank has issued so far. Bytes are those sent to other ranks."""

    collectives: int = 0
    bytes_sent: int = 0


@dataclass
class _Pending:
    """An all-to-all under way. Keeps both buffers alive until it has completed."""

    route: _Route
    received: Tensor
    sent: Tensor
    work: dist.Work | None


@dataclass
class Exchange:
    """The all-to-alls of one plan over one process group.

    Attributes:
        plan: The same on every rank of the group.
        group: Its ranks are the plan's; None is the default group.
        dtype: Of the elements on the wire.
        device: Of the buffers.
        stats: Counters of this rank.

    Raises:
        RuntimeError: On construction, if the group's size is not the plan's.
    """

    plan: OwnershipPlan
    group: dist.ProcessGroup | None
    dtype: torch.dtype
    device: torch.device
    stats: ExchangeStats = field(default_factory=ExchangeStats)

    def __post_init__(self) -> None:
        self.rank = dist.get_rank(self.group) if dist.is_initialized() else 0
        world_size = dist.get_world_size(self.group) if dist.is_initialized() else 1
        if world_size != self.plan.world_size:
            raise RuntimeError(f"the group has {world_size} ranks, but the plan was made for {self.plan.world_size}")
        self._held = {
            index: (s.start, s.stop)
            for index, matrix in enumerate(self.plan.matrices)
            for s in matrix.slices
            if s.rank == self.rank
        }
        self._routes = [(self._route(r, scatter=False), self._route(r, scatter=True)) for r in range(self.num_rounds)]

    @property
    def num_rounds(self) -> int:
        return len(self.plan.rounds)

    def _route(self, round_index: int, *, scatter: bool) -> _Route:
        stored: list[tuple[int, Segment]] = []
        owned: list[tuple[int, Segment]] = []
        for item in self.plan.items(round_index):
            owner = self.plan.owners[item.matrix][item.part]
            for segment in self.plan.segments(item, scatter=scatter):
                if segment.rank == self.rank:
                    stored.append((owner, segment))
                if owner == self.rank:
                    owned.append((segment.rank, segment))
        return _Route(
            tuple(s for _, s in sorted(stored, key=lambda e: e[0])),
            tuple(s for _, s in sorted(owned, key=lambda e: e[0])),
            self._splits(stored),
            self._splits(owned),
        )

    def _splits(self, peers: list[tuple[int, Segment]]) -> tuple[int, ...]:
        splits = [0] * self.plan.world_size
        for peer, segment in peers:
            splits[peer] += segment.numel
        return tuple(splits)

    def start_gather(self, round_index: int, slices: Mapping[int, Tensor]) -> _Pending:
        """Packs this rank's slices and starts sending them to the owners.

        Args:
            round_index: The round.
            slices: Parameter index -> flat slice, of any floating dtype; it may be reused once this returns.

        Returns:
            What `finish_gather` takes. Collective: every rank of the group must call this in the same order.
        """
        route = self._routes[round_index][0]
        with record_function(f"muon/pack/{round_index}"):
            send = torch.empty(sum(route.stored_splits), dtype=self.dtype, device=self.device)
            wire, local = self._stored_runs(route, send, slices)
            _copy(wire, local)
        return self._start("gather", round_index, route, send, route.stored_splits, route.owned_splits)

    def finish_gather(self, pending: _Pending, dtype: torch.dtype) -> dict[Item, Tensor]:
        """Waits for a gather and puts the parts together.

        Returns:
            For each part this rank owns in the round, a new tensor (TP pieces, rows, cols) of `dtype`.
        """
        received = self._wait(pending)
        with record_function("muon/unpack"):
            parts = self._collected(pending.route, dtype)
            _copy(*self._owned_runs(pending.route, received, parts, to_wire=False))
        return parts

    def start_scatter(self, round_index: int, parts: Mapping[Item, Tensor]) -> _Pending:
        """Packs the parts this rank owns and starts sending every rank its slices.

        Args:
            round_index: The round.
            parts: Part -> tensor (TP pieces, rows, cols); all that this rank owns in the round.

        Returns:
            What `finish_scatter` takes. Collective: every rank of the group must call this in the same order.
        """
        route = self._routes[round_index][1]
        with record_function(f"muon/pack/{round_index}"):
            send = torch.empty(sum(route.owned_splits), dtype=self.dtype, device=self.device)
            _copy(*self._owned_runs(route, send, parts, to_wire=True))
        return self._start("scatter", round_index, route, send, route.owned_splits, route.stored_splits)

    def finish_scatter(self, pending: _Pending, slices: Mapping[int, Tensor]) -> None:
        """Waits for a scatter and writes it into `slices` (parameter index -> flat slice), in their dtype."""
        received = self._wait(pending)
        with record_function("muon/unpack"):
            wire, local = self._stored_runs(pending.route, received, slices)
            _copy(local, wire)

    def _start(
        self,
        label: str,
        round_index: int,
        route: _Route,
        send: Tensor,
        send_splits: tuple[int, ...],
        receive_splits: tuple[int, ...],
    ) -> _Pending:
        if self.plan.world_size == 1:
            return _Pending(route, send, send, None)
        received = torch.empty(sum(receive_splits), dtype=self.dtype, device=self.device)
        with record_function(f"muon/{label}/{round_index}"):
            work = dist.all_to_all_single(
                received, send, list(receive_splits), list(send_splits), group=self.group, async_op=True
            )
        self.stats.collectives += 1
        self.stats.bytes_sent += (sum(send_splits) - send_splits[self.rank]) * self.dtype.itemsize
        return _Pending(route, received, send, work)

    @staticmethod
    def _wait(pending: _Pending) -> Tensor:
        if pending.work is not None:
            with record_function("muon/wait"):
                pending.work.wait()
        return pending.received

    def _stored_runs(
        self, route: _Route, wire: Tensor, slices: Mapping[int, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Pairs of views, (on the wire, in the slices), for everything this rank stores of a round."""
        on_wire: list[Tensor] = []
        local: list[Tensor] = []
        at = 0
        for segment in route.stored:
            spec = self.plan.matrices[segment.item.matrix].spec
            begin, end = self._held[segment.item.matrix]
            flat = slices[segment.item.matrix]
            for start, stop in spec.runs(segment.item.part, begin, end):
                local.append(flat[start - begin : stop - begin])
                on_wire.append(wire[at : at + stop - start])
                at += stop - start
        return on_wire, local

    def _collected(self, route: _Route, dtype: torch.dtype) -> dict[Item, Tensor]:
        return {
            item: torch.empty(
                self.plan.matrices[item.matrix].spec.part_shape(item.part), dtype=dtype, device=self.device
            )
            for item in dict.fromkeys(sorted(segment.item for segment in route.owned))
        }

    @staticmethod
    def _owned_runs(
        route: _Route, wire: Tensor, parts: Mapping[Item, Tensor], *, to_wire: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(destinations, sources) of the copies between the wire and the parts this rank owns."""
        on_wire: list[Tensor] = []
        in_part: list[Tensor] = []
        at = 0
        for segment in route.owned:
            piece = parts[segment.item][segment.piece].view(-1)
            in_part.append(piece[segment.start : segment.stop])
            on_wire.append(wire[at : at + segment.numel])
            at += segment.numel
        return (on_wire, in_part) if to_wire else (in_part, on_wire)


def _copy(destinations: list[Tensor], sources: list[Tensor]) -> None:
    if destinations:
        torch._foreach_copy_(destinations, sources)
