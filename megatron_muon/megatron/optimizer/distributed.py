"""Muon inside Megatron-Core's DistributedOptimizer, and the chain that steps it beside AdamW."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import distrib_optimizer
from torch import nn

from megatron_muon.config import MuonConfig
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.megatron.checkpoint.sharded_states import CheckpointedOptimizer, report_changes
from megatron_muon.megatron.entry.checks import check_variant
from megatron_muon.megatron.optimizer.process_grid import ProcessGrid
from megatron_muon.optimizer.element_states import elementwise, from_elements
from megatron_muon.optimizer.sharded_muon import ShardedMuon
from megatron_muon.plan.build import CostModel, OwnershipPlan, PlanOptions, ShardedMatrix, Slice, build_plan
from megatron_muon.plan.links_file import load_links
from megatron_muon.plan.shards import shard_ranges

# What says how a run began, what it logs or checks, does not change how it goes on.
_NOT_IN_CHECKPOINTS = frozenset(
    {
        "init_from_adamw",
        "links",
        "log_interval",
        "log_params",
        "metrics_dir",
        "profile",
        "profile_dir",
        "verify_checkpoint",
        "verify_saves",
    }
)


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def plan_options(muon: MuonConfig, grid: ProcessGrid) -> PlanOptions:
    """What plans are made with on this machine."""
    links = load_links(muon.links) if muon.links else None
    return PlanOptions.from_config(muon, CostModel.for_device(_device().type, links), grid.node_of)


@contextmanager
def _any_optimizer_accepted() -> Iterator[None]:
    """Lets DistributedOptimizer of megatron-core 0.18 be made, which asserts that its inner optimizer is an Adam."""
    adam = distrib_optimizer.Adam
    distrib_optimizer.Adam = torch.optim.Optimizer
    try:
        yield
    finally:
        distrib_optimizer.Adam = adam


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
        grid: ProcessGrid,
        names: Mapping[nn.Parameter, str] | None = None,
        **kwargs: Any,
    ) -> None:
        with _any_optimizer_accepted():
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

    def bind(self, plan: OwnershipPlan, team_group: dist.ProcessGroup | None = None) -> None:
        """Gives the inner optimizer its plan and its slices. Collective over the grid; see `ShardedMuon.bind`."""
        main_slices = self._main_slices()
        index_of = {parameter: index for index, parameter in enumerate(self._specs)}
        self.optimizer.bind(
            plan,
            self.grid.group,
            {index_of[parameter]: main for parameter, main in main_slices.items()},
            _device(),
            {index_of[parameter]: name for parameter, name in self._names.items() if parameter in index_of},
            team_group,
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
                shard_numel = bucket.grad_data.numel() // size
                for parameter in bucket.params_list:
                    begin, end, _ = buffer.param_index_map[parameter]
                    ranges = shard_ranges(begin - bucket.offset, end - bucket.offset, shard_numel)
                    out[parameter] = {dp_rank: (start, stop) for dp_rank, start, stop in ranges}
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
        inner, main = self.optimizer, tensors["param"]
        for key in tensors.keys() & set(inner.state_keys):
            tensors[key] = elementwise(inner.state[main][key], key, inner.elements_of(main), inner.muon)
        return tensors

    def _set_main_param_and_optimizer_states(self, model_param: nn.Parameter, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        inner = self.optimizer
        for key in inner.state_keys:
            if key in tensors:
                inner.state[main][key].copy_(from_elements(tensors[key], key, inner.elements_of(main), inner.muon))
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
