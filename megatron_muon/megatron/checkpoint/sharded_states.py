"""Checkpointed optimizer state: what Megatron's DistributedOptimizer saves and loads, for Muon and for AdamW.

Two of Megatron's formats are supported. `fully_reshardable` holds one tensor per parameter and state, of the whole
parameter's shape, under `optimizer.state.<state>.<model key>`: `param` and `momentum_buffer` for Muon's matrices,
`param`, `exp_avg` and `exp_avg_sq` for AdamW's. Any layout can load it. `dp_reshardable` holds the flat buckets; only
the data-parallel size may change.

`CheckpointedOptimizer` mends what keeps stock megatron-core 0.19 from loading what it saved:

| defect | where |
|---|---|
| tensors past the first bucket are cut from the wrong place | `sharded_param_state_fully_reshardable` |
| a data-parallel rank whose part of a bucket is all padding is refused | `sharded_param_state_dp_reshardable` |
| fp32 parameters cannot be loaded from `dp_reshardable` and legacy files | `_set_main_param_and_optimizer_states` |
| without TE or apex, a rank that stores nothing, or has not stepped yet, has no `step` to report | `state_dict` |
| without TE or apex, all parameters of a loaded optimizer count up one shared `step` | `load_state_dict` |
| without TE or apex, `step` is looked up where the format has none, or reset | `_set_main_param_and_optimizer_states` |
| a changed learning rate makes the parameter groups of the checkpoint unfindable | `load_state_dict` |
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
from megatron.core.optimizer.optimizer import ChainedOptimizer, param_group_identifier_keys
from torch import Tensor, nn

from megatron_muon.checkpoints.contents import optimizer_entries
from megatron_muon.megatron.checkpoint.state_keys_018 import check_format, distributed_optimizer
from megatron_muon.megatron.entry.messages import say

# Settings that a schedule changes at every step; a group's other settings are this run's.
_SCHEDULED = ("lr", "weight_decay")
# What identifies a group, the most important first.
_STRUCTURE = ("is_expert_parallel", "is_decoupled_lr", "wd_mult", "lr_mult", "default_config", "optimizer")


class CheckpointedOptimizer(distributed_optimizer()):  # type: ignore[misc]
    """DistributedOptimizer that saves and loads without the defects named in the module's table."""

    kind: Literal["muon", "adam"]

    # Successful updates of this optimizer; a rank that stores nothing cannot read them from any state.
    _updates = 0

    def step_with_ready_grads(self) -> bool:
        """As for DistributedOptimizer; counts."""
        success = bool(super().step_with_ready_grads())
        self._updates += success
        return success

    def _state_dtype(self, key: str) -> torch.dtype:
        """The dtype of a state tensor, or of "param", in a checkpoint."""
        return torch.float32

    def _shared_state(self) -> dict[str, Any]:
        """Settings that go into a checkpoint beside the parameter groups."""
        # The groups hold the value that the schedule has changed.
        return {"settings": {"weight_decay": self.config.weight_decay}}

    def state_dict(self) -> dict[str, Any]:
        """Everything but parameters and their state tensors: the groups and the gradient scaler.

        Issues no collective: Megatron asks only some of the ranks.

        Raises:
            RuntimeError: If parameters of this rank have been updated different numbers of times.
        """
        inner = self.optimizer.state_dict()
        step = self._step()
        groups = []
        for group in inner["param_groups"]:
            kept = {k: v for k, v in group.items() if k != "params"}
            # Kept per group, as Megatron does it, for readers that expect it.
            groups.append({**kept, "step": step} if self.kind == "adam" else kept)
        out: dict[str, Any] = {"optimizer": {**self._shared_state(), "kind": self.kind, "param_groups": groups}}
        if self.grad_scaler:
            out["grad_scaler"] = self.grad_scaler.state_dict()
        return out

    def _step(self) -> int:
        """How often this rank's parameters have been updated."""
        # torch's Adam counts per parameter, TE's and apex's per group.
        counters = self.optimizer.state.values() if not HAVE_APEX_OR_TE else self.optimizer.param_groups
        counted = {int(counter["step"]) for counter in counters if "step" in counter and counter.get("params", True)}
        if len(counted) > 1:
            raise RuntimeError(
                f"AdamW's parameters have been updated {sorted(counted)} times, expected one number; a checkpoint "
                "holds one step count. Load the last good checkpoint"
            )
        return next(iter(counted), self._updates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` or `sharded_state_dict` returned.

        Of the parameter groups only the update count and what a schedule sets (lr, weight_decay) is restored. All other
        settings are this run's, so that changed flags take effect; what differs from the checkpoint is printed.
        """
        saved = state_dict["optimizer"]
        if not _schedule_from_checkpoint():
            report_changes(saved.get("settings", {}), CheckpointedOptimizer._shared_state(self)["settings"])
        groups = restored_groups(self.optimizer.param_groups, saved["param_groups"], self.kind)
        steps = {int(group["step"]) for group in groups if "step" in group}
        if steps:
            self._updates = max(steps)
        super().load_state_dict({**state_dict, "optimizer": {"param_groups": groups}})
        if HAVE_APEX_OR_TE:
            return
        # torch's Adam counts in its states. Megatron gives all of them one tensor, which every parameter's update would
        # count up, and leaves a number in the groups, which none does.
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
        for group in self.optimizer.param_groups:
            group.pop("step", None)

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(self, model_param: nn.Parameter, tensors: dict[str, Any]) -> None:
        # Megatron's own writes into fp32 parameters under autograd in some formats. It also copies torch's `step`:
        # missing in one format, in another that of before the load.
        super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": None})

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[int, dict[str, Any]] | None:
        """One tensor per parameter and state, of the parameter's shape, sharded as the model's own entry is.

        Collective over the data-parallel group unless `is_loading`: flat shards are gathered to its ranks.

        Args:
            model_sharded_state_dict: The model's, made with the parameters themselves as data.
            is_loading: Whether the tensors are to be filled by a load.
            metadata: Megatron's; `distrib_optim_fully_reshardable_mem_efficient` gathers to one rank, over Gloo.

        Returns:
            Running number of the parameter over the buffers -> state -> sharded tensor, as
            `load_parameter_state_from_fully_reshardable` expects it; None on a rank that saves nothing.

        Raises:
            ValueError: If a parameter is missing in `model_sharded_state_dict`.
            NotImplementedError: With megatron-core 0.18.
        """
        check_format()
        efficient = bool((metadata or {}).get("distrib_optim_fully_reshardable_mem_efficient", False))
        whole_buffers = self.get_parameter_state_dp_zero(
            use_gloo_comm=efficient, empty_data=is_loading, return_on_all_ranks=is_loading or not efficient
        )
        if whole_buffers is None:
            return None
        entries = _entries_by_parameter(model_sharded_state_dict)
        out: dict[int, dict[str, Any]] = {}
        for index, buffer in enumerate(self.buffers):
            (states,) = whole_buffers[index].values()
            for parameter, (start, stop) in _unpadded_ranges(buffer):
                entry = entries.get(parameter)
                if entry is None:
                    raise ValueError(
                        f"sharded_state_dict: a parameter of shape {tuple(parameter.shape)} is not in the model's "
                        "sharded state dict; make that with keep_vars=True (Megatron's sharded_state_dict does) from "
                        "the model this optimizer was built for"
                    )
                out[len(out)] = {
                    state: _state_entry(
                        entry, state, tensor[start:stop].view(parameter.shape).to(self._state_dtype(state))
                    )
                    for state, tensor in states.items()
                    if isinstance(tensor, Tensor)
                }
        return out

    def get_parameter_state_dp_reshardable(self) -> dict[Any, Any]:
        """Megatron's own; an empty part of a bucket gets a placeholder, so that its padding is still covered."""
        state: dict[Any, Any] = super().get_parameter_state_dp_reshardable()
        for index in range(len(self.gbuf_ranges)):
            for bucket in (bucket for buckets in state[index].values() for bucket in buckets if not bucket):
                empty = {key: torch.empty(0) for key in ("param", *self.optimizer_state_keys)}
                bucket.append({**empty, "gbuf_local_start": 0, "gbuf_local_end": 0, "padding": True})
        return state

    def sharded_param_state_dp_reshardable(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[Any, Any]:
        """Megatron's own, without the placeholders, which are no part of any tensor.

        Lists become dicts by position: a load drops empty lists, and what follows would move up.
        """
        state: dict[Any, Any] = super().sharded_param_state_dp_reshardable(
            model_sharded_state_dict, is_loading, metadata
        )
        for index in range(len(self.gbuf_ranges)):
            state[index] = {
                dtypes: {
                    number: {at: entry for at, entry in enumerate(bucket) if entry["param"].data.numel() > 0}
                    for number, bucket in enumerate(buckets)
                }
                for dtypes, buckets in state[index].items()
            }
        return state

    def load_parameter_state_from_dp_reshardable(self, state_dict: dict[Any, Any]) -> None:
        """Megatron's own, for the lists of `get_parameter_state_dp_reshardable` and the dicts made of them above."""
        state = dict(state_dict)
        for index, ranges in enumerate(self.gbuf_ranges):
            ((dtypes, buckets),) = ranges.items()
            loaded = state.get(index, {}).get(dtypes, {})
            state[index] = {dtypes: [_entries_of_bucket(loaded, number) for number in range(len(buckets))]}
        super().load_parameter_state_from_dp_reshardable(state)


class AdamDistributedOptimizer(CheckpointedOptimizer):
    """Megatron's DistributedOptimizer with AdamW, with checkpoints that load."""

    kind = "adam"


class CheckpointedChain(ChainedOptimizer):
    """ChainedOptimizer that loads the checkpoint of a chain of another length.

    With expert parallelism of one, experts are dense parameters to Megatron and the chain has no optimizers for them.
    """

    def load_state_dict(self, state_dict: Any) -> None:
        """Loads what `sharded_state_dict` or `state_dict` returned, or a load has made of it.

        Args:
            state_dict: Of a single optimizer, or by position in the chain. An entry may lack all but the parameter
                state; the rest then comes from an entry of an optimizer of the same kind.

        Raises:
            ValueError: If the checkpoint has no optimizer of a kind that this run has.
        """
        entries = optimizer_entries(state_dict)
        for position, optimizer in enumerate(self.chained_optimizers):
            own = entries.get(position, {})
            shared = _entry_of_kind(entries, position, optimizer.kind)
            optimizer.load_state_dict({**shared, **{k: v for k, v in own.items() if k.startswith("param_state")}})


def _entry_of_kind(entries: Mapping[int, dict[str, Any]], position: int, kind: str) -> dict[str, Any]:
    """A checkpoint's entry for an optimizer of this kind, without parameter state: preferably that of `position`."""
    for at in (position, *sorted(entries)):
        entry = entries.get(at, {})
        if entry.get("optimizer", {}).get("kind") == kind:
            return {k: v for k, v in entry.items() if k != "param_state"}
    found = sorted({str(entry["optimizer"].get("kind")) for entry in entries.values() if "optimizer" in entry})
    raise ValueError(
        f"the checkpoint's optimizers are {', '.join(found) or 'none'}, expected one of kind {kind}; load it "
        "with --no-load-optim"
    )


# Megatron's flags for settings that have another name in parameter groups.
_FLAGS = {
    "max_lr": "--lr",
    "betas": "--adam-beta1 and --adam-beta2",
    "eps": "--adam-eps",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
}


def report_changes(saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> None:
    """Prints on rank 0, once each, the settings of this run that differ from those of a checkpoint.

    Args:
        saved: Settings of the checkpoint by name. Settings that it lacks are not reported.
        current: Settings of this run.
        prefix: Prefix of the flags that the names do not have.
    """
    for key in sorted(saved.keys() & current.keys()):
        if not _equal(saved[key], current[key]):
            flag = _FLAGS.get(key, f"--{prefix}{key.replace('_', '-')}")
            say(f"{flag}: {saved[key]} -> {current[key]}: this run continues with another value than the checkpoint's")


def _entries_by_parameter(model_sharded_state_dict: dict[str, Any]) -> dict[Any, ShardedTensor | ShardedTensorFactory]:
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    return {entry.data: entry for entry in nested_values(sharded)}


def _entries_of_bucket(loaded: Any, number: int) -> list[dict[str, Any]]:
    """The states of the parameters in a bucket, in the bucket's order. A load drops buckets without parameters."""
    bucket = loaded.get(number, {}) if isinstance(loaded, Mapping) else loaded[number]
    entries = [entry for _, entry in sorted(bucket.items())] if isinstance(bucket, Mapping) else bucket
    return [{"padding": False, **entry} for entry in entries]


def _unpadded_ranges(buffer: Any) -> Iterator[tuple[nn.Parameter, tuple[int, int]]]:
    """Yields each parameter of a buffer with its range in the buffer without padding after each bucket.

    Megatron joins a buffer's shards without that padding, but `param_index_map` counts it.
    """
    shifts, joined = [], 0
    for bucket in buffer.buckets:
        shifts.append(joined - bucket.offset)
        joined += bucket.numel_unpadded
    for parameter, (start, stop, bucket_id) in buffer.param_index_map.items():
        yield parameter, (start + shifts[bucket_id], stop + shifts[bucket_id])


def _state_entry(entry: ShardedTensor | ShardedTensorFactory, state: str, tensor: Tensor) -> Any:
    changes: dict[str, Any] = {"key": f"optimizer.state.{state}.{entry.key}", "data": tensor}
    if isinstance(entry, ShardedTensor):
        changes["dtype"] = tensor.dtype
    return dataclasses.replace(entry, **changes)


def restored_groups(
    current: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], kind: str
) -> list[dict[str, Any]]:
    """This run's parameter groups with the progress of a checkpoint's.

    Args:
        current: Groups of this run.
        saved: Groups of the checkpoint, in any order.
        kind: Optimizer of the groups, for messages.

    Returns:
        Groups without parameters, in the order of `current`, with this run's settings; lr, weight_decay and step are
        those of the most similar saved group. Settings that differ from that group are printed.

    Raises:
        ValueError: If the checkpoint has no groups.
    """
    if not saved:
        raise ValueError(
            f"the checkpoint has no parameter groups of {kind}; load it with --no-load-optim to start a new state"
        )
    scheduled = (*_SCHEDULED, *_schedule_from_checkpoint())
    out = []
    for group in current:
        match = max(saved, key=lambda other: [_same(group, other, key) for key in _STRUCTURE])
        merged = {k: v for k, v in group.items() if k != "params"}
        alike = all(_same(group, match, key) for key in _STRUCTURE)
        merged |= {key: match[key] for key in ("step", *(scheduled if alike else ())) if key in match}
        old, new = ({k: v for k, v in g.items() if k in _COMPARED} for g in (match, merged))
        report_changes(old, new)
        out.append(merged)
    return out


# Settings of a group that are reported if they differ: Adam's, and those that identify the group.
_COMPARED = frozenset(param_group_identifier_keys) | {"betas", "eps", "decoupled_weight_decay"}


def _same(group: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    return _equal(group.get(key, group.get(f"pre_{key}")), other.get(key, other.get(f"pre_{key}")))


def _equal(a: Any, b: Any) -> bool:
    # A checkpoint may hold lists where torch has tuples.
    return (tuple(a) == tuple(b)) if isinstance(a, list | tuple) and isinstance(b, list | tuple) else bool(a == b)


def _schedule_from_checkpoint() -> tuple[str, ...]:
    """The keys of groups that --use-checkpoint-opt_param-scheduler takes from the checkpoint."""
    state = sys.modules.get("megatron.training.global_vars")
    args = getattr(state, "_GLOBAL_ARGS", None)
    if not getattr(args, "use_checkpoint_opt_param_scheduler", False):
        return ()
    return ("max_lr", "min_lr", "start_wd", "end_wd")
