#!/usr/bin/env bash
# Trains Moonlight-16B-A3B (arXiv 2502.16982) with Distributed Muon and its experts in FP8, on 8 to 64 GPUs.
#
#   MEGATRON_LM=~/Megatron-LM DATA=/data/corpus TOKENIZER=moonshotai/Moonlight-16B-A3B bash examples/moonlight_16b_fp8.sh
#
# On each of NODES nodes of 8 GPUs, with NODE_RANK from 0 and MASTER_ADDR as for torchrun. Hopper: RECIPE=blockwise (the
# default), tensorwise or delayed. Blackwell: RECIPE=mxfp8. Further arguments are passed on and win.
#
# Not run: there was no GPU in the development of this version. A test parses these arguments with Megatron's own parser
# and checks them, for 8 and for 64 GPUs and each recipe. Batch, recomputation and overlap are starting points to
# measure from, not tuned. docs/fp8.md tells what FP8 does here and what it costs in memory.
set -euo pipefail

NODES=${NODES:-1}
RECIPE=${RECIPE:-blockwise}
FP8_WEIGHTS=${FP8_WEIGHTS:-0}
SCRIPT=${MEGATRON_LM:?set MEGATRON_LM to a Megatron-LM checkout, branch core_r0.19.0}/pretrain_gpt.py

# Moonlight's shape: 27 layers, the first with a dense MLP, the others with experts.
MODEL=(
  --transformer-impl transformer_engine # the layers that have FP8
  --num-layers 27                       # transformer layers
  --hidden-size 2048                    # width of the residual stream
  --num-attention-heads 16              # each with its own queries, keys and values
  --multi-latent-attention              # keys and values from one compressed state ...
  --kv-lora-rank 512                    # ... this wide; queries are not compressed (no --q-lora-rank)
  --qk-head-dim 128                     # a head's queries and keys, the part without a position,
  --qk-pos-emb-head-dim 64              # and the rotated part
  --v-head-dim 128                      # a head's values
  --qk-layernorm                        # a norm on the compressed state,
  --spec megatron_muon.megatron.model.latent_attention layer_spec # and none on the queries
  --position-embedding-type rope        # positions rotate queries and keys
  --rope-type rope                      # MLA's default is YaRN
  --no-rope-fusion                      # Megatron fuses MLA's rotation under YaRN only
  --rotary-base 50000                   # the slowest rotation's base
  --max-position-embeddings 8192        # longest sequence
  --swiglu                              # gated MLPs, also in experts
  --ffn-hidden-size 11264               # the first layer's MLP
  --normalization RMSNorm               # of layers' inputs; scale only
  --norm-epsilon 1e-6                   # added to the mean square, as Transformers does
  --disable-bias-linear                 # linears have no biases
  --untie-embeddings-and-output-weights # the head has weights of its own
  --attention-dropout 0                 # none in pretraining,
  --hidden-dropout 0                    # anywhere
)

EXPERTS=(
  --moe-layer-freq "([0]*1+[1]*26)"          # which layers have experts
  --num-experts 64                           # routed ones in a layer
  --moe-router-topk 6                        # of them for each token
  --moe-ffn-hidden-size 1408                 # 11 x 128: fits all recipes
  --moe-shared-expert-intermediate-size 2816 # two shared experts, as one
  --moe-router-score-function sigmoid        # scores of experts do not compete
  --moe-router-enable-expert-bias            # balances the load without an auxiliary loss
  --moe-router-bias-update-rate 1e-3         # how fast that bias moves
  --moe-router-topk-scaling-factor 2.446     # on the chosen experts' outputs
  --moe-router-load-balancing-type none      # no auxiliary loss
  --moe-router-dtype fp32                    # logits and scores of the router
  --moe-token-dispatcher-type alltoall       # the all-gather dispatcher cannot pad for FP8
  --moe-permute-fusion                       # sorts tokens by expert in one kernel
)

# Every expert layer's 64 experts are spread over a node's 8 GPUs. From 16 GPUs on, copies of an expert on several nodes
# share its optimizer state (expert data parallelism: 1 at 8 GPUs, 8 at 64); all other state is shared by all GPUs.
PARALLEL=(
  --tensor-model-parallel-size 1   # no matrix is split
  --pipeline-model-parallel-size 1 # all layers on every GPU
  --expert-model-parallel-size 8   # 8 of the 64 experts on each GPU of a node
  --expert-tensor-parallel-size 1  # nor is an expert's
  --use-distributed-optimizer      # shards fp32 parameters, Muon's momentum and AdamW's state
  --overlap-grad-reduce            # gradients are reduced while the backward pass goes on,
  --overlap-param-gather           # parameters gathered while the forward pass does
)

# What --muon-moe-fp8 sets by itself, and says at the start: --fp8-format, --fp8-recipe, --te-precision-config-file (all
# but experts stay in bf16), --moe-grouped-gemm, --moe-router-padding-for-quantization.
PRECISION=(
  --bf16                               # weights and activations but the experts'
  --muon-moe-fp8 "$RECIPE"             # the experts' linears in FP8
  --accumulate-allreduce-grads-in-fp32 # over micro-batches and GPUs
)
# Keeps the experts' weights in FP8 instead of bf16, and gathers them as bytes; Muon updates fp32 shards in both cases.
if [[ $FP8_WEIGHTS == 1 ]]; then
  PRECISION+=(--fp8-param-gather)
  # mxfp8 has scales in two directions, so that bf16 is gathered, in the place of the gradients, and quantized by all.
  if [[ $RECIPE == mxfp8 ]]; then
    PRECISION+=(--reuse-grad-buf-for-mxfp8-param-ag)
  fi
fi

# Muon with Moonlight's settings for matrices; AdamW, with these numbers, for embeddings, head and norms.
OPTIMIZER=(
  --distributed-muon      # Muon for matrices, in Megatron's DistributedOptimizer
  --optimizer adam        # AdamW for the rest
  --adam-beta1 0.9        # decay of its mean gradient
  --adam-beta2 0.95       # decay of its mean square
  --adam-eps 1e-8         # added to that one's root
  --weight-decay 0.1      # of both
  --clip-grad 1.0         # by the norm of all gradients together
  --lr 4.2e-4             # of both: Muon's updates have AdamW's size
  --min-lr 4.2e-5         # where the schedule ends
  --lr-decay-style cosine # from one to the other
  --lr-warmup-iters 2000  # up from zero before that
)

TRAINING=(
  --seq-length 8192               # tokens of a sequence
  --micro-batch-size 1            # sequences a GPU computes at a time
  --global-batch-size 2048        # sequences: 16.8M tokens a step
  --train-iters "${STEPS:-10000}" # Moonlight's 5.7T tokens are 340,000 such steps
  --eval-interval 500             # steps between validations
  --eval-iters 10                 # batches of each
  --log-interval 10               # steps between lines of the log
)
# These are computed again in the backward pass, for memory. Megatron has no FP8 recomputation with delayed scaling.
if [[ $RECIPE != delayed ]]; then
  TRAINING+=(--recompute-granularity selective --recompute-modules moe_act layernorm mla_up_proj)
fi

INPUT_OUTPUT=(
  --data-path "${DATA:?set DATA to the prefix of a .bin and .idx file}" # what indexed_dataset wrote
  --split 99,1,0                        # percent for training, validation, test
  --tokenizer-type HuggingFaceTokenizer # only its vocabulary and end of text matter here
  --tokenizer-model "${TOKENIZER:?set TOKENIZER to a Hugging Face tokenizer of 163840 tokens}" # its name or directory
  --save "${CHECKPOINTS:-checkpoints/moonlight_16b_fp8}" # where checkpoints go
  --load "${CHECKPOINTS:-checkpoints/moonlight_16b_fp8}" # goes on where an earlier run ended
  --save-interval 500                   # steps between checkpoints
  --ckpt-format torch_dist              # can be loaded on another number of GPUs
)

torchrun --nnodes "$NODES" --node-rank "${NODE_RANK:-0}" --nproc-per-node 8 \
  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}" \
  -m megatron_muon.launch "$SCRIPT" \
  "${MODEL[@]}" "${EXPERTS[@]}" "${PARALLEL[@]}" "${PRECISION[@]}" "${OPTIMIZER[@]}" "${TRAINING[@]}" \
  "${INPUT_OUTPUT[@]}" "$@"
