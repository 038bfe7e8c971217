"""Small random models of Hugging Face's, and Megatron's logits of what they were imported to."""

from __future__ import annotations

import io
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Two ranks: every split of Megatron's that changes what lies in a checkpoint, but pipeline stages.
PARALLEL = "--tensor-model-parallel-size 2 --sequence-parallel"
EXPERT_PARALLEL = "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall"
RUN = shlex.split("""
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion
    --no-masked-softmax-fusion --no-rope-fusion --attention-backend unfused
    --seq-length 32 --micro-batch-size 2 --global-batch-size 2 --train-iters 1 --lr 1e-3 --mock-data
    --tokenizer-type NullTokenizer --make-vocab-size-divisible-by 2
""")

BASE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
)
LATENT = dict(
    BASE,
    num_key_value_heads=4,
    moe_intermediate_size=48,
    n_routed_experts=8,
    n_shared_experts=2,
    routed_scaling_factor=2.446,
    kv_lora_rank=32,
    q_lora_rank=None,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=3,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
)
SOFTMAX = dict(
    BASE,
    num_key_value_heads=2,
    head_dim=24,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
)
# Name -> Transformers' class and configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "moonlight": ("DeepseekV3", LATENT),
    "k2": ("DeepseekV3", dict(LATENT, q_lora_rank=24, n_group=4, topk_group=2, num_experts_per_tok=4)),
    "yarn": (
        "DeepseekV3",
        dict(
            LATENT,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10000.0,
                factor=40.0,
                original_max_position_embeddings=4096,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
    ),
    "llama": ("Llama", dict(BASE, num_key_value_heads=4, tie_word_embeddings=True)),
    "llama groups": ("Llama", dict(BASE, num_key_value_heads=2)),
    "qwen3": ("Qwen3", dict(BASE, num_key_value_heads=2, head_dim=24)),
    "qwen3 moe": ("Qwen3Moe", dict(SOFTMAX, norm_topk_prob=True)),
    "qwen3 moe raw": ("Qwen3Moe", dict(SOFTMAX, norm_topk_prob=False, mlp_only_layers=[1])),
}


def tokens() -> Tensor:
    """The batch of all comparisons: [batch, sequence]."""
    return torch.randint(0, BASE["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(0))  # type: ignore[call-overload]


def make_model(name: str) -> Any:
    """A model with random weights, norms and biases, in fp32."""
    import transformers

    family, fields = MODELS[name]
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**fields)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "norm" in key:
                value.copy_(1 + 0.3 * torch.randn(value.shape, generator=generator))
            elif "correction" in key:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif "inv_freq" not in key:
                value.copy_(0.08 * torch.randn(value.shape, generator=generator))
    return model


def logits(model: Any) -> Tensor:
    """A Transformers model's logits of `tokens`."""
    with torch.no_grad():
        out: Tensor = model(tokens()).logits
    return out


def megatron_side(
    rank: int, world_size: int, runs: dict[str, tuple[Path, Path, list[str]]], large: list[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Megatron's own logits of checkpoints, each of which it saves again; and the keys of a large model.

    Args:
        rank: Of two.
        world_size: Two.
        runs: By name: the run to load, where to save it, and the model's flags.
        large: The flags of a model that is built on the meta device.

    Returns:
        Logits by name, and the whole shape of each tensor of the large model by its key.
    """
    from tests.models import Layout, initialize

    initialize(Layout(2, tp=2, ep=2, etp=1, sequence_parallel=True))
    with redirect_stdout(io.StringIO()):
        found = {name: _logits_and_save(*run) for name, run in runs.items()}
        return found, _keys(large)


def _build(flags: list[str]) -> tuple[Any, Any]:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    sys.argv = ["train", *flags, *RUN, *shlex.split(PARALLEL)]
    if "--num-experts" in flags:
        sys.argv += shlex.split(EXPERT_PARALLEL)
    args = parse_args()
    validate_args(args)
    args.padded_vocab_size = args.vocab_size
    config = gpt_config_from_args(args)
    config.transformer.perform_initialization = False
    config.finalize()
    return args, GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


def _keys(flags: list[str]) -> dict[str, tuple[int, ...]]:
    from megatron_muon.megatron.checkpoint.loading import wanted_tensors

    with torch.device("meta"):
        _, model = _build(flags)
    return {key: entry.shape for key, entry in wanted_tensors(model.sharded_state_dict()).items()}


def _logits_and_save(source: Path, target: Path, flags: list[str]) -> Tensor:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megatron_muon.checkpoints.reader import iteration_directory
    from tests.checkpoint_runs import child_processes

    args, model = _build(flags)
    state = model.sharded_state_dict()
    loaded = dist_checkpointing.load(state, str(iteration_directory(source)), strict="log_unexpected")
    model.load_state_dict({name: loaded[name] for name in model.state_dict() if name in loaded})
    batch = tokens()
    with torch.no_grad():
        out = model(batch, torch.arange(batch.shape[1]).expand_as(batch), None)
        out = gather_from_tensor_model_parallel_region(out)
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    with child_processes():
        content = {"args": args, "iteration": 7, "checkpoint_version": 3.0}
        dist_checkpointing.save({**content, **model.sharded_state_dict()}, str(target))
    return out.float()
