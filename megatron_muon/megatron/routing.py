"""Which parameters are Muon's, and what logical matrices Megatron's fused weights are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.router import Router
from torch import nn

from megatron_muon.config import MuonConfig
from megatron_muon.matrices import MatrixSpec, Part, gated, interleaved, whole
from megatron_muon.megatron.fp8 import check_kinds

# Read by Megatron's DDP: parameters with this tag get buffers of their own.
TAG = "is_managed_by_layer_wise_optimizer"


@dataclass(frozen=True)
class NamedParameter:
    """A trainable parameter with its name in the model chunks and the modules around it.

    Attributes:
        name: Without the wrappers' prefixes; with the chunk's number if there are several chunks.
        parameter: The parameter.
        module: The module that has it as a direct attribute.
        parent: The module around `module`; None at the top.
    """

    name: str
    parameter: nn.Parameter
    module: nn.Module
    parent: nn.Module | None


def named_parameters(model_chunks: Sequence[nn.Module]) -> Iterator[NamedParameter]:
    """Trainable parameters of all chunks, each once, in the order of `named_parameters()` of the chunks."""
    seen: set[nn.Parameter] = set()
    for index, chunk in enumerate(model_chunks):
        model = unwrapped(chunk)
        prefix = f"chunk{index}." if len(model_chunks) > 1 else ""
        modules = dict(model.named_modules())
        for module_name, module in modules.items():
            parent = modules[module_name.rpartition(".")[0]] if module_name else None
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    yield NamedParameter(
                        f"{prefix}{module_name}.{name}" if module_name else f"{prefix}{name}", parameter, module, parent
                    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and Float16Module, which hold it as `module`."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def uses_muon(entry: NamedParameter, config: MuonConfig) -> bool:
    """Whether Muon updates a parameter; AdamW does otherwise.

    Muon's are matrices that map activations to activations: no embeddings (learned positions included), no output
    layer, no vectors. A parameter's own `use_muon` attribute decides over everything else.

    Raises:
        ValueError: If `use_muon` is True on what is no matrix.
        TypeError: If the parameter is complex.
    """
    parameter = entry.parameter
    if parameter.is_complex():
        raise TypeError(f"{entry.name}: got {parameter.dtype}, expected a real floating-point parameter")
    wish = getattr(parameter, "use_muon", None)
    if wish is not None:
        if wish and parameter.dim() != 2:
            raise ValueError(
                f"{entry.name}: use_muon is True, but it has shape {tuple(parameter.shape)}; Muon needs a matrix"
            )
        return bool(wish)
    if parameter.dim() != 2:
        return False
    if getattr(parameter, "is_embedding_or_output_parameter", False) or isinstance(entry.module, nn.Embedding):
        return False
    if isinstance(entry.module, Router):
        return config.router == "muon"
    return True


def tag_parameters(model_chunks: Sequence[nn.Module], config: MuonConfig) -> None:
    """Marks Muon's parameters, so that DDP gives them buffers of their own. Call before DDP wraps the chunks.

    Args:
        model_chunks: Mutated: every trainable parameter gets the attribute that Megatron's DDP reads.
        config: Decides on routers.

    Raises:
        NotImplementedError: If parameters are quantized in a way that Muon's buffers cannot hold.
    """
    tagged = [(entry, uses_muon(entry, config)) for entry in named_parameters(model_chunks)]
    check_kinds((entry.name, entry.parameter, is_muon) for entry, is_muon in tagged)
    for entry, is_muon in tagged:
        setattr(entry.parameter, TAG, is_muon)


def matrix_spec(entry: NamedParameter, config: MuonConfig, tp_size: int) -> MatrixSpec:
    """How a parameter of Muon's is made of logical matrices.

    Args:
        entry: The parameter.
        config: Which fused weights are split, and whether tensor-parallel pieces are joined.
        tp_size: Size of the tensor-parallel group that the parameter belongs to (an expert's own for experts).

    Raises:
        ValueError: If a fused weight's shape does not divide into its parts.
    """
    parameter = entry.parameter
    rows, cols = parameter.shape
    partitioned = tp_size > 1 and getattr(parameter, "tensor_model_parallel", False)
    return MatrixSpec(
        name=entry.name,
        shape=(rows, cols),
        tp_size=tp_size,
        partition_dim=int(parameter.partition_dim) if partitioned else None,  # type: ignore[attr-defined]
        parts=_parts(entry, config, rows),
        tp_joined=config.tp_mode == "exact",
    )


def _parts(entry: NamedParameter, config: MuonConfig, rows: int) -> tuple[Part, ...]:
    parent: Any = entry.parent
    if config.split_qkv and isinstance(parent, SelfAttention) and entry.module is parent.linear_qkv:
        return _qkv_parts(entry.name, rows, parent.config)
    is_mlp = isinstance(parent, MLP | TEGroupedMLP)
    if config.split_gated and is_mlp and entry.module is parent.linear_fc1 and parent.config.gated_linear_unit:
        # Some kernels want gate and up interleaved in blocks; each expert kind has its own setting.
        shared = "shared_experts" in entry.name
        size = getattr(parent.config, f"moe_{'shared_expert' if shared else 'mlp'}_glu_interleave_size", None)
        if size and (shared or isinstance(parent, TEGroupedMLP)):
            return interleaved(entry.name, rows, (size, size), ("gate", "up"))
        return gated(entry.name, rows)
    return whole(rows)


def _qkv_parts(name: str, rows: int, config: Any) -> tuple[Part, ...]:
    """Megatron stores, per query group: its query heads, (their output gates,) one key head, one value head."""
    query = config.num_attention_heads // config.num_query_groups * config.kv_channels
    if getattr(config, "attention_output_gate", False):
        sizes, labels = (query, query, config.kv_channels, config.kv_channels), ("q", "gate", "k", "v")
    else:
        sizes, labels = (query, config.kv_channels, config.kv_channels), ("q", "k", "v")  # type: ignore[assignment]
    return interleaved(name, rows, sizes, labels)
