#!/usr/bin/env bash
# Build the image of Containerfile and ask it for its version, where podman or docker runs.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in podman docker; do
    if "$tool" info >/dev/null 2>&1; then # a client alone, without a daemon, builds nothing
        "$tool" build --file Containerfile --tag megatron-converters .
        exec "$tool" run --rm megatron-converters --version
    fi
done
echo "neither podman nor docker runs here: the image is not built, and Containerfile is checked by tests/test_packaging.py alone"
