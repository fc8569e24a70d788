"""The conversion that `convert` and `plan` are asked for: options, source, target, dtype."""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

from ...basics.dtypes import DType, dtype_named
from ...basics.errors import UsageError
from ...conversion.endpoint import Source, Target
from ...formats.detect import HF, MEGATRON
from ...formats.huggingface.target import FUSED, SEPARATE
from ...formats.megatron.names import EXPERTS
from ..options.any_format import add_reading_arguments, open_any, refuse_unheeded
from ..options.values import new_folder, positive
from ..options.writing import (
    add_expert_layout_argument,
    add_hf_target_arguments,
    add_megatron_target_arguments,
    open_hf_target,
    open_megatron_target,
)

_TARGETS = {HF: "a Hugging Face folder", MEGATRON: "a Megatron-LM checkpoint"}


class Job(NamedTuple):
    """What is to be converted into what; `dtype` is None where the source's is kept."""

    source_format: str
    source: Source
    target_format: str
    target: Target
    dtype: DType | None


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC, DST and the options of every format."""
    parser.add_argument("load_dir", metavar="SRC", help="Folder to read; its format is recognised.")
    parser.add_argument("save_dir", metavar="DST", help="Folder to write to.")
    parser.add_argument(
        "--to",
        choices=[HF, MEGATRON],
        default=None,
        help="Format to write. By default a Megatron-LM checkpoint, but Hugging Face from a checkpoint when no option of "
        "checkpoints is given.",
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default=None, help="Type to write; the source's by default."
    )
    add_reading_arguments(parser)
    parser.set_defaults(overwrite=False)
    add_expert_layout_argument(parser, (*EXPERTS, SEPARATE, FUSED))
    parser.add_argument(
        "--tokenizer-model", metavar="PATH", default=None, help="Tokenizer to record or write; by default the source's."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a model or checkpoint in DST.")
    _add_megatron_arguments(parser.add_argument_group("writing a Megatron-LM checkpoint"))
    add_hf_target_arguments(parser.add_argument_group("writing a Hugging Face folder"))
    parser.set_defaults(**{name: None for defaults in _defaults().values() for name in defaults})


def _add_megatron_arguments(parser: Any) -> None:
    add_megatron_target_arguments(parser)
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        metavar="N",
        type=positive,
        default=None,
        help="Vocabulary padding; 128 by default.",
    )


def _defaults() -> dict[str, dict[str, Any]]:
    """By format, the options that it alone has, with their defaults. The parser itself has None, which says "not given"."""
    found = {}
    for name, declare in {MEGATRON: _add_megatron_arguments, HF: add_hf_target_arguments}.items():
        parser = argparse.ArgumentParser(add_help=False)
        declare(parser)
        found[name] = vars(parser.parse_args([]))
    shared = found[MEGATRON].keys() & found[HF].keys()
    return {name: {key: defaults[key] for key in defaults.keys() - shared} for name, defaults in found.items()}


def job_of(args: argparse.Namespace) -> Job:
    """Open the source and choose the target."""
    if os.path.realpath(new_folder(args.load_dir)) == os.path.realpath(new_folder(args.save_dir)):
        raise UsageError(f"{args.save_dir} is the source itself; choose another folder to write to")
    source_format, source = open_any(args.load_dir, args)
    refuse_unheeded([source_format], args)
    read = os.path.realpath(source.origin.described)
    if args.overwrite and os.path.dirname(read) == os.path.realpath(args.save_dir):
        raise UsageError(
            f"{args.load_dir} lies in {args.save_dir}, where --overwrite could replace it; choose another folder to write to"
        )
    target_format = _target_format(source_format, args)
    unsaid = {name: value for name, value in _defaults()[target_format].items() if getattr(args, name) is None}
    chosen = argparse.Namespace(**{**vars(args), **unsaid})
    target: Target = open_hf_target(chosen) if target_format == HF else open_megatron_target(chosen)
    return Job(source_format, source, target_format, target, dtype_named(args.dtype) if args.dtype else None)


def _target_format(source_format: str, args: argparse.Namespace) -> str:
    """What --to says, or else: a checkpoint becomes a folder unless an option of checkpoints is given, all else a checkpoint.

    Raises where an option of the other format is given, which would go unheeded.
    """
    given = {
        name: sorted(key for key in defaults if getattr(args, key) is not None)
        for name, defaults in _defaults().items()
    }
    asks = bool(given[MEGATRON]) or args.expert_layout in EXPERTS
    chosen: str = args.to or (HF if source_format == MEGATRON and not asks else MEGATRON)
    other = HF if chosen == MEGATRON else MEGATRON
    if given[other]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given[other])
        raise UsageError(
            f"{options}: only for writing {_TARGETS[other]}, but this writes {_TARGETS[chosen]}; leave it out, or pass --to {other}"
        )
    return chosen
