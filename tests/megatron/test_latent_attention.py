"""Latent attention with a norm on compressed keys and values and none on queries, for both kinds of layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

pytest.importorskip("megatron.core.transformer.mla_qk_norm_config", reason="megatron-core 0.18 needs no mending")

from megatron_muon.megatron.model import latent_attention
from megatron_muon.megatron.model.latent_attention import LatentAttention, layer_spec


def config(**settings: Any) -> Any:
    transformer = MLATransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        multi_latent_attention=True,
        transformer_impl="local",
        normalization="RMSNorm",
        add_bias_linear=False,
        **{"qk_layernorm": True, "q_lora_rank": None, **settings},
    )
    return SimpleNamespace(transformer=transformer, restore_modelopt_state=False)


def resolve(transformer: Any, submodules: Any) -> dict[str, Any]:
    attention = LatentAttention.__new__(LatentAttention)
    object.__setattr__(attention, "config", transformer)
    resolved: dict[str, Any] = attention._resolve_qk_norm_config(submodules)
    return resolved


def test_local_layers_have_one_norm() -> None:
    """Megatron's own layers refuse to be built from the same flags."""
    model = config()
    attention = layer_spec(model).submodules.self_attention
    assert attention.module is LatentAttention
    found = resolve(model.transformer, attention.submodules)
    assert found["kv_layernorm"] is attention.submodules.kv_layernorm is not IdentityOp
    assert found["q_layernorm"] is IdentityOp
    assert found["linear_q_proj"] is attention.submodules.linear_q_proj
    with pytest.raises(ValueError, match=r"q_layernorm|q_lora_rank"):
        MLASelfAttention._resolve_qk_norm_config(
            SimpleNamespace(config=model.transformer),
            attention.submodules,  # type: ignore[arg-type]
        )


def test_transformer_engines_layers_have_one_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for Transformer Engine's modules: the norm is fused with the projection after it."""
    stand_ins = SimpleNamespace(linear_impl="linear", fused_norm_linear_impl="norm and linear")
    monkeypatch.setattr(latent_attention, "QKNormConfigResolver", lambda *arguments: stand_ins)
    submodules = SimpleNamespace(kv_layernorm=IdentityOp, linear_q_proj="linear", linear_kv_up_proj=None)
    assert resolve(config().transformer, submodules) == {
        "linear_q_proj": "linear",
        "linear_q_up_proj": IdentityOp,
        "linear_kv_up_proj": "norm and linear",
        "q_layernorm": IdentityOp,
        "kv_layernorm": IdentityOp,
    }


def test_compressed_queries_keep_megatrons_norms() -> None:
    model = config(q_lora_rank=16)
    attention = layer_spec(model).submodules.self_attention
    found = resolve(model.transformer, attention.submodules)
    assert found["q_layernorm"] is attention.submodules.q_layernorm is not IdentityOp


def test_other_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = get_gpt_layer_local_spec(normalization="RMSNorm")
    monkeypatch.setattr("megatron.training.models.gpt.default_layer_spec", lambda *arguments: plain)
    assert layer_spec(config()) is plain
