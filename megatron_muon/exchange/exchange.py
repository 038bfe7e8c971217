"""Moves parts between the ranks that store their slices and the ranks that own them, along a plan.

Each round is one all-to-all towards the owners and one back, and between the two those of the round's teams, if it has
any. Every rank of the group takes part in each of them, in the plan's order, also with nothing to send.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.exchange.lockstep import Scratch, Talk, run_lockstep
from megatron_muon.exchange.phases import LABELS, Flight, Watch
from megatron_muon.matrices.shares import Strip, collected_strips, stored_strips
from megatron_muon.plan.ownership import Item, OwnershipPlan, Segment


@dataclass(frozen=True)
class _Run:
    """A segment and where its elements lie in what this rank has: its slice, or the share it collects."""

    segment: Segment
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class _Route:
    """This rank's side of one all-to-all: runs it holds as storage, and runs it holds as owner, in wire order."""

    stored: tuple[_Run, ...]
    owned: tuple[_Run, ...]
    stored_splits: tuple[int, ...]
    owned_splits: tuple[int, ...]

    @property
    def stored_numel(self) -> int:
        return sum(self.stored_splits)

    @property
    def owned_numel(self) -> int:
        return sum(self.owned_splits)


@dataclass
class ExchangeStats:
    """What this rank has issued so far. Bytes are those sent to other ranks."""

    collectives: int = 0
    bytes_sent: int = 0
    team_collectives: int = 0
    team_bytes_sent: int = 0


@dataclass
class Pending:
    """An all-to-all under way."""

    round_index: int
    route: _Route
    received: Tensor
    work: dist.Work | None


@dataclass
class Exchange:
    """The all-to-alls of one plan over one process group.

    Buffers are made when they are first needed and kept: three for rounds under way, used in turn, each as large as
    the largest round needs it, and one for the parts that this rank owns in a round. A round's buffer has two halves:
    what this rank stores, sent in the gather and received in the scatter, and what it owns, the other way round.

    Attributes:
        plan: The same on every rank of the group.
        group: Its ranks are the plan's; None is the default group.
        dtype: Of the elements on the wire.
        device: Of the buffers.
        stats: Counters of this rank.
        watch: Sees the phases.

    Raises:
        RuntimeError: On construction, if the group's size is not the plan's.
    """

    plan: OwnershipPlan
    group: dist.ProcessGroup | None
    dtype: torch.dtype
    device: torch.device
    stats: ExchangeStats = field(default_factory=ExchangeStats)
    watch: Watch = LABELS

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
        self._stages = [self.plan.team_stages(r) for r in range(self.num_rounds)]
        self._scratch = Scratch(self.device)

    @property
    def num_rounds(self) -> int:
        return len(self.plan.rounds)

    @property
    def buffer_bytes(self) -> int:
        """What the buffers of rounds and of collected parts take on this rank, once made."""
        return sum(buffer.nbytes for name, buffer in self._scratch.buffers.items() if name not in TEAM_BUFFERS)

    def _route(self, round_index: int, *, scatter: bool) -> _Route:
        stored: list[tuple[int, _Run]] = []
        owned: list[tuple[int, _Run]] = []
        for item in self.plan.items(round_index):
            owner, spec, share = self.plan.owner(item), self.plan.spec(item), self.plan.share(item)
            for run in self.plan.segments(item, scatter=scatter):
                if run.rank == self.rank:
                    strips = stored_strips(spec, item.part, share, run.piece, *self._held[item.matrix])
                    stored.append((owner, _Run(run, tuple(strips))))
                if owner == self.rank:
                    strips = collected_strips(spec, item.part, share, run.piece, run.start, run.stop)
                    owned.append((run.rank, _Run(run, tuple(strips))))
        return _Route(
            tuple(run for _, run in sorted(stored, key=lambda e: e[0])),
            tuple(run for _, run in sorted(owned, key=lambda e: e[0])),
            self._splits(stored),
            self._splits(owned),
        )

    def _splits(self, peers: list[tuple[int, _Run]]) -> tuple[int, ...]:
        splits = [0] * self.plan.world_size
        for peer, run in peers:
            splits[peer] += run.segment.numel
        return tuple(splits)

    def start_gather(self, round_index: int, slices: Mapping[int, Tensor]) -> Pending:
        """Packs this rank's slices and starts sending them to the owners.

        Args:
            round_index: The round.
            slices: Parameter index -> flat slice, of any floating dtype; it may be reused once this returns.

        Returns:
            What `finish_gather` takes. Collective: every rank of the group must call this in the same order, and
            finish a round's scatter before it starts the gather of the third round after it.
        """
        route = self._routes[round_index][0]
        stored, owned = self._halves(round_index)
        send, receive = stored[: route.stored_numel], owned[: route.owned_numel]
        with self.watch.phase("pack", round_index):
            wire, local = self._stored_runs(route, send, slices)
            _copy(wire, local)
        return self._start("gather", round_index, route, send, route.stored_splits, receive, route.owned_splits)

    def finish_gather(self, pending: Pending, dtype: torch.dtype) -> dict[Item, Tensor]:
        """Waits for a gather and puts the parts together.

        Returns:
            For each item this rank owns in the round, a tensor (rows, cols) of `dtype` as `OwnershipPlan.shape` says.
            They are valid until the next `finish_gather`.
        """
        received = self._wait(pending)
        with self.watch.phase("unpack", pending.round_index):
            parts = self._collected(pending.route, dtype)
            wire, collected = self._owned_runs(pending.route, received, parts)
            _copy(collected, wire)
        return parts

    def run_teams(self, round_index: int, talks: Mapping[Item, Talk]) -> dict[Item, Tensor]:
        """Lets the owners of bands of the same matrix talk until all of a round's teams have finished.

        Args:
            round_index: The round.
            talks: For each item of a team that this rank owns in the round, its part in it.

        Returns:
            What the talks returned. Collective: every rank of the group must call this, also one that is in no team.
        """
        if not self._stages[round_index] and not talks:
            return {}
        items = sorted(talks)
        with self.watch.phase("teams", round_index):
            results = run_lockstep(
                [talks[item] for item in items],
                [self.plan.owners[item.matrix][item.part] for item in items],
                self._stages[round_index],
                self.plan.world_size,
                self._all_to_all_bytes,
                self._scratch,
            )
        return dict(zip(items, results, strict=True))

    def start_scatter(self, round_index: int, parts: Mapping[Item, Tensor]) -> Pending:
        """Packs the items this rank owns and starts sending every rank its slices.

        Args:
            round_index: The round.
            parts: Item -> tensor (rows, cols), contiguous; all that this rank owns in the round.

        Returns:
            What `finish_scatter` takes. Collective: every rank of the group must call this in the same order.
        """
        route = self._routes[round_index][1]
        stored, owned = self._halves(round_index)
        send, receive = owned[: route.owned_numel], stored[: route.stored_numel]
        with self.watch.phase("pack", round_index):
            _copy(*self._owned_runs(route, send, parts))
        return self._start("scatter", round_index, route, send, route.owned_splits, receive, route.stored_splits)

    def finish_scatter(self, pending: Pending, slices: Mapping[int, Tensor]) -> None:
        """Waits for a scatter and writes it into `slices` (parameter index -> flat slice), in their dtype."""
        received = self._wait(pending)
        with self.watch.phase("unpack", pending.round_index):
            wire, local = self._stored_runs(pending.route, received, slices)
            _copy(local, wire)

    def _halves(self, round_index: int) -> tuple[Tensor, Tensor]:
        """The two halves of a round's buffer: for what this rank stores, and for what it owns."""
        sizes = [
            [max(route.stored_numel for route in routes), max(route.owned_numel for route in routes)]
            for routes in self._routes
        ]
        stored, owned = sizes[round_index]
        largest = max(map(sum, sizes))
        # Round i is gathered and computed while i - 1 is scattered and i + 1 gathered.
        buffer = self._scratch.take(f"round {round_index % 3}", largest * self.dtype.itemsize).view(self.dtype)
        return buffer[:stored], buffer[stored : stored + owned]

    def _start(
        self,
        name: Flight,
        round_index: int,
        route: _Route,
        send: Tensor,
        send_splits: tuple[int, ...],
        receive: Tensor,
        receive_splits: tuple[int, ...],
    ) -> Pending:
        if self.plan.world_size == 1:
            return Pending(round_index, route, send, None)
        sent_bytes = (sum(send_splits) - send_splits[self.rank]) * self.dtype.itemsize
        splits = list(receive_splits), list(send_splits)
        issue = partial(dist.all_to_all_single, receive, send, *splits, group=self.group, async_op=True)
        work = self.watch.collective(name, round_index, sent_bytes, issue)
        self.stats.collectives += 1
        self.stats.bytes_sent += sent_bytes
        return Pending(round_index, route, receive, work)

    def _wait(self, pending: Pending) -> Tensor:
        if pending.work is not None:
            with self.watch.phase("wait", pending.round_index):
                pending.work.wait()
        return pending.received

    def _all_to_all_bytes(self, receive: Tensor, send: Tensor, received: list[int], sent: list[int]) -> None:
        work = dist.all_to_all_single(receive, send, received, sent, group=self.group, async_op=True)
        self.stats.team_collectives += 1
        self.stats.team_bytes_sent += sum(sent) - sent[self.rank]
        # Who gets nothing goes on: the collectives of its rounds may still be under way before this one.
        if work is not None and any(received):
            work.wait()

    def _stored_runs(
        self, route: _Route, wire: Tensor, slices: Mapping[int, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Pairs of views, (on the wire, in the slices), for everything this rank stores of a round."""
        return _pairs(route.stored, wire, lambda segment: slices[segment.item.matrix])

    @staticmethod
    def _owned_runs(route: _Route, wire: Tensor, parts: Mapping[Item, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pairs of views, (on the wire, in the collected parts), for everything this rank owns of a round."""
        return _pairs(route.owned, wire, lambda segment: parts[segment.item].view(-1))

    def _collected(self, route: _Route, dtype: torch.dtype) -> dict[Item, Tensor]:
        def numel(route: _Route) -> dict[Item, int]:
            items = dict.fromkeys(sorted(run.segment.item for run in route.owned))
            return {item: math.prod(self.plan.shape(item)) for item in items}

        largest = max(sum(numel(gather).values()) for gather, _ in self._routes)
        flat = self._scratch.take("collected", largest * dtype.itemsize).view(dtype)
        sizes = numel(route)
        starts = accumulate(sizes.values(), initial=0)
        return {
            item: flat[at : at + size].view(self.plan.shape(item))
            for (item, size), at in zip(sizes.items(), starts, strict=False)
        }


TEAM_BUFFERS = ("send", "receive")


def _pairs(
    runs: Sequence[_Run], wire: Tensor, flat_of: Callable[[Segment], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    on_wire: list[Tensor] = []
    elsewhere: list[Tensor] = []
    at = 0
    for run in runs:
        flat = flat_of(run.segment)
        for strip in run.strips:
            on_wire.append(wire[at : at + strip.numel].view(strip.shape))
            elsewhere.append(strip.view(flat))
            at += strip.numel
    return on_wire, elsewhere


def _copy(destinations: list[Tensor], sources: list[Tensor]) -> None:
    if destinations:
        torch._foreach_copy_(destinations, sources)
