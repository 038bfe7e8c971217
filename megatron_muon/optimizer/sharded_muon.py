"""ShardedMuon: a torch optimizer whose parameters are flat slices of matrices that other ranks hold the rest of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_muon.config import TORCH_DTYPES, MuonConfig
from megatron_muon.exchange.agreement import backend_problem, compare_over_ranks, slices_problem
from megatron_muon.exchange.exchange import Exchange
from megatron_muon.exchange.pipeline import pipeline, run_together
from megatron_muon.exchange.team_groups import has_teams
from megatron_muon.matrices.slice_elements import SliceElements
from megatron_muon.optimizer.observer import UNOBSERVED, StepObserver
from megatron_muon.optimizer.step import Binding, Step
from megatron_muon.plan.ownership import OwnershipPlan
from megatron_muon.plan.wire import SCRATCH_SHARE
from megatron_muon.rule.adaptive import second_moment_numel
from megatron_muon.state_keys import MOMENTUM, SECOND_MOMENT


class ShardedMuon(torch.optim.Optimizer):
    """Muon on flat slices of matrices that are spread over the ranks of a group.

    A step of one rank, with others of the same group at the same time:
      1. momentum, element-wise on this rank's slices;
      2. gather: slices travel to the owners of their matrices;
      3. the owner runs Newton-Schulz once on each of its matrices, and scales the result. The owners of bands of one
         matrix do it together, with all-to-alls of products on its short side;
      4. scatter: updates travel back to the slices;
      5. NorMuon and AdaMuon divide updates by roots of running mean squares, with one or two small all-reduces;
      6. weight decay and update, element-wise on this rank's slices.
    This is done in rounds of the plan. One all-to-all carries the gather of a round and the scatter of the round two
    before, while the round between them is computed: see `exchange.pipeline`. Slices that a rank owns itself do not
    travel, and where nothing moves between any ranks there is no all-to-all.

    The optimizer is made in two steps, because a ZeRO wrapper replaces the parameters by slices after construction:
    first with the parameters and groups, then `bind` tells it what its slices are.

    Args:
        params: Parameters or groups. `lr` and `weight_decay` are read from the groups at every step.
        lr: Learning rate of groups without one.
        weight_decay: Decoupled weight decay of groups without one.
        config: Everything else.

    State: `momentum_buffer` for each slice, of the slice's shape, in fp32 or bf16. With variants also `second_moment`,
    fp32: of the slice's shape for AdaMuon, for NorMuon one number for each line that the slice has a part of. And
    `updates`, the number of steps. The exchange's buffers, `exchange.buffer_bytes` in all, are made by `bind` and kept
    from step to step, but are not part of the state.

    Raises:
        ValueError: If `lr` or `weight_decay` is negative.
        TypeError: If a parameter is complex or no floating-point tensor.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0, config: MuonConfig | None = None
    ) -> None:
        self.muon = config or MuonConfig()
        self.updates = 0
        self.observer: StepObserver = UNOBSERVED
        self._binding: Binding | None = None
        self._running: Iterator[None] | None = None
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
        team_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Tells the optimizer what its parameters are: which slice of which matrix in the plan.

        Collective: every rank of `group` calls this. Fingerprints of the plans are compared, all buffers are made, the
        ranks are connected, and on a GPU kernels are run once.

        Args:
            plan: The same on every rank.
            group: The ranks that the plan is about.
            slices: Parameter index in the plan -> the parameter of this optimizer that holds this rank's slice.
            device: Of the exchange buffers; also a rank that stores nothing takes part in the exchange.
            names: Parameter index -> a name that is the same in every layout, from which bf16 momentum draws its random
                bits; the plan's names if None.
            team_group: See `Exchange`.

        Raises:
            ValueError: If the plan was made for another number of Newton-Schulz steps, or with teams for another dtype.
            RuntimeError: On every rank, if the ranks' plans differ or a rank's slices do not fit the plan.
        """
        if plan.ns_steps != self.muon.ns_steps:
            raise ValueError(f"bind: the plan was made for {plan.ns_steps} ns_steps, expected {self.muon.ns_steps}")
        if plan.ns_dtype != self.muon.ns_dtype and has_teams(plan):
            raise ValueError(
                f"bind: the plan was made for ns_dtype {plan.ns_dtype}, expected {self.muon.ns_dtype}, by which the "
                "buffers of teams are sized; make it with PlanOptions.from_config"
            )
        rank = dist.get_rank(group) if dist.is_initialized() else 0
        problem = slices_problem(plan, rank, slices, [p for g in self.param_groups for p in g["params"]])
        problem = problem or backend_problem(self.muon, plan, rank, device)
        compare_over_ranks(plan.fingerprint, problem, group)
        # AdaMuon divides all updates of a round at once, on slices.
        at_owner = self.muon.variant != "adamuon"
        exchange = Exchange(
            plan,
            group,
            TORCH_DTYPES[self.muon.exchange_dtype],
            device,
            scratch_numel=self.muon.exchange_buffer_mb * 2**20 // SCRATCH_SHARE // 4 if at_owner else sys.maxsize,
            keep_resident=at_owner,
            carry_lines=self.muon.variant == "normuon",
            team_group=team_group,
        )
        numbers = {id(p): number for number, g in enumerate(self.param_groups) for p in g["params"]}
        group_of = {index: numbers[id(p)] for index, p in slices.items()}
        exchange.connect()
        self._binding = Binding(self.muon, exchange, dict(slices), dict(names or {}), group_of)

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

    def _bound(self) -> Binding:
        if self._binding is None:
            raise RuntimeError("ShardedMuon.bind was not called: the optimizer does not know its matrices yet")
        return self._binding

    def elements_of(self, parameter: Tensor) -> SliceElements:
        """The elements of one of the bound slices."""
        bound = self._bound()
        return next(bound.elements[index] for index, p in bound.slices.items() if p is parameter)

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

    @torch.no_grad()
    def begin(self) -> None:
        """Starts a step: momentum of the first round, and its gather. Collective over the bound group.

        Whoever drives several optimizers begins all of them, does other work, and lets `run_together` finish them;
        `step` of each then has nothing left to do but to count. Gradients must not change in between.
        """
        if self._running is None:
            bound = self._bound()
            self.init_state()
            self._running = pipeline(Step(bound, self.state, self.param_groups, self.updates, self.observer))
            next(self._running, None)

    @property
    def running(self) -> Iterator[None]:
        """The rest of the step that has begun, as `run_together` takes it; to be run with gradients disabled."""
        return self._running if self._running is not None else iter(())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of all slices. Collective over the bound group, also for a rank without slices.

        A slice without a gradient counts as one with a zero gradient, since other slices of its matrix may have one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        try:
            run_together([self.running])
        finally:
            self._running = None
        self.updates += 1
        return loss
