"""Builds the optimizer of a run: Muon and AdamW, dense and expert, chained."""

# More than 400 lines: all that Megatron passes to its optimizers meets here, once.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from megatron_muon.megatron.entry.agreement import agree_on_settings, all_or_none, settings_of
from megatron_muon.megatron.entry.checks import check_optimizer_config
from megatron_muon.megatron.entry.messages import say
from megatron_muon.megatron.entry.split_checks import check_rows_match, check_splits
from megatron_muon.megatron.log.parameter_table import Line, adam_lines, log_parameters, muon_lines
from megatron_muon.megatron.log.start_line import RankLoad, start_lines
from megatron_muon.megatron.model.fp8_weights import check_gather
from megatron_muon.megatron.model.identity import NamedParameter, named_parameters, unwrapped, whole_model_names
from megatron_muon.megatron.model.routing import TAG, matrix_spec, uses_muon
from megatron_muon.megatron.optimizer.attention_clip import QKClip, is_clip_needed
from megatron_muon.megatron.optimizer.chain import MuonChainedOptimizer
from megatron_muon.megatron.optimizer.distributed import MuonDistributedOptimizer, plan_options
from megatron_muon.megatron.optimizer.process_grid import ProcessGrid, make_grids
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

    Collective: every rank of the world calls this. The ranks compare their settings first; then each checks its part
    of the model, and an error of one rank is raised on all of them.

    Args:
        config: As for Megatron, with `optimizer='adam'` (what the other parameters get).
        model_chunks: DDP-wrapped chunks with parameters that were tagged before wrapping.
        config_overrides: As for Megatron.
        use_gloo_process_groups: As for Megatron.
        pg_collection: As for Megatron; None takes `parallel_state`'s groups.
        dump_param_to_param_group_map: Not supported.
        muon: Muon's settings; None means Moonlight's.

    Raises:
        ValueError: If a setting or a parameter's shape is bad.
        NotImplementedError: If a valid Megatron option or model is not supported.
        RuntimeError: On every rank, if parameters were not tagged before DDP or ranks disagree.
    """
    muon = muon or MuonConfig()
    chunks = list(model_chunks)
    _check_model_class(chunks[0])
    agree_on_settings(settings_of(muon, config, chunks[0].config))
    check_optimizer_config(config, chunks[0].ddp_config)
    if dump_param_to_param_group_map is not None:
        raise NotImplementedError(
            "dump_param_to_param_group_map: got a file, expected None with Distributed Muon, since the file has no "
            "place for the two optimizers; omit it"
        )
    if config_overrides is None:
        config_overrides = get_standard_config_overrides(config)
    check_config_overrides_consistency(config, config_overrides)
    groups = ProcessGroupCollection.setup_process_groups_for_optimizer(pg_collection, chunks, use_gloo_process_groups)
    parallel = pg_collection if pg_collection is not None else ProcessGroupCollection.use_mpu_process_groups()
    families = _families(groups, parallel)
    entries = list(named_parameters(chunks))
    names = whole_model_names(chunks)
    clip: QKClip | None = None

    def check() -> _Found:
        nonlocal clip
        _check_tags(entries, muon)
        check_gather(((e.name, e.parameter) for e in entries), chunks[0].ddp_config)
        used_rows = check_splits(entries, muon, lambda expert: dist.get_world_size(families[expert].tp_group))
        clip = QKClip(chunks, names, groups["dp_cp_group"], parallel)
        present = {(f.name, f.selects(e, is_muon=True)) for e in entries for f in families if f.has(e.parameter)}
        return _Found(frozenset(present), used_rows, clip.asked, clip.clips, clip.records)

    found = all_or_none(check)
    check_rows_match(muon, (name for rank in found for name in rank.used_rows))
    assert clip is not None
    clips = is_clip_needed((rank.clip_asked, rank.clips, rank.records) for rank in found)
    builder = _Builder(
        config=config,
        chunks=chunks,
        muon=muon,
        groups=groups,
        parallel=parallel,
        entries=entries,
        names=names,
        param_groups=_get_param_groups(chunks, config, config_overrides),
        grad_scaler=_grad_scaler(config),
    )
    present = {kind for rank in found for kind in rank.present}
    return MuonChainedOptimizer(builder.build(families, present), clip if clips else None)


def _check_model_class(chunk: nn.Module) -> None:
    from megatron.core.models.mimo.model.base import MimoModel

    if isinstance(unwrapped(chunk), MimoModel):
        raise NotImplementedError(
            "model: got MimoModel, whose modules have optimizers and process groups of their own, expected one model "
            "with Distributed Muon; omit --distributed-muon, or train its modules one by one"
        )


def _check_tags(entries: Sequence[NamedParameter], muon: MuonConfig) -> None:
    wrong = [e.name for e in entries if getattr(e.parameter, TAG, None) != uses_muon(e, muon)]
    if wrong:
        raise RuntimeError(
            f"DDP wrapped {', '.join(wrong[:3])} before Muon's parameters were tagged with these settings; call "
            "megatron_muon.enable(...) before the model is built, or tag_parameters before DDP"
        )


@dataclass(frozen=True)
class _Found:
    """What a rank has found in its part of the model.

    Attributes:
        present: (family, whether Muon's) of the parameters.
        used_rows: Names of the user's rows that match any.
        clip_asked: Whether the settings ask for QK-Clip.
        clips: Whether there are weights that it may scale.
        records: Whether there is attention with logits that are read.
    """

    present: frozenset[tuple[str, bool]]
    used_rows: set[str]
    clip_asked: bool
    clips: bool
    records: bool


@dataclass(frozen=True)
class _Family:
    """Dense or expert parameters: what Megatron keeps apart for the two.

    Attributes:
        expert: Which of the two.
        tp_group: The tensor-parallel group.
        dp_group: The data- (and context-)parallel group of the optimizer instance.
        dp_group_gloo: Its Gloo double; None if there is none.
        model_parallel_group: All ranks with other parameters of the same model.
    """

    expert: bool
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_group_gloo: dist.ProcessGroup | None
    model_parallel_group: dist.ProcessGroup

    @property
    def name(self) -> str:
        return "experts" if self.expert else "dense"

    def has(self, parameter: nn.Parameter) -> bool:
        return (not getattr(parameter, "allreduce", True)) == self.expert

    def selects(self, entry: NamedParameter, *, is_muon: bool) -> bool:
        return self.has(entry.parameter) and getattr(entry.parameter, TAG) == is_muon


def _families(groups: Mapping[str, Any], parallel: ProcessGroupCollection) -> tuple[_Family, _Family]:
    """Dense and expert parameters, in this order."""
    return (
        _Family(False, parallel.tp, groups["intra_dp_cp_group"], groups["intra_dp_cp_group_gloo"], groups["mp_group"]),
        _Family(
            True,
            getattr(parallel, "expt_tp", parallel.tp),
            groups["intra_expt_dp_group"],
            groups["intra_expt_dp_group_gloo"],
            groups.get("expt_tp_pp_with_egtp_remat_group", groups.get("expt_tp_pp_group")),
        ),
    )


@dataclass(frozen=True)
class _Builder:
    """Makes the chain's optimizers, in the order dense AdamW, dense Muon, experts' AdamW, experts' Muon.

    An optimizer that any rank has parameters for is made on all ranks: the chain must be the same everywhere.
    """

    config: OptimizerConfig
    chunks: list[nn.Module]
    muon: MuonConfig
    groups: Mapping[str, Any]
    parallel: ProcessGroupCollection
    entries: list[NamedParameter]
    names: Mapping[nn.Parameter, str]
    param_groups: list[dict[str, Any]]
    grad_scaler: MegatronGradScaler | None

    def build(self, families: Sequence[_Family], present: set[tuple[str, bool]]) -> list[Any]:
        """Makes the optimizers that `present` names. Collective over the world."""
        of_muon = [family for family in families if (family.name, True) in present]
        grids = make_grids(
            {family.name: (family.tp_group, family.dp_group) for family in of_muon},
            [getattr(self.parallel, "tp_dp_cp", None)],
        )
        specs = {f.name: self._specs(f, grids[f.name]) for f in of_muon}
        adams = {f.name: self._adam(f) for f in families if (f.name, False) in present}
        muons = {f.name: self._muon(f, grids[f.name], specs[f.name]) for f in of_muon}
        # See `largest_matrix_flops`; the same on all ranks that share any.
        order = sorted(muons, key=lambda name: self._largest_flops(grids[name], specs[name]), reverse=True)
        plans = _plans({name: muons[name] for name in order}, self.muon.max_team_size)
        team_groups = make_team_groups([(plans[f.name], grids[f.name].group) for f in of_muon])
        for family, team_group in zip(of_muon, team_groups, strict=True):
            muons[family.name].bind(plans[family.name], team_group)
        if self.muon.log_params:
            self._log_parameters(families, adams, muons)
        self._announce(families, muons)
        return [made[f.name] for f in families for made in (adams, muons) if f.name in made]

    @property
    def _instance(self) -> int:
        inter = self.groups["inter_dist_opt_group"]
        return dist.get_rank(inter) if inter is not None else 0

    def _describes(self, family: _Family) -> bool:
        """Whether this rank is the first of those that share a family's parameters."""
        return not (self._instance or dist.get_rank(family.dp_group) or dist.get_rank(family.tp_group))

    def _selected(self, family: _Family, *, is_muon: bool) -> list[NamedParameter]:
        return [entry for entry in self.entries if family.selects(entry, is_muon=is_muon)]

    def _log_parameters(
        self, families: Sequence[_Family], adams: Mapping[str, Any], muons: Mapping[str, MuonDistributedOptimizer]
    ) -> None:
        """Prints the table of all parameters; each is described by the first rank of those that share it."""
        lines: list[Line] = []
        for family in filter(self._describes, families):
            if family.name in adams:
                lines += adam_lines(self._selected(family, is_muon=False), self.muon)
            if family.name in muons:
                lines += muon_lines(self._selected(family, is_muon=True), self.muon, muons[family.name])
        log_parameters(lines)

    def _announce(self, families: Sequence[_Family], muons: Mapping[str, MuonDistributedOptimizer]) -> None:
        """Prints what the run has been given, in a line (and one per pipeline stage). Collective over the world."""
        described = [family for family in families if self._describes(family)]
        own = RankLoad.of(
            stage=dist.get_rank(self.parallel.pp),
            optimizers=list(muons.values()),
            described=[muons[family.name] for family in described if family.name in muons],
            adam_parameters=sum(len(self._selected(family, is_muon=False)) for family in described),
        )
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        layout = {
            "PP": dist.get_world_size(self.parallel.pp),
            "DP": dist.get_world_size(self.groups["dp_cp_group"]),
            "TP": dist.get_world_size(self.parallel.tp),
            "EP": dist.get_world_size(self.parallel.ep) if getattr(self.parallel, "ep", None) else 1,
        }
        for line in start_lines(gathered, layout):
            say(line)

    def _param_groups(self, family: _Family, *, is_muon: bool) -> list[dict[str, Any]]:
        """Megatron's groups with only this kind's parameters. Empty groups stay: all ranks need the same ones."""
        return [
            {**group, "params": [p for p in group["params"] if getattr(p, TAG) == is_muon]}
            for group in self.param_groups
            if group["is_expert_parallel"] == family.expert
        ]

    def _wrapper_arguments(self, family: _Family, *, is_muon: bool) -> dict[str, Any]:
        """What Megatron passes to DistributedOptimizer for dense and for expert parameters."""
        attribute = "expert_parallel_buffers" if family.expert else "buffers"
        return {
            "model_chunks": self.chunks,
            "per_model_buffers": {
                index: [b for b in getattr(chunk, attribute) if getattr(b.params[0], TAG) == is_muon]
                for index, chunk in enumerate(self.chunks)
            },
            "data_parallel_group": family.dp_group,
            "data_parallel_group_gloo": family.dp_group_gloo,
            "data_parallel_group_idx": dist.get_rank(family.model_parallel_group),
            "distributed_optimizer_instance_id": self._instance,
        }

    def _adam(self, family: _Family) -> Any:
        optimizer = _get_megatron_optimizer_based_on_param_groups(
            config=self.config,
            param_groups=self._param_groups(family, is_muon=False),
            model_parallel_group=None,
            intra_dist_opt_group=self.groups["intra_dist_opt_group"],
            pg_collection=self.parallel,
            **self._wrapper_arguments(family, is_muon=False),
        )
        # Megatron makes the inner AdamW and wraps it in one call. The class with working checkpoints has no state of
        # its own and the same constructor.
        optimizer.__class__ = AdamDistributedOptimizer
        optimizer.grad_scaler = self.grad_scaler
        return optimizer

    def _muon(
        self, family: _Family, grid: ProcessGrid, specs: dict[nn.Parameter, MatrixSpec]
    ) -> MuonDistributedOptimizer:
        inner = ShardedMuon(
            self._param_groups(family, is_muon=True),
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
            grid=grid,
            names=self.names,
            **self._wrapper_arguments(family, is_muon=True),
        )
        optimizer.grad_stats_parallel_group = self.groups["intra_dist_opt_group"]
        optimizer.tp_group = self.parallel.tp
        optimizer.expert_tp_group = getattr(self.parallel, "expt_tp", self.parallel.tp)
        return optimizer

    def _specs(self, family: _Family, grid: ProcessGrid) -> dict[nn.Parameter, MatrixSpec]:
        tp_size = max(grid.tp_ranks) + 1
        return {e.parameter: matrix_spec(e, self.muon, tp_size) for e in self._selected(family, is_muon=True)}

    def _largest_flops(self, grid: ProcessGrid, specs: Mapping[nn.Parameter, MatrixSpec]) -> int:
        options = plan_options(self.muon, grid)
        return largest_matrix_flops(specs.values(), ns_steps=self.muon.ns_steps, options=options)


def _plans(muons: Mapping[str, MuonDistributedOptimizer], most: int) -> dict[str, OwnershipPlan]:
    """A plan for each optimizer, the second one around the loads of the first. Collective over their grids.

    Each attempt of the search is a gather over the second grid and one over the dense one, which has all ranks of the
    stage: experts of another expert-parallel rank are planned there. All ranks make the same attempts, since the
    search sees only what has been gathered.

    Args:
        muons: By family, the one with the largest matrix first.
        most: The largest team.
    """

    def attempt(max_team_size: int) -> tuple[dict[str, OwnershipPlan], float]:
        plans: dict[str, OwnershipPlan] = {}
        own_load = 0
        for (name, optimizer), limit in zip(muons.items(), (max_team_size, most), strict=False):
            initial = _over_grid(optimizer.grid, own_load) if plans else None
            plans[name] = optimizer.make_plan(initial, limit)
            own_load = plans[name].loads[dist.get_rank(optimizer.grid.group)]
        if len(muons) == 1:
            return plans, 1.0
        ideal = sum(plan.total_flops / plan.world_size for plan in plans.values())
        loads, ideals = zip(*_over_grid(muons["dense"].grid, (own_load, ideal)), strict=True)
        return plans, max(loads) * len(ideals) / max(sum(ideals), 1.0)

    return fewest_idle(most, attempt)


def _over_grid[T](grid: ProcessGrid, value: T) -> tuple[T, ...]:
    """The value of each rank of a grid. Collective over it."""
    gathered: list[Any] = [None] * len(grid.tp_ranks)
    dist.all_gather_object(gathered, value, group=grid.group)
    return tuple(gathered)


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
