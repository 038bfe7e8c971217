"""Starts Distributed Muon from a checkpoint of AdamW, as the launch flags say; refuses those of other optimizers.

The checkpoints of AdamW and of Distributed Muon differ only in the states of Muon's parameters (see `state_keys`). To
start from AdamW's, the run reads `exp_avg` into `momentum_buffer`, and then scales it or sets it to zero.

`exp_avg` is a mean of gradients, `b*m + (1-b)*g`; `momentum_buffer` is a sum, `mu*m + g`. A constant gradient g gives
g in the first and g/(1-mu) in the second, hence the factor 1/(1-mu). A variant's second moment starts from zero, as
in a new run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_muon.checkpoints.contents import optimizer_entries
from megatron_muon.config import MuonConfig
from megatron_muon.megatron.entry.active import active_config
from megatron_muon.megatron.entry.checks import check_checkpoint_step, check_variant
from megatron_muon.megatron.entry.messages import say
from megatron_muon.state_keys import (
    MEAN,
    MOMENTUM,
    SECOND_MOMENT,
    OptimizerKind,
    kind_by_states,
    split_key,
    state_key,
    states_among,
)

_FLAG = "--muon-init-from-adamw"
_NAMES: dict[OptimizerKind, str] = {
    "adamw": "AdamW",
    "megatron-muon": "Megatron's Muon",
    "distributed-muon": "Distributed Muon",
}
_RESUME: dict[OptimizerKind, str] = {
    "adamw": "omit --distributed-muon and --optimizer muon",
    "megatron-muon": "use --optimizer muon without --distributed-muon",
    "distributed-muon": "add --distributed-muon",
}


def load_global_dist_base_checkpoint(
    original: Callable[..., Any],
    load_dir: Any,
    args: Any,
    rank0: bool,
    sharded_state_dict: Any,
    iteration: int,
    release: bool,
    **rest: Any,
) -> Any:
    """The seam around Megatron's load of a torch_dist checkpoint."""
    config = active_config()
    adopts = False
    if not rank0 and "optimizer" in (sharded_state_dict or {}):
        adopts = _adopts(_directory(load_dir, iteration, release), _kind_of_run(args, config), config)
    if adopts:
        _ask_for_adamws(sharded_state_dict["optimizer"])
    state, *others = original(load_dir, args, rank0, sharded_state_dict, iteration, release, **rest)
    if adopts:
        assert config is not None
        state["optimizer"] = adopted(state["optimizer"], config)
    return (state, *others)


def load_base_checkpoint(
    original: Callable[..., Any], load_dir: Any, args: Any, rank0: bool = False, *rest: Any, **named: Any
) -> Any:
    """The seam around Megatron's load of any checkpoint: checks which optimizer wrote legacy files."""
    from megatron.training.checkpointing import CheckpointType

    state, name, release, found = original(load_dir, args, rank0, *rest, **named)
    loads_optimizer = not (rank0 or release or args.finetune or args.no_load_optim)
    if found is CheckpointType.LEGACY and loads_optimizer and "optimizer" in state:
        config = active_config()
        if config is not None:
            check_checkpoint_step(args, legacy=True)
        _check_legacy(str(name), _legacy_kind(state["optimizer"]), _kind_of_run(args, config))
    return state, name, release, found


def _kind_of_run(args: Any, config: MuonConfig | None) -> OptimizerKind | None:
    """The optimizer of this run; None if it is not one of `OptimizerKind`."""
    if config is not None:
        return "distributed-muon"
    kinds: dict[str, OptimizerKind] = {"adam": "adamw", "muon": "megatron-muon"}
    return kinds.get(args.optimizer)


def _directory(load_dir: Any, iteration: int, release: bool) -> str:
    from megatron.training.checkpointing import get_checkpoint_name

    return str(get_checkpoint_name(load_dir, iteration, release, return_base_dir=True))


def _adopts(directory: str, run: OptimizerKind | None, config: MuonConfig | None) -> bool:
    """Whether Distributed Muon starts from this torch_dist checkpoint of AdamW. Reads only its metadata.

    Raises:
        ValueError: If another optimizer wrote the checkpoint and no flag says how to continue.
        NotImplementedError: If a flag does, but the checkpoint has flat buckets instead of a tensor per parameter.
    """
    from megatron.core.dist_checkpointing import load_tensors_metadata

    per_parameter, in_buckets = states_among(load_tensors_metadata(directory))
    states = per_parameter | in_buckets
    found = kind_by_states(states)
    if found is None or run is None:
        return False
    if found == run:
        if config is not None:
            check_variant(config.variant if SECOND_MOMENT in states else "muon", config.variant)
        return False
    if config is None or found != "adamw":
        raise ValueError(
            f"{directory}: got a checkpoint of {_NAMES[found]}, expected one of {_NAMES[run]}; {_RESUME[found]} to "
            f"resume it, or convert it (python -m megatron_muon convert SRC DST --from {found} --to {run}), or add "
            "--no-load-optim to keep the weights alone"
        )
    if config.init_from_adamw == "refuse":
        raise ValueError(
            f"{directory}: got a checkpoint of AdamW alone, expected one of Distributed Muon; add {_FLAG} momentum to "
            f"start Muon's momentum from {MEAN}, {_FLAG} fresh to start it from zero (both keep the other parameters' "
            "state), or --no-load-optim to drop all optimizer state"
        )
    if MEAN not in per_parameter:
        raise NotImplementedError(
            f"{directory}: {_FLAG} {config.init_from_adamw}: got optimizer state in flat buckets (dp_reshardable), "
            "expected one tensor per parameter; resume it once with AdamW and --dist-ckpt-optim-fully-reshardable, and "
            "continue what that saves"
        )
    return True


def _legacy_kind(state: Any) -> OptimizerKind:
    """The optimizer that wrote the state in a legacy file."""
    inner = [entry["optimizer"] for entry in optimizer_entries(state).values() if "optimizer" in (entry or {})]
    if any(optimizer.get("kind") == "muon" for optimizer in inner):
        return "distributed-muon"
    groups = [group for optimizer in inner for group in optimizer.get("param_groups", ())]
    return "megatron-muon" if any("momentum" in group for group in groups) else "adamw"


def _check_legacy(path: str, found: OptimizerKind, run: OptimizerKind | None) -> None:
    """Raises NotImplementedError if another optimizer wrote the legacy files that a run loads."""
    if run is None or found == run:
        return
    onward = f"continue what that saves with {_FLAG} momentum or fresh"
    if run != "distributed-muon" or found != "adamw":
        onward = f"convert what that saves (python -m megatron_muon convert SRC DST --from {found} --to {run})"
    raise NotImplementedError(
        f"{path}: got legacy files (--ckpt-format torch) of {_NAMES[found]}, expected a torch_dist checkpoint to "
        f"continue with {_NAMES[run]}; resume it once as {_NAMES[found]} with --ckpt-format torch_dist "
        f"--dist-ckpt-optim-fully-reshardable --save NEW, and {onward}; or add --no-load-optim to keep the weights "
        "alone"
    )


def _ask_for_adamws(state: dict[Any, Any]) -> None:
    """Changes an optimizer's sharded state dict so that it loads AdamW's states. Mutates it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    for part in (part for part in state.values() if isinstance(part, Mapping)):
        for states in part.get("param_state", {}).values():
            states.pop(SECOND_MOMENT, None)
    for entry in nested_values(state):
        found = split_key(str(getattr(entry, "key", "")))
        if found and found[0] == MOMENTUM:
            entry.key = state_key(MEAN, found[1])


def adopted(state: dict[Any, Any], config: MuonConfig) -> dict[int, dict[str, Any]]:
    """AdamW's loaded optimizer state as the state of a chain of AdamW's and Muon's optimizers.

    Args:
        state: Position in the chain -> `param_state`, in which Muon's `momentum_buffer` holds AdamW's `exp_avg`. All
            other entries are AdamW's: of a single optimizer at the top, or of a chain, which may be shorter.
        config: Muon's settings; `init_from_adamw` says how momentum starts.

    Returns:
        Position -> entry, for `CheckpointedChain.load_state_dict`. Momentum is changed in place.
    """
    own = {key: value for key, value in state.items() if isinstance(key, int)}
    saved = [entry for entry in optimizer_entries(state).values() if "optimizer" in entry]
    groups = [group for entry in saved for group in entry["optimizer"]["param_groups"]]
    rest = {k: v for k, v in saved[0].items() if isinstance(k, str) and k not in ("optimizer", "param_state")}

    def entry(kind: str, **own: Any) -> dict[str, Any]:
        made = {"muon": {"variant": config.variant}} if kind == "muon" else {}
        return {**rest, **own, "optimizer": {"kind": kind, "param_groups": groups, **made}}

    # For optimizers that store nothing on this rank.
    out = {-2: entry("adam"), -1: entry("muon")}
    for at, param_state in ((at, part["param_state"]) for at, part in own.items() if "param_state" in part):
        of_muon = [states for states in param_state.values() if MOMENTUM in states]
        for states in of_muon:
            if config.init_from_adamw == "fresh":
                states[MOMENTUM].zero_()
            else:
                states[MOMENTUM].div_(1.0 - config.momentum)
            if config.variant != "muon":
                states[SECOND_MOMENT] = torch.zeros_like(states[MOMENTUM], dtype=torch.float32)
        out[at] = entry("muon" if of_muon else "adam", param_state=param_state)
    how = f"{MEAN} / (1 - {config.momentum})" if config.init_from_adamw == "momentum" else "zero"
    say(f"{_FLAG} {config.init_from_adamw}: the checkpoint is AdamW's; Muon's {MOMENTUM} starts from {how}")
    return out
