"""MindSpore weights on disk: which form a path has, and the tensors in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ...basics.errors import ConversionError, UsageError
from ...basics.folders import existing_path
from ...storage import safetensors
from .parts import MAP, read_parts
from .tensors import Slice, Tensor, WeightFiles
from .weight_file import CKPT, SAFETENSORS, read_file

__all__ = ["Slice", "Tensor", "WeightFiles", "is_mindspore", "read_weight_files"]


def read_weight_files(path: Path) -> WeightFiles:
    """Find and read the weights of a file or folder; raises `ConversionError` if they are damaged or incomplete."""
    path = existing_path(path)
    if path.is_file():
        return _one_file(path)
    files = sorted(path.glob(f"*{SAFETENSORS}"))
    if files:
        return read_parts(path, files)
    raise UsageError(f"{path} holds no weights of MindSpore")


def _one_file(path: Path) -> WeightFiles:
    if path.suffix not in (SAFETENSORS, CKPT):
        raise UsageError(f"{path} is not a {SAFETENSORS} or {CKPT} file; give one, or a folder of them")
    content = read_file(path)
    form = CKPT if path.suffix == CKPT else "one file"
    return WeightFiles(path.parent, content.weights, Counter(content.others.values()), (path,), form)


def is_mindspore(path: Path) -> bool:
    """Whether a path looks like weights of MindSpore: by names, and by the header of a single file."""
    if path.is_file():
        return path.suffix == CKPT or (path.suffix == SAFETENSORS and _says_ms(path))
    return (path / MAP).exists()


def _says_ms(path: Path) -> bool:
    try:
        return safetensors.read(path).metadata.get("format") == "ms"
    except ConversionError:
        return False
