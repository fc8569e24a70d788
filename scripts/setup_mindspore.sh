#!/usr/bin/env bash
# Print the path of a Python with the mindspore of requirements-mindspore.txt; create its environment if there is none (2.8 GB).
#
#   export MINDSPORE_PYTHON=$(scripts/setup_mindspore.sh)
#
# mindspore wants an older numpy than the converters' tests, so it lives alone: in .venv-mindspore, or where $MINDSPORE_VENV says.
# $PYTHON may name the Python 3.11 to make it with.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${MINDSPORE_VENV:-$PWD/.venv-mindspore}

satisfies() { # by importing it, as tests skip where that fails
    "$1" - <<'PY'
import sys
from importlib.metadata import version

import mindspore  # noqa: F401 - for its shared libraries

lines = open("requirements-mindspore.txt", encoding="utf-8").read().splitlines()
sys.exit(any(version(name) != pin for name, pin in (line.split("==") for line in lines if "==" in line)))
PY
}

base_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.11 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "no Python 3.11 found; install it, or give its path: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

if ! satisfies "$venv/bin/python" 2>/dev/null; then
    base=$(base_python)
    echo "setting up $venv with $("$base" --version) (once; mindspore is a large download)" >&2
    [ -x "$venv/bin/python" ] || "$base" -m venv "$venv" >&2
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check install -r requirements-mindspore.txt >&2
    satisfies "$venv/bin/python" >&2
fi
(cd "$venv" && echo "$PWD/bin/python")
