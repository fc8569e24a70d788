#!/usr/bin/env bash
# Put the plugins into a tree of Megatron-LM, beside its tools/checkpoint/convert.py, and take them out again:
#
#   scripts/install_dropin.sh MEGATRON_DIR                 files of the tree stay as they are
#   scripts/install_dropin.sh MEGATRON_DIR --as-core       ours also take the names of the tree's own plugins, which are kept as *_stock.py
#   scripts/install_dropin.sh MEGATRON_DIR --uninstall     remove what was installed, put back what was replaced
#
# A small model is converted there and back with the tree's convert.py at the end, unless --no-check says otherwise; if that fails, or
# anything before it, the tree is left as it was. PYTHON names the Python that runs the tree. A second run replaces the first.
# --uninstall keeps everything where an installed file was changed since; --force removes those, too.
set -euo pipefail

PYTHON="${PYTHON:-python}"                                    # in an environment with numpy, safetensors and torch
here="$(cd "$(dirname "$0")/.." && pwd)"
LIBRARY=megatron_converters
RECORD=.megatron_converters_dropin                            # checksums of what was installed
MOVED=.megatron_converters_moved                              # tree's own files, by name, that are kept as *_stock.py
BEGIN="# megatron-converters: begin"
END="# megatron-converters: end"
# Module of the library, and the name that it has beside convert.py: Megatron-LM up to 0.10 looks for loader_mcore and saver_mcore, later
# releases read `mcore` as `core`.
PLUGINS="
loaders.loader_llama_mistral loader_llama_mistral
loaders.loader_mixtral_hf    loader_mixtral_hf
loaders.loader_hf            loader_hf
loaders.loader_core          loader_core
loaders.loader_core          loader_mcore
loaders.loader_core_mf       loader_core_mf
savers.saver_mcore           saver_core
savers.saver_mcore           saver_mcore
savers.saver_hf              saver_hf
savers.saver_mf              saver_mf
"

fail() {
    echo "error: $*" >&2
    exit 1
}

usage() {
    echo "usage: $(basename "$0") MEGATRON_DIR [--as-core] [--no-check] | MEGATRON_DIR --uninstall [--force]" >&2
    exit 2
}

tree="" as_core="" uninstall="" force="" check=yes
for word in "$@"; do
    case "$word" in
        --as-core) as_core=yes ;;
        --uninstall) uninstall=yes ;;
        --force) force=yes ;;
        --no-check) check="" ;;
        -*) usage ;;
        *) [ -z "$tree" ] || usage; tree="$word" ;;
    esac
done
[ -n "$tree" ] || usage
tools="$tree/tools/checkpoint"
[ -f "$tools/convert.py" ] || { echo "error: $tree is no tree of Megatron-LM: it has no tools/checkpoint/convert.py" >&2; exit 2; }
tools="$(cd "$tools" && pwd)"
cd "$tools"

# --- taking out

without_our_lines() {
    sed "/^$BEGIN\$/,/^$END\$/d" requirements.txt
}

remove() {
    local name
    if [ -f requirements.txt ] && grep -qx "$BEGIN" requirements.txt; then
        without_our_lines >requirements.txt.new
        if [ -s requirements.txt.new ]; then cat requirements.txt.new >requirements.txt; else rm requirements.txt; fi
        rm requirements.txt.new
    fi
    if [ -f "$RECORD" ]; then
        while read -r _ name; do
            rm -f -- "$name"
        done <"$RECORD"
    fi
    if [ -f "$MOVED" ]; then
        while read -r name; do
            if [ -e "$(stock "$name")" ]; then mv -- "$(stock "$name")" "$name"; fi
        done <"$MOVED"
    fi
    if [ -d "$LIBRARY" ]; then
        find "$LIBRARY" -name __pycache__ -type d -prune -exec rm -r {} +
        find "$LIBRARY" -depth -type d -empty -delete
    fi
    rm -f -- "$RECORD" "$RECORD.new" "$MOVED"
}

stock() {
    echo "${1%.py}_stock.py"
}

changed() {
    sha256sum --check --quiet "$RECORD" 2>/dev/null | sed 's/: FAILED.*//' || true
}

take_out() {
    local names
    names="$(changed)"
    if [ -n "$names" ] && [ -z "$force" ]; then
        fail "changed since they were installed: ${names//$'\n'/, }; nothing was removed: put your changes elsewhere, or use --uninstall --force"
    fi
    remove
}

if [ -n "$uninstall" ]; then
    [ -f "$RECORD" ] || fail "nothing is installed in $tools"
    take_out
    echo "removed from $tools"
    exit 0
fi

# --- putting in

# The record has a file before it is there, so that whatever stops the installation can be undone.
record() {
    sed 's/^/0  /' >>"$RECORD"
}

put() {
    echo "$1" | record
    cat >"$1"
}

# Files of a folder of the checkout, with the names that they get.
put_folder() {
    (cd "$here/$1" && find . -type f ! -path '*/__pycache__/*' -printf "$2/%P\n" | sort) | record
    mkdir -p -- "$2"
    tar --create --directory "$here/$1" --exclude=__pycache__ . | tar --extract --directory "$2" --no-same-owner
}

seal() {
    cut -c 4- "$RECORD" | xargs -d '\n' sha256sum -- >"$RECORD.new"
    mv -- "$RECORD.new" "$RECORD"
}

# A file of the tree keeps its name, or is moved away with --as-core. Fails if the name is not ours to take.
vacate() {
    local name="$1"
    [ -e "$name" ] || return 0
    [ -n "$as_core" ] || return 1
    [ ! -e "$(stock "$name")" ] || fail "$tools/$(stock "$name") exists, so that $name cannot be kept under this name; move it away"
    echo "$name" >>"$MOVED"
    mv -- "$name" "$(stock "$name")"
}

put_plugin() {
    local module="$1" name="$2"
    vacate "$name.py" || { echo "  $name.py is the tree's own; ours is --${name%%_*} $LIBRARY.$module"; return 0; }
    {
        echo "\"\"\"Plugin of megatron-converters, put here by its scripts/install_dropin.sh.\"\"\""
        echo
        case "$name" in loader_*) call=load_checkpoint ;; *) call=save_checkpoint ;; esac
        echo "from $LIBRARY.$module import add_arguments, $call  # noqa: F401"
        if [ -e "$(stock "$name.py")" ]; then
            printf '\n\ndef __getattr__(name):\n'
            printf '    """What else the file has that stood here, for tools of the tree that import it."""\n'
            printf '    import %s_stock\n\n    return getattr(%s_stock, name)\n' "$name" "$name"
        fi
    } | put "$name.py"
}

put_requirements() {
    local line package
    {
        echo "$BEGIN"
        while read -r line; do
            package="${line%%[<>=!~[; ]*}"
            if ! grep -qiE "^$package([^A-Za-z0-9_.-]|\$)" requirements.txt 2>/dev/null; then echo "$line"; fi
        done <"$here/requirements.txt"
        echo "$END"
    } >requirements.txt.new
    if [ -s requirements.txt ] && [ -n "$(tail -c 1 requirements.txt)" ]; then echo >>requirements.txt; fi
    cat requirements.txt.new >>requirements.txt
    rm requirements.txt.new
}

undo() {
    trap - EXIT
    remove
    rm -f requirements.txt.new
    echo "error: not installed; $tools is as it was" >&2
}

if [ -f "$RECORD" ]; then take_out; fi
[ ! -e "$LIBRARY" ] || fail "$tools/$LIBRARY exists and was not put there by this script; move it away"
trap undo EXIT
: >"$RECORD"
echo "installing in $tools"
put_folder megatron_converters "$LIBRARY"
put_folder loaders "$LIBRARY/loaders"
put_folder savers "$LIBRARY/savers"
while read -r module name; do
    if [ -n "$module" ]; then put_plugin "$module" "$name"; fi
done <<<"$PLUGINS"
if vacate convert_mlm_to_hf_checkpoint.py; then
    put convert_mlm_to_hf_checkpoint.py <"$here/convert_mlm_to_hf_checkpoint.py"
else
    echo "  convert_mlm_to_hf_checkpoint.py is the tree's own; ours is python -m $LIBRARY.cli.mlm_to_hf, with PYTHONPATH=$tools"
fi
put_requirements
seal

if [ -n "$as_core" ]; then
    loader=llama_mistral saver=mcore back=core
else
    loader="$LIBRARY.loaders.loader_llama_mistral" saver="$LIBRARY.savers.saver_mcore" back="$LIBRARY.loaders.loader_core"
fi
if [ -n "$check" ]; then
    "$PYTHON" "$here/scripts/check_dropin.py" "$tools/convert.py" "$loader" "$saver" "$back"
fi
trap - EXIT

cat <<END
Convert to Megatron-LM, and back:
  $PYTHON $tools/convert.py --model-type GPT --loader $loader --saver $saver \\
    --load-dir HF --save-dir MEGATRON --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2
  $PYTHON $tools/convert.py --model-type GPT --loader $back --saver hf --load-dir MEGATRON --save-dir HF_AGAIN
  PYTHONPATH=$tools $PYTHON -m $LIBRARY verify HF HF_AGAIN
Take it out again: $here/scripts/install_dropin.sh $tree --uninstall
END
