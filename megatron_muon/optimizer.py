"""ShardedMuon: a torch optimizer whose parameters are flat slices of matrices that other ranks hold the rest of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.agreement import backend_problem, compare_over_ranks, slices_problem
from megatron_muon.config import TORCH_DTYPES, MuonConfig, gradient_gain
from megatron_muon.elements import SliceElements
from megatron_muon.exchange import Exchange, _Pending
from megatron_muon.metrics import Recorder
from megatron_muon.muon import apply_updates, band_update, momentum_update, orthogonalized_updates
from megatron_muon.ownership import OwnershipPlan
from megatron_muon.pipeline import run_rounds
from megatron_muon.rounding import random_bits, stochastic_bf16, stream
from megatron_muon.second_moment import Piece, divide, second_moment_numel
from megatron_muon.shares import logical_views
from megatron_muon.states import MOMENTUM, SECOND_MOMENT


class ShardedMuon(torch.optim.Optimizer):
    """Muon on flat slices of matrices that are spread over the ranks of a group.

    One step, on every rank of the group:
      1. momentum, element-wise on this rank's slices;
      2. gather: one all-to-all a round takes the slices to the owner of each matrix;
      3. the owner puts its matrices together, runs Newton-Schulz once on each, and scales; the owners of bands of one
         matrix do it together, with all-to-alls of products on its short side;
      4. scatter: one all-to-all a round takes the updates back to the slices;
      5. for NorMuon and AdaMuon, division by roots of running mean squares, with one or two small all-reduces;
      6. weight decay and update, element-wise on this rank's slices.
    Rounds overlap: see `pipeline`.

    The optimizer is made in two steps, because a ZeRO wrapper replaces the parameters by slices after construction:
    first with the parameters and groups, then `bind` tells it what its slices are.

    Args:
        params: Parameters or groups. `lr` and `weight_decay` are read from the groups at every step.
        lr: Learning rate of groups without one.
        weight_decay: Decoupled weight decay of groups without one.
        config: Everything else.

    State: `momentum_buffer` for each slice, of the slice's shape, in fp32 or bf16. With variants also `second_moment`,
    fp32: of the slice's shape for AdaMuon, for NorMuon one number for each line that the slice has a part of. And
    `updates`, the number of steps. Buffers of the exchange are kept from step to step but are no state.

    Raises:
        ValueError: If `lr` or `weight_decay` is negative.
        TypeError: If a parameter is complex or no floating-point tensor.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0, config: MuonConfig | None = None
    ) -> None:
        self.muon = config or MuonConfig()
        self.updates = 0
        self.recorder: Recorder | None = None
        self._binding: _Binding | None = None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for name in ("lr", "weight_decay"):
                if not group[name] >= 0.0:
                    raise ValueError(f"ShardedMuon: {name}: got {group[name]}, expected a number that is not negative")
            for p in group["params"]:
                if not p.is_floating_point():
                    raise TypeError(
                        f"ShardedMuon: got a parameter of {p.dtype} and shape {tuple(p.shape)}, expected a real "
                        "floating-point matrix; leave it to AdamW (param.use_muon = False)"
                    )

    def bind(
        self,
        plan: OwnershipPlan,
        group: dist.ProcessGroup | None,
        slices: Mapping[int, Tensor],
        device: torch.device,
        names: Mapping[int, str] | None = None,
    ) -> None:
        """Tells the optimizer what its parameters are: which slice of which matrix in the plan.

        Collective: every rank of `group` calls this; fingerprints of the plans are compared.

        Args:
            plan: The same on every rank.
            group: The ranks that the plan is about.
            slices: Parameter index in the plan -> the parameter of this optimizer that holds this rank's slice.
            device: Of the exchange buffers; also a rank that stores nothing takes part in the exchange.
            names: Parameter index -> a name that is the same in every layout, from which bf16 momentum draws its random
                bits; the plan's names if None.

        Raises:
            ValueError: If the plan was made for another number of Newton-Schulz steps.
            RuntimeError: On every rank, if the ranks' plans differ or a rank's slices do not fit the plan.
        """
        if plan.ns_steps != self.muon.ns_steps:
            raise ValueError(f"bind: the plan was made for {plan.ns_steps} ns_steps, expected {self.muon.ns_steps}")
        rank = dist.get_rank(group) if dist.is_initialized() else 0
        problem = slices_problem(plan, rank, slices, [p for g in self.param_groups for p in g["params"]])
        problem = problem or backend_problem(self.muon, device)
        compare_over_ranks(plan.fingerprint, problem, group)
        exchange = Exchange(plan, group, TORCH_DTYPES[self.muon.exchange_dtype], device)
        self._binding = _Binding(exchange, dict(slices), dict(names or {}))

    @property
    def exchange(self) -> Exchange:
        """The bound exchange, with the plan and this rank's counters.

        Raises:
            RuntimeError: Before `bind`.
        """
        return self._bound().exchange

    @property
    def slices(self) -> Mapping[int, Tensor]:
        """Parameter index in the plan -> this rank's slice."""
        return self._bound().slices

    @property
    def names(self) -> Mapping[int, str]:
        """Parameter index in the plan -> name in the whole model, where `bind` was told."""
        return self._bound().names

    def _bound(self) -> _Binding:
        if self._binding is None:
            raise RuntimeError("ShardedMuon.bind was not called: the optimizer does not know its matrices yet")
        return self._binding

    def state_dtype(self, key: str) -> torch.dtype:
        """The data type of a state tensor."""
        return TORCH_DTYPES[self.muon.momentum_dtype] if key == MOMENTUM else torch.float32

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The state tensors of each slice."""
        return (MOMENTUM,) if self.muon.variant == "muon" else (MOMENTUM, SECOND_MOMENT)

    def init_state(self) -> None:
        """Creates missing state, zero. Called by `step` and before a checkpoint is loaded."""
        for group in self.param_groups:
            for p in group["params"]:
                if MOMENTUM not in self.state[p]:
                    self.state[p][MOMENTUM] = torch.zeros_like(p, dtype=self.state_dtype(MOMENTUM))
        if self.muon.variant != "muon":
            bound = self._bound()
            for index, p in bound.slices.items():
                if SECOND_MOMENT not in self.state[p]:
                    numel = second_moment_numel(bound.elements[index], self.muon)
                    self.state[p][SECOND_MOMENT] = torch.zeros(numel, dtype=torch.float32, device=p.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own dtype; torch casts it to the parameter's."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                if key in (MOMENTUM, SECOND_MOMENT) and p.dtype != self.state_dtype(key):
                    self.state[p][key] = value.to(p.device, self.state_dtype(key), copy=True)

    def elementwise_state(self, parameter: Tensor, key: str) -> Tensor:
        """A state tensor with one entry per element of the slice, as a checkpoint holds it.

        Args:
            parameter: One of the bound slices.
            key: Of `state_keys`.
        """
        state: Tensor = self.state[parameter][key]
        if key != SECOND_MOMENT or self.muon.variant != "normuon":
            return state
        elements = self._bound().elements_of(parameter)
        lines = elements.touched_lines
        table = state.new_zeros(int(lines[-1]) + 1)
        table[lines] = state
        return torch.cat([table[elements.lines(chunk)] for chunk in elements.chunks()])

    def state_from_elements(self, parameter: Tensor, key: str, values: Tensor) -> Tensor:
        """The inverse of `elementwise_state`: what the state tensor must be for it to return `values`."""
        if key != SECOND_MOMENT or self.muon.variant != "normuon":
            return values
        elements = self._bound().elements_of(parameter)
        lines = elements.touched_lines
        table = torch.zeros(int(lines[-1]) + 1, dtype=torch.float32, device=lines.device)
        for chunk in elements.chunks():
            # All elements of a line have the same value, so that it does not matter whose stays.
            table[elements.lines(chunk)] = values[chunk].to(table)
        return table[lines]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of all slices. Collective over the bound group, also for a rank without slices.

        A slice without a gradient counts as one with a zero gradient, since other slices of its matrix may have one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        bound = self._bound()
        self.init_state()
        run_rounds(_Step(self, bound))
        self.updates += 1
        return loss


@dataclass(frozen=True)
class _Binding:
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
class _Step:
    """The rounds of one step."""

    optimizer: ShardedMuon
    bound: _Binding
    group_of: dict[int, dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        by_parameter = {p: group for group in self.optimizer.param_groups for p in group["params"]}
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

    def prepare(self, round_index: int) -> _Pending:
        muon, state = self.optimizer.muon, self.optimizer.state
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
        """Nothing, but on a step that is logged."""
        if self.optimizer.recorder is not None:
            for index, value in values.items():
                if self.bound.counts(index):
                    self.optimizer.recorder.slice_squares(quantity, index, self.bound.elements[index], value)

    def _store_momenta(self, slices: Mapping[int, Tensor], momenta: Sequence[Tensor]) -> None:
        """Rounds fp32 momenta to bf16 and writes them into the state; random bits depend on element and step alone."""
        optimizer, names = self.optimizer, self.bound.names
        for (index, p), wide in zip(slices.items(), momenta, strict=True):
            elements = self.bound.elements[index]
            stream_id = stream(names.get(index, elements.spec.name), optimizer.updates)
            for chunk in elements.chunks():
                bits = random_bits(elements.numbers(chunk), stream_id)
                optimizer.state[p][MOMENTUM][chunk] = stochastic_bf16(wide[chunk], bits)

    def _divide(self, round_index: int, slices: Mapping[int, Tensor], updates: Mapping[int, Tensor]) -> None:
        """Collective over the group: sums over lines and matrices."""
        plan = self.bound.exchange.plan
        pieces = {
            index: Piece(
                self.bound.elements[index],
                updates[index],
                self.optimizer.state[p][SECOND_MOMENT],
                self.bound.counts(index),
            )
            for index, p in slices.items()
        }
        specs = {index: plan.matrices[index].spec for index in plan.rounds[round_index]}
        divide(specs, pieces, self.optimizer.muon, self.bound.exchange.device, self.bound.all_reduce)

    def compute(self, round_index: int, gathered: _Pending) -> _Pending:
        exchange, muon = self.bound.exchange, self.optimizer.muon
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
        recorder = self.optimizer.recorder
        with recorder.newton_schulz() if recorder is not None else nullcontext():
            # First: the members of a team start together, right after the gather.
            exchange.run_teams(round_index, talks)
            with exchange.watch.phase("newton_schulz", round_index):
                orthogonalized_updates([view for group in views.values() for view in group], muon)
        if recorder is not None:
            for item, group in views.items():
                recorder.orthogonality(item.matrix, item.part, group)
        return exchange.start_scatter(round_index, parts)

    def finalize(self, round_index: int, scattered: _Pending) -> None:
        slices = self._in_round(round_index)
        updates = self._scratch(slices)
        self.bound.exchange.finish_scatter(scattered, updates)
        if self.optimizer.muon.variant != "muon":
            with self.bound.exchange.watch.phase("second_moment", round_index):
                self._divide(round_index, slices, updates)
        self._record("update_sq", updates)
        self._record("weight_sq", slices)
        if self.optimizer.recorder is not None:
            for index in slices:
                parts = len(self.bound.elements[index].spec.parts)
                self.optimizer.recorder.learning_rate(index, parts, float(self.group_of[index]["lr"]))
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
                    cautious=self.optimizer.muon.cautious_weight_decay,
                )


def _gradient(p: Tensor) -> Tensor:
    return p.grad if p.grad is not None else torch.zeros_like(p)
