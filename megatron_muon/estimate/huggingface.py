"""Reads a model's matrices from the fields of a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_muon.estimate.models import Layer, MatrixShape, Model
from megatron_muon.matrices.fused import WHOLE, FusedQkv, GatedMlp, LatentDown, LatentOutput, LatentUp, WeightKind


class _Config:
    """A config.json with fields that are checked when they are read."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.name = name
        self._fields = fields

    def size(self, field: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            ValueError: If the field is missing and has no default, or its value is no positive integer.
        """
        value = self._fields.get(field, default)
        if value is None and field not in self._fields:
            raise ValueError(f"{self.name}: has no {field!r}, which a {self.get('model_type')} model needs")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.name}: {field}: got {value!r}, expected a positive integer")
        return value

    def count(self, field: str) -> int:
        """A positive integer, or 0 if the field is missing, null or 0."""
        return self.size(field) if self._fields.get(field) else 0

    def get(self, field: str, default: Any = None) -> Any:
        value = self._fields.get(field)
        return default if value is None else value


def model_from_config(name: str, fields: Mapping[str, Any], source: str) -> Model:
    """Makes a Model from a Hugging Face config.

    Multi-token-prediction layers are left out: Megatron-Core counts them apart, and most runs drop them.

    Args:
        name: For reports and messages.
        fields: The content of config.json.
        source: Where the config is published.

    Raises:
        ValueError: If the architecture is not supported, or a field is missing or invalid.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ValueError(
            f"{name}: got model_type {model_type!r} (architectures {fields.get('architectures')!r}), expected one of "
            f"{', '.join(ARCHITECTURES)}; describe other models by a YAML of shapes (docs/planning.md)"
        )
    config = _Config(name, fields)
    layers, norms_numel = ARCHITECTURES[model_type](config)
    hidden = config.size("hidden_size")
    embeddings = 1 if config.get("tie_word_embeddings", False) else 2
    other = norms_numel + hidden + embeddings * config.size("vocab_size") * hidden
    return Model(name, layers, other, source)


def _grouped_attention(config: _Config, *, head_norms: bool) -> tuple[Layer, int]:
    """Grouped-query attention, and the number of its norms' parameters. The output projection comes first."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    groups = config.size("num_key_value_heads", heads)
    dim = config.size("head_dim", hidden // heads)
    if heads % groups:
        raise ValueError(
            f"{config.name}: num_attention_heads={heads} do not divide into num_key_value_heads={groups} groups"
        )
    kind = FusedQkv.of_heads(heads // groups, dim)
    period = sum(size for _, size in kind.sizes)
    matrices = (
        MatrixShape("self_attention.linear_proj", hidden, heads * dim, 1, dim, "attention heads"),
        MatrixShape("self_attention.linear_qkv", groups * period, hidden, 0, period, "query groups", kind),
    )
    biases = 0
    if config.get("attention_bias", False):
        biases = groups * period + hidden
    return matrices, biases + (2 * dim if head_norms else 0)


def _latent_attention(config: _Config) -> tuple[Layer, int]:
    """Multi-head latent attention (MLA), and the number of its norms' parameters."""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    nope, rope = config.size("qk_nope_head_dim"), config.size("qk_rope_head_dim")
    value, kv_rank, q_rank = config.size("v_head_dim"), config.size("kv_lora_rank"), config.count("q_lora_rank")
    query, key_value = LatentUp((("q_nope", nope), ("q_rope", rope))), LatentUp((("k_nope", nope), ("v", value)))

    def down(name: str, rows: int, kind: WeightKind = WHOLE) -> MatrixShape:
        return MatrixShape(f"self_attention.{name}", rows, hidden, 0, kind=kind, whole_in_te=True)

    def by_heads(name: str, kind: LatentUp, cols: int) -> MatrixShape:
        head = sum(size for _, size in kind.sizes)
        return MatrixShape(f"self_attention.{name}", heads * head, cols, 0, head, "attention heads", kind)

    output = LatentOutput(value)
    matrices = [MatrixShape("self_attention.linear_proj", hidden, heads * value, 1, value, "attention heads", output)]
    if q_rank:
        matrices.append(down("linear_q_down_proj", q_rank))
        matrices.append(by_heads("linear_q_up_proj", query, q_rank))
    else:
        matrices.append(by_heads("linear_q_proj", query, hidden))
    matrices.append(down("linear_kv_down_proj", kv_rank + rope, LatentDown(kv_rank, rope)))
    matrices.append(by_heads("linear_kv_up_proj", key_value, kv_rank))
    return tuple(matrices), q_rank + kv_rank


def _gated_mlp(prefix: str, hidden: int, ffn: int, experts: int = 0) -> Layer:
    return (
        MatrixShape(f"{prefix}.linear_fc1", 2 * ffn, hidden, 0, 2, "FFN channels", GatedMlp(), experts=experts),
        MatrixShape(f"{prefix}.linear_fc2", hidden, ffn, 1, 1, "FFN channels", experts=experts),
    )


def _moe(hidden: int, ffn: int, experts: int, shared_ffn: int) -> Layer:
    router = MatrixShape("mlp.router", experts, hidden, None, router=True)
    shared = _gated_mlp("mlp.shared_experts", hidden, shared_ffn) if shared_ffn else ()
    return (router, *_gated_mlp("mlp.experts", hidden, ffn, experts), *shared)


def _transformer(
    config: _Config,
    attention: tuple[Layer, int],
    experts: Layer = (),
    is_dense: Callable[[int], bool] = lambda index: True,
) -> tuple[tuple[Layer, ...], int]:
    """All layers, and the number of their norms' parameters.

    Args:
        config: The config.
        attention: Matrices of a layer's attention, and the number of its norms' parameters.
        experts: Matrices of a mixture of experts.
        is_dense: Whether the layer of an index has an MLP in place of the experts.
    """
    hidden, num_layers = config.size("hidden_size"), config.size("num_hidden_layers")
    matrices, norms = attention
    dense = matrices + _gated_mlp("mlp", hidden, config.size("intermediate_size"))
    layers = tuple(dense if is_dense(index) else matrices + experts for index in range(num_layers))
    return layers, num_layers * (norms + 2 * hidden)


def _llama(config: _Config) -> tuple[tuple[Layer, ...], int]:
    return _transformer(config, _grouped_attention(config, head_norms=False))


def _qwen3(config: _Config) -> tuple[tuple[Layer, ...], int]:
    return _transformer(config, _grouped_attention(config, head_norms=True))


def _qwen3_moe(config: _Config) -> tuple[tuple[Layer, ...], int]:
    experts = _moe(config.size("hidden_size"), config.size("moe_intermediate_size"), config.size("num_experts"), 0)
    step, only_dense = config.size("decoder_sparse_step", 1), set(config.get("mlp_only_layers", ()))
    attention = _grouped_attention(config, head_norms=True)
    return _transformer(config, attention, experts, lambda index: index in only_dense or (index + 1) % step > 0)


def _deepseek_v3(config: _Config) -> tuple[tuple[Layer, ...], int]:
    ffn = config.size("moe_intermediate_size")
    shared_ffn = ffn * config.count("n_shared_experts")
    experts = _moe(config.size("hidden_size"), ffn, config.size("n_routed_experts"), shared_ffn)
    first, step = config.count("first_k_dense_replace"), config.size("moe_layer_freq", 1)
    return _transformer(config, _latent_attention(config), experts, lambda index: index < first or index % step > 0)


ARCHITECTURES: Mapping[str, Callable[[_Config], tuple[tuple[Layer, ...], int]]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
}
"""Hugging Face's `model_type` -> the function that lists the layers and counts the norms' parameters."""
