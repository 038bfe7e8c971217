"""The parameters of model chunks with what they are: their modules, and their names on the rank and in the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from torch import nn


@dataclass(frozen=True)
class NamedParameter:
    """A trainable parameter with its name in the model chunks and the modules around it.

    Attributes:
        name: Without the wrappers' prefixes; with the chunk's number if there are several chunks.
        parameter: The parameter.
        module: The module that has it as a direct attribute.
        parent: The module around `module`; None at the top.
        whole_name: The name in the whole model, with numbers of layers and experts in the model instead of on the
            rank: the same in every layout.
    """

    name: str
    parameter: nn.Parameter
    module: nn.Module
    parent: nn.Module | None
    whole_name: str


def named_parameters(model_chunks: Sequence[nn.Module]) -> Iterator[NamedParameter]:
    """Trainable parameters of all chunks, each once, in the order of `named_parameters()` of the chunks."""
    seen: set[nn.Parameter] = set()
    for index, chunk in enumerate(model_chunks):
        model = unwrapped(chunk)
        prefix = f"chunk{index}." if len(model_chunks) > 1 else ""
        modules = dict(model.named_modules())
        for module_name, module in modules.items():
            parent = modules[module_name.rpartition(".")[0]] if module_name else None
            for own_name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    name = f"{module_name}.{own_name}" if module_name else own_name
                    yield NamedParameter(f"{prefix}{name}", parameter, module, parent, _whole_name(name, modules))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and Float16Module, which hold it as `module`."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def whole_model_names(model_chunks: Sequence[nn.Module]) -> dict[nn.Parameter, str]:
    """Name in the whole model of each trainable parameter.

    Args:
        model_chunks: May be wrapped.
    """
    return {entry.parameter: entry.whole_name for entry in named_parameters(model_chunks)}


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
