#!/usr/bin/env bash
# Print the path of a Python that can run the demo or the tests; create the environment .venv if there is none.
#
#   PYTHON=$(scripts/setup_env.sh demo|test)
#
# demo accepts any environment with the packages that the converters and transformers need; test needs the pinned versions.
# It tries $PYTHON, the active python3 and .venv, in this order. pip's own variables choose another index, for example
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for the smaller torch without CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
kind=${1:?demo or test}

satisfies() {
    "$1" - "$kind" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version

kind = sys.argv[1]
lines = open("requirements-test.txt", encoding="utf-8").read().splitlines()
pins = dict(line.split("==") for line in lines if "==" in line)
if kind == "demo":
    pins = {name: None for name in ("torch", "numpy", "safetensors", "tqdm", "transformers", "tokenizers")}
    torch = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
    pins = pins if torch >= (2, 6) else {"a newer torch": None}
good = all(version(name).split("+")[0] == (pin or version(name).split("+")[0]) for name, pin in pins.items())
sys.exit(not (good and sys.version_info >= (3, 10)))
PY
}

base_python() { # the pinned versions need Python 3.11
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "no Python 3.11 or newer found; install one, or give its path: PYTHON=/path/to/python3 $0" >&2
    return 1
}

for candidate in ${PYTHON:+"$PYTHON"} python3 .venv/bin/python; do
    if satisfies "$candidate"; then
        command -v "$candidate" | sed "s|^\.venv|$PWD/.venv|"
        exit
    fi
done

base=$(base_python)
echo "setting up .venv with $("$base" --version) (once; torch is a large download)" >&2
[ -x .venv/bin/python ] || "$base" -m venv .venv >&2
pip=(.venv/bin/python -m pip --quiet --disable-pip-version-check install)
"${pip[@]}" "$(grep '^torch==' requirements-test.txt)" >&2
if [ "$kind" = test ]; then
    "${pip[@]}" -r requirements-test.txt >&2
else
    "${pip[@]}" -c requirements-test.txt -r requirements.txt transformers tokenizers >&2
fi
echo "$PWD/.venv/bin/python"
