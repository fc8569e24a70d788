"""What the program that trained a checkpoint made of its args: releases of Megatron-LM accept arguments and build without them.

`--trained-by` says which program it was: a release, or `args` for one that heeds them all, such as Megatron-Bridge.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .argument import Args, Argument
from .arguments import ARGUMENTS
from .releases import NEWEST, before, parse, previous

#: Value of `--trained-by` for a program that builds the model that the args describe.
ALL_HEEDED = "args"


@dataclass(frozen=True)
class _WithoutEnd:
    """Tokenizer whose `vocab_size` argument does not count the end-of-document token; from `counted_since` on it does.

    Args of a release that counts it have the attribute `mark`, whatever its value.
    """

    counted_since: str = ""
    mark: str = ""


#: By `tokenizer_type`. Source: training/tokenizer/tokenizer.py up to 0.16; from then on core/tokenizers/text/libraries/
#: null_tokenizer.py, which 0.18 changed, and core/tokenizers/vision/libraries/null_multimodal_tokenizer.py.
_WITHOUT_END = {
    "NullTokenizer": _WithoutEnd("0.18", "null_tokenizer_eod_id"),
    "NullMultimodalTokenizer": _WithoutEnd(),
}
#: Attributes that decide how `vocab_size` is meant.
VOCABULARY = ("tokenizer_type", *(row.mark for row in _WITHOUT_END.values() if row.mark))


def program(text: str | None) -> str | None:
    """Program that `--trained-by` names: a release in the form "0.16", or `args`; raises `UsageError` for another text."""
    return text if text in (None, ALL_HEEDED) else parse(text)


def recorded_vocab(args: argparse.Namespace, trained_by: str | None) -> Any:
    """Vocabulary size of args, with the end-of-document token that the argument of some tokenizers leaves out."""
    size, row = getattr(args, "vocab_size", None), _WITHOUT_END.get(getattr(args, "tokenizer_type", None) or "")
    if row is None or not isinstance(size, int):
        return size
    known = None if trained_by in (None, ALL_HEEDED) else trained_by
    counts = hasattr(args, row.mark) if known is None else not before(known, row.counted_since)
    return size if row.counted_since and counts else size + 1


def as_built(args: argparse.Namespace, trained_by: str | None) -> tuple[argparse.Namespace, list[str]]:
    """Args of the model that a program built, and a note on each that it did not heed; the same args where none is named."""
    if trained_by in (None, ALL_HEEDED):
        return args, []
    values, notes = dict(vars(args)), []
    for row, builds, _ in _unheeded(values):
        if row.flag is not None and row.flag.effective_since and not before(trained_by, row.flag.effective_since):
            continue
        notes.append(
            f"the args have {row.attribute}={values[row.attribute]!r}, but Megatron-LM {trained_by} (--trained-by) trains "
            f"{_with(builds)}, which is converted"
        )
        values[row.attribute] = builds
    return argparse.Namespace(**values), notes


def doubts(args: Args, trained_by: str | None) -> list[str]:
    """Warning for each argument that releases accept and train without, unless the user has said which program it was."""
    if trained_by is not None:
        return []
    found = [
        f"warning: the args have {row.attribute}={args[row.attribute]!r}, which is taken as it stands, but the pretrain_gpt.py of "
        f"Megatron-LM up to {last} trains {_with(builds)}; say which program trained the checkpoint: --trained-by RELEASE, such as "
        f"{last}, or --trained-by {ALL_HEEDED} for one that heeds it, such as Megatron-Bridge"
        for row, builds, last in _unheeded(args)
    ]
    return [*found, *_limit_doubt(args)]


def _limit_doubt(args: Args) -> Iterator[str]:
    """Warning where Megatron-LM's kernel of a quick GELU has limited what goes in before biases were added (`_fuses_gelu`)."""
    limit, grouped = args.get("activation_func_clamp_value"), args.get("moe_grouped_gemm")
    biased = args.get("num_experts") and args.get("add_bias_linear", True)
    if limit is not None and args.get("quick_geglu") and biased and args.get("bias_gelu_fusion", True) and not grouped:
        yield (
            f"warning: the args have activation_func_clamp_value={limit!r}, bias_gelu_fusion, and experts with biases that are not "
            "grouped: Megatron-LM's kernel applies the limit before it adds the biases, and Hugging Face's model after that, so "
            "that they differ where values reach the limit; train with --no-bias-gelu-fusion or --moe-grouped-gemm"
        )


def _with(builds: Any) -> str:
    return "without it" if builds is None else f"with {builds:g}"


def _unheeded(args: Args) -> Iterator[tuple[Argument, Any, str]]:
    """Arguments that some releases accept and build the model without: row, value that they build with, last such release."""
    for row in ARGUMENTS:
        flag, value = row.flag, args.get(row.attribute)
        if flag is None or value is None or not flag.matters(args):
            continue
        if flag.effective_since and not row.is_usual(value):
            yield row, row.absent, previous(flag.effective_since)
        if flag.built_as is not None and value != flag.built_as:
            yield row, flag.built_as, NEWEST
