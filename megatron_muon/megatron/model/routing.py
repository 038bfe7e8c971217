"""Which parameters are Muon's, and what logical matrices they are made of: the registry of splits, applied."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from megatron_muon.config import MuonConfig
from megatron_muon.matrices.fused import WHOLE, spec_from_split
from megatron_muon.matrices.spec import MatrixSpec
from megatron_muon.megatron.model.fp8_weights import check_kinds
from megatron_muon.megatron.model.identity import NamedParameter, named_parameters, unwrapped
from megatron_muon.megatron.model.registry import is_matrix, registry

__all__ = ["TAG", "NamedParameter", "matrix_spec", "named_parameters", "tag_parameters", "unwrapped", "uses_muon"]

# Read by Megatron's DDP: parameters with this tag get buffers of their own.
TAG = "is_managed_by_layer_wise_optimizer"


def uses_muon(entry: NamedParameter, config: MuonConfig) -> bool:
    """Whether Muon updates a parameter; AdamW does otherwise.

    Muon's are matrices that map activations to activations: no embeddings (learned positions included), no output
    layer, no vectors; see `splits.ROWS`. A parameter's own `use_muon` attribute decides over everything else.

    Raises:
        ValueError: If `use_muon` is True on what is no matrix.
        TypeError: If the parameter is complex.
    """
    parameter = entry.parameter
    if parameter.is_complex():
        raise TypeError(f"{entry.name}: got {parameter.dtype}, expected a real floating-point parameter")
    wish = getattr(parameter, "use_muon", None)
    if wish is not None:
        if wish and not is_matrix(entry):
            raise ValueError(
                f"{entry.name}: use_muon is True, but it has shape {tuple(parameter.shape)}; Muon needs a matrix"
            )
        return bool(wish)
    return registry(config.splits).row(entry).optimizer_of(config) == "muon"


def tag_parameters(model_chunks: Sequence[nn.Module], config: MuonConfig) -> None:
    """Marks Muon's parameters, so that DDP gives them buffers of their own. Call before DDP wraps the chunks.

    Args:
        model_chunks: Mutated: every trainable parameter gets the attribute that Megatron's DDP reads.
        config: Decides on routers, and names the user's rows.

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
        NotImplementedError: If tensor-parallel pieces are not to be joined and differ in their parts.
    """
    parameter = entry.parameter
    row = registry(config.splits).row(entry)
    partitioned = tp_size > 1 and getattr(parameter, "tensor_model_parallel", False)
    partition_dim = int(parameter.partition_dim) if partitioned else None  # type: ignore[attr-defined]
    return spec_from_split(
        entry.name,
        tuple(parameter.shape),
        # What `use_muon` gives to Muon against its row is not split.
        row.kind(entry).split(config) if row.optimizer_of(config) == "muon" else WHOLE,
        tp_size=tp_size,
        partition_dim=partition_dim,
        tp_joined=config.tp_mode == "exact",
    )
