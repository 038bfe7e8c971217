"""Names of parameters in the whole model: the same on whichever rank, stage or chunk a parameter lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from torch import nn

from megatron_muon.megatron.routing import named_parameters, unwrapped


def whole_model_names(model_chunks: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    """Name of each trainable parameter, with numbers of layers and experts in the model instead of on the rank.

    Args:
        model_chunks: May be wrapped.
    """
    out: dict[nn.Parameter, str] = {}
    for chunk in model_chunks:
        by_module = dict(unwrapped(chunk).named_modules())
        for entry in named_parameters([chunk]):
            out[entry.parameter] = _whole_name(entry.name, by_module)
    return out


def _whole_name(name: str, modules: dict[str, nn.Module]) -> str:
    local = name.split(".")
    parts = list(local)
    for at in range(1, len(local)):
        module = modules[".".join(local[:at])]
        number = getattr(module, "layer_number", None)
        if isinstance(number, int) and local[at - 1].isdigit():
            parts[at - 1] = str(number - 1)
        if isinstance(module, SequentialMLP) and local[at] == "local_experts":
            parts[at + 1] = str(_first_expert(module, len(module.local_experts)) + int(local[at + 1]))
        if isinstance(module, TEGroupedMLP) and local[-1].startswith("weight") and local[-1][6:].isdigit():
            parts[-1] = f"weight{_first_expert(module, module.num_local_experts) + int(local[-1][6:])}"
    return ".".join(parts)


def _first_expert(module: nn.Module, local: int) -> int:
    group: Any = module.ep_group
    return int(group.rank()) * local
