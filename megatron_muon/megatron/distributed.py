"""Muon inside Megatron-Core's DistributedOptimizer, and the chain that steps it beside AdamW."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import Range
from torch import nn

from megatron_muon.config import MuonConfig
from megatron_muon.matrices import MatrixSpec
from megatron_muon.megatron.checkpoint import CheckpointedChain, CheckpointedOptimizer, report_changes
from megatron_muon.megatron.checks import check_variant
from megatron_muon.megatron.metrics import MetricsLog
from megatron_muon.megatron.profiling import Profiler
from megatron_muon.megatron.qk_clip import QKClip
from megatron_muon.optimizer import ShardedMuon
from megatron_muon.plan import CostModel, OwnershipPlan, PlanOptions, ShardedMatrix, Slice, build_plan

# What says how a run began, what it logs or checks, does not change how it goes on.
_NOT_IN_CHECKPOINTS = frozenset(
    {
        "init_from_adamw",
        "log_interval",
        "log_params",
        "metrics_dir",
        "profile",
        "profile_dir",
        "profile_links",
        "verify_checkpoint",
    }
)


@dataclass(frozen=True)
class Grid:
    """The ranks that share Muon matrices: data-parallel times tensor-parallel, within an optimizer instance.

    Attributes:
        group: The process group over all of them.
        dp_ranks: For each rank of `group`, its data-parallel rank.
        tp_ranks: For each rank of `group`, its tensor-parallel rank.
        node_of: For each rank of `group`, a number of the node it runs on; None if that is not known.
    """

    group: dist.ProcessGroup
    dp_ranks: tuple[int, ...]
    tp_ranks: tuple[int, ...]
    node_of: tuple[int, ...] | None = None

    @cached_property
    def rank_at(self) -> dict[tuple[int, int], int]:
        """(data-parallel rank, tensor-parallel rank) -> rank of `group`."""
        return {at: rank for rank, at in enumerate(zip(self.dp_ranks, self.tp_ranks, strict=True))}


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def plan_options(muon: MuonConfig, grid: Grid) -> PlanOptions:
    """What plans are made with on this machine."""
    return PlanOptions.from_config(muon, CostModel.for_device(_device().type), grid.node_of)


class MuonDistributedOptimizer(CheckpointedOptimizer):
    """DistributedOptimizer whose inner optimizer is `ShardedMuon`, with that optimizer's state.

    Gradients, fp32 main slices, parameter buffers and their all-gather are Megatron's, unchanged. This class tells
    ShardedMuon which flat range of which matrix each slice is, once `bind` has given it a plan that `make_plan` made.

    Args:
        optimizer: A ShardedMuon over the model parameters; Megatron replaces them by their slices.
        *args: As for DistributedOptimizer.
        specs: Model parameter -> spec, for all of Muon's parameters in the buffers, in plan order.
        grid: The ranks that share them.
        names: Model parameter -> its name in the whole model, the same in every layout.
        **kwargs: As for DistributedOptimizer.
    """

    optimizer: ShardedMuon
    kind = "muon"

    def __init__(
        self,
        optimizer: ShardedMuon,
        *args: Any,
        specs: dict[nn.Parameter, MatrixSpec],
        grid: Grid,
        names: Mapping[nn.Parameter, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.grid = grid
        self._specs = specs
        self._names = names or {}

    def make_plan(self, initial_loads: Sequence[float] | None, max_team_size: int) -> OwnershipPlan:
        """A plan for the matrices. No communication: it follows from the layout, and is the same on the whole grid.

        Args:
            initial_loads: What each rank of the grid has to do for other matrices already, as `OwnershipPlan.loads`.
            max_team_size: The most ranks that may share a matrix.
        """
        muon, grid = self.optimizer.muon, self.grid
        return build_plan(
            self._sharded,
            grid.tp_ranks,
            ns_steps=muon.ns_steps,
            initial_loads=initial_loads,
            options=dataclasses.replace(plan_options(muon, grid), max_team_size=max_team_size),
        )

    def bind(self, plan: OwnershipPlan) -> None:
        """Gives the inner optimizer its plan and its slices. Collective over the grid; see `ShardedMuon.bind`."""
        main_slices = self._main_slices()
        index_of = {parameter: index for index, parameter in enumerate(self._specs)}
        self.optimizer.bind(
            plan,
            self.grid.group,
            {index_of[parameter]: main for parameter, main in main_slices.items()},
            _device(),
            {index_of[parameter]: name for parameter, name in self._names.items() if parameter in index_of},
        )

    @cached_property
    def _sharded(self) -> list[ShardedMatrix]:
        """Every matrix of the grid with the slices of all ranks, in plan order."""
        ranges = self._ranges_by_dp_rank()
        matrices = []
        for parameter, spec in self._specs.items():
            slices = tuple(
                Slice(self.grid.rank_at[dp_rank, tp_rank], start, stop)
                for dp_rank, (start, stop) in ranges[parameter].items()
                for tp_rank in range(spec.tp_size)
            )
            matrices.append(ShardedMatrix(spec, slices))
        return matrices

    def _ranges_by_dp_rank(self) -> dict[nn.Parameter, dict[int, tuple[int, int]]]:
        """For each parameter, the flat range of it that each data-parallel rank stores, if not empty."""
        out: dict[nn.Parameter, dict[int, tuple[int, int]]] = {}
        for buffer in self.buffers:
            size = buffer.data_parallel_group.size()
            for bucket in buffer.buckets:
                shard = bucket.grad_data.numel() // size
                for dp_rank in range(size):
                    begin = bucket.offset + dp_rank * shard
                    stored = self._build_model_gbuf_param_range_map(
                        {p: buffer.param_index_map[p] for p in bucket.params_list},
                        Range(begin, begin + shard),
                        bucket.offset,
                    )
                    for parameter, entry in stored.items():
                        out.setdefault(parameter, {})[dp_rank] = (entry["param"].start, entry["param"].end)
        return out

    def _main_slices(self) -> dict[nn.Parameter, torch.Tensor]:
        """Model parameter -> the fp32 slice of it that the inner optimizer updates on this rank."""
        pairs = [
            *zip(self.model_float16_groups, self.shard_fp32_from_float16_groups, strict=True),
            *zip(self.model_fp32_groups, self.shard_fp32_groups, strict=True),
        ]
        return {p: main for models, mains in pairs for p, main in zip(models, mains, strict=True)}

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """Tensors that a checkpoint holds for each parameter besides the parameter itself."""
        return self.optimizer.state_keys

    def _state_dtype(self, key: str) -> torch.dtype:
        return torch.float32 if key == "param" else self.optimizer.state_dtype(key)

    def _get_main_param_and_optimizer_states(self, model_param: nn.Parameter) -> dict[str, torch.Tensor]:
        """Megatron's own; every state has an entry per element, so that it can be cut anew for any layout."""
        tensors: dict[str, torch.Tensor] = super()._get_main_param_and_optimizer_states(model_param)
        keys = tensors.keys() & set(self.optimizer.state_keys)
        return {**tensors, **{key: self.optimizer.elementwise_state(tensors["param"], key) for key in keys}}

    def _set_main_param_and_optimizer_states(self, model_param: nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for key in self.optimizer.state_keys:
            if key in tensors:
                self.optimizer.state[main][key].copy_(self.optimizer.state_from_elements(main, key, tensors[key]))
        main.detach().copy_(tensors["param"])

    def _shared_state(self) -> dict[str, Any]:
        settings = dataclasses.asdict(self.optimizer.muon)
        kept = {key: v for key, v in settings.items() if key not in _NOT_IN_CHECKPOINTS}
        return {**super()._shared_state(), "muon": kept, "updates": self.optimizer.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for CheckpointedOptimizer; settings of Muon that differ from the checkpoint's are printed.

        Megatron's own puts a `step` into every group and state where neither TE nor apex is installed; it is lent
        one here and taken back, so that it does not end up in the next checkpoint.
        """
        saved = state_dict["optimizer"]
        check_variant(saved.get("muon", {}).get("variant", "muon"), self.optimizer.muon.variant)
        self.optimizer.updates = int(saved.get("updates", 0))
        report_changes(saved.get("muon", {}), dataclasses.asdict(self.optimizer.muon), "muon-")
        groups = [{**group, "step": 0} for group in saved["param_groups"]]
        self.optimizer.init_state()
        super().load_state_dict({**state_dict, "optimizer": {**saved, "param_groups": groups}})
        for state in self.optimizer.state.values():
            state.pop("step", None)
        for group in self.optimizer.param_groups:
            group.pop("step", None)

    def _init_optimizer_states_with_dummy_values(self) -> None:
        """Megatron's own runs a step, which would exchange; zeros are enough."""
        self.optimizer.init_state()


class MuonChainedOptimizer(CheckpointedChain):
    """Steps Muon's and AdamW's optimizers one after the other, then gathers all parameters once.

    A bucket group can hold buckets of both kinds (it does in virtual pipelines), so a gather that ran as soon as one
    optimizer has stepped would distribute parameters that the other one has not updated yet.

    Args:
        chained_optimizers: Muon's and AdamW's.
        qk_clip: Clips query and key weights after each optimizer's update; None does not.
    """

    def __init__(self, chained_optimizers: list[CheckpointedOptimizer], qk_clip: QKClip | None = None) -> None:
        super().__init__(chained_optimizers)
        for optimizer in chained_optimizers:
            optimizer._defer_param_sync = True
        muon = [optimizer for optimizer in chained_optimizers if isinstance(optimizer, MuonDistributedOptimizer)]
        self.metrics = MetricsLog(muon[0].optimizer.muon, muon) if muon else None
        self.qk_clip = qk_clip
        if qk_clip is not None:
            # After the update of main parameters, before any of Megatron's ways to cast them to model parameters.
            for optimizer in chained_optimizers:
                if not optimizer.is_stub_optimizer:
                    optimizer.optimizer.register_step_post_hook(functools.partial(_clip, qk_clip, optimizer))
            if self.metrics is not None:
                self.metrics.sources.append(qk_clip.maxima)
                self.metrics.counters.append(qk_clip.counts)
        wanted = bool(muon) and muon[0].optimizer.muon.profile > 0
        self.profiler = Profiler(muon[0].optimizer.muon, muon, self.model_chunks) if wanted else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As for ChainedOptimizer; what evaluations recorded is no part of the step that begins."""
        if self.qk_clip is not None:
            self.qk_clip.reset()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self) -> Any:
        """As for ChainedOptimizer; attention logits are forgotten, also if the step is skipped."""
        if self.qk_clip is None:
            return super().step()
        self.qk_clip.largest = 0.0
        try:
            return super().step()
        finally:
            self.qk_clip.reset()

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Copies and unscales gradients; returns whether any optimizer of the chain found inf or NaN.

        The chain shares one gradient scaler, which hears of the whole chain's outcome once. With one scaler each, an
        overflow in one optimizer's gradients would leave their loss scales different.
        """
        for optimizer in self.chained_optimizers:
            if not optimizer.is_stub_optimizer:
                optimizer._copy_model_grads_to_main_grads()
        scaler = self.chained_optimizers[0].grad_scaler
        if scaler is None:
            return False
        found = False
        for optimizer in self.chained_optimizers:
            # On the left, so that it always runs: it is a collective.
            found = optimizer._unscale_main_grads_and_check_for_nan() or found
        scaler.update(found)
        return found

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Steps all optimizers, then starts the parameter gather unless it overlaps with the next forward pass."""
        if self.qk_clip is not None:
            self.qk_clip.collect()
        logged = self.metrics if self.metrics is not None and self.metrics.due else None
        profiled = self.profiler if self.profiler is not None and self.profiler.due else None
        if logged is not None:
            logged.begin()
        if profiled is not None:
            profiled.begin()
        success = bool(self._step())
        with profiled.param_gather() if profiled is not None else nullcontext():
            for model_chunk in self.model_chunks:
                if not model_chunk.ddp_config.overlap_param_gather:
                    model_chunk.start_param_sync()
        # First what times the step, since metrics sample weights through the same exchange.
        if profiled is not None:
            profiled.finish()
        if logged is not None:
            logged.finish()
        return success


def _clip(qk_clip: QKClip, optimizer: CheckpointedOptimizer, *_: Any) -> None:
    qk_clip.apply(optimizer)
