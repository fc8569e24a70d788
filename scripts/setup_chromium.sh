#!/usr/bin/env bash
# Print the path of Chromium; install Debian's package where there is none and apt-get can. Prints nothing where neither is so.
#
#   export CHROMIUM=$(scripts/setup_chromium.sh)
#
# Tests of pages in a browser skip without it.
set -euo pipefail

find_chromium() {
    local name
    for name in ${CHROMIUM:+"$CHROMIUM"} chromium chromium-browser google-chrome; do
        if command -v "$name"; then
            return
        fi
    done
    return 1
}

install_chromium() {
    local as_root=()
    [ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
    command -v apt-get >/dev/null || return 1
    echo "installing Chromium (once)" >&2
    # The lists of packages may be missing or old.
    "${as_root[@]}" apt-get install --yes --quiet --no-install-recommends chromium >&2 && return
    "${as_root[@]}" apt-get update --quiet >&2 && "${as_root[@]}" apt-get install --yes --quiet --no-install-recommends chromium >&2
}

find_chromium || { install_chromium && find_chromium; } || echo "no Chromium; tests that need it are skipped" >&2
