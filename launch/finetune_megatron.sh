#!/usr/bin/env bash
# Fine-tune with Megatron-core: the arrays below are the defaults; arguments after them win.
#
#   bash launch/finetune_megatron.sh DATA_DIR RUN_DIR [more arguments of finetune_megatron.py]
#
# NPROC (ranks on this node), NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT go to torchrun.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_venv
cd "$REPO"

if [ $# -lt 2 ]; then
  echo "usage: $0 DATA_DIR RUN_DIR [arguments]" >&2
  exit 2
fi
DATA_PATH=$1
OUTPUT=$2
shift 2

GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
NPROC=${NPROC:-$((GPUS > 0 ? GPUS : 2))}
if [ "$GPUS" -gt 0 ]; then BACKEND=nccl; else BACKEND=gloo; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=1

DISTRIBUTED_ARGS=(
  --nproc_per_node "$NPROC"
  --nnodes "${NNODES:-1}"
  --node_rank "${NODE_RANK:-0}"
  --master_addr "${MASTER_ADDR:-localhost}"
  --master_port "${MASTER_PORT:-29500}"
)

MODEL_ARGS=(
  --num-layers 6
  --hidden-size 256
  --num-attention-heads 8
  --kv-channels 32
  --qk-layernorm
  --normalization RMSNorm
  --norm-epsilon 1e-6
  --swiglu
  --untie-embeddings-and-output-weights
)

MOE_ARGS=(
  --num-experts 16
  --moe-ffn-hidden-size 192
  --moe-router-topk 2
  --moe-router-load-balancing-type aux_loss
  --moe-aux-loss-coeff 0.02
  --moe-token-dispatcher-type alltoall
)

TRAINING_ARGS=(
  --seq-length 256
  --micro-batch-size 4
  --train-iters 300
  --lr 1e-3
  --min-lr 1e-4
  --lr-warmup-iters 20
  --lr-decay-style cosine
  --seed 0
)

MODEL_PARALLEL_ARGS=(
  --expert-model-parallel-size "$NPROC"
  --distributed-backend "$BACKEND"
)

SEMANTIC_EP_ARGS=(
  --semantic-ep-enabled
  --semantic-ep-observe-output "$OUTPUT/profile"
)

torchrun "${DISTRIBUTED_ARGS[@]}" launch/finetune_megatron.py \
  --data-path "$DATA_PATH" \
  --output "$OUTPUT" \
  "${MODEL_ARGS[@]}" \
  "${MOE_ARGS[@]}" \
  "${TRAINING_ARGS[@]}" \
  "${MODEL_PARALLEL_ARGS[@]}" \
  "${SEMANTIC_EP_ARGS[@]}" \
  "$@"
