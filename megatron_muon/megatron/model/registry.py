"""The registry of splits: one row per kind of parameter, saying whose it is and what logical matrices it is made of.

Rows of the same priority exclude each other. The built-in ones have priority 0, those for all that is left -1, and a
user's own (`split_file`) 1 or more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, Literal

from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from torch import nn
from torch.nn.modules.conv import _ConvNd

from megatron_muon.config import MuonConfig
from megatron_muon.matrices.fused import WHOLE, FusedQkv, GatedMlp, LatentDown, LatentOutput, LatentUp, WeightKind
from megatron_muon.matrices.user_rows import SplitRow, load_split_rows
from megatron_muon.megatron.model.identity import NamedParameter

Optimizer = Literal["muon", "adam"]


@dataclass(frozen=True)
class KnownWeights:
    """A kind of parameter.

    Attributes:
        name: For tables and messages.
        matches: Whether a parameter is of the kind.
        kind: How such a parameter is made of logical matrices, if it is Muon's.
        optimizer: Whose it is; a function of the settings where these decide.
        priority: Of the rows that match a parameter, those of the highest count.
    """

    name: str
    matches: Callable[[NamedParameter], bool]
    kind: Callable[[NamedParameter], WeightKind] = lambda entry: WHOLE
    optimizer: Optimizer | Callable[[MuonConfig], Optimizer] = "muon"
    priority: int = 0

    def optimizer_of(self, config: MuonConfig) -> Optimizer:
        """Whose parameters of the kind are in a run with these settings."""
        return self.optimizer(config) if callable(self.optimizer) else self.optimizer


def is_stack(entry: NamedParameter) -> bool:
    """Whether a parameter is (experts, rows, cols): the weights of all of a rank's experts in one tensor."""
    return entry.parameter.dim() == 3 and isinstance(entry.parent, TEGroupedMLP)


def is_matrix(entry: NamedParameter) -> bool:
    """Whether a parameter is a matrix or a stack of them."""
    return entry.parameter.dim() == 2 or is_stack(entry)


def _inside(parent: type[nn.Module] | tuple[type[nn.Module], ...], *modules: str) -> Callable[[NamedParameter], bool]:
    """Matches the matrices of `modules`, attributes of a module of class `parent`."""

    def matches(entry: NamedParameter) -> bool:
        return (
            is_matrix(entry)
            and isinstance(entry.parent, parent)
            and any(entry.module is getattr(entry.parent, module, None) for module in modules)
        )

    return matches


def _is_embedding(entry: NamedParameter) -> bool:
    # Learned position embeddings do not have Megatron's mark.
    marked = getattr(entry.parameter, "is_embedding_or_output_parameter", False)
    return is_matrix(entry) and (marked or isinstance(entry.module, nn.Embedding))


def _is_convolution(entry: NamedParameter) -> bool:
    weight = entry.name.rpartition(".")[2]
    return isinstance(entry.module, _ConvNd) or (isinstance(entry.module, MambaMixer) and weight.startswith("conv1d"))


def _is_gated_mlp(entry: NamedParameter) -> bool:
    parent: Any = entry.parent
    return _inside((MLP, TEGroupedMLP), "linear_fc1")(entry) and bool(parent.config.gated_linear_unit)


def _config(entry: NamedParameter) -> Any:
    return entry.parent.config  # type: ignore[union-attr]


def _fused_qkv(entry: NamedParameter) -> WeightKind:
    config = _config(entry)
    queries = config.num_attention_heads // config.num_query_groups
    return FusedQkv.of_heads(queries, config.kv_channels, bool(getattr(config, "attention_output_gate", False)))


def _gated_mlp(entry: NamedParameter) -> WeightKind:
    # Some kernels want gate and up interleaved in blocks; each expert kind has its own setting.
    shared = "shared_experts" in entry.name
    size = getattr(_config(entry), f"moe_{'shared_expert' if shared else 'mlp'}_glu_interleave_size", None)
    return GatedMlp(size if size and (shared or isinstance(entry.parent, TEGroupedMLP)) else None)


def _latent_query(entry: NamedParameter) -> WeightKind:
    config = _config(entry)
    return LatentUp((("q_nope", config.qk_head_dim), ("q_rope", config.qk_pos_emb_head_dim)))


def _latent_key_value(entry: NamedParameter) -> WeightKind:
    config = _config(entry)
    return LatentUp((("k_nope", config.qk_head_dim), ("v", config.v_head_dim)))


def _latent_down(entry: NamedParameter) -> WeightKind:
    config = _config(entry)
    fused = entry.module is getattr(entry.parent, "linear_qkv_down_proj", None)
    return LatentDown(config.kv_lora_rank, config.qk_pos_emb_head_dim, config.q_lora_rank if fused else 0)


def _latent_output(entry: NamedParameter) -> WeightKind:
    return LatentOutput(_config(entry).v_head_dim)


ROWS: tuple[KnownWeights, ...] = (
    KnownWeights("embedding or output", _is_embedding, optimizer="adam"),
    KnownWeights(
        "router", lambda entry: isinstance(entry.module, Router) and is_matrix(entry), optimizer=lambda c: c.router
    ),
    KnownWeights("convolution", _is_convolution, optimizer="adam"),
    # [z, x, B, C, dt] and [query, key, value, z, beta, alpha]: fused in ways of their own, and trained with AdamW by
    # their authors. A row of the user's gives them to Muon.
    KnownWeights("Mamba in_proj", _inside(MambaMixer, "in_proj"), optimizer="adam"),
    KnownWeights("GatedDeltaNet", _inside(GatedDeltaNet, "in_proj", "out_proj"), optimizer="adam"),
    KnownWeights("fused QKV", _inside(SelfAttention, "linear_qkv"), _fused_qkv),
    KnownWeights("gated MLP", _is_gated_mlp, _gated_mlp),
    KnownWeights("MLA query", _inside(MultiLatentAttention, "linear_q_proj", "linear_q_up_proj"), _latent_query),
    KnownWeights("MLA key-value", _inside(MultiLatentAttention, "linear_kv_up_proj"), _latent_key_value),
    KnownWeights(
        "MLA down",
        _inside(MultiLatentAttention, "linear_kv_down_proj", "linear_qkv_down_proj"),
        _latent_down,
    ),
    KnownWeights("MLA output", _inside(MultiLatentAttention, "linear_proj"), _latent_output),
    # All else: output projections, second weights of MLPs, experts, MTP's projection, and what users add to a model.
    KnownWeights("matrix", is_matrix, priority=-1),
    KnownWeights("no matrix", lambda entry: not is_matrix(entry), optimizer="adam", priority=-1),
)


def _users(row: SplitRow) -> KnownWeights:
    return KnownWeights(
        row.name,
        lambda entry: fnmatchcase(entry.whole_name, row.match),
        lambda entry: row.split,
        row.optimizer,
        row.priority,
    )


class Registry:
    """The rows of a run: the user's and the built-in ones.

    Args:
        user_rows: The user's.
    """

    def __init__(self, user_rows: tuple[SplitRow, ...] = ()) -> None:
        self.user_rows = user_rows
        self.rows = (*map(_users, user_rows), *ROWS)

    def matching(self, entry: NamedParameter) -> list[KnownWeights]:
        """The rows of the highest priority that match a parameter; one, unless rows overlap."""
        found = [row for row in self.rows if row.matches(entry)]
        top = max(row.priority for row in found)
        return [row for row in found if row.priority == top]

    def by_name(self, name: str) -> KnownWeights:
        """The row of a name."""
        return next(row for row in self.rows if row.name == name)

    def row(self, entry: NamedParameter) -> KnownWeights:
        """The row of a parameter; the first if rows overlap."""
        return self.matching(entry)[0]


@cache
def registry(path: str) -> Registry:
    """The registry with the rows of a file, read once per process; an empty path has none.

    Raises:
        ValueError: If the file cannot be read or a row is bad.
    """
    return Registry(load_split_rows(path) if path else ())
