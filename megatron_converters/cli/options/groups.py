"""Groups of options in help, by need, the first being what most conversions need. A row names each option once, by any name."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Group(NamedTuple):
    """Title of a group, and the options in it, in the order in which help shows them."""

    title: str
    options: tuple[str, ...]


def _group(title: str, options: str) -> Group:
    return Group(title, tuple(options.split()))


#: Title for folders and other words without an option.
OPERANDS = "what to name"
#: Title for options without a row. There are none; a test says so.
REST = "more options"
GROUPS = (
    _group(
        "what most need",
        """
        --loader --saver --load-dir --load-path --save-dir --save-path --in_dir --save_path --format --model_type --model_size
        --to --tp --pp --ep --etp --tp_size --pp_size --num_layer --num_query_heads --num_kv_heads --hf_config --tokenizer-model
        --overwrite --dry-run --download
        """,
    ),
    _group("comparing", "--tolerance --as-cast --ignore-dtype --from-b --limit --top --all"),
    _group("comparing what the models compute", "--logits --seed --batch --length"),
    _group("what is printed", "--html --json --quiet --verbose --no-measure --help --version"),
    _group(
        "casting, and other changes of values",
        "--dtype --bf16 --fp16 --target-params-dtype --mup --mf-fold --as --without-mtp --text-only --backfill-from --untie",
    ),
    _group(
        "layout of a Megatron-LM checkpoint",
        """
        --ckpt-format --megatron-version --saver-transformer-impl --expert-layout --mla-layout --make-vocab-size-divisible-by
        --pad-vocab-for-tp --release --allow-inexpressible
        """,
    ),
    _group(
        "pipeline stages",
        """
        --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --account-for-embedding-in-pipeline-split
        --account-for-loss-in-pipeline-split --target-num-layers-per-virtual-pipeline-stage
        --target-num-virtual-stages-per-pipeline-rank --pipeline-model-parallel-layout
        """,
    ),
    _group("what a Hugging Face folder gets", "--max-shard-size --instruct --source-model-type"),
    _group("resuming an interrupted run, and several processes", "--restart --workers"),
    _group(
        "reading what a folder does not say, or says otherwise",
        """
        --from --ckpt-dir-name --hf-config --prefer-args --trained-by --true-vocab-size --true_vocab_size --ignore-args
        --ignore-config-fields --ignore_config_fields --ignore-tensors --ignore_tensors --source-margs-file --family-file
        """,
    ),
    _group(
        "weights of MindSpore Transformers",
        """
        --mf-version --mf-config --mf-mlp-layout --mf-qkv-layout --num-layers --hidden-size --ffn-hidden-size
        --num-attention-heads --num-query-groups --kv-channels --max-position-embeddings --rotary-base --norm-epsilon
        --normalization --add-bias-linear --add-qkv-bias --qk-layernorm --swiglu --untie-embeddings-and-output-weights
        --padded-vocab-size --seq-length --ms2torch-ckpt-path
        """,
    ),
    _group("Habana's capacity bins", "--save-capacity-bins --load-capacity-bins"),
    _group("queue between loader and saver", "--max-queue-size --no-checking --start-method"),
    _group(
        "accepted from stock command lines, and checked where they say something",
        """
        --model-type --model-size --checkpoint-type --position-embedding-type --vocab-file --tokenizer-type
        --loader-transformer-impl --megatron-path
        """,
    ),
)


def grouped(actions: Iterable[argparse.Action]) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Titles, and the options of a command under each; groups without any are left out."""
    left = [action for action in actions if action.help is not argparse.SUPPRESS]
    operands = [action for action in left if not action.option_strings]
    if operands:
        yield OPERANDS, operands
    for group in GROUPS:
        found = [action for name in group.options for action in left if name in action.option_strings]
        if found:
            yield group.title, found
    placed = {name for group in GROUPS for name in group.options}
    rest = [action for action in left if action.option_strings and placed.isdisjoint(action.option_strings)]
    if rest:
        yield REST, rest
