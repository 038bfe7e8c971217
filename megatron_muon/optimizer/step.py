"""One step of ShardedMuon, which reads as its phases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.config import MuonConfig, gradient_gain
from megatron_muon.exchange.exchange import Exchange, SliceBatch
from megatron_muon.exchange.team import band_update
from megatron_muon.matrices.lines import TileStrips, num_logical_matrices, tiles_of_slice
from megatron_muon.matrices.shares import logical_views
from megatron_muon.matrices.slice_elements import SliceElements
from megatron_muon.optimizer.observer import StepObserver
from megatron_muon.rule.adaptive import divide_elements, rms_factor, square_bits, square_sum
from megatron_muon.rule.muon import Stack, apply_updates, bounded_stacks, momentum_update, orthogonalized_update
from megatron_muon.rule.stochastic_rounding import random_bits, stochastic_bf16, stream
from megatron_muon.state_keys import MOMENTUM, SECOND_MOMENT


@dataclass(frozen=True)
class BoundBatch:
    """A batch of this rank's slices, with the lists that a step's operations take.

    Attributes:
        batch: Its copies to and from the wire.
        indices: Parameter indices of the slices.
        slices: The slices, fp32 parameters of the optimizer.
        scratch: Their places in the exchange's scratch, for directions and updates.
        by_group: Number of a parameter group -> its slices of the batch and their places in the scratch.
    """

    batch: SliceBatch
    indices: list[int]
    slices: list[Tensor]
    scratch: list[Tensor]
    by_group: dict[int, tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Binding:
    """What an optimizer was bound to: its exchange, its slices, their names, and the parameter group of each.

    What follows from these is computed once, when it is first needed.
    """

    muon: MuonConfig
    exchange: Exchange
    slices: dict[int, Tensor]
    names: dict[int, str]
    group_of: dict[int, int]

    @cached_property
    def elements(self) -> dict[int, SliceElements]:
        """By parameter index, what this rank's slices are made of."""
        plan, rank = self.exchange.plan, self.exchange.rank
        out = {}
        for index in self.slices:
            spec = plan.matrices[index].spec
            (own,) = (s for s in plan.matrices[index].slices if s.rank == rank)
            piece = spec.piece_of(plan.tp_ranks[rank])
            out[index] = SliceElements(spec, piece, own.start, own.stop, self.exchange.device)
        return out

    @cached_property
    def tiles(self) -> dict[int, list[TileStrips]]:
        """By parameter index, what this rank's slice has of each logical matrix."""
        return {i: tiles_of_slice(e.spec, e.piece, e.start, e.stop) for i, e in self.elements.items()}

    @cached_property
    def _batches(self) -> dict[tuple[int, bool], tuple[BoundBatch, ...]]:
        exchange = self.exchange
        return {
            (round_index, travels): tuple(map(self._bound, batches))
            for round_index in range(exchange.num_rounds)
            for travels, batches in (
                (True, exchange.travelling(round_index)),
                (False, exchange.resident(round_index)),
            )
        }

    def _bound(self, batch: SliceBatch) -> BoundBatch:
        by_group: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for index, flat in batch.flats.items():
            slices, scratch = by_group.setdefault(self.group_of[index], ([], []))
            slices.append(self.slices[index])
            scratch.append(flat)
        slices = [self.slices[index] for index in batch.flats]
        return BoundBatch(batch, list(batch.flats), slices, list(batch.flats.values()), by_group)

    def batches(self, round_index: int, *, travels: bool) -> tuple[BoundBatch, ...]:
        """This rank's slices of a round that cross the wire, or that do not; none if there is no such round."""
        return self._batches.get((round_index, travels), ())

    @cached_property
    def stacks(self) -> tuple[tuple[Stack, ...], ...]:
        """For each round, the logical matrices that this rank does alone, as they are orthogonalized at once."""
        exchange, lines = self.exchange, self.exchange.lines
        out = []
        for round_index in range(exchange.num_rounds):
            stacks = exchange.stacks(round_index)
            moments = lines.stacked(round_index, stacks) if lines is not None else None
            out.append(tuple(bounded_stacks(stacks, self.muon, moments)))
        return tuple(out)

    @cached_property
    def counted(self) -> frozenset[int]:
        """Parameters of which this rank's elements enter sums over the ranks: of several copies, the first ones do."""
        plan, first = self.exchange.plan, self.exchange.plan.tp_ranks[self.exchange.rank] == 0
        return frozenset(index for index in self.slices if first or not plan.matrices[index].spec.replicated)

    def second_moments(self, state: Mapping[Tensor, dict[str, Tensor]]) -> dict[int, Tensor]:
        """By parameter index, the running mean squares of this rank's slices, if the variant keeps any."""
        return {index: state[p][SECOND_MOMENT] for index, p in self.slices.items() if SECOND_MOMENT in state[p]}

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums over the group, in place."""
        if self.exchange.plan.world_size > 1:
            dist.all_reduce(tensor, group=self.exchange.group)

    @cached_property
    def zeros(self) -> Tensor:
        """The gradient of slices that have none."""
        numel = max((p.numel() for p in self.slices.values()), default=0)
        return torch.zeros(numel, dtype=torch.float32, device=self.exchange.device)


@dataclass
class Step:
    """The rounds of one step, as `exchange.pipeline` runs them.

    Attributes:
        bound: What the optimizer is bound to.
        state: The optimizer's state tensors, by slice; mutated.
        param_groups: The optimizer's, with `lr` and `weight_decay`.
        updates: Number of steps before this one.
        observer: Sees what the step computes.
    """

    bound: Binding
    state: Mapping[Tensor, dict[str, Tensor]]
    param_groups: Sequence[dict[str, Any]]
    updates: int
    observer: StepObserver
    muon: MuonConfig = field(init=False)
    exchange: Exchange = field(init=False)

    def __post_init__(self) -> None:
        self.muon, self.exchange = self.bound.muon, self.bound.exchange

    @property
    def num_rounds(self) -> int:
        return self.exchange.num_rounds

    def prepare(self, round_index: int) -> None:
        """Momentum of the slices that travel, which are then packed for the gather."""
        for batch in self.bound.batches(round_index, travels=True):
            self._momentum(round_index, batch)
        self.exchange.pack_lines(round_index, self.bound.second_moments(self.state))

    def start(self, transfer: int) -> None:
        self.exchange.start(transfer)

    def finish(self, transfer: int) -> None:
        self.exchange.finish(transfer)

    def compute(self, round_index: int) -> None:
        """Newton-Schulz on what this rank owns, and all the rest for slices that do not travel."""
        resident = self.bound.batches(round_index, travels=False)
        for batch in resident:
            self._momentum(round_index, batch)
        if round_index < self.num_rounds:
            self._newton_schulz(round_index)
        for batch in resident:
            self._apply(round_index, batch)

    def apply(self, round_index: int) -> None:
        """Updates of the slices that travel, which have come back."""
        batches = self.bound.batches(round_index, travels=True)
        for batch in batches:
            self._apply(round_index, batch)
        self.exchange.unpack_lines(round_index, self.bound.second_moments(self.state))
        if self.muon.variant == "adamuon" and not batches and 0 <= round_index < self.num_rounds:
            # Collective, also for a rank without slices in the round.
            self._divide(round_index, {})

    def _momentum(self, round_index: int, batch: BoundBatch) -> None:
        muon = self.muon
        momenta = [self.state[p][MOMENTUM] for p in batch.slices]
        with self.exchange.watch.phase("momentum", round_index):
            momentum_update(
                momenta,
                [p.grad if p.grad is not None else self.bound.zeros[: p.numel()] for p in batch.slices],
                batch.scratch,
                momentum=muon.momentum,
                nesterov=muon.nesterov,
                gain=gradient_gain(muon),
                store=partial(self._store_momenta, batch) if muon.momentum_dtype == "bf16" else None,
            )
            self._record("momentum_sq", batch.indices, momenta)
            if muon.variant == "adamuon":
                for u in batch.scratch:
                    u.sign_()
        with self.exchange.watch.phase("pack", round_index):
            batch.batch.pack.run()

    def _record(self, quantity: str, indices: Sequence[int], values: Sequence[Tensor]) -> None:
        """Shows the observer what this rank counts for."""
        if self.observer.watches:
            counted = {i: value for i, value in zip(indices, values, strict=True) if i in self.bound.counted}
            self.observer.slices(quantity, counted, self.bound.elements)

    def _store_momenta(self, batch: BoundBatch, momenta: Sequence[Tensor]) -> None:
        """Rounds fp32 momenta to bf16 and writes them into the state; random bits depend on element and step alone."""
        names = self.bound.names
        for index, p, wide in zip(batch.indices, batch.slices, momenta, strict=True):
            elements = self.bound.elements[index]
            stream_id = stream(names.get(index, elements.spec.name), self.updates)
            for chunk in elements.chunks():
                bits = random_bits(elements.numbers(chunk), stream_id)
                self.state[p][MOMENTUM][chunk] = stochastic_bf16(wide[chunk], bits)

    def _newton_schulz(self, round_index: int) -> None:
        exchange, plan, muon = self.exchange, self.exchange.plan, self.muon
        parts, lines = exchange.parts(round_index), exchange.lines
        if lines is not None:
            lines.load_resident(round_index, self.bound.second_moments(self.state))
        teams = {item: team for item in parts if (team := plan.team(item)) is not None}
        talks = {
            item: band_update(
                parts[item],
                (team.rows, team.cols),
                plan.share(item).dim,
                team.seat(item.share),
                muon,
                divided=team.method.divided,
                line_moments=lines.owned(round_index, item) if lines is not None else None,
            )
            for item, team in teams.items()
        }
        with self.observer.newton_schulz():
            pieces = [partial(orthogonalized_update, stack, muon) for stack in self.bound.stacks[round_index]]
            exchange.run_teams(round_index, talks, pieces)
        if lines is not None:
            lines.store_resident(round_index, self.bound.second_moments(self.state))
        if self.observer.watches:
            for item, part in parts.items():
                if item not in teams:
                    views = logical_views(plan.spec(item), item.part, part)
                    self.observer.orthogonality(item.matrix, item.part, views)

    def _divide(self, round_index: int, updates: Mapping[int, Tensor]) -> None:
        """AdaMuon's division, element-wise on slices, and its scale. One small all-reduce over the group."""
        plan, muon = self.exchange.plan, self.muon
        specs = [plan.matrices[index].spec for index in plan.rounds[round_index]]
        offsets = dict(zip(plan.rounds[round_index], accumulate(map(num_logical_matrices, specs), initial=0)))
        moments = self.bound.second_moments(self.state)
        divide_elements(list(updates.values()), [moments[index] for index in updates], muon)
        numel = sum(map(num_logical_matrices, specs))
        sums = torch.zeros(numel, dtype=torch.float64, device=self.exchange.device)
        tiles = [
            (offsets[index] + tile.number, tile, [strip.view(updates[index]) for strip in tile.strips])
            for index in updates
            for tile in self.bound.tiles[index]
        ]
        for (number, tile, parts), index in zip(tiles, (i for i in updates for _ in self.bound.tiles[i]), strict=True):
            if index in self.bound.counted:
                bits = square_bits(math.prod(tile.shape), muon.beta2)
                sums[number] = square_sum(parts, bits, sums)
        self.bound.all_reduce(sums)
        for number, tile, parts in tiles:
            bits = square_bits(math.prod(tile.shape), muon.beta2)
            factor = rms_factor(sums[number], bits, tile.shape, muon)
            for part in parts:
                part.mul_(factor)

    def _apply(self, round_index: int, batch: BoundBatch) -> None:
        with self.exchange.watch.phase("unpack", round_index):
            batch.batch.unpack.run()
        if self.muon.variant == "adamuon":
            with self.exchange.watch.phase("second_moment", round_index):
                self._divide(round_index, batch.batch.flats)
        self._record("update_sq", batch.indices, batch.scratch)
        self._record("weight_sq", batch.indices, batch.slices)
        if self.observer.watches:
            groups = {index: self.param_groups[self.bound.group_of[index]] for index in batch.indices}
            self.observer.learning_rates({index: float(group["lr"]) for index, group in groups.items()})
        with self.exchange.watch.phase("apply", round_index):
            for number, (slices, updates) in batch.by_group.items():
                apply_updates(
                    slices,
                    updates,
                    lr=self.param_groups[number]["lr"],
                    weight_decay=self.param_groups[number]["weight_decay"],
                    cautious=self.muon.cautious_weight_decay,
                )
