#!/usr/bin/env bash
# A model goes from Hugging Face to Megatron-LM, is trained there, and comes back: what the job scripts of single models in scripts/slurm
# and scripts/torchrun have in common. They set HF, MEGATRON_LM, DATA and WORK, the arrays LAYOUT and TRAINING, and two functions:
# `convert`, which runs a conversion with the given options, and `launch`, which starts a program on every GPU.
#
# Each step can be repeated: finished conversions end at once, and the training goes on from its last checkpoint.
# shellcheck disable=SC2153 # HF, DATA, … are set by the script that reads this one
set -euo pipefail

PYTHON="${PYTHON:-python}"                                    # in an environment with numpy, safetensors and torch
TRACKER=latest_checkpointed_iteration.txt

for path in "$HF/config.json" "$MEGATRON_LM/pretrain_gpt.py"; do
    if [ ! -e "$path" ]; then
        echo "usage: set HF, MEGATRON_LM and DATA in the first lines of the script, or in the environment; there is no $path" >&2
        exit 2
    fi
done

there_and_back() {
    local begin flags model_args back
    convert "$HF" "$WORK/megatron" "${LAYOUT[@]}"
    if first; then "$PYTHON" -m megatron_converters verify "$HF" "$WORK/megatron"; fi

    begin="$WORK/megatron"
    if [ -f "$WORK/trained/$TRACKER" ]; then begin="$WORK/trained"; fi
    flags="$("$PYTHON" -m megatron_converters args "$begin")"
    eval "model_args=($flags)"                                # quoted for a shell, --load among them
    launch "$MEGATRON_LM/pretrain_gpt.py" "${model_args[@]}" "${TRAINING[@]}" --data-path "$DATA" --save "$WORK/trained"

    back="$WORK/hf_$(<"$WORK/trained/$TRACKER")"
    convert "$WORK/trained" "$back" --to hf --hf-config "$HF"
    if first; then "$PYTHON" -m megatron_converters verify "$WORK/trained" "$back"; fi
    echo "trained model: $back"
}

# Whether this is the first machine, or the only one, which verifies for all.
first() {
    [ "${NODE_RANK:-0}" -eq 0 ]
}
