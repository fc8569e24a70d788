#!/usr/bin/env bash
# Build the image of Containerfile and ask it for its version, where podman or docker is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in podman docker; do
    if command -v "$tool" >/dev/null; then
        "$tool" build --file Containerfile --tag megatron-converters .
        exec "$tool" run --rm megatron-converters --version
    fi
done
echo "no podman or docker here: the image is not built, and Containerfile is checked by tests/test_packaging.py alone"
