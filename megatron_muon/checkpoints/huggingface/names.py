"""Which tensors of Megatron's checkpoint are which of Hugging Face's: one table, read in both directions.

No weight is permuted: Megatron rotates halves in plain attention and interleaved pairs in latent attention, and so does
Transformers in its models of the same architectures.

Sources: megatron-core 0.19.2 (`models/gpt/gpt_layer_specs.py`, `transformer/attention.py`,
`transformer/multi_latent_attention.py`, `transformer/moe/`); Transformers 5.24 (`models/{llama,qwen3,qwen3_moe,
deepseek_v3}/modeling_*.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Architecture = Literal["llama", "qwen3", "qwen3_moe", "deepseek_v3"]
# How tensors of Hugging Face's lie in one of Megatron's: alone; gate above up; Q, K and V of each query group.
Join = Literal["alone", "gated", "qkv"]


@dataclass(frozen=True)
class Block:
    """A part of a tensor in Megatron's checkpoint, and the tensors of Hugging Face's that it consists of.

    Attributes:
        key: Key in the checkpoint.
        index: Which layer and expert, where Megatron stacks them along leading axes.
        names: Names of Hugging Face's tensors.
        join: How they lie in the block.
    """

    key: str
    index: tuple[int, ...]
    names: tuple[str, ...]
    join: Join


@dataclass(frozen=True)
class Heads:
    """The rows of a fused QKV weight.

    Attributes:
        groups: Number of query groups, each with one head of keys and one of values.
        queries: Query heads in a group.
        dim: Rows of a head.
    """

    groups: int
    queries: int
    dim: int


_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_GATE_UP = ("gate_proj", "up_proj")
# Name of a layer's parameter in Megatron -> names within the layer of Hugging Face's tensors that it consists of;
# `{}` is the number of an expert. Norms stand under the names of local layers and of Transformer Engine's.
Names = Mapping[str, tuple[str, ...]]
_MLP: Names = {
    "mlp.linear_fc1.weight": tuple(f"mlp.{name}.weight" for name in _GATE_UP),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
    # Transformer Engine's layers fuse the norm into a dense MLP; local ones do not, but some are stored as if they did.
    "mlp.linear_fc1.layer_norm_weight": ("post_attention_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "input_layernorm.weight": ("input_layernorm.weight",),
}
_GROUPED_QUERY: Names = {
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "self_attention.linear_qkv.layer_norm_weight": ("input_layernorm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
_HEAD_NORMS: Names = {f"self_attention.{part}_layernorm.weight": (f"self_attn.{part}_norm.weight",) for part in "qk"}
# Queries of latent attention, without and with --q-lora-rank.
_WHOLE_QUERIES: Names = {"self_attention.linear_q_proj.weight": ("self_attn.q_proj.weight",)}
_LOW_RANK_QUERIES: Names = {
    "self_attention.linear_q_down_proj.weight": ("self_attn.q_a_proj.weight",),
    "self_attention.linear_q_up_proj.weight": ("self_attn.q_b_proj.weight",),
    "self_attention.q_layernorm.weight": ("self_attn.q_a_layernorm.weight",),
    "self_attention.linear_q_up_proj.layer_norm_weight": ("self_attn.q_a_layernorm.weight",),
}
_LATENT: Names = {
    **_WHOLE_QUERIES,
    **_LOW_RANK_QUERIES,
    "self_attention.linear_kv_down_proj.weight": ("self_attn.kv_a_proj_with_mqa.weight",),
    "self_attention.kv_layernorm.weight": ("self_attn.kv_a_layernorm.weight",),
    "self_attention.linear_kv_up_proj.layer_norm_weight": ("self_attn.kv_a_layernorm.weight",),
    "self_attention.linear_kv_up_proj.weight": ("self_attn.kv_b_proj.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
}
_EXPERTS: Names = {
    "mlp.router.weight": ("mlp.gate.weight",),
    "mlp.experts.experts.linear_fc1.weight": tuple(f"mlp.experts.{{}}.{name}.weight" for name in _GATE_UP),
    "mlp.experts.experts.linear_fc2.weight": ("mlp.experts.{}.down_proj.weight",),
}
_BIAS_AND_SHARED: Names = {
    "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",),
    "mlp.shared_experts.linear_fc1.weight": tuple(f"mlp.shared_experts.{name}.weight" for name in _GATE_UP),
    "mlp.shared_experts.linear_fc2.weight": ("mlp.shared_experts.down_proj.weight",),
}
NAMES: Mapping[Architecture, Names] = {
    "llama": {**_MLP, **_GROUPED_QUERY},
    "qwen3": {**_MLP, **_GROUPED_QUERY, **_HEAD_NORMS},
    "qwen3_moe": {**_MLP, **_GROUPED_QUERY, **_HEAD_NORMS, **_EXPERTS},
    "deepseek_v3": {**_MLP, **_LATENT, **_EXPERTS, **_BIAS_AND_SHARED},
}


def blocks_of(key: str, shape: Sequence[int], architecture: Architecture) -> Iterator[Block]:
    """What a tensor in Megatron's checkpoint consists of.

    Args:
        key: Key of a tensor of the model.
        shape: Its whole shape.
        architecture: Hugging Face's architecture.

    Raises:
        ValueError: If the architecture has no such tensor.
    """
    if key in _TOP:
        yield Block(key, (), (_TOP[key],), "alone")
        return
    found = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", key)
    name = found[2] if found else ""
    # Experts are stacked along an axis, or, with singleton_local_shards, have keys of their own.
    expert = re.search(r"(?<=experts\.experts\.)(\d+)\.", name)
    names = NAMES[architecture].get(name.replace(expert[0], "", 1) if expert else name)
    if found is None or names is None:
        raise ValueError(f"{key}: a {architecture} model of Hugging Face's has no such tensor; it cannot be exported")
    join: Join = "alone" if len(names) == 1 else "gated" if len(names) == 2 else "qkv"
    for layer in [int(found[1])] if found[1] else range(shape[0]):
        index = () if found[1] else (layer,)
        stacked = "{}" in names[0] and not expert
        for number in range(shape[len(index)]) if stacked else [int(expert[1]) if expert else 0]:
            whole = tuple(f"model.layers.{layer}.{name.format(number)}" for name in names)
            yield Block(key, (*index, number) if stacked else index, whole, join)


def keys_of(settings: Mapping[str, Any], architecture: Architecture) -> Iterator[tuple[str, bool]]:
    """The keys of a model in Megatron's checkpoint, and whether the tensor is a stack of all layers.

    Norms come under the names of local layers and of Transformer Engine's, so that both can load the checkpoint.

    Args:
        settings: The model's, by the names of Megatron's arguments.
        architecture: Hugging Face's architecture.
    """
    yield from ((key, False) for key in _TOP if key != "output_layer.weight")
    if settings["untie_embeddings_and_output_weights"]:
        yield "output_layer.weight", False
    if not settings["num_experts"]:
        yield from ((f"decoder.layers.{name}", True) for name in NAMES[architecture] if _applies(name, settings, False))
        return
    for layer, experts in enumerate(settings["moe_layer_freq"]):
        for name in NAMES[architecture]:
            if _applies(name, settings, bool(experts)):
                yield f"decoder.layers.{layer}.{name}", False


def _applies(name: str, settings: Mapping[str, Any], experts: bool) -> bool:
    """Whether a layer, with experts or without, has a parameter."""
    if name.startswith(("mlp.experts.", "mlp.router.", "mlp.shared_experts.")):
        return experts
    if name in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight"):
        return not experts
    if settings["multi_latent_attention"] and name in {**_WHOLE_QUERIES, **_LOW_RANK_QUERIES}:
        return bool(settings["q_lora_rank"]) == (name in _LOW_RANK_QUERIES)
    return True


def shapes_of(settings: Mapping[str, Any], heads: Heads | None) -> dict[str, tuple[int, ...]]:
    """Shapes of Hugging Face's tensors, by their names without layer and with `{}` for an expert's number."""
    hidden, count = settings["hidden_size"], settings["num_attention_heads"]
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (settings["vocab_size"], hidden),
        "lm_head.weight": (settings["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if heads is not None:
        queries, keys = heads.groups * heads.queries * heads.dim, heads.groups * heads.dim
        out |= {f"self_attn.{part}_proj.weight": (rows, hidden) for part, rows in zip("qkv", (queries, keys, keys))}
        out |= {"self_attn.o_proj.weight": (hidden, queries)}
        out |= {f"self_attn.{part}_norm.weight": (heads.dim,) for part in "qk"}
    else:
        nope, rope, value = settings["qk_head_dim"], settings["qk_pos_emb_head_dim"], settings["v_head_dim"]
        rank, q_rank = settings["kv_lora_rank"], settings["q_lora_rank"] or 0
        out |= {
            "self_attn.q_proj.weight": (count * (nope + rope), hidden),
            "self_attn.q_a_proj.weight": (q_rank, hidden),
            "self_attn.q_a_layernorm.weight": (q_rank,),
            "self_attn.q_b_proj.weight": (count * (nope + rope), q_rank),
            "self_attn.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
            "self_attn.kv_a_layernorm.weight": (rank,),
            "self_attn.kv_b_proj.weight": (count * (nope + value), rank),
            "self_attn.o_proj.weight": (hidden, count * value),
        }
    widths = {"mlp.": settings["ffn_hidden_size"]}
    if experts := settings["num_experts"]:
        out |= {"mlp.gate.weight": (experts, hidden), "mlp.gate.e_score_correction_bias": (experts,)}
        widths["mlp.experts.{}."] = settings["moe_ffn_hidden_size"]
        widths["mlp.shared_experts."] = settings["moe_shared_expert_intermediate_size"] or 0
    for prefix, width in widths.items():
        out |= {f"{prefix}{name}.weight": (width, hidden) for name in _GATE_UP}
        out[f"{prefix}down_proj.weight"] = (hidden, width)
    return out


def generic(name: str) -> str:
    """A tensor's name without its layer, and with `{}` for an expert's number."""
    return re.sub(r"(?<=experts\.)\d+(?=\.)", "{}", re.sub(r"^model\.layers\.\d+\.", "", name))


def separated(block: Tensor, join: Join, heads: Heads | None) -> list[Tensor]:
    """Hugging Face's tensors in a block of Megatron's; `heads` is needed for `qkv`."""
    if join == "alone":
        return [block]
    if join == "gated":
        return list(block.chunk(2))
    assert heads is not None
    rows = block.view(heads.groups, heads.queries + 2, heads.dim, -1)
    parts = rows[:, : heads.queries], rows[:, heads.queries : -1], rows[:, -1:]
    return [part.reshape(-1, block.shape[-1]) for part in parts]


def joined(parts: Sequence[Tensor], join: Join, heads: Heads | None) -> Tensor:
    """The inverse of `split`."""
    if join == "alone":
        return parts[0]
    if join == "gated":
        return torch.cat(tuple(parts))
    assert heads is not None
    rows = [part.view(heads.groups, -1, heads.dim, part.shape[-1]) for part in parts]
    return torch.cat(rows, dim=1).reshape(-1, parts[0].shape[-1])
