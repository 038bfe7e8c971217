"""Writes the Slurm scripts beside this file, with what the planner says of each layout in its header.

    python examples/slurm/make_scripts.py

The models' flags are those that `megatron_muon import` writes for their config.json. Llama 3 70B has no script for
8 GPUs: its weights in bf16, gradients and optimizer state in fp32 take 14 bytes a parameter, 123 GB on each of 8.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_muon.checkpoints.huggingface.architecture import flags_of, settings_from_config

HERE = Path(__file__).resolve().parent
GPUS_PER_NODE = 8

# From the models' config.json at huggingface.co: moonshotai/Moonlight-16B-A3B, Qwen/Qwen3-8B and
# meta-llama/Meta-Llama-3-70B. Moonlight's epsilon is 1e-6 here, as Transformers computes it: docs/huggingface.md.
CONFIGS: dict[str, dict[str, Any]] = {
    "moonlight-16b": {
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "llama3-70b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Job:
    """A model on a number of GPUs."""

    model: str
    dp: int
    tp: int = 1
    pp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def name(self) -> str:
        return f"{self.model}-{self.gpus}gpus"


JOBS = (
    Job("moonlight-16b", dp=8, ep=8),
    Job("moonlight-16b", dp=64, ep=8),
    Job("moonlight-16b", dp=512, ep=8),
    Job("qwen3-8b", dp=8),
    Job("qwen3-8b", dp=64),
    Job("qwen3-8b", dp=256, tp=2),
    Job("llama3-70b", dp=2, tp=8, pp=4),
    Job("llama3-70b", dp=16, tp=8, pp=4),
)
# Peaks for AdamW, which Muon takes over unchanged. Moonlight: arXiv 2502.16982. Llama 3 70B, and 8B for the Qwen3 model
# of that size, whose report gives none: arXiv 2407.21783, table 3.
LEARNING_RATES = {"moonlight-16b": "4.2e-4", "qwen3-8b": "3e-4", "llama3-70b": "1.5e-4"}
ONE_QUEUE = """
# Megatron asks for it with tensor parallelism before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=1
"""
TEMPLATE = r"""#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_per_node}
#SBATCH --exclusive
#
# Pretrains {model} with Distributed Muon on {gpus} GPUs: {layout}. Not run: there was no GPU.
#
#   MEGATRON_LM=~/Megatron-LM DATA=/data/corpus TOKENIZER=/data/tokenizer sbatch examples/slurm/{name}.sh
#
# Without Slurm, start it with bash on every node, with NODE_RANK and MASTER_ADDR set. Further arguments are passed on
# and win. Batch, learning rate and recomputation are starting points to measure from, not tuned.
#
# What `{command}` says, for the stage with most work:
{plan}
#
# Made by examples/slurm/make_scripts.py; a test compares the two.
set -euo pipefail
{environment}
MODEL=(
{model_flags}
)
LAYOUT=(
  --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}
  --expert-model-parallel-size {ep} --expert-tensor-parallel-size 1{sequence_parallel}
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --bf16 --accumulate-allreduce-grads-in-fp32 --recompute-activations
)
OPTIMIZER=(
  --distributed-muon --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
  --weight-decay 0.1 --clip-grad 1.0 --lr {lr} --lr-decay-style cosine --lr-warmup-iters 2000
)
TRAINING=(
  --seq-length 8192 --micro-batch-size 1 --global-batch-size {batch} --train-iters "${{STEPS:-10000}}"
  --eval-interval 500 --eval-iters 10 --log-interval 10
  --muon-log-interval 100 --tensorboard-dir "${{LOGS:-runs/{name}}}"
  --data-path "${{DATA:?set DATA to the prefix of a .bin and .idx file}}" --split 99,1,0
  --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model "${{TOKENIZER:?set TOKENIZER to the name or directory of a tokenizer}}"
  --save "${{CHECKPOINTS:-checkpoints/{name}}}"
  --load "${{CHECKPOINTS:-checkpoints/{name}}}" --save-interval 500
  --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
)

START=(torchrun --nnodes "${{SLURM_NNODES:-{nodes}}}" --nproc-per-node {gpus_per_node})
if [[ -n ${{SLURM_JOB_ID:-}} ]]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  START=(srun "${{START[@]}}" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:29500")
else
  START+=(--node-rank "${{NODE_RANK:-0}}")
  START+=(--master-addr "${{MASTER_ADDR:-localhost}}" --master-port "${{MASTER_PORT:-29500}}")
fi
"${{START[@]}}" -m megatron_muon.launch "${{MEGATRON_LM:?set MEGATRON_LM to a Megatron-LM checkout}}/pretrain_gpt.py" \
  "${{MODEL[@]}}" "${{LAYOUT[@]}}" "${{OPTIMIZER[@]}}" "${{TRAINING[@]}}" "$@"
"""


def plan_command(job: Job) -> list[str]:
    """The words after `python`."""
    words = ["-m", "megatron_muon", "plan", job.model, "--dp", str(job.dp)]
    for flag, size in (("--tp", job.tp), ("--pp", job.pp), ("--ep", job.ep)):
        words += [flag, str(size)] if size > 1 else []
    return words


def plan_lines(job: Job) -> Iterator[str]:
    """What the planner says of the stage with most Newton-Schulz on a rank, as comments."""
    command = [sys.executable, *plan_command(job), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stages = json.loads(done.stdout)["stages"]
    demands = [stage["schemes"]["megatron_muon"] for stage in stages]
    worst = max(demands, key=lambda demand: demand["flops"]["max"])
    adamw = stages[demands.index(worst)]["adamw"]["sent_bytes"]
    flops, sent = worst["flops"], worst["sent_bytes"]["max"]
    share = f"{flops['max_over_ideal']:.2f} of the ideal share"
    yield f"#   Newton-Schulz, busiest GPU  {flops['max'] / 1e12:.3g} TFLOP a step, {share}"
    traffic = f"{100 * sent / adamw:.1f} % of AdamW's traffic"
    yield f"#   exchange beyond AdamW's     {sent / 1e6:.0f} MB sent a step, {traffic}"
    yield f"#   momentum                    {worst['momentum_bytes']['max'] / 1e9:.2f} GB"
    yield f"#   exchange buffers            {worst['exchange_buffer_bytes']['max'] / 1e9:.2f} GB"
    yield f"#   gradients and weights       {worst['buffer_bytes'] / 1e9:.1f} GB, of Muon's parameters"


def script(job: Job) -> str:
    """The text of a job's script."""
    flags = flags_of(settings_from_config(CONFIGS[job.model]))
    sizes = {"DP": job.dp, "TP": job.tp, "PP": job.pp, "EP": job.ep}
    return TEMPLATE.format(
        name=job.name,
        model=job.model,
        gpus=job.gpus,
        nodes=job.gpus // GPUS_PER_NODE,
        gpus_per_node=GPUS_PER_NODE,
        layout=" x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1),
        command=" ".join(["python", *plan_command(job)]),
        plan="\n".join(plan_lines(job)),
        model_flags="\n".join("  " + " ".join(map(shlex.quote, words)) for words in flags),
        tp=job.tp,
        pp=job.pp,
        ep=job.ep,
        environment=ONE_QUEUE if job.tp > 1 else "",
        sequence_parallel=" --sequence-parallel" if job.tp > 1 else "",
        lr=LEARNING_RATES[job.model],
        batch=max(512, job.dp),
    )


def main() -> None:
    """Writes all scripts."""
    for job in JOBS:
        path = HERE / f"{job.name}.sh"
        path.write_text(script(job), encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()
