"""Small GPT models under any parallel layout, with weights, gradients and data that do not depend on the layout."""

from __future__ import annotations

import re
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
# Rows of a Mamba mixer's in_proj, whole; each tensor-parallel rank has its share of each.
MIXER_SIZES = {"z": 16, "x": 16, "B": 8, "C": 8, "dt": 4}
# Beside settings of Megatron's config: `fused` down projections of MLA, `experts` of a stand-in's kind, `mixers`, and
# the pattern of a `hybrid` model with two layers for one of GPTModel's.
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "odd": ODD,
    "learned": LEARNED,
    "moe": MOE,
    "mla": MLA,
    "gated attention": dict(DENSE, attention_output_gate=True),
    "mla lora": dict(MLA, q_lora_rank=12),
    "mla fused": dict(MLA, q_lora_rank=12, fused=True),
    "mtp": dict(MLA, q_lora_rank=12, mtp_num_layers=1),
    "grouped": dict(MOE, experts="each"),
    "stacked": dict(MOE, experts="single"),
    "mixers": dict(DENSE, mixers=True),
    "te-moe": TE_MOE,
    # "dense", "moe" and "mla" as HybridModel: attention and MLP are layers of their own.
    "hybrid dense": dict(DENSE, hybrid="*-*-"),
    "hybrid moe": dict(MOE, hybrid="*-*E"),
    "hybrid mla": dict(MLA, hybrid="+-+E"),
}
NO_SETTINGS = {"position", "fused", "experts", "mixers", "hybrid"}


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
    settings.update({k: v for k, v in MODELS[model].items() if k not in NO_SETTINGS})
    settings.update(layout.config)
    if settings["num_layers"] != 2 and "moe_layer_freq" in settings:
        settings["moe_layer_freq"] = [0] + [1] * (settings["num_layers"] - 1)
    if "hybrid" in MODELS[model]:
        settings.pop("moe_layer_freq", None)
        settings["num_layers"] *= 2
    return (MLATransformerConfig if "multi_latent_attention" in settings else TransformerConfig)(**settings)


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
    config = make_config(model, layout, dtype)
    chunks: list[nn.Module] = []
    for stage in range(layout.vpp or 1):
        chunk = _make_chunk(model, layout, config, stage if layout.vpp else None)
        _add_stand_ins(chunk, MODELS[model], layout)
        chunk.model_type = None
        with torch.no_grad():
            for place in places(chunk, layout):
                value = place.shard(initial_value(place.key, place.shape, rows_differ=model.startswith("te")))
                place.parameter.copy_(value)
                if hasattr(place.parameter, "_high_precision_init_val"):
                    # TE keeps what an FP8 parameter was made from, for the optimizer's main parameter.
                    place.parameter._high_precision_init_val = value.to(dtype)
        chunks.append(chunk.to(dtype))
    return chunks


def _make_chunk(model: str, layout: Layout, config: Any, vp_stage: int | None) -> Any:
    """One model chunk as Megatron builds it."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec

    common: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        position_embedding_type=MODELS[model].get("position", "rope"),
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
    )
    if "hybrid" in MODELS[model]:
        from megatron.core.models.hybrid import hybrid_layer_specs
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        pattern: str = MODELS[model]["hybrid"]
        # As many layers as the layout has stages for, all after the first pair as the last one.
        pattern = pattern[:2] + pattern[2:] * (config.num_layers // 2 - 1)
        width = len(pattern) // (layout.pp * (layout.vpp or 1))
        stages = "|".join(pattern[at : at + width] for at in range(0, len(pattern), width))
        return HybridModel(config, hybrid_layer_specs.hybrid_stack_spec, hybrid_layer_pattern=stages, **common)
    with_te = model.startswith("te")
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=with_te, normalization=config.normalization, vp_stage=vp_stage
    )
    if MODELS[model].get("fused"):
        _fuse_down_projections(spec)
    mtp = get_gpt_mtp_block_spec(config, spec, with_te, vp_stage=vp_stage) if config.mtp_num_layers else None
    with _modules_may_be_built(model):
        return GPTModel(config, spec, mtp_block_spec=mtp, **common)


def _modules_may_be_built(model: str) -> AbstractContextManager[None]:
    if not model.startswith("te"):
        return nullcontext()
    from tests.te.cuda_stand_ins import modules_may_be_built

    return modules_may_be_built()


def _fuse_down_projections(block: Any) -> None:
    """Makes MLA's down projections one, as Megatron's Transformer Engine spec does with mla_down_proj_fusion."""
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.multi_latent_attention import FusedMLASelfAttention

    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        attention.module = FusedMLASelfAttention
        attention.submodules.linear_qkv_down_proj = ColumnParallelLinear


def _add_stand_ins(chunk: Any, settings: dict[str, Any], layout: Layout) -> None:
    from tests.stand_ins import Delta, GroupedExperts, Mixer

    for layer in chunk.decoder.layers:
        if "experts" in settings and hasattr(layer.mlp, "experts"):
            layer.mlp.experts = GroupedExperts(layer.mlp.experts, settings["experts"] == "single")
        if settings.get("mixers"):
            layer.mixer = Mixer(chunk.config.hidden_size, MIXER_SIZES, layout.tp)
            layer.delta = Delta(chunk.config.hidden_size, layout.tp)


@dataclass(frozen=True)
class Place:
    """Where a local parameter lies in the whole model: its layout-independent name, whole shape, and its shard.

    `key` is what its initial value depends on: the name, or in a HybridModel the name that GPTModel has for it.
    """

    name: str
    key: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    shard: Callable[[Tensor], Tensor]


def places(chunk: nn.Module, layout: Layout) -> list[Place]:
    """The places of a chunk's parameters. `chunk` may be wrapped."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.hybrid.hybrid_model import HybridModel
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
            if isinstance(module, TEGroupedMLP) and at == len(parts) - 2 and parts[-1] != "weight":
                first = ps.get_expert_model_parallel_rank() * module.num_local_experts
                parts[-1] = f"weight{first + int(parts[-1].removeprefix('weight'))}"
        name = key = ".".join(parts)
        if isinstance(chunk, HybridModel):
            key = re.sub(r"(?<=layers\.)\d+", lambda number: str(int(number[0]) // 2), name)
            key = key.replace("decoder.final_norm.", "decoder.final_layernorm.")
        expert = not getattr(parameter, "allreduce", True)
        size = layout.expert_tp if expert else layout.tp
        rank = ps.get_expert_tensor_parallel_rank() if expert else ps.get_tensor_model_parallel_rank()
        stacked = parameter.dim() == 3 and ".experts." in name
        shape = list(parameter.shape[1:] if stacked else parameter.shape)
        shard: Callable[[Tensor], Tensor] = _identity
        if getattr(parameter, "tensor_model_parallel", False) and size > 1:
            dim = parameter.partition_dim  # type: ignore[attr-defined]
            shape[dim] *= size
            shard = partial(_shard, dim=dim, size=size, rank=rank, sections=_sections(name, shape[0], chunk))
        if stacked:
            # All experts of the model below each other.
            shard = partial(
                _stack, shard=shard, rows=shape[0], count=len(parameter), ep_rank=ps.get_expert_model_parallel_rank()
            )
            shape[0] *= len(parameter) * layout.ep
        out.append(Place(name, key, parameter, tuple(shape), shard))
    return out


def _identity(whole: Tensor) -> Tensor:
    return whole


def _sections(name: str, rows: int, chunk: Any) -> list[int]:
    """Rows of what each tensor-parallel rank has a share of, one after the other."""
    if "linear_fc1" in name:
        return [rows // 2, rows // 2]
    if "linear_qkv_down_proj" in name:
        return [chunk.config.q_lora_rank, rows - chunk.config.q_lora_rank]
    return [*MIXER_SIZES.values()] if "mixer.in_proj" in name else [rows]


def _shard(whole: Tensor, *, dim: int, size: int, rank: int, sections: list[int]) -> Tensor:
    blocks = whole.split(sections, dim=0)
    return torch.cat([block.chunk(size, dim=dim)[rank] for block in blocks], dim=0)


def _stack(whole: Tensor, *, shard: Callable[[Tensor], Tensor], rows: int, count: int, ep_rank: int) -> Tensor:
    experts = whole.split(rows)[ep_rank * count : (ep_rank + 1) * count]
    return torch.stack([shard(expert) for expert in experts])


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
