#!/usr/bin/env bash
# Build the documentation as a site, into site/ or the folder that is given; a broken link or a page without a place fails.
# mkdocs lives in an environment of its own, .venv-docs or where $DOCS_VENV says, which is made if there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${DOCS_VENV:-.venv-docs}

if ! "$venv/bin/python" -m pip freeze 2>/dev/null | grep -qx "$(grep '^mkdocs-material==' requirements-docs.txt)"; then
    echo "setting up $venv (once)" >&2
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv" >&2
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check install -r requirements-docs.txt >&2
fi
export NO_MKDOCS_2_WARNING=1 # a notice about versions after the pinned ones
exec "$venv/bin/python" -m mkdocs build --strict --site-dir "${1:-site}"
