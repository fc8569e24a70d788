"""Which format a folder has, by what it holds."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from ..basics.errors import UsageError
from ..conversion.staging import unfinished_in
from .megatron.reading import listing
from .megatron.writing import TRACKER

HF, META, MEGATRON = "hf", "meta", "megatron"
#: Format: files of which one says that a folder has it.
_SIGNS = {
    HF: ("config.json", "*.safetensors", "pytorch_model*.bin"),
    META: ("consolidated.*.pth",),
    MEGATRON: (TRACKER, "mp_rank_*", ".metadata"),
}
FORMATS = tuple(_SIGNS)


def format_of(path: Path) -> str:
    """The format of a folder; raises where it is none or could be two."""
    names = [entry.name for entry in listing(path)]
    found = [name for name, signs in _SIGNS.items() if any(fnmatch.filter(names, sign) for sign in signs)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{path} could be {' or '.join(found)}; say which with --from")
    unfinished = unfinished_in(path)
    if unfinished is not None:
        raise UsageError(f"{path} {unfinished}")
    signs = "; ".join(f"{name}: {', '.join(signs)}" for name, signs in _SIGNS.items())
    raise UsageError(f"{path} is of no known format; a folder needs one of {signs}")
