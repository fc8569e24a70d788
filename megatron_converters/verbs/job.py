"""The conversion that `convert` and `plan` are asked for: options, source, target, dtype."""

from __future__ import annotations

import argparse
import os
from typing import NamedTuple

from ..dtypes import DType, dtype_named
from ..endpoints.base import Source, Target
from ..endpoints.hf_target import FUSED, SEPARATE
from ..errors import UsageError
from ..formats import HF, MEGATRON, add_reading_arguments, open_any
from ..megatron_names import EXPERTS
from ..options.values import place, positive
from ..options.writing import (
    add_expert_layout_argument,
    add_hf_target_arguments,
    add_megatron_target_arguments,
    open_hf_target,
    open_megatron_target,
)

#: Options that only a Megatron-LM checkpoint has: giving one asks for such a target.
_SIZES = ("tensor", "pipeline", "expert", "expert_tensor")


class Job(NamedTuple):
    """What is to be converted into what; `dtype` is None where the source's is kept."""

    source_format: str
    source: Source
    target_format: str
    target: Target
    dtype: DType | None


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC, DST and the options of every format."""
    parser.add_argument("load_dir", metavar="SRC", type=place, help="Folder to read; its format is recognised.")
    parser.add_argument("save_dir", metavar="DST", type=place, help="Folder to write to.")
    parser.add_argument(
        "--to",
        choices=[HF, MEGATRON],
        default=None,
        help="Format to write. By default a Megatron-LM checkpoint, but Hugging Face from a checkpoint when no size is given.",
    )
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], default=None, help="Type to write; the source's by default."
    )
    add_reading_arguments(parser)
    parser.set_defaults(overwrite=False)
    add_expert_layout_argument(parser, (*EXPERTS, SEPARATE, FUSED))
    parser.add_argument(
        "--tokenizer-model", default=None, help="Tokenizer to record or write; by default the source's."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace a model or checkpoint in DST.")
    megatron = parser.add_argument_group("writing a Megatron-LM checkpoint")
    add_megatron_target_arguments(megatron)
    megatron.add_argument(
        "--make-vocab-size-divisible-by", type=positive, default=None, help="Vocabulary padding; 128 by default."
    )
    add_hf_target_arguments(parser.add_argument_group("writing a Hugging Face folder"))


def job_of(args: argparse.Namespace) -> Job:
    """Open the source and choose the target."""
    if os.path.realpath(args.load_dir) == os.path.realpath(args.save_dir):
        raise UsageError(f"{args.save_dir} is the source itself; choose another folder to write to")
    source_format, source = open_any(args.load_dir, args)
    read = os.path.realpath(source.origin.described)
    if args.overwrite and os.path.dirname(read) == os.path.realpath(args.save_dir):
        raise UsageError(
            f"{args.load_dir} lies in {args.save_dir}, where --overwrite could replace it; choose another folder to write to"
        )
    target_format = args.to or _target_format(source_format, args)
    target: Target = open_hf_target(args) if target_format == HF else open_megatron_target(args)
    return Job(source_format, source, target_format, target, dtype_named(args.dtype) if args.dtype else None)


def _target_format(source_format: str, args: argparse.Namespace) -> str:
    sized = any(getattr(args, f"target_{size}_parallel_size") is not None for size in _SIZES)
    return HF if source_format == MEGATRON and not sized else MEGATRON
