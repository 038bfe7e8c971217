#!/usr/bin/env bash
#SBATCH --job-name=llama3-70b-64gpus
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#
# Pretrains llama3-70b with Distributed Muon on 64 GPUs: DP2 x TP8 x PP4. Not run: there was no GPU.
#
#   MEGATRON_LM=~/Megatron-LM DATA=/data/corpus TOKENIZER=/data/tokenizer sbatch examples/slurm/llama3-70b-64gpus.sh
#
# Without Slurm, start it with bash on every node, with NODE_RANK and MASTER_ADDR set. Further arguments are passed on
# and win. Batch, learning rate and recomputation are starting points to measure from, not tuned.
#
# What `python -m megatron_muon plan llama3-70b --dp 2 --tp 8 --pp 4` says, for the stage with most work:
#   Newton-Schulz, busiest GPU  209 TFLOP a step, 1.01 of the ideal share
#   exchange beyond AdamW's     4018 MB sent a step, 62.6 % of AdamW's traffic
#   momentum                    4.28 GB
#   exchange buffers            1.64 GB
#   gradients and weights       12.8 GB, of Muon's parameters
#
# Made by examples/slurm/make_scripts.py; a test compares the two.
set -euo pipefail

# Megatron asks for it with tensor parallelism before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
  --num-layers 80
  --hidden-size 8192
  --ffn-hidden-size 28672
  --num-attention-heads 64
  --max-position-embeddings 8192
  --init-method-std 0.02
  --norm-epsilon 1e-05
  --vocab-size 128256
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --position-embedding-type rope
  --rotary-base 500000
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --group-query-attention
  --num-query-groups 8
  --kv-channels 128
)
LAYOUT=(
  --tensor-model-parallel-size 8 --pipeline-model-parallel-size 4
  --expert-model-parallel-size 1 --expert-tensor-parallel-size 1 --sequence-parallel
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --bf16 --accumulate-allreduce-grads-in-fp32 --recompute-activations
)
OPTIMIZER=(
  --distributed-muon --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
  --weight-decay 0.1 --clip-grad 1.0 --lr 1.5e-4 --lr-decay-style cosine --lr-warmup-iters 2000
)
TRAINING=(
  --seq-length 8192 --micro-batch-size 1 --global-batch-size 512 --train-iters "${STEPS:-10000}"
  --eval-interval 500 --eval-iters 10 --log-interval 10
  --muon-log-interval 100 --tensorboard-dir "${LOGS:-runs/llama3-70b-64gpus}"
  --data-path "${DATA:?set DATA to the prefix of a .bin and .idx file}" --split 99,1,0
  --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model "${TOKENIZER:?set TOKENIZER to the name or directory of a tokenizer}"
  --save "${CHECKPOINTS:-checkpoints/llama3-70b-64gpus}"
  --load "${CHECKPOINTS:-checkpoints/llama3-70b-64gpus}" --save-interval 500
  --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
)

START=(torchrun --nnodes "${SLURM_NNODES:-8}" --nproc-per-node 8)
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  START=(srun "${START[@]}" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:29500")
else
  START+=(--node-rank "${NODE_RANK:-0}")
  START+=(--master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}")
fi
"${START[@]}" -m megatron_muon.launch "${MEGATRON_LM:?set MEGATRON_LM to a Megatron-LM checkout}/pretrain_gpt.py" \
  "${MODEL[@]}" "${LAYOUT[@]}" "${OPTIMIZER[@]}" "${TRAINING[@]}" "$@"
