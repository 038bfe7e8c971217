"""Megatron-Core's local norm, core attention and hybrid layers, without what they refuse on a CPU."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_muon.megatron.entry.patching import Patch

# What Megatron-Core's arguments default to, and what this attention does; both give the same values.
_CP_COMM_TYPES = (None, "p2p", "all_gather")


def _torch_norm(
    original: Callable[..., torch.nn.Module],
    cls: type,
    config: TransformerConfig,
    hidden_size: int,
    eps: float = 1e-5,
    *args: Any,
    **kwargs: Any,
) -> torch.nn.Module:
    """`WrappedTorchNorm.__new__` that accepts sequence parallelism and marks the parameters for it."""
    unsharded = copy.copy(config)
    unsharded.sequence_parallel = False
    norm = original(cls, unsharded, hidden_size, eps, *args, **kwargs)
    # A norm acts on each token alone; only its gradients are partial sums over this rank's tokens. Megatron's
    # finalize_model_grads adds them up over the tensor-parallel group for parameters with this mark. It also adds
    # up MLA's q_layernorm, by its name, where without sequence parallelism each rank has the whole gradient: the
    # average is then the gradient itself.
    replicated = not config.sequence_parallel and getattr(config, "multi_latent_attention", False)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        parameter.average_gradients_across_tp_domain = replicated  # type: ignore[attr-defined]
    return norm


class CoreAttention(DotProductAttention):  # type: ignore[misc]
    """The local `DotProductAttention` with MLA's head widths, context parallelism and recorded attention logits.

    Everything else is the parent's: grouped queries, dropout, sliding windows, softmax offsets.

    Args:
        config: As for the parent. With `qk_clip` or `log_max_attention_logit`, logits are recorded.
        layer_number: Number of the layer, from 1.
        attn_mask_type: Mask used where `forward` gets none.
        attention_type: `self` or `cross`.
        attention_dropout: Probability; None takes `config.attention_dropout`.
        softmax_scale: Factor of the scores; None takes 1/sqrt(width of a query head).
        k_channels: Width of a query and key head; None takes `config.kv_channels`.
        v_channels: Width of a value head; None takes `config.kv_channels`.
        cp_comm_type: How context-parallel ranks exchange keys and values: None, `p2p` or `all_gather`. All of them
            gather here, which gives the same values.
        pg_collection: Must hold `tp`, and with context parallelism `cp`. None takes Megatron's global groups.

    Attributes:
        current_max_attn_logits: None, or a (heads on this rank,) tensor: the largest unmasked scaled logit of each
            head since the attribute was last set to None, over this rank's queries. The reader sets it to None
            again. Same contract as Megatron-Core's `TEDotProductAttention`, so that `qk_clip` reads it unchanged.

    Raises:
        NotImplementedError: For other values of `cp_comm_type` under context parallelism.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        if softmax_scale is None and k_channels is not None:
            softmax_scale = k_channels**-0.5
        # The parent refuses context parallelism because it sees only its own keys; `forward` hands it all of them.
        whole_sequence = copy.copy(config)
        whole_sequence.context_parallel_size = 1
        super().__init__(
            config=whole_sequence,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            attention_dropout=attention_dropout,
            softmax_scale=softmax_scale,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.config = config
        if v_channels is not None:
            # The parent uses it only for the width of its output.
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        self.cp_group: torch.distributed.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            if cp_comm_type not in _CP_COMM_TYPES:
                raise NotImplementedError(
                    f"cp_comm_type: got {cp_comm_type!r}, expected one of {_CP_COMM_TYPES}; "
                    "the CPU backend gathers keys and values: use --cp-comm-type all_gather"
                )
            self.cp_group = getattr(pg_collection, "cp", None) or parallel_state.get_context_parallel_group()
        self.current_max_attn_logits: Tensor | None = None
        if config.qk_clip or config.log_max_attention_logit:
            self.scale_mask_softmax.register_forward_pre_hook(self._record_max_logits)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of this rank's queries over the whole sequence.

        Args:
            query: (queries, batch, heads, k_channels).
            key: (keys, batch, query groups, k_channels).
            value: (keys, batch, query groups, v_channels).
            attention_mask: Boolean, True where masked, (batch or 1, 1, queries, keys of all context-parallel ranks);
                None takes the causal mask if that is the layer's kind.
            attn_mask_type: Ignored, as by the parent.
            attention_bias: Must be None.
            packed_seq_params: Must be None.

        Returns:
            (queries, batch, heads * v_channels).
        """
        if self.cp_group is not None:
            if attention_mask is None:
                attention_mask = self._zigzag_mask(query.size(0), query.device)
            key = self._gather_sequence(key)
            value = self._gather_sequence(value)
        out: Tensor = super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        return out

    def _gather_sequence(self, local: Tensor) -> Tensor:
        """All context-parallel ranks' tokens in the order of the sequence; a collective, also in backward.

        Rank r of n holds chunks r and 2n-1-r of 2n, so that causal work is balanced.
        """
        assert self.cp_group is not None
        size = self.cp_group.size()
        by_rank = gather_from_sequence_parallel_region(local, tensor_parallel_output_grad=True, group=self.cp_group)
        chunks = by_rank.view(2 * size, -1, *by_rank.shape[1:])
        order = [2 * c if c < size else 2 * (2 * size - 1 - c) + 1 for c in range(2 * size)]
        joined: Tensor = chunks[order].reshape(by_rank.shape)
        return joined

    def _zigzag_mask(self, queries: int, device: torch.device) -> Tensor | None:
        """The causal mask's rows for this rank's queries, (1, 1, queries, keys)."""
        assert self.cp_group is not None
        if self.attn_mask_type != AttnMaskType.causal:
            return None
        size, rank = self.cp_group.size(), self.cp_group.rank()
        positions = torch.arange(queries * size, device=device)
        chunks = positions.view(2 * size, -1)
        rows = torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))
        return (positions[None, :] > rows[:, None])[None, None]

    @torch.no_grad()
    def _record_max_logits(self, module: Any, inputs: tuple[Any, ...]) -> None:
        scores, mask = inputs[0].detach(), inputs[1]
        # Undoes apply_query_key_layer_scaling, whose divisor the softmax multiplies back.
        scores = scores.float() * (1.0 if module.scale is None else module.scale)
        queries, keys = scores.shape[-2:]
        if mask is None and module.attn_mask_type == AttnMaskType.causal and queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(1)
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        largest = scores.amax(dim=(0, 2, 3))
        if self.current_max_attn_logits is not None:
            largest = torch.maximum(largest, self.current_max_attn_logits)
        self.current_max_attn_logits = largest


def _mla_down_projection(
    original: Callable[..., tuple[Tensor, Tensor]], self: Any, hidden_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Completes the gradient of MLA's shared rotary key under tensor parallelism.

    The local layer splits `linear_kv_down_proj` over the tensor-parallel ranks and gathers its output with a function
    whose backward keeps this rank's slice. For the rotary key, which each rank uses for its own heads only, the other
    ranks' heads are then missing from the gradient. Transformer Engine's layer is not split and has no such gather.
    """
    q_compressed, kv_combined = original(self, hidden_states)
    widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
    if kv_combined.size(-1) == sum(widths):
        return q_compressed, kv_combined
    kv_combined = gather_from_tensor_model_parallel_region(kv_combined, group=self.tp_group)
    if self.config.sequence_parallel:
        # As an unsplit layer leaves it; the caller gathers the rotary key, and in backward sums its parts.
        return q_compressed, scatter_to_sequence_parallel_region(kv_combined, group=self.tp_group)
    compressed, rotary_key = kv_combined.split(widths, dim=-1)
    rotary_key = copy_to_tensor_model_parallel_region(rotary_key, group=self.tp_group)
    return q_compressed, torch.cat((compressed, rotary_key), dim=-1)


def _hybrid_stack() -> Any:
    """Megatron's `hybrid_stack_spec` with local modules in attention, MLP, latent-attention and MoE layers.

    Mamba, Gated DeltaNet and sparse attention stay as they are: they need kernels that do not exist for a CPU.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    def local_attention(latent: bool) -> Any:
        attention = gpt(multi_latent_attention=latent).self_attention
        # This table is made before the patch of LocalSpecProvider is applied.
        return replace(attention, submodules=replace(attention.submodules, core_attention=CoreAttention))

    def changed(layer: str, **submodules: Any) -> Any:
        spec = getattr(stack, layer)
        return replace(spec, submodules=replace(spec.submodules, **submodules))

    gpt = functools.partial(get_gpt_layer_local_submodules, normalization="RMSNorm")
    stack = hybrid_stack_spec.submodules
    norm = gpt().input_layernorm
    experts = get_moe_module_spec(use_te=False, num_experts=2, moe_grouped_gemm=False)
    layers = {
        # Checkpoints have the names of Transformer Engine's layers, in which a norm belongs to the projection after it.
        "attention_layer": changed(
            "attention_layer",
            input_layernorm=norm,
            self_attention=local_attention(latent=False),
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        ),
        "mlp_layer": changed(
            "mlp_layer",
            pre_mlp_layernorm=norm,
            mlp=gpt().mlp,
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        ),
        "moe_layer": changed("moe_layer", pre_mlp_layernorm=norm, mlp=experts),
    }
    if hasattr(stack, "mla_layer"):  # from 0.19
        layers["mla_layer"] = changed("mla_layer", input_layernorm=norm, self_attention=local_attention(latent=True))
    return replace(hybrid_stack_spec, submodules=replace(stack, **layers))


def patches() -> list[Patch]:
    """The table of Megatron's modules."""
    return [
        *_PATCHES,
        Patch(
            "megatron.core.models.hybrid.hybrid_block:TENorm",
            WrappedTorchNorm,
            "HybridModel's last norm is Transformer Engine's, whatever the spec",
            is_value=True,
        ),
        Patch(
            "megatron.core.models.hybrid.hybrid_layer_specs:hybrid_stack_spec",
            _hybrid_stack(),
            "HybridModel's layers are Transformer Engine's",
            is_value=True,
            by_name=True,
        ),
    ]


_PATCHES = (
    Patch(
        "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
        _torch_norm,
        "the local norm refuses sequence parallelism",
        ("cls", "config", "hidden_size", "eps"),
    ),
    Patch(
        "megatron.core.models.backends:LocalSpecProvider.core_attention",
        lambda original, self: CoreAttention,
        "the local attention has neither MLA's head widths nor context parallelism",
        ("self",),
    ),
    Patch(
        "megatron.core.transformer.multi_latent_attention:MLASelfAttention._qkv_down_projection",
        _mla_down_projection,
        "the local layer loses part of the rotary key's gradient under tensor parallelism",
        ("self", "hidden_states"),
    ),
)
