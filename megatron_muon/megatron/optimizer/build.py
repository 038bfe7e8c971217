"""Builds the optimizer of a run: Muon and AdamW, dense and expert, chained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer import (
    OptimizerConfig,
    _get_megatron_optimizer_based_on_param_groups,
    _get_param_groups,
    check_config_overrides_consistency,
    get_standard_config_overrides,
)
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_muon.config import MuonConfig
from megatron_muon.exchange.team_groups import make_team_groups
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.megatron.checkpoint.sharded_states import AdamDistributedOptimizer
from megatron_muon.megatron.entry.agreement import agree_on_settings, settings_of
from megatron_muon.megatron.entry.checks import check_optimizer_config
from megatron_muon.megatron.entry.split_checks import check_splits
from megatron_muon.megatron.log.parameter_table import Line, adam_lines, log_parameters, muon_lines
from megatron_muon.megatron.model.fp8_weights import gather_problem
from megatron_muon.megatron.model.identity import NamedParameter, named_parameters, whole_model_names
from megatron_muon.megatron.model.routing import TAG, matrix_spec, uses_muon
from megatron_muon.megatron.optimizer.attention_clip import make_qk_clip
from megatron_muon.megatron.optimizer.chain import MuonChainedOptimizer
from megatron_muon.megatron.optimizer.distributed import (
    Grid,
    MuonDistributedOptimizer,
    plan_options,
)
from megatron_muon.megatron.optimizer.grid import make_grid
from megatron_muon.optimizer.sharded_muon import ShardedMuon
from megatron_muon.plan.build import OwnershipPlan, fewest_idle, largest_matrix_flops


def get_megatron_optimizer(
    config: OptimizerConfig,
    model_chunks: Sequence[nn.Module],
    config_overrides: dict[Any, Any] | None = None,
    use_gloo_process_groups: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    dump_param_to_param_group_map: str | None = None,
    *,
    muon: MuonConfig | None = None,
) -> MuonChainedOptimizer:
    """Megatron-Core's `get_megatron_optimizer` with Muon for the matrices.

    Collective: every rank of the world calls this.

    Args:
        config: As for Megatron, with `optimizer='adam'` (what the other parameters get).
        model_chunks: DDP-wrapped chunks whose parameters were tagged before wrapping.
        config_overrides: As for Megatron.
        use_gloo_process_groups: As for Megatron.
        pg_collection: As for Megatron; None takes `parallel_state`'s groups.
        dump_param_to_param_group_map: Not supported.
        muon: Muon's settings; None means Moonlight's.

    Raises:
        ValueError: If a setting or a parameter's shape is bad.
        NotImplementedError: If a valid Megatron option is not supported.
        RuntimeError: On every rank, if parameters were not tagged before DDP or ranks disagree.
    """
    muon = muon or MuonConfig()
    chunks = list(model_chunks)
    agree_on_settings(settings_of(muon, config, chunks[0].config))
    check_optimizer_config(config, chunks[0].ddp_config)
    if dump_param_to_param_group_map is not None:
        raise NotImplementedError(
            "dump_param_to_param_group_map is not supported with Distributed Muon; leave it unset"
        )
    if config_overrides is None:
        config_overrides = get_standard_config_overrides(config)
    check_config_overrides_consistency(config, config_overrides)
    entries = list(named_parameters(chunks))
    problem = gather_problem(((e.name, e.parameter) for e in entries), chunks[0].ddp_config)
    _check_model(entries, muon, problem)

    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(pg_collection, chunks, use_gloo_process_groups)
    parallel = pg_collection if pg_collection is not None else ProcessGroupCollection.use_mpu_process_groups()
    builder = _Builder(
        config=config,
        chunks=chunks,
        muon=muon,
        groups=groups,
        parallel=parallel,
        entries=entries,
        param_groups=_get_param_groups(chunks, config, config_overrides),
        grad_scaler=_grad_scaler(config),
    )
    qk_clip = make_qk_clip(chunks, builder.names, groups["dp_cp_group"], parallel)
    return MuonChainedOptimizer(builder.build(), qk_clip)


class _Builder:
    """Makes the chain's optimizers: {dense, expert} x {AdamW, Muon}, those that any rank has parameters for."""

    def __init__(
        self,
        config: OptimizerConfig,
        chunks: list[nn.Module],
        muon: MuonConfig,
        groups: dict[str, Any],
        parallel: ProcessGroupCollection,
        entries: list[NamedParameter],
        param_groups: list[dict[str, Any]],
        grad_scaler: MegatronGradScaler | None,
    ) -> None:
        self.config, self.chunks, self.muon = config, chunks, muon
        self.groups, self.parallel = groups, parallel
        self.entries, self.param_groups, self.grad_scaler = entries, param_groups, grad_scaler
        inter = groups["inter_dist_opt_group"]
        self.instance_id = dist.get_rank(inter) if inter is not None else 0
        self._grids: dict[bool, Grid] = {}
        self.names = whole_model_names(chunks)

    def build(self) -> list[Any]:
        check_splits(self.entries, self.muon, lambda expert: dist.get_world_size(self._tp_group(expert)))
        present = _present_anywhere([self._selected(expert, is_muon) for expert, is_muon in _KINDS])
        built: dict[tuple[bool, bool], Any] = {kind: self._adam(kind[0]) for kind in sorted(present) if not kind[1]}
        muons = sorted(expert for expert, is_muon in present if is_muon)
        for expert in muons:
            self._grid(expert)  # collective over the world, hence in this order
        specs = {expert: self._specs(expert) for expert in muons}
        built.update({(expert, True): self._muon(expert, specs[expert]) for expert in muons})
        # See `largest_matrix_flops`.
        order = sorted(muons, key=lambda expert: self._largest_flops(expert, specs[expert]), reverse=True)
        plans = self._plans({expert: built[expert, True] for expert in order})
        team_groups = make_team_groups([(plans[expert], self._grid(expert).group) for expert in muons])
        for expert, team_group in zip(muons, team_groups, strict=True):
            built[expert, True].bind(plans[expert], team_group)
        if self.muon.log_params:
            self._log_parameters(built)
        return [built[kind] for kind in _KINDS if kind in built]

    def _log_parameters(self, built: dict[tuple[bool, bool], Any]) -> None:
        """Prints the table of all parameters; each is described by the first rank of those that share it."""
        lines: list[Line] = []
        for (expert, is_muon), optimizer in built.items():
            data_parallel = self._wrapper_arguments(expert, is_muon)["data_parallel_group"]
            if self.instance_id or dist.get_rank(data_parallel) or dist.get_rank(self._tp_group(expert)):
                continue
            own = self._selected(expert, is_muon)
            lines += muon_lines(own, self.muon, optimizer) if is_muon else adam_lines(own, self.muon)
        log_parameters(lines)

    def _selected(self, expert: bool, is_muon: bool) -> list[NamedParameter]:
        return [
            e
            for e in self.entries
            if getattr(e.parameter, TAG) == is_muon and (not getattr(e.parameter, "allreduce", True)) == expert
        ]

    def _param_groups(self, expert: bool, is_muon: bool) -> list[dict[str, Any]]:
        """Megatron's groups with only this kind's parameters. Empty groups stay: all ranks need the same ones."""
        return [
            {**group, "params": [p for p in group["params"] if getattr(p, TAG) == is_muon]}
            for group in self.param_groups
            if group["is_expert_parallel"] == expert
        ]

    def _buffers(self, expert: bool, is_muon: bool) -> dict[int, list[Any]]:
        attribute = "expert_parallel_buffers" if expert else "buffers"
        return {
            index: [b for b in getattr(chunk, attribute) if getattr(b.params[0], TAG) == is_muon]
            for index, chunk in enumerate(self.chunks)
        }

    def _wrapper_arguments(self, expert: bool, is_muon: bool) -> dict[str, Any]:
        """What Megatron passes to DistributedOptimizer for dense and for expert parameters."""
        model_parallel = self.groups["expt_tp_pp_with_egtp_remat_group" if expert else "mp_group"]
        return {
            "model_chunks": self.chunks,
            "per_model_buffers": self._buffers(expert, is_muon),
            "data_parallel_group": self.groups["intra_expt_dp_group" if expert else "intra_dp_cp_group"],
            "data_parallel_group_gloo": self.groups["intra_expt_dp_group_gloo" if expert else "intra_dp_cp_group_gloo"],
            "data_parallel_group_idx": dist.get_rank(model_parallel),
            "distributed_optimizer_instance_id": self.instance_id,
        }

    def _adam(self, expert: bool) -> Any:
        optimizer = _get_megatron_optimizer_based_on_param_groups(
            config=self.config,
            param_groups=self._param_groups(expert, False),
            model_parallel_group=None,
            intra_dist_opt_group=self.groups["intra_dist_opt_group"],
            pg_collection=self.parallel,
            **self._wrapper_arguments(expert, False),
        )
        # Megatron makes the inner AdamW and wraps it in one call. The class with working checkpoints has no state of
        # its own and the same constructor.
        optimizer.__class__ = AdamDistributedOptimizer
        optimizer.grad_scaler = self.grad_scaler
        return optimizer

    def _muon(self, expert: bool, specs: dict[nn.Parameter, MatrixSpec]) -> MuonDistributedOptimizer:
        inner = ShardedMuon(
            self._param_groups(expert, True),
            lr=self.config.lr if self.config.lr is not None else 0.0,
            weight_decay=self.config.weight_decay,
            config=self.muon,
        )
        optimizer = MuonDistributedOptimizer(
            inner,
            self.config,
            self.grad_scaler,
            _init_state,
            specs=specs,
            grid=self._grid(expert),
            names=self.names,
            **self._wrapper_arguments(expert, True),
        )
        optimizer.grad_stats_parallel_group = self.groups["intra_dist_opt_group"]
        optimizer.tp_group = self.parallel.tp
        optimizer.expert_tp_group = self._tp_group(True)
        return optimizer

    def _specs(self, expert: bool) -> dict[nn.Parameter, MatrixSpec]:
        tp_size = max(self._grid(expert).tp_ranks) + 1
        return {e.parameter: matrix_spec(e, self.muon, tp_size) for e in self._selected(expert, True)}

    def _tp_group(self, expert: bool) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self.parallel.tp
        return getattr(self.parallel, "expt_tp", group) if expert else group

    def _grid(self, expert: bool) -> Grid:
        """The grid of a kind. Collective over the world at its first call for each kind."""
        if expert in self._grids:
            return self._grids[expert]
        dp_group = self.groups["intra_expt_dp_group" if expert else "intra_dp_cp_group"]
        self._grids[expert] = make_grid(self._tp_group(expert), dp_group)
        return self._grids[expert]

    def _largest_flops(self, expert: bool, specs: dict[nn.Parameter, MatrixSpec]) -> int:
        """Of the largest matrix of a kind; the same on all ranks that share any."""
        options = plan_options(self.muon, self._grid(expert))
        return largest_matrix_flops(specs.values(), ns_steps=self.muon.ns_steps, options=options)

    def _plans(self, muons: dict[bool, MuonDistributedOptimizer]) -> dict[bool, OwnershipPlan]:
        """A plan for each of the optimizers, in the order in which they are to be made. Collective over the grids."""
        most = self.muon.max_team_size

        def attempt(max_team_size: int) -> tuple[dict[bool, OwnershipPlan], float]:
            plans: dict[bool, OwnershipPlan] = {}
            own_load = 0
            for (expert, optimizer), limit in zip(muons.items(), (max_team_size, most), strict=False):
                initial = self._over_grid(expert, own_load) if plans else None
                plans[expert] = optimizer.make_plan(initial, limit)
                own_load = plans[expert].loads[dist.get_rank(optimizer.grid.group)]
            if len(muons) == 1:
                return plans, 1.0
            # The dense matrices' grid has all ranks of the stage; experts of another expert-parallel rank are planned
            # there.
            loads = self._over_grid(False, own_load)
            ideals = self._over_grid(False, sum(plan.total_flops / plan.world_size for plan in plans.values()))
            return plans, max(loads) * len(ideals) / max(sum(ideals), 1.0)

        return fewest_idle(most, attempt)

    def _over_grid(self, expert: bool, value: float) -> tuple[float, ...]:
        """The value of each rank of a grid. Collective over it."""
        grid = self._grid(expert)
        gathered: list[Any] = [None] * len(grid.tp_ranks)
        dist.all_gather_object(gathered, value, group=grid.group)
        return tuple(gathered)


_KINDS = ((False, False), (False, True), (True, False), (True, True))


def _init_state(optimizer: ShardedMuon, config: OptimizerConfig | None = None) -> None:
    optimizer.init_state()


def _grad_scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    """Megatron's own choice: a constant scale if given, else a dynamic one for fp16 alone."""
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


def _check_model(entries: list[NamedParameter], muon: MuonConfig, problem: str | None) -> None:
    """Raises on every rank if any rank has `problem`, or parameters not tagged before DDP made its buffers."""
    wrong = [e.name for e in entries if getattr(e.parameter, TAG, None) != uses_muon(e, muon)]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (wrong[:3], problem))
    for rank, (names, found) in enumerate(gathered):
        if found:
            raise ValueError(f"on global rank {rank}, {found}")
        if names:
            raise RuntimeError(
                f"on global rank {rank}, DDP wrapped {', '.join(names)} before Muon's parameters were tagged with "
                "these settings; call megatron_muon.enable(...) before the model is built, or tag_parameters before DDP"
            )


def _present_anywhere(selections: list[list[NamedParameter]]) -> set[tuple[bool, bool]]:
    """The kinds that any rank of the world has parameters of; a chain's optimizers must be the same on all."""
    flags = [bool(selected) for selected in selections]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, flags)
    return {kind for index, kind in enumerate(_KINDS) if any(row[index] for row in gathered)}
