"""Kinds of values, and options that readers and writers share."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ...basics.errors import ConversionError, UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
#: Whose parameter names a checkpoint has.
IMPLS = ("local", "transformer_engine")


def byte_size(text: str) -> int:
    """Bytes in "5GB", "500MB", "2GiB" or plain digits, as huggingface_hub counts (decimal unless "i")."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise UsageError(f"{text!r} is no size; write for example 5GB, 500MB or 2GiB")
    return int(match[1]) * _UNITS[match[2]]


def positive(text: str) -> int:
    """A whole number above 0, as an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0 on, as an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def folder(path: str) -> Path:
    """An existing folder, or one sentence."""
    result = new_folder(path)
    try:
        exists = result.is_dir()
    except OSError as error:
        raise ConversionError(f"cannot look at {path}: {error.strerror}") from error
    if not exists:
        raise ConversionError(f"{path} is no folder; give one that exists")
    return result


def new_folder(path: str) -> Path:
    """A folder that need not exist. Empty it would mean the current one, which nobody asks for that way: one sentence."""
    if not path:
        raise UsageError("the name of a folder is empty; is a variable of the command line unset?")
    return Path(path)


def add_argument(parser: Any, *names: str, **options: Any) -> None:
    """Add an option unless the parser has it: loader, saver and convert.py share some."""
    try:
        parser.add_argument(*names, **options)
    except argparse.ArgumentError as error:
        if "conflicting option" not in str(error):
            raise


def add_dtype_arguments(parser: Any) -> None:
    """--bf16 and --fp16."""
    add_argument(parser, "--bf16", action="store_true", help="Write bfloat16; without it the source's dtype is kept.")
    add_argument(parser, "--fp16", action="store_true", help="Write float16; without it the source's dtype is kept.")


def add_margs_argument(parser: Any) -> None:
    """--source-margs-file."""
    add_argument(
        parser,
        "--source-margs-file",
        metavar="FILE",
        default=None,
        help="source_megatron_args.json with training arguments to take over.",
    )
