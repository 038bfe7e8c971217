"""Small GPT models under any parallel layout, with weights, gradients and data that do not depend on the layout."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

VOCABULARY, SEQUENCE, GLOBAL_BATCH = 64, 16, 4


@dataclass(frozen=True)
class Layout:
    """How ranks are laid out, and what they overlap. `ddp` and `config` are settings of Megatron's configs."""

    world_size: int
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    sequence_parallel: bool = False
    instances: int = 1
    ddp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def expert_tp(self) -> int:
        return self.tp if self.etp is None else self.etp


DENSE: dict[str, Any] = dict(num_query_groups=2, add_bias_linear=True, normalization="LayerNorm")
# Sizes that are no multiples of anything, so that shards cut matrices in the middle of a row.
ODD: dict[str, Any] = dict(
    num_query_groups=4, hidden_size=36, ffn_hidden_size=44, kv_channels=7, add_bias_linear=False, position="rope"
)
LEARNED: dict[str, Any] = dict(num_query_groups=2, add_bias_linear=True, position="learned_absolute")
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
    **{k: v for k, v in MOE.items() if k != "num_query_groups"},
    multi_latent_attention=True,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=6,
    rope_type="rope",
    qk_layernorm=False,
    position="none",
)
# Of Transformer Engine's modules, with grouped experts; sizes that FP8 takes, and that 128 x 128 blocks do not divide.
TE_MOE: dict[str, Any] = dict(
    MOE,
    hidden_size=192,
    ffn_hidden_size=192,
    moe_ffn_hidden_size=96,
    moe_shared_expert_intermediate_size=128,
    moe_grouped_gemm=True,
)
MODELS = {"dense": DENSE, "odd": ODD, "learned": LEARNED, "moe": MOE, "mla": MLA, "te-moe": TE_MOE}


def make_config(model: str, layout: Layout, dtype: torch.dtype) -> Any:
    """The model's TransformerConfig under a layout."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    settings: dict[str, Any] = dict(
        num_layers=max(2, layout.pp * (layout.vpp or 1)),
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        # Between two virtual stages both neighbours are the same rank, which a batch of sends cannot tell apart.
        overlap_p2p_comm=layout.vpp is not None,
        batch_p2p_comm=layout.vpp is None,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
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
    settings.update({k: v for k, v in MODELS[model].items() if k != "position"})
    settings.update(layout.config)
    if settings["num_layers"] != 2 and "moe_layer_freq" in settings:
        settings["moe_layer_freq"] = [0] + [1] * (settings["num_layers"] - 1)
    return (MLATransformerConfig if model == "mla" else TransformerConfig)(**settings)


def initialize(layout: Layout) -> None:
    """Makes Megatron's process groups for a layout."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    ps.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        num_distributed_optimizer_instances=layout.instances,
    )
    model_parallel_cuda_manual_seed(1)


def make_chunks(model: str, layout: Layout, dtype: torch.dtype) -> list[nn.Module]:
    """This rank's model chunks, with layout-independent weights, not wrapped."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    config = make_config(model, layout, dtype)
    chunks: list[nn.Module] = []
    for stage in range(layout.vpp or 1):
        vp_stage = stage if layout.vpp else None
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=model.startswith("te"),
            normalization=config.normalization,
            vp_stage=vp_stage,
        )
        mtp = None
        if config.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=model.startswith("te"), vp_stage=vp_stage)
        with _modules_may_be_built(model):
            chunk = GPTModel(
                config,
                spec,
                mtp_block_spec=mtp,
                vocab_size=VOCABULARY,
                max_sequence_length=SEQUENCE,
                pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                position_embedding_type=MODELS[model].get("position", "rope"),
                share_embeddings_and_output_weights=False,
                vp_stage=vp_stage,
            )
        chunk.model_type = None
        with torch.no_grad():
            for place in places(chunk, layout):
                value = place.shard(initial_value(place.name, place.shape, rows_differ=model.startswith("te")))
                place.parameter.copy_(value)
                if hasattr(place.parameter, "_high_precision_init_val"):
                    # TE keeps what an FP8 parameter was made from, for the optimizer's main parameter.
                    place.parameter._high_precision_init_val = value.to(dtype)
        chunks.append(chunk.to(dtype))
    return chunks


def _modules_may_be_built(model: str) -> AbstractContextManager[None]:
    if not model.startswith("te"):
        return nullcontext()
    from tests.te.cuda_stand_ins import modules_may_be_built

    return modules_may_be_built()


@dataclass(frozen=True)
class Place:
    """Where a local parameter lies in the whole model: its layout-independent name, whole shape, and its shard."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    shard: Callable[[Tensor], Tensor]


def places(chunk: nn.Module, layout: Layout) -> list[Place]:
    """The places of a chunk's parameters. `chunk` may be wrapped."""
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    while isinstance(getattr(chunk, "module", None), nn.Module):
        chunk = chunk.module  # type: ignore[assignment]
    out = []
    for local_name, parameter in chunk.named_parameters():
        # A local number (layer in the stage, expert on the rank) becomes the model's.
        local_parts = local_name.split(".")
        parts = list(local_parts)
        for at in range(1, len(parts)):
            module = chunk.get_submodule(".".join(local_parts[:at]))
            if isinstance(module, TransformerLayer) and parts[at - 1].isdigit():
                parts[at - 1] = str(module.layer_number - 1)
            if isinstance(module, SequentialMLP):
                first = ps.get_expert_model_parallel_rank() * len(module.local_experts)
                parts[at + 1] = str(first + int(parts[at + 1]))
            if isinstance(module, TEGroupedMLP) and at == len(parts) - 2:
                first = ps.get_expert_model_parallel_rank() * module.num_local_experts
                parts[-1] = f"weight{first + int(parts[-1].removeprefix('weight'))}"
        name = ".".join(parts)
        expert = not getattr(parameter, "allreduce", True)
        size = layout.expert_tp if expert else layout.tp
        rank = ps.get_expert_tensor_parallel_rank() if expert else ps.get_tensor_model_parallel_rank()
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False) and size > 1:
            shape[parameter.partition_dim] *= size  # type: ignore[attr-defined]
            shard = partial(_shard, dim=parameter.partition_dim, size=size, rank=rank, gated="linear_fc1" in name)  # type: ignore[attr-defined]
        else:
            shard = _identity  # type: ignore[assignment]
        out.append(Place(name, parameter, tuple(shape), shard))
    return out


def _identity(whole: Tensor) -> Tensor:
    return whole


def _shard(whole: Tensor, *, dim: int, size: int, rank: int, gated: bool) -> Tensor:
    # A rank's rows of a gated fc1 are [its gate; its up].
    blocks = whole.chunk(2, dim=0) if gated else (whole,)
    return torch.cat([block.chunk(size, dim=dim)[rank] for block in blocks], dim=dim)


def normal(key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal values that depend on `key` and the place of each element alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def initial_value(name: str, shape: tuple[int, ...], *, rows_differ: bool = False) -> Tensor:
    """The whole initial parameter called `name`; on request with rows of different size, as FP8's scales want them."""
    if rows_differ and len(shape) == 2:
        return initial_value(name, shape) * normal(f"rows {name}", (shape[0], 1)).exp()
    if name.endswith("bias"):
        return 0.05 * normal(name, shape)
    if len(shape) == 1:
        return 1 + 0.1 * normal(name, shape)
    return normal(name, shape) * shape[1] ** -0.5


def wrap(chunks: list[nn.Module], layout: Layout) -> list[Any]:
    """DDP around each chunk, as Megatron's training loop does it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        num_distributed_optimizer_instances=layout.instances,
        **layout.ddp,
    )
    wrapped = [
        DistributedDataParallel(chunk.config, ddp_config, chunk, disable_bucketing=stage > 0)
        for stage, chunk in enumerate(chunks)
    ]
    config: Any = chunks[0].config
    config.finalize_model_grads_func = _finalize
    if layout.ddp.get("overlap_grad_reduce"):
        no_sync = [ddp.no_sync for ddp in wrapped]
        config.no_sync_func = no_sync[0] if len(wrapped) == 1 else no_sync
    if layout.ddp.get("align_param_gather"):
        sync = [ddp.start_param_sync for ddp in wrapped]
        config.param_sync_func = sync[0] if len(wrapped) == 1 else sync
    return wrapped


def _finalize(*args: Any, **kwargs: Any) -> None:
    from megatron.core.distributed import finalize_model_grads

    finalize_model_grads(*args, **kwargs)


def optimizer_config(layout: Layout, dtype: torch.dtype, **settings: Any) -> Any:
    """An OptimizerConfig that fits the layout."""
    from megatron.core.optimizer import OptimizerConfig

    defaults: dict[str, Any] = dict(
        optimizer="adam",
        lr=1e-3,
        min_lr=0.0,
        weight_decay=0.1,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=layout.ddp.get("overlap_param_gather", False),
        clip_grad=1.0,
    )
    return OptimizerConfig(**{**defaults, **settings})


def train_step(chunks: list[Any], optimizer: Any, step: int) -> float:
    """Forward, backward and update on a global batch that depends on the parity of `step` alone.

    Returns:
        The mean loss over the global batch before the update, on every rank.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    dp, dp_rank = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    # Two batches in turn, so that a few steps can learn something.
    generator = torch.Generator().manual_seed(1000 + step % 2)
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
    successful, _, _ = optimizer.step()
    assert successful
    total = torch.zeros(())
    if ps.is_pipeline_last_stage(ignore_virtual=True):
        total = torch.stack([entry["loss"] for entry in reported]).mean()
        dist.all_reduce(total, op=dist.ReduceOp.AVG, group=ps.get_data_parallel_group(with_context_parallel=True))
    pipeline = ps.get_pipeline_model_parallel_group()
    dist.broadcast(total, src=ps.get_pipeline_model_parallel_last_rank(), group=pipeline)
    return total.item()


def _forward(batches: Any, chunk: Any) -> tuple[Tensor, Any]:
    tokens = next(batches)
    positions = torch.arange(SEQUENCE)[None]
    output = chunk(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return output, _loss


def _loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}
