"""One step of ShardedMuon, which reads as its phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.config import MuonConfig, gradient_gain
from megatron_muon.exchange.exchange import Exchange, Pending
from megatron_muon.exchange.team import band_update
from megatron_muon.matrices.shares import logical_views
from megatron_muon.matrices.slice_elements import SliceElements
from megatron_muon.optimizer.observer import StepObserver
from megatron_muon.rule.adaptive import Piece, divide
from megatron_muon.rule.muon import apply_updates, momentum_update, orthogonalized_updates
from megatron_muon.rule.stochastic_rounding import random_bits, stochastic_bf16, stream
from megatron_muon.state_keys import MOMENTUM, SECOND_MOMENT


@dataclass(frozen=True)
class Binding:
    """What `bind` told an optimizer: its exchange, its slices and their names."""

    exchange: Exchange
    slices: dict[int, Tensor]
    names: dict[int, str]

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

    def elements_of(self, parameter: Tensor) -> SliceElements:
        """What one of this rank's slices is made of."""
        return next(self.elements[index] for index, p in self.slices.items() if p is parameter)

    def counts(self, index: int) -> bool:
        """Whether this rank's elements enter sums over the ranks: of several copies of a parameter, the first's do."""
        plan = self.exchange.plan
        return not plan.matrices[index].spec.replicated or plan.tp_ranks[self.exchange.rank] == 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums over the group, in place."""
        if self.exchange.plan.world_size > 1:
            dist.all_reduce(tensor, group=self.exchange.group)

    @cached_property
    def scratch(self) -> Tensor:
        """fp32, for the directions or the updates of this rank's slices in any one round."""
        sizes = (sum(self.slices[i].numel() for i in r if i in self.slices) for r in self.exchange.plan.rounds)
        return torch.empty(max(sizes, default=0), dtype=torch.float32, device=self.exchange.device)


@dataclass
class Step:
    """The rounds of one step.

    Attributes:
        muon: The optimizer's settings.
        bound: What the optimizer is bound to.
        state: The optimizer's state tensors, by slice; mutated.
        param_groups: The optimizer's, with `lr` and `weight_decay`.
        updates: Number of steps before this one.
        observer: Sees what the step computes.
    """

    muon: MuonConfig
    bound: Binding
    state: Mapping[Tensor, dict[str, Tensor]]
    param_groups: Sequence[dict[str, Any]]
    updates: int
    observer: StepObserver
    group_of: dict[int, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        by_parameter = {p: group for group in self.param_groups for p in group["params"]}
        self.group_of = {index: by_parameter[p] for index, p in self.bound.slices.items()}

    @property
    def num_rounds(self) -> int:
        return self.bound.exchange.num_rounds

    def _in_round(self, round_index: int) -> dict[int, Tensor]:
        """This rank's slices of the round, by parameter index."""
        members = self.bound.exchange.plan.rounds[round_index]
        return {index: self.bound.slices[index] for index in members if index in self.bound.slices}

    def _scratch(self, slices: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """A place for what belongs to a round's slices; the next round's takes its place."""
        sizes = [p.numel() for p in slices.values()]
        runs = torch.split(self.bound.scratch[: sum(sizes)], sizes) if sizes else ()
        return dict(zip(slices, runs, strict=True))

    def prepare(self, round_index: int) -> Pending:
        muon, state = self.muon, self.state
        slices = self._in_round(round_index)
        scratch = list(self._scratch(slices).values())
        with self.bound.exchange.watch.phase("momentum", round_index):
            directions = momentum_update(
                [state[p][MOMENTUM] for p in slices.values()],
                [_gradient(p) for p in slices.values()],
                momentum=muon.momentum,
                nesterov=muon.nesterov,
                gain=gradient_gain(muon),
                out=scratch,
                store=partial(self._store_momenta, slices) if muon.momentum_dtype == "bf16" else None,
            )
            self._record("momentum_sq", {i: state[p][MOMENTUM] for i, p in slices.items()})
            if muon.variant == "adamuon":
                directions = [torch.sign(u, out=out) for u, out in zip(directions, scratch, strict=True)]
        return self.bound.exchange.start_gather(round_index, dict(zip(slices, directions, strict=True)))

    def _record(self, quantity: str, values: Mapping[int, Tensor]) -> None:
        """Shows the observer what this rank counts for."""
        if self.observer.watches:
            counted = {i: value for i, value in values.items() if self.bound.counts(i)}
            self.observer.slices(quantity, counted, self.bound.elements)

    def _store_momenta(self, slices: Mapping[int, Tensor], momenta: Sequence[Tensor]) -> None:
        """Rounds fp32 momenta to bf16 and writes them into the state; random bits depend on element and step alone."""
        names = self.bound.names
        for (index, p), wide in zip(slices.items(), momenta, strict=True):
            elements = self.bound.elements[index]
            stream_id = stream(names.get(index, elements.spec.name), self.updates)
            for chunk in elements.chunks():
                bits = random_bits(elements.numbers(chunk), stream_id)
                self.state[p][MOMENTUM][chunk] = stochastic_bf16(wide[chunk], bits)

    def _divide(self, round_index: int, slices: Mapping[int, Tensor], updates: Mapping[int, Tensor]) -> None:
        """Collective over the group: sums over lines and matrices."""
        plan = self.bound.exchange.plan
        pieces = {
            index: Piece(
                self.bound.elements[index],
                updates[index],
                self.state[p][SECOND_MOMENT],
                self.bound.counts(index),
            )
            for index, p in slices.items()
        }
        specs = {index: plan.matrices[index].spec for index in plan.rounds[round_index]}
        divide(specs, pieces, self.muon, self.bound.exchange.device, self.bound.all_reduce)

    def compute(self, round_index: int, gathered: Pending) -> Pending:
        exchange, muon = self.bound.exchange, self.muon
        plan = exchange.plan
        parts = exchange.finish_gather(gathered, torch.float32)
        teams = {item: team for item in parts if (team := plan.team(item)) is not None}
        talks = {
            item: band_update(
                parts[item],
                team.rows,
                team.cols,
                plan.share(item).dim,
                team.seat(item.share),
                muon,
                divided=team.method.divided,
            )
            for item, team in teams.items()
        }
        views = {
            item: logical_views(plan.spec(item), item.part, collected)
            for item, collected in parts.items()
            if item not in teams
        }
        with self.observer.newton_schulz():
            # First: the members of a team start together, right after the gather.
            exchange.run_teams(round_index, talks)
            with exchange.watch.phase("newton_schulz", round_index):
                orthogonalized_updates([view for group in views.values() for view in group], muon)
        for item, group in views.items():
            self.observer.orthogonality(item.matrix, item.part, group)
        return exchange.start_scatter(round_index, parts)

    def finalize(self, round_index: int, scattered: Pending) -> None:
        slices = self._in_round(round_index)
        updates = self._scratch(slices)
        self.bound.exchange.finish_scatter(scattered, updates)
        if self.muon.variant != "muon":
            with self.bound.exchange.watch.phase("second_moment", round_index):
                self._divide(round_index, slices, updates)
        self._record("update_sq", updates)
        self._record("weight_sq", slices)
        self.observer.learning_rates({index: float(self.group_of[index]["lr"]) for index in slices})
        with self.bound.exchange.watch.phase("apply", round_index):
            by_group: dict[int, list[int]] = {}
            for index in slices:
                by_group.setdefault(id(self.group_of[index]), []).append(index)
            for members in by_group.values():
                group = self.group_of[members[0]]
                apply_updates(
                    [slices[i] for i in members],
                    [updates[i] for i in members],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    cautious=self.muon.cautious_weight_decay,
                )


def _gradient(p: Tensor) -> Tensor:
    return p.grad if p.grad is not None else torch.zeros_like(p)
