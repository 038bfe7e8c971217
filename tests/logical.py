"""The logical matrices of whole parameters, written down independently of the product's code."""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import Any

from megatron_muon.config import MuonConfig
from megatron_muon.rule.reference import Logical
from tests.models import MIXER_SIZES, Place


def runs(start: int, *sizes: int) -> list[list[int]]:
    """Consecutive rows of these sizes, from `start` on."""
    return [list(range(a, b)) for a, b in pairwise(accumulate(sizes, initial=start))]


def joined(matrices: list[list[int]]) -> list[int]:
    return [row for rows in matrices for row in rows]


def of_kinds(labels: str, matrices: list[list[int]], kinds: str, apart: bool) -> list[Logical]:
    """Matrices whose labels are given, in the order of `kinds`; apart, or those of a kind as one."""
    chosen: list[Logical] = []
    for kind in kinds:
        own = [matrix for label, matrix in zip(labels, matrices, strict=True) if label == kind]
        chosen += own if apart else [joined(own)]
    return chosen


def qkv(config: Any, mode: str) -> list[Logical] | None:
    if mode == "none":
        return None
    queries = config.num_attention_heads // config.num_query_groups
    gates = queries if config.attention_output_gate else 0
    heads = ("q" * queries + "g" * gates + "kv") * config.num_query_groups
    rows = runs(0, *[config.kv_channels] * len(heads))
    kinds = "qgkv" if gates else "qkv"
    if mode == "group":
        # The heads of a kind follow each other within a group.
        by_group: list[Logical] = []
        per_group = len(heads) // config.num_query_groups
        for kind in kinds:
            for first in range(0, len(heads), per_group):
                own = range(first, first + per_group)
                by_group.append(joined([rows[head] for head in own if heads[head] == kind]))
        return by_group
    return of_kinds(heads, rows, kinds, apart=mode == "head")


def latent(name: str, config: Any, mode: str) -> list[Logical] | None:
    heads, nope, rope = config.num_attention_heads, config.qk_head_dim, config.qk_pos_emb_head_dim
    value, rank = config.v_head_dim, config.kv_lora_rank
    if "linear_qkv_down_proj" in name:
        query = config.q_lora_rank
        return list(runs(0, query, rank + rope) if mode == "none" else runs(0, query, rank, rope))
    if mode == "none" or "linear_q_down_proj" in name:
        return None
    if "linear_kv_down_proj" in name:
        return list(runs(0, rank, rope))
    if "linear_proj" in name:
        everything = list(range(config.hidden_size))
        columns = [slice(at, at + value) for at in range(0, heads * value, value)]
        return [(everything, own) for own in columns] if mode == "head" else None
    second = rope if "linear_q" in name else value
    return of_kinds("ab" * heads, runs(0, *[nope, second] * heads), "ab", apart=mode == "head")


def logical_matrices(place: Place, config: Any, muon: MuonConfig) -> list[Logical] | None:
    """Of a whole parameter under a run's settings; None if it is one."""
    rows, name = place.shape[0], place.name
    if place.parameter.dim() == 3 and len(place.shape) == 2:
        per_expert = rows // config.num_moe_experts
        parts = [per_expert // 2] * 2 if "linear_fc1" in name else [per_expert]
        return list(runs(0, *parts * config.num_moe_experts))
    if re.search(r"linear_qkv\.weight$", name):
        return qkv(config, muon.qkv_split)
    if re.search(r"linear_fc1\.weight\d*$", name):
        return [list(range(rows // 2)), list(range(rows // 2, rows))]
    if "mixer.in_proj" in name:
        return list(runs(0, *MIXER_SIZES.values()))
    if re.search(r"self_attention\.linear_.*weight$", name) and config.multi_latent_attention:
        return latent(name, config, muon.mla_split)
    return None


def is_muons(place: Place, muon: MuonConfig) -> bool:
    """Whether a parameter is Muon's: what no row gives to AdamW, and no user's row to Muon."""
    if "mixer.in_proj" in place.name:
        return bool(muon.splits)
    return len(place.shape) == 2 and not re.search(r"embedding|output_layer|\.delta\.", place.name)
