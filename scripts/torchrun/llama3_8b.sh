#!/usr/bin/env bash
# Train Llama 3 8B on: from Hugging Face to Megatron-LM, training, and back, each step verified. On one machine with 8 GPUs:
#
#   scripts/torchrun/llama3_8b.sh
#
# Run again, it goes on where it stopped.
set -euo pipefail

# Edit these three lines, or set the variables:
HF="${HF:-/path/to/Meta-Llama-3-8B}"
MEGATRON_LM="${MEGATRON_LM:-/path/to/Megatron-LM}"
DATA="${DATA:-/path/to/data_text_document}"

WORK="${WORK:-$PWD/llama3_8b}"                                  # folder of the checkpoints
read -r -a LAYOUT <<<"${LAYOUT:---tp 2 --pp 2 --ckpt-format torch_dist}"
TRAINING=(
    --micro-batch-size 1 --global-batch-size 128 --train-iters 1000 --save-interval 500
    --lr 1e-5 --min-lr 1e-6 --lr-warmup-iters 50 --lr-decay-style cosine --clip-grad 1.0
    --bf16 --sequence-parallel --use-distributed-optimizer
)
read -r -a MORE <<<"${MORE:-}"                                # further flags of the training, which win
TRAINING+=(${MORE[@]+"${MORE[@]}"})
GPUS="${GPUS:-8}"                                             # of each machine
export NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}" MASTER_ADDR="${MASTER_ADDR:-localhost}"
export PYTHON="${PYTHON:-python}"
here="$(cd "$(dirname "$0")" && pwd)"
# shellcheck source=scripts/there_and_back.sh
source "$here/../there_and_back.sh"

convert() {
    "$here/convert.sh" "$@"
}

launch() {
    CUDA_DEVICE_MAX_CONNECTIONS=1 "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --node-rank="$NODE_RANK" \
        --nproc-per-node="$GPUS" --master-addr="$MASTER_ADDR" --master-port="${TRAINING_PORT:-29514}" "$@"
}

there_and_back
