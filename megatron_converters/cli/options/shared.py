"""Options that several commands have, each declared once."""

from __future__ import annotations

import argparse
from typing import Any

from ...formats.megatron.options import FLAGS, FOLD, RAW
from ...formats.mindspore.options import CONTIGUOUS, GROUPED, INTERLEAVED
from .values import DTYPES, IMPLS, dtype_word, positive

#: By flag, what `add_argument` takes beside it.
_DECLARED: dict[str, dict[str, Any]] = {
    "--ckpt-dir-name": dict(
        metavar="NAME", default=None, help="Megatron: folder to read (iter_0000008) instead of the latest."
    ),
    "--hf-config": dict(
        metavar="DIR",
        default=None,
        help="Megatron: reference model folder; configuration and tokenizer are taken from it.",
    ),
    "--true-vocab-size": dict(
        metavar="N",
        type=positive,
        default=None,
        help="Megatron: vocabulary without padding, where args lack it. Elsewhere config.json says it, and another value is an "
        "error.",
    ),
    "--trained-by": dict(
        metavar="RELEASE",
        default=None,
        help="Megatron: release of Megatron-LM whose pretrain_gpt.py trained the checkpoint, such as 0.16: what it made of args "
        "that it accepts and ignores is converted. `args` means a program that heeds them all, such as Megatron-Bridge.",
    ),
    "--prefer-args": dict(
        action="store_true",
        help="Megatron: where --hf-config and the args differ, take what the args say; the reference then gives the family, names "
        "and tokenizer.",
    ),
    "--ignore-args": dict(
        metavar="NAMES",
        default="",
        help="Megatron: comma-separated arguments of programs built on Megatron-LM that do not change what the model computes.",
    ),
    "--untie": dict(
        action="store_true", help="Hugging Face: keep a stored lm_head apart although config.json ties it."
    ),
    "--text-only": dict(
        action="store_true",
        help="Of a model of images and text, convert the text part alone; else what lies beside it is carried as it is.",
    ),
    "--without-mtp": dict(
        action="store_true", help="Leave out layers of multi-token prediction, which training and logits do not need."
    ),
    "--backfill-from": dict(
        metavar="DIR",
        default=None,
        help="Hugging Face folder that the training began with: layers of multi-token prediction, which it ran without, are taken "
        "from there. Nothing else is, and each tensor is listed in the manifest.",
    ),
    "--mup": dict(
        choices=(FLAGS, FOLD, RAW),
        default=None,
        help="Where the multipliers of MiniCPM, Granite and the like go: flags of muP (Megatron-LM 0.17 on; no weight changes), "
        "folded into weights, which rounds them, or raw: weights as they are, and MindSpeed-LLM's --scale-emb, --scale-depth and "
        "--dim-model-base. By default flags where the release has them and they suffice. Of a checkpoint that is read whose args "
        "do not say it: how that one has them.",
    ),
    "--mf-version": dict(
        metavar="X",
        default=None,
        help="MindSpore: release of MindSpore Transformers that wrote the weights, such as 1.7, which decides both.",
    ),
    "--mf-config": dict(
        metavar="FILE", default=None, help="MindSpore: YAML of the training run, which says sizes and orders of rows."
    ),
    "--download": dict(
        action="store_true",
        help="Fetch what the cache lacks of models that are named as on the Hugging Face Hub (owner/name, or owner/name@revision): "
        "the files that are needed, and no others. Without it, such names are looked up in the local cache alone.",
    ),
    "--ignore-config-fields": dict(
        metavar="NAMES",
        default="",
        help="Comma-separated unknown fields to ignore, of config.json (also that of --hf-config) or Meta's params.json; KEY.FIELD "
        "names one within another.",
    ),
    "--ignore-tensors": dict(
        metavar="PATTERN,…",
        action="append",
        default=None,
        help="Leave out tensors of these names (* and ? as in a shell, such as 'v_head.*'), which the model must not need; can be "
        "given several times.",
    ),
    "--source-margs-file": dict(
        metavar="FILE",
        default=None,
        help="source_megatron_args.json with training arguments to take over.",
    ),
    "--family-file": dict(
        metavar="FILE",
        default=None,
        help="YAML file with a family of your own: its tensors' names and the rules of its config.json "
        "(docs/adding-a-family.md).",
    ),
    "--tokenizer-model": dict(
        metavar="PATH", default=None, help="Tokenizer to record or to write; by default the source's."
    ),
    "--make-vocab-size-divisible-by": dict(
        metavar="N",
        type=positive,
        default=None,
        help="Vocabulary padding, times the tensor-parallel size; by default the source's, or 128.",
    ),
    "--vocab-file": dict(
        metavar="FILE",
        default=None,
        help="JSON vocabulary of a checkpoint; its length is the vocabulary without padding. Elsewhere config.json says it.",
    ),
    "--loader-transformer-impl": dict(
        default=None, choices=IMPLS, help="Accepted for compatibility; the names in the source say it."
    ),
    "--bf16": dict(action="store_true", help="Write bfloat16; without it the source's dtype is kept."),
    "--fp16": dict(action="store_true", help="Write float16; without it the source's dtype is kept."),
    "--dtype": dict(type=dtype_word, choices=DTYPES, default=None, help="Type to write; the source's by default."),
    "--quiet": dict(action="store_true", help="Print errors and warnings only."),
    "--overwrite": dict(action="store_true", help="Replace a model or checkpoint in the folder that is written to."),
    "--restart": dict(
        action="store_true",
        help="Throw away what an interrupted run has finished, instead of going on from it.",
    ),
    "--mf-mlp-layout": dict(
        choices=[INTERLEAVED, CONTIGUOUS],
        default=None,
        help="MindSpore: whether gate and up of an MLP alternate row by row (interleaved, as mindformers has it from 1.7 on unless "
        "use_interleaved_weight_layout_mlp is false) or follow each other (contiguous), which neither names nor shapes "
        "tell. Written interleaved by default.",
    ),
    "--mf-qkv-layout": dict(
        choices=[GROUPED, CONTIGUOUS],
        default=None,
        help="MindSpore: whether each query group has its queries, key and value together (grouped, as mindformers has it from 1.7 "
        "on unless use_contiguous_weight_layout_attention is true), or all queries come first, then all keys, then all values "
        "(contiguous). Written grouped by default.",
    ),
    "--json": dict(
        action="store_true", help="Print one JSON object instead of text, also for an error (docs/json.md)."
    ),
    "--allow-inexpressible": dict(
        action="store_true",
        help="Go on although Megatron-LM's arguments cannot express all of the model; warns what it will not compute.",
    ),
}


def add_shared(parser: Any, *flags: str) -> None:
    """Declare some of these options."""
    for flag in flags:
        add_argument(parser, flag, **_DECLARED[flag])


def add_argument(parser: Any, *names: str, **options: Any) -> None:
    """Add an option unless the parser has it: loader, saver and convert.py share some."""
    try:
        parser.add_argument(*names, **options)
    except argparse.ArgumentError as error:
        if "conflicting option" not in str(error):
            raise


def add_common_arguments(parser: Any) -> None:
    """Add the options of loaders and savers that stock convert.py lacks."""
    add_shared(parser, "--quiet", "--overwrite", "--restart", "--family-file", "--download")
    add_argument(
        parser,
        "--megatron-path",
        metavar="DIR",
        default=None,
        help="Accepted for compatibility; not needed, since Megatron-LM is never imported.",
    )
