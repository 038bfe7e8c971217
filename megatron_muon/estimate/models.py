"""Models as lists of matrices: what a plan needs to know of a network, and the built-in ones. No ranks, no torch."""

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
        experts: Number of such matrices in the layer, one per routed expert; 0 if it is no expert's.
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


_LLAMA3: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
}
_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}

BUILT_IN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "moonlight-16b": BuiltIn(
            {
                **_MLA,
                "model_type": "deepseek_v3",
                "vocab_size": 163840,
                "hidden_size": 2048,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "q_lora_rank": None,
                "intermediate_size": 11264,
                "moe_intermediate_size": 1408,
                "n_routed_experts": 64,
                "n_shared_experts": 2,
                "first_k_dense_replace": 1,
            },
            # 15.29B without embeddings, and two of 163840 x 2048.
            15.29e9 + 2 * 163840 * 2048,
            "huggingface.co/moonshotai/Moonlight-16B-A3B config.json; arXiv 2502.16982",
        ),
        "kimi-k2": BuiltIn(
            {
                **_MLA,
                "model_type": "kimi_k2",
                "vocab_size": 163840,
                "hidden_size": 7168,
                "num_hidden_layers": 61,
                "num_attention_heads": 64,
                "q_lora_rank": 1536,
                "intermediate_size": 18432,
                "moe_intermediate_size": 2048,
                "n_routed_experts": 384,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
            },
            # The checkpoint's own count; its report rounds to 1.04T.
            1026.5e9,
            "huggingface.co/moonshotai/Kimi-K2-Instruct config.json and parameter count; arXiv 2507.20534",
        ),
        "deepseek-v3": BuiltIn(
            {
                **_MLA,
                "model_type": "deepseek_v3",
                "vocab_size": 129280,
                "hidden_size": 7168,
                "num_hidden_layers": 61,
                "num_attention_heads": 128,
                "q_lora_rank": 1536,
                "intermediate_size": 18432,
                "moe_intermediate_size": 2048,
                "n_routed_experts": 256,
                "n_shared_experts": 1,
                "first_k_dense_replace": 3,
            },
            671e9,
            "huggingface.co/deepseek-ai/DeepSeek-V3 config.json; arXiv 2412.19437",
        ),
        "qwen3-30b-a3b": BuiltIn(
            {
                **_QWEN3,
                "model_type": "qwen3_moe",
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "num_key_value_heads": 4,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            },
            30.5e9,
            "huggingface.co/Qwen/Qwen3-30B-A3B config.json and model card",
        ),
        "qwen3-8b": BuiltIn(
            {
                **_QWEN3,
                "model_type": "qwen3",
                "hidden_size": 4096,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "intermediate_size": 12288,
            },
            8.2e9,
            "huggingface.co/Qwen/Qwen3-8B config.json and model card",
        ),
        "llama3-8b": BuiltIn(
            {
                **_LLAMA3,
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "intermediate_size": 14336,
            },
            8.03e9,
            "huggingface.co/meta-llama/Llama-3.1-8B config.json; arXiv 2407.21783, table 3",
        ),
        "llama3-70b": BuiltIn(
            {
                **_LLAMA3,
                "hidden_size": 8192,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "intermediate_size": 28672,
            },
            70.6e9,
            "huggingface.co/meta-llama/Llama-3.1-70B config.json; arXiv 2407.21783, table 3",
        ),
        "llama3-405b": BuiltIn(
            {
                **_LLAMA3,
                "hidden_size": 16384,
                "num_hidden_layers": 126,
                "num_attention_heads": 128,
                "intermediate_size": 53248,
            },
            405e9,
            "huggingface.co/meta-llama/Llama-3.1-405B config.json; arXiv 2407.21783, table 3",
        ),
    }
)
