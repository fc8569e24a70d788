#!/usr/bin/env bash
# Verify a conversion, on any one machine. What follows the script's name goes to `megatron-converters verify`:
#
#   scripts/torchrun/verify.sh SRC DST     do both hold the same model, to the bit?
#   scripts/torchrun/verify.sh DST         are the output's files as they were written? (checksums, no source needed)
#
# Exits with 0 if all is equal and with 1 if not, having named what differs.
set -euo pipefail

PYTHON="${PYTHON:-python}"                                    # of an environment with numpy, safetensors and torch

if [ $# -lt 1 ]; then
    echo "usage: $(basename "$0") SRC DST | DST [options of verify]" >&2
    exit 2
fi
exec "$PYTHON" -m megatron_converters verify "$@"
