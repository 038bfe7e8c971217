"""Stock GPT models train on the CPU backend, and every layout gives the losses of one rank."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks

VOCABULARY, SEQUENCE, GLOBAL_BATCH, STEPS = 64, 16, 4, 3


@dataclass(frozen=True)
class Layout:
    """How ranks are laid out, and what they overlap."""

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    instances: int = 1
    ddp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


DENSE: dict[str, Any] = dict(num_query_groups=2, add_bias_linear=True, normalization="LayerNorm")
MOE: dict[str, Any] = dict(
    num_query_groups=2,
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=32,
    moe_token_dispatcher_type="alltoall",
    moe_router_load_balancing_type="seq_aux_loss",
    moe_aux_loss_coeff=1e-2,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_layer_freq=[0, 1],
)
MLA: dict[str, Any] = dict(
    multi_latent_attention=True,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=6,
    rope_type="rope",
)
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "moe": MOE,
    "mla": {**MOE, **MLA, "num_query_groups": None},
    "mla_norm": {**MLA, "q_lora_rank": 16, "qk_layernorm": True},
}


def make_config(model: str, layout: Layout, dtype: torch.dtype) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    settings: dict[str, Any] = dict(
        num_layers=layout.pp * (layout.vpp or 1) if layout.pp * (layout.vpp or 1) > 2 else 2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        pipeline_dtype=dtype,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
    )
    settings.update(MODELS[model])
    settings.update(layout.config)
    if settings["num_layers"] != 2 and "moe_layer_freq" in settings:
        settings["moe_layer_freq"] = [0] + [1] * (settings["num_layers"] - 1)
    return (MLATransformerConfig if "mla" in model else TransformerConfig)(**settings)


def global_value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The whole parameter called `name`: a function of its name and of the place of each element."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("bias"):
        return 0.05 * torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * shape[1] ** -0.5


def set_weights(chunk: torch.nn.Module, layout: Layout, experts: int | None) -> None:
    """Sets each local parameter to its part of `global_value`."""
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    renames: list[tuple[str, str]] = []
    for prefix, module in chunk.named_modules():
        if isinstance(module, TransformerLayer):
            parent = prefix.rpartition(".")[0]
            renames.append((prefix + ".", f"{parent}.{module.layer_number - 1}."))
        if isinstance(module, SequentialMLP):
            first = ps.get_expert_model_parallel_rank() * (experts or 0) // layout.ep
            for local in range(len(module.local_experts)):
                renames.append((f".experts.local_experts.{local}.", f".experts.local_experts.{first + local}."))
            offset = {f".experts.local_experts.{i}.": f".experts.local_experts.{first + i}." for i in range(len(module.local_experts))}
    layers = [(a, b) for a, b in renames if not a.startswith(".experts")]
    expert_names = offset if any(a.startswith(".experts") for a, _ in renames) else {}
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            for old, new in layers:
                if name.startswith(old):
                    name = new + name[len(old) :]
                    break
            for old, new in expert_names.items():
                if old in name:
                    name = name.replace(old, new)
                    break
            expert = not getattr(parameter, "allreduce", True)
            size = layout.etp if expert else layout.tp
            rank = ps.get_expert_tensor_parallel_rank() if expert else ps.get_tensor_model_parallel_rank()
            if not getattr(parameter, "tensor_model_parallel", False) or size == 1:
                parameter.copy_(global_value(name, tuple(parameter.shape)))
                continue
            dim = parameter.partition_dim
            shape = list(parameter.shape)
            shape[dim] *= size
            whole = global_value(name, tuple(shape))
            # A rank's rows of a gated fc1 are [its gate; its up].
            blocks = whole.chunk(2, dim=0) if "linear_fc1" in name else (whole,)
            parameter.copy_(torch.cat([block.chunk(size, dim=dim)[rank] for block in blocks], dim=dim))


def build(model: str, layout: Layout, dtype: torch.dtype) -> tuple[list[Any], Any]:
    """The DDP-wrapped chunks of this rank, and the stock optimizer."""
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=layout.instances,
    )
    model_parallel_cuda_manual_seed(1)
    config = make_config(model, layout, dtype)
    chunks: list[Any] = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        chunk = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="none" if "mla" in model else "rope",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
        )
        chunk.model_type = None
        set_weights(chunk, layout, config.num_moe_experts)
        chunks.append(chunk.bfloat16() if dtype is torch.bfloat16 else chunk)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        num_distributed_optimizer_instances=layout.instances,
        **layout.ddp,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=stage > 0)
        for stage, chunk in enumerate(chunks)
    ]
    for ddp in wrapped:
        ddp.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.01,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=layout.ddp.get("overlap_param_gather", False),
            clip_grad=1.0,
        ),
        wrapped,
    )
    config.finalize_model_grads_func = _finalize
    config.no_sync_func = [ddp.no_sync for ddp in wrapped] if layout.ddp.get("overlap_grad_reduce") else None
    if config.no_sync_func is not None:
        config.no_sync_func = config.no_sync_func[0] if len(wrapped) == 1 else config.no_sync_func
    return wrapped, optimizer


def _finalize(*args: Any, **kwargs: Any) -> None:
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(*args, **kwargs)


def _loss(mask_sum: int, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    from megatron.core import parallel_state as ps

    # Each context-parallel rank averages its part of the sequence; DDP averages over them.
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}


def _forward(batches: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
    from megatron.core import parallel_state as ps
    from megatron.core.utils import get_batch_on_this_cp_rank

    tokens = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(SEQUENCE)[None]
    batch = dict(tokens=inputs, labels=labels, position_ids=positions, attention_mask=None)
    if ps.get_context_parallel_world_size() > 1:
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=ps.get_context_parallel_group())
    output = chunk(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(_loss, 0)


def train(rank: int, world_size: int, model: str, layout: Layout, dtype: torch.dtype = torch.float32) -> list[float]:
    """Losses of `STEPS` steps, the mean over the global batch, the same on every rank."""
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks, optimizer = build(model, layout, dtype)
    dp, dp_rank = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(STEPS):
        data = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, 1, SEQUENCE + 1), generator=generator)
        mine = data[dp_rank::dp]
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        iterators = [iter(mine) for _ in chunks]
        reported = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(mine),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            decoder_seq_length=SEQUENCE,
        )
        ok, norm, _ = optimizer.step()
        assert ok
        total = torch.zeros(())
        if ps.is_pipeline_last_stage(ignore_virtual=True):
            total = torch.stack([r["loss"] for r in reported]).mean()
            dist.all_reduce(total, op=dist.ReduceOp.AVG, group=ps.get_data_parallel_group(with_context_parallel=True))
        dist.broadcast(total, src=ps.get_pipeline_model_parallel_last_rank(), group=ps.get_pipeline_model_parallel_group())
        losses.append(total.item())
    return losses
