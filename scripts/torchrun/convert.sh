#!/usr/bin/env bash
# Convert a model on machines without a scheduler. Arguments are passed to `megatron-converters convert`.
# On one machine:
#
#   PROCS_PER_NODE=4 scripts/torchrun/convert.sh SRC DST --tp 8 --pp 8
#
# On several machines that share the folders, run the same line on each at the same time, with its own NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 scripts/torchrun/convert.sh SRC DST --tp 8 --pp 8     # on node0
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=node0 scripts/torchrun/convert.sh SRC DST --tp 8 --pp 8     # on node1
#
# To continue after a failure, a full disk or Ctrl-C, run the same lines again: finished files are kept. A lost machine ends
# the run on all; it can continue with another number of machines or processes. With ATTEMPTS=3 the script retries by itself.
set -euo pipefail

PYTHON="${PYTHON:-python}"                                    # in an environment with numpy, safetensors and torch
NNODES="${NNODES:-1}"                                         # number of machines
NODE_RANK="${NODE_RANK:-0}"                                   # number of this machine, from 0 to NNODES - 1
PROCS_PER_NODE="${PROCS_PER_NODE:-4}"                         # each process writes whole files
MASTER_ADDR="${MASTER_ADDR:-localhost}"                       # host name or address of machine 0
MASTER_PORT="${MASTER_PORT:-29513}"                           # a free port on machine 0
ATTEMPTS="${ATTEMPTS:-1}"                                     # at most so many runs, until one succeeds
PAUSE="${PAUSE:-30}"                                          # seconds between runs, for all machines to notice the failure
# If a machine has several networks, choose one: export GLOO_SOCKET_IFNAME=ib0

if [ $# -lt 2 ]; then
    echo "usage: $(basename "$0") SRC DST [options of convert]" >&2
    exit 2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"                # else torchrun prints that it sets this

convert() {
    if [ "$NNODES" -eq 1 ]; then                              # without torch.distributed
        "$PYTHON" -m megatron_converters convert "$@" --workers "$PROCS_PER_NODE"
    else
        "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --node-rank="$NODE_RANK" --nproc-per-node="$PROCS_PER_NODE" \
            --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m megatron_converters convert "$@"
    fi
}

for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
    code=0
    convert "$@" || code=$?
    # 0: complete; 2: wrong usage; 130: stopped by the user
    case "$code" in 0 | 2 | 130) exit "$code" ;; esac
    echo "run $attempt of $ATTEMPTS ended with code $code" >&2
    [ "$attempt" -eq "$ATTEMPTS" ] || sleep "$PAUSE"
done
exit "$code"
