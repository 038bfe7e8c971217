"""Parameter groups and settings of one optimizer in the form that another one's load expects.

No tensors are involved. A group keeps what identifies it (multipliers, whether it holds experts) and the values that a
schedule has set; settings that only the source's optimizer has are dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from megatron_muon.checkpoints.contents import FULLY_RESHARDABLE, optimizer_entries
from megatron_muon.state_keys import OptimizerKind

_ADAMS = frozenset(
    {
        *("betas", "eps", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
        *("decoupled_weight_decay", "bias_correction", "step"),
    }
)
_MUONS = frozenset({"momentum"})
_LOCAL = frozenset({"params", "optimizer"})
_IDENTITY = ("is_expert_parallel", "is_decoupled_lr", "wd_mult", "lr_mult", "default_config")

Group = dict[str, Any]


def converted_common(common: Mapping[str, Any], target: OptimizerKind, momentum: float) -> dict[str, Any]:
    """The common state of a checkpoint, with the optimizer's part as `target` expects it.

    Args:
        common: Common state of the source.
        target: Optimizer to convert to.
        momentum: Muon's momentum that the target records.

    Raises:
        ValueError: If the source has no groups of AdamW to take its settings from.
    """
    adam, muon, step, rest = _groups(common)
    if not adam:
        raise ValueError("the checkpoint has no parameter groups of AdamW, expected at least one; is it damaged?")
    if target == "adamw":
        optimizer = _adamw(adam, muon, step, rest)
    elif target == "distributed-muon":
        optimizer = _distributed_muon(adam, muon or adam, step, rest, momentum)
    else:
        optimizer = _megatron_muon(adam, muon or adam, step, momentum)
    content = {**(common.get("content_metadata") or {}), "distrib_optim_sharding_type": FULLY_RESHARDABLE}
    out = {**common, "optimizer": optimizer, "content_metadata": content}
    if "args" in common:
        out["args"] = _arguments(common["args"], target)
    return out


def source_momentum(common: Mapping[str, Any]) -> float | None:
    """Muon's momentum in a checkpoint of a Muon; None in another."""
    for entry in optimizer_entries(common.get("optimizer")).values():
        groups = entry["optimizer"].get("param_groups", ())
        for settings in (entry["optimizer"].get("muon", {}), *groups):
            if "momentum" in settings:
                return float(settings["momentum"])
    return None


def adam_settings(common: Mapping[str, Any]) -> tuple[tuple[float, float], int]:
    """AdamW's betas and step count."""
    adam, _, step, _ = _groups(common)
    first, second = adam[0]["betas"] if adam else (0.9, 0.999)
    return (float(first), float(second)), step


def _groups(common: Mapping[str, Any]) -> tuple[list[Group], list[Group], int, dict[str, Any]]:
    """AdamW's groups, Muon's, the number of AdamW's steps, and the gradient scaler if there is one."""
    adam: list[Group] = []
    muon: list[Group] = []
    steps: set[int] = set()
    rest: dict[str, Any] = {}
    for entry in optimizer_entries(common.get("optimizer")).values():
        inner = entry["optimizer"]
        rest |= {key: value for key, value in entry.items() if key in ("grad_scaler",)}
        if "common_step" in (inner.get("state") or {}):
            steps.add(int(inner["state"]["common_step"]))
        for group in inner.get("param_groups", ()):
            of_muon = inner.get("kind") == "muon" or "momentum" in group
            (muon if of_muon else adam).append({k: v for k, v in group.items() if k not in _LOCAL})
            if "step" in group and not of_muon:
                steps.add(int(group["step"]))
    return _unique(adam), _unique(muon), max(steps, default=0), rest


def _unique(groups: Iterable[Group]) -> list[Group]:
    found: dict[tuple[Any, ...], Group] = {}
    for group in groups:
        found.setdefault(tuple(group.get(key) for key in _IDENTITY), group)
    return list(found.values())


def _base(group: Group) -> Group:
    return {k: v for k, v in group.items() if k not in _ADAMS | _MUONS}


def _adamw(adam: list[Group], muon: list[Group], step: int, rest: dict[str, Any]) -> dict[Any, Any]:
    settings = {k: v for k, v in adam[0].items() if k in _ADAMS} | {"step": float(step)}
    groups = [{**_base(group), **settings} for group in _unique([*adam, *muon])]
    entries = []
    # Megatron chains one optimizer of dense parameters and one of experts.
    for expert in (False, True):
        own = [group for group in groups if bool(group.get("is_expert_parallel")) == expert]
        if own:
            entries.append({"optimizer": {"param_groups": own}, "param_state_sharding_type": FULLY_RESHARDABLE, **rest})
    return entries[0] if len(entries) == 1 else dict(enumerate(entries))


def _distributed_muon(
    adam: list[Group], muon: list[Group], step: int, rest: dict[str, Any], momentum: float
) -> dict[Any, Any]:
    ends = {"param_state_sharding_type": FULLY_RESHARDABLE, **rest}
    own_adam = {"kind": "adam", "param_groups": [{**group, "step": step} for group in adam]}
    own_muon = {"kind": "muon", "muon": {"momentum": momentum}, "param_groups": [_base(group) for group in muon]}
    return {0: {"optimizer": own_adam, **ends}, 1: {"optimizer": own_muon, **ends}}


def _megatron_muon(adam: list[Group], muon: list[Group], step: int, momentum: float) -> dict[Any, Any]:
    # Only matrices are in these groups, and Megatron decays all of them; only vectors are not AdamW's to decay.
    muons = [{**_base(group), "momentum": momentum} for group in muon if group.get("wd_mult", 1.0) != 0.0]
    adams = [
        {**group, "step": float(step), "optimizer": "adam"} for group in adam if not group.get("is_expert_parallel")
    ]
    # A DistributedOptimizer reads the groups' step, any other the common one; the script decides which one it is.
    others = {"state": {"common_step": torch.tensor(float(step))}, "param_groups": adams}
    return {
        0: {"optimizer": {"param_groups": muons}},
        1: {"optimizer": others, "param_state_sharding_type": FULLY_RESHARDABLE},
    }


def _arguments(args: Any, target: OptimizerKind) -> Any:
    args = copy.copy(args)
    args.optimizer = "muon" if target == "megatron-muon" else "adam"
    args.use_distributed_optimizer = target != "megatron-muon"
    args.use_layer_wise_distributed_optimizer = target == "megatron-muon"
    if target == "distributed-muon":
        args.distributed_muon = True
    elif hasattr(args, "distributed_muon"):
        del args.distributed_muon
    return args
