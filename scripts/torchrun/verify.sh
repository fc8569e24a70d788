#!/usr/bin/env bash
# Verify a conversion on one machine. Arguments are passed to `megatron-converters verify`:
#
#   scripts/torchrun/verify.sh SRC DST     do both hold the same model, bit for bit?
#   scripts/torchrun/verify.sh DST         are the output's files unchanged since they were written? (checksums, no source needed)
#
# Exits with 0 if everything is equal, with 1 if something differs, which it lists, and with 2 if it could not compare.
set -euo pipefail

PYTHON="${PYTHON:-python}"                                    # in an environment with numpy, safetensors and torch

if [ $# -lt 1 ]; then
    echo "usage: $(basename "$0") SRC DST | DST [options of verify]" >&2
    exit 2
fi
exec "$PYTHON" -m megatron_converters verify "$@"
