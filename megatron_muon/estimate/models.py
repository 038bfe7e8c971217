"""Models as lists of matrix shapes, and the built-in ones. Without ranks and torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

from megatron_muon.matrices.fused import WHOLE, WeightKind


@dataclass(frozen=True)
class MatrixShape:
    """A matrix parameter of the whole model, before any parallelism; `experts` of them if that is not zero.

    Attributes:
        name: Path within its transformer layer, as Megatron-Core names the module that has the weight.
        rows: Output features.
        cols: Input features.
        tp_dim: Dimension that tensor parallelism splits; None if every tensor-parallel rank stores all of it.
        unit: Rows (or columns) that must stay on one tensor-parallel rank: a head, a query group.
        unit_name: What `unit` is, for messages.
        kind: How it is made of logical matrices.
        router: An MoE router's weight.
        whole_in_te: Transformer Engine's module keeps it whole on every tensor-parallel rank in spite of `tp_dim`.
        experts: Number of such matrices in the layer, one per routed expert; 0 for other matrices.
    """

    name: str
    rows: int
    cols: int
    tp_dim: int | None
    unit: int = 1
    unit_name: str = "rows"
    kind: WeightKind = WHOLE
    router: bool = False
    whole_in_te: bool = False
    experts: int = 0

    @property
    def numel(self) -> int:
        return self.rows * self.cols * max(self.experts, 1)


Layer = tuple[MatrixShape, ...]


@dataclass(frozen=True)
class Model:
    """A model as its transformer layers' matrices, in the order in which Megatron-Core creates them.

    Attributes:
        name: For reports.
        layers: The matrices of each layer.
        other_numel: Parameters that are AdamW's: embeddings, output layer, norms, biases.
        source: Where the shapes are from.
    """

    name: str
    layers: tuple[Layer, ...]
    other_numel: int
    source: str

    @cached_property
    def matrix_numel(self) -> int:
        """Parameters in matrices: Muon's."""
        return sum(matrix.numel for layer in self.layers for matrix in layer)

    @property
    def numel(self) -> int:
        """All parameters."""
        return self.matrix_numel + self.other_numel

    @cached_property
    def expert_counts(self) -> tuple[int, ...]:
        """The different numbers of routed experts that layers have; empty for a dense model."""
        return tuple(sorted({m.experts for layer in self.layers for m in layer if m.experts}))


@dataclass(frozen=True)
class BuiltIn:
    """A published model.

    Attributes:
        config: The fields of its Hugging Face config.json that decide on shapes.
        published_numel: Parameters as published, without multi-token-prediction layers.
        source: Where the shapes and the count are published.
    """

    config: Mapping[str, Any]
    published_numel: float
    source: str


def _llama3(hidden: int, layers: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
    }


def _latent(
    hidden: int, layers: int, heads: int, ffn: int, moe_ffn: int, experts: int, **fields: Any
) -> dict[str, Any]:
    """A mixture of experts with multi-head latent attention (MLA), as in DeepSeek-V3."""
    return {
        "model_type": "deepseek_v3",
        "tie_word_embeddings": False,
        "n_shared_experts": 1,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "moe_intermediate_size": moe_ffn,
        "n_routed_experts": experts,
        "first_k_dense_replace": 1,
        **fields,
    }


def _qwen3(hidden: int, layers: int, kv_heads: int, ffn: int, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "num_attention_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": ffn,
        **fields,
    }


BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "moonlight-16b": BuiltIn(
            _latent(2048, 27, 16, 11264, 1408, 64, vocab_size=163840, q_lora_rank=None, n_shared_experts=2),
            # 15.29B without embeddings, and two of 163840 x 2048.
            15.29e9 + 2 * 163840 * 2048,
            "huggingface.co/moonshotai/Moonlight-16B-A3B config.json; arXiv 2502.16982",
        ),
        "kimi-k2": BuiltIn(
            _latent(7168, 61, 64, 18432, 2048, 384, vocab_size=163840, model_type="kimi_k2"),
            # The checkpoint's own count; its report rounds to 1.04T.
            1026.5e9,
            "huggingface.co/moonshotai/Kimi-K2-Instruct config.json and parameter count; arXiv 2507.20534",
        ),
        "deepseek-v3": BuiltIn(
            _latent(7168, 61, 128, 18432, 2048, 256, vocab_size=129280, first_k_dense_replace=3),
            671e9,
            "huggingface.co/deepseek-ai/DeepSeek-V3 config.json; arXiv 2412.19437",
        ),
        "qwen3-30b-a3b": BuiltIn(
            _qwen3(2048, 48, 4, 6144, model_type="qwen3_moe", moe_intermediate_size=768, num_experts=128),
            30.5e9,
            "huggingface.co/Qwen/Qwen3-30B-A3B config.json and model card",
        ),
        "qwen3-8b": BuiltIn(
            _qwen3(4096, 36, 8, 12288), 8.2e9, "huggingface.co/Qwen/Qwen3-8B config.json and model card"
        ),
        "llama3-8b": BuiltIn(
            _llama3(4096, 32, 32, 14336),
            8.03e9,
            "huggingface.co/meta-llama/Llama-3.1-8B config.json; arXiv 2407.21783, table 3",
        ),
        "llama3-70b": BuiltIn(
            _llama3(8192, 80, 64, 28672),
            70.6e9,
            "huggingface.co/meta-llama/Llama-3.1-70B config.json; arXiv 2407.21783, table 3",
        ),
        "llama3-405b": BuiltIn(
            _llama3(16384, 126, 128, 53248),
            405e9,
            "huggingface.co/meta-llama/Llama-3.1-405B config.json; arXiv 2407.21783, table 3",
        ),
    }
)
