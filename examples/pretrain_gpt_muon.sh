#!/usr/bin/env bash
# Trains a small GPT on mock data with Distributed Muon, through Megatron-LM's own, unmodified pretrain_gpt.py.
#
#   MEGATRON_LM=~/Megatron-LM bash examples/pretrain_gpt_muon.sh                        # 8 GPUs
#   MEGATRON_LM=~/Megatron-LM RANKS=2 DEVICE=cpu bash examples/pretrain_gpt_muon.sh     # no GPU, over Gloo
#
# MEGATRON_LM is a checkout of NVIDIA/Megatron-LM, branch core_r0.19.0. To train with Muon, a launch command changes in
# two places: `-m megatron_muon.launch` before the script, and `--distributed-muon` among its arguments. Without
# `--distributed-muon` (and the preset) the same command trains with AdamW. Further arguments are passed on and win.
#
# The second command prints (shortened; two cores of an AMD EPYC):
#
#   megatron_muon: --device cpu adds --distributed-backend gloo --transformer-impl local ...
#   megatron_muon: Newton-Schulz runs in fp32, since bf16 products are slow on a CPU; setting ns_dtype overrides this
#   iteration        1/      20 | ... | lm loss: 6.257982E+00 | ... | grad norm: 1.253 | ...
#   iteration       20/      20 | ... | lm loss: 3.551173E+00 | ... | grad norm: 1.143 | ...
#   validation loss at iteration 20 on validation set | lm loss value: 3.251802E+00 | ...
#
# Losses depend on the processor, since products round differently, and on the versions of torch and Megatron.
# Another processor gave 6.270065 at the first step and 3.539892 at the last.
set -euo pipefail

RANKS=${RANKS:-8}
DEVICE=${DEVICE:-cuda}
SCRIPT=${MEGATRON_LM:?set MEGATRON_LM to a Megatron-LM checkout}/pretrain_gpt.py

MODEL=(
  --num-layers 4 --hidden-size 128 --num-attention-heads 4 --group-query-attention --num-query-groups 2
  --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope
  --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
)
DATA=(--mock-data --tokenizer-type NullTokenizer --vocab-size 512 --split 90,5,5)
TRAINING=(
  --micro-batch-size 2 --global-batch-size 16 --train-iters 20 --bf16
  --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1
  --overlap-grad-reduce --overlap-param-gather --use-distributed-optimizer
  --log-interval 5 --eval-interval 1000 --eval-iters 1
)
# The first flag is all that Muon needs; the second says what is the default anyway.
MUON=(--distributed-muon --muon-preset moonlight)

torchrun --nproc-per-node "$RANKS" -m megatron_muon.launch --device "$DEVICE" "$SCRIPT" \
  "${MODEL[@]}" "${DATA[@]}" "${TRAINING[@]}" "${MUON[@]}" "$@"
