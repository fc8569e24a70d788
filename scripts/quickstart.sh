#!/usr/bin/env bash
# Make a small random Llama, convert it to Megatron-LM with TP2 and PP2, convert it back, and prove that nothing changed.
# The results are kept if a folder is given:  scripts/quickstart.sh [FOLDER]
set -euo pipefail
[ $# -eq 0 ] || { mkdir -p "$1" && work=$(cd "$1" && pwd); }
cd "$(dirname "$0")/.."
PYTHON=$(scripts/setup_env.sh demo)
[ -n "${work:-}" ] || { work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT; }
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1

step() {
    echo
    echo "== $1"
    shift
    echo "\$ python $*" | sed "s|$work/||g"
    "$PYTHON" "$@"
}

step "a small random Llama 3.1 with a real tokenizer" scripts/make_tiny_llama.py "$work/hf"
step "Hugging Face -> Megatron-LM, tensor parallel 2, pipeline parallel 2" \
    convert.py --model-type GPT --loader llama_mistral --saver mcore --load-dir "$work/hf" --save-dir "$work/megatron" \
    --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2
(cd "$work" && find megatron -type f -exec ls -s --block-size=1K {} + | sort -k 2 | sed 's/^/   KiB /')
step "Megatron-LM -> Hugging Face" \
    convert_mlm_to_hf_checkpoint.py --load-path "$work/megatron" --save-path "$work/hf2"
step "is it the same model? (safetensors and transformers decide, not this project)" \
    scripts/prove_equal.py "$work/hf" "$work/hf2"
