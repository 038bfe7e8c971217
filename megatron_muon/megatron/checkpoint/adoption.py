"""Loads a checkpoint that another optimizer wrote, as the launch flags say, or refuses it and names the flags.

AdamW's and Distributed Muon's checkpoints differ only for Muon's parameters (the table is in `state_keys`). So to
continue AdamW's, the run reads `exp_avg` where it asks for `momentum_buffer`, and then scales it or sets it to zero.

`exp_avg` is a mean of gradients, `b*m + (1-b)*g`; `momentum_buffer` is a sum, `mu*m + g`. A constant gradient g gives
g in the first and g/(1-mu) in the second, hence the factor 1/(1-mu). A variant's second moment starts from zero, as
in a new run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

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
    """The seam around Megatron's load of any checkpoint, which looks at what legacy files gave."""
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
    """The optimizer of this run; None if the table does not have it."""
    if config is not None:
        return "distributed-muon"
    kinds: dict[str, OptimizerKind] = {"adam": "adamw", "muon": "megatron-muon"}
    return kinds.get(args.optimizer)


def _directory(load_dir: Any, iteration: int, release: bool) -> str:
    from megatron.training.checkpointing import get_checkpoint_name

    return str(get_checkpoint_name(load_dir, iteration, release, return_base_dir=True))


def _adopts(directory: str, run: OptimizerKind | None, config: MuonConfig | None) -> bool:
    """Whether a run is to continue a torch_dist checkpoint of AdamW under Distributed Muon, by its metadata.

    Raises:
        ValueError: If the checkpoint is another optimizer's and no flag says how to continue it.
        NotImplementedError: If they do, but its format has no tensors of parameters.
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
    entries = [state] if isinstance(state, Mapping) and "optimizer" in state else _members(state)
    inner = [entry["optimizer"] for entry in entries if isinstance(entry, Mapping) and "optimizer" in entry]
    if any(optimizer.get("kind") == "muon" for optimizer in inner):
        return "distributed-muon"
    groups = [group for optimizer in inner for group in optimizer.get("param_groups", ())]
    return "megatron-muon" if any("momentum" in group for group in groups) else "adamw"


def _members(state: Any) -> list[Any]:
    return list(state.values()) if isinstance(state, Mapping) else list(state)


def _check_legacy(path: str, found: OptimizerKind, run: OptimizerKind | None) -> None:
    """Raises NotImplementedError if a run is about to load legacy files that another optimizer wrote."""
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
    """Makes an optimizer's sharded state dict ask for the states in AdamW's checkpoint. Mutates it."""
    for param_state in _param_states(state):
        for states in param_state.values():
            states.pop(SECOND_MOMENT, None)
    for entry in _momenta(state):
        _, name = split_key(entry.key) or ("", "")
        entry.key = state_key(MEAN, name)


def _param_states(state: Mapping[Any, Any]) -> Iterator[Any]:
    for part in state.values():
        if isinstance(part, Mapping) and "param_state" in part:
            yield part["param_state"]


def _momenta(state: dict[Any, Any]) -> Iterator[Any]:
    """The entries of an optimizer's sharded state dict that ask for Muon's momentum in model space."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    for entry in nested_values(state):
        if (split_key(str(getattr(entry, "key", ""))) or ("",))[0] == MOMENTUM:
            yield entry


def adopted(state: dict[Any, Any], config: MuonConfig) -> dict[int, dict[str, Any]]:
    """AdamW's loaded optimizer state as the state of a chain of AdamW's and Muon's optimizers.

    Args:
        state: By position in the chain: `param_state`, where Muon's `momentum_buffer` holds what was `exp_avg`. All
            else is as AdamW saved it: of one optimizer at the top, or of a chain of another length by position.
        config: Says what becomes of `exp_avg`.

    Returns:
        By position, entries that `CheckpointedChain.load_state_dict` takes. Momentum is changed in place.
    """
    own = {key: value for key, value in state.items() if isinstance(key, int)}
    saved = [state] if "optimizer" in state else [entry for entry in own.values() if "optimizer" in entry]
    groups = [group for entry in saved for group in entry["optimizer"]["param_groups"]]
    rest = {k: v for k, v in saved[0].items() if isinstance(k, str) and k not in ("optimizer", "param_state")}

    def entry(kind: str, **own: Any) -> dict[str, Any]:
        # A variant's second moment is made below.
        made = {"muon": {"variant": config.variant}} if kind == "muon" else {}
        return {**rest, **own, "optimizer": {"kind": kind, "param_groups": groups, **made}}

    # Without parameter state: what an optimizer is told that stores nothing on this rank.
    out = {-2: entry("adam"), -1: entry("muon")}
    for at, param_state in ((at, part["param_state"]) for at, part in own.items() if "param_state" in part):
        momenta = [states[MOMENTUM] for states in param_state.values() if MOMENTUM in states]
        for momentum in momenta:
            _start(momentum, config)
        if config.variant != "muon":
            for states in (states for states in param_state.values() if MOMENTUM in states):
                states[SECOND_MOMENT] = torch.zeros_like(states[MOMENTUM], dtype=torch.float32)
        out[at] = entry("muon" if momenta else "adam", param_state=param_state)
    how = f"{MEAN} / (1 - {config.momentum})" if config.init_from_adamw == "momentum" else "zero"
    say(f"{_FLAG} {config.init_from_adamw}: the checkpoint is AdamW's; Muon's {MOMENTUM} starts from {how}")
    return out


def _start(momentum: Tensor, config: MuonConfig) -> None:
    if config.init_from_adamw == "fresh":
        momentum.zero_()
    else:
        momentum.div_(1.0 - config.momentum)
