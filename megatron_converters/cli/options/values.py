"""Kinds of values that options take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from ...basics.errors import ConversionError, UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
#: Types that can be written, by the short names of help, and the same by torch's names.
DTYPES = ("bf16", "fp16", "fp32")
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
#: Whose parameter names a checkpoint has.
IMPLS = ("local", "transformer_engine")


def byte_size(text: str) -> int:
    """Bytes in "5GB", "500MB", "2GiB" or plain digits, as huggingface_hub counts (decimal unless "i")."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise UsageError(f"{text!r} is no size; write for example 5GB, 500MB or 2GiB")
    return int(match[1]) * _UNITS[match[2]]


def comma_separated(text: str | None) -> tuple[str, ...]:
    """Names in a text with commas between them; none of None."""
    return tuple(name for name in (text or "").split(",") if name)


def patterns(given: Iterable[str] | None) -> tuple[str, ...]:
    """Patterns of names of tensors, from options that each have one or several, with commas between them."""
    return tuple(pattern for text in given or () for pattern in comma_separated(text))


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


def dtype_word(text: str) -> str:
    """Short name of a type to write; any other text is returned as it is, and is then none of the choices."""
    from ...basics.dtypes import dtype_named  # which imports numpy, and help does not

    try:
        return _SHORT.get(dtype_named(text.lower()).name, text)
    except ConversionError:
        return text
