"""Latent attention with a norm on the compressed keys and values and none on the queries, as Moonlight's.

megatron-core 0.19 takes `--qk-layernorm` for both norms at once. Without compressed queries (no `--q-lora-rank`) its
Transformer Engine layers then put a norm before `linear_q_proj`, which no published model has, and its local layers
refuse to be built. Moonlight and DeepSeek-V2-Lite have the norm on compressed keys and values alone. In Megatron:

    --qk-layernorm --spec megatron_muon.megatron.model.latent_attention layer_spec

With `--q-lora-rank`, and for layers without latent attention, the layers are Megatron's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

try:
    from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
except ModuleNotFoundError as error:  # megatron-core 0.18, whose layers need no mending
    if error.name != "megatron.core.transformer.mla_qk_norm_config":
        raise


class LatentAttention(MLASelfAttention):
    """`MLASelfAttention` in which queries have a norm only if they are compressed."""

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        """Which modules the norms and the projections after them are; called while the attention is built.

        megatron-core 0.18 does not call it: its layers have no norm on queries that are not compressed.
        """
        if self.config.q_lora_rank is not None or not self.config.qk_layernorm:
            return super()._resolve_qk_norm_config(submodules)
        resolver = QKNormConfigResolver(self.config, submodules)
        norm = submodules.kv_layernorm or IdentityOp
        # Without a norm of its own, as in Transformer Engine's layers, it is fused with the projection after it.
        fused = resolver.fused_norm_linear_impl if norm is IdentityOp else None
        return {
            "linear_q_proj": submodules.linear_q_proj or resolver.linear_impl,
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": fused or submodules.linear_kv_up_proj or resolver.linear_impl,
            "q_layernorm": IdentityOp,
            "kv_layernorm": norm,
        }


def layer_spec(config: Any, vp_stage: int | None = None) -> Any:
    """Megatron's layers for a model, with `LatentAttention` in the place of `MLASelfAttention`.

    Args:
        config: Megatron's `GPTModelConfig`.
        vp_stage: Virtual pipeline stage of the layers.

    Returns:
        What `--spec` expects: a specification of one layer or of a block of layers.
    """
    from megatron.training.models.gpt import default_layer_spec

    spec = default_layer_spec(config, vp_stage)
    if isinstance(spec, ModuleSpec):
        return _with_latent_attention(spec)
    return replace(spec, layer_specs=[_with_latent_attention(layer) for layer in spec.layer_specs])


def _with_latent_attention(layer: ModuleSpec) -> ModuleSpec:
    submodules = layer.submodules
    if not isinstance(submodules, TransformerLayerSubmodules):
        return layer
    attention = submodules.self_attention
    if not isinstance(attention, ModuleSpec) or attention.module is not MLASelfAttention:
        return layer
    return replace(layer, submodules=replace(submodules, self_attention=replace(attention, module=LatentAttention)))
