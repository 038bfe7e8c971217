#!/usr/bin/env bash
#SBATCH --job-name=moonlight-16b-8gpus
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#
# Pretrains moonlight-16b with Distributed Muon on 8 GPUs: DP8 x EP8. Not run: there was no GPU.
#
#   MEGATRON_LM=~/Megatron-LM DATA=/data/corpus TOKENIZER=/data/tokenizer sbatch examples/slurm/moonlight-16b-8gpus.sh
#
# Without Slurm, start it with bash on every node, with NODE_RANK and MASTER_ADDR set. Further arguments are passed on
# and win. Batch, learning rate and recomputation are starting points to measure from, not tuned.
#
# What `python -m megatron_muon plan moonlight-16b --dp 8 --ep 8` says, for the stage with most work:
#   Newton-Schulz, busiest GPU  73.8 TFLOP a step, 1.00 of the ideal share
#   exchange beyond AdamW's     180 MB sent a step, 3.8 % of AdamW's traffic
#   momentum                    7.64 GB
#   exchange buffers            0.71 GB
#   gradients and weights       16.2 GB, of Muon's parameters
#
# Made by examples/slurm/make_scripts.py; a test compares the two.
set -euo pipefail

MODEL=(
  --num-experts 64
  --num-layers 27
  --hidden-size 2048
  --ffn-hidden-size 11264
  --num-attention-heads 16
  --max-position-embeddings 8192
  --init-method-std 0.02
  --norm-epsilon 1e-06
  --moe-ffn-hidden-size 1408
  --moe-router-topk 6
  --kv-lora-rank 512
  --qk-head-dim 128
  --qk-pos-emb-head-dim 64
  --v-head-dim 128
  --vocab-size 163840
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --position-embedding-type rope
  --qk-layernorm
  --moe-router-score-function sigmoid
  --moe-router-enable-expert-bias
  --rotary-base 50000
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --multi-latent-attention
  --moe-router-dtype fp32
  --rope-type rope
  --rotary-scaling-factor 1.0
  --mscale 1.0
  --mscale-all-dim 0.0
  --no-rope-fusion
  --spec megatron_muon.megatron.model.latent_attention layer_spec
  --moe-layer-freq '([0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1])'
  --moe-shared-expert-intermediate-size 2816
  --moe-router-topk-scaling-factor 2.446
)
LAYOUT=(
  --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1
  --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
  --bf16 --accumulate-allreduce-grads-in-fp32 --recompute-activations
)
OPTIMIZER=(
  --distributed-muon --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
  --weight-decay 0.1 --clip-grad 1.0 --lr 4.2e-4 --lr-decay-style cosine --lr-warmup-iters 2000
)
TRAINING=(
  --seq-length 8192 --micro-batch-size 1 --global-batch-size 512 --train-iters "${STEPS:-10000}"
  --eval-interval 500 --eval-iters 10 --log-interval 10
  --muon-log-interval 100 --tensorboard-dir "${LOGS:-runs/moonlight-16b-8gpus}"
  --data-path "${DATA:?set DATA to the prefix of a .bin and .idx file}" --split 99,1,0
  --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model "${TOKENIZER:?set TOKENIZER to the name or directory of a tokenizer}"
  --save "${CHECKPOINTS:-checkpoints/moonlight-16b-8gpus}"
  --load "${CHECKPOINTS:-checkpoints/moonlight-16b-8gpus}" --save-interval 500
  --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
)

START=(torchrun --nnodes "${SLURM_NNODES:-1}" --nproc-per-node 8)
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  START=(srun "${START[@]}" --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:29500")
else
  START+=(--node-rank "${NODE_RANK:-0}")
  START+=(--master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}")
fi
"${START[@]}" -m megatron_muon.launch "${MEGATRON_LM:?set MEGATRON_LM to a Megatron-LM checkout}/pretrain_gpt.py" \
  "${MODEL[@]}" "${LAYOUT[@]}" "${OPTIMIZER[@]}" "${TRAINING[@]}" "$@"
