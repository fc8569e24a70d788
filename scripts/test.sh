#!/usr/bin/env bash
# Run all checks of the project: style, types, tests. Arguments are passed to pytest:  scripts/test.sh tests/test_plan.py -k name
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(scripts/setup_env.sh test) || exit 1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

failed=()
check() {
    echo "== $*"
    "$PYTHON" -m "$@" || failed+=("$1")
}
check ruff check --quiet .
check ruff format --quiet --check .
check mypy --no-error-summary megatron_converters megatron_layers model_converter_tool
check pytest -q -n 2 --dist loadgroup "$@"

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}" >&2
    exit 1
fi
