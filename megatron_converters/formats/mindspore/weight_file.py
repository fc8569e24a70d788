"""One file of weights, .safetensors or .ckpt, with everything that is no weight sorted out by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ...basics.errors import ConversionError, one_line
from ...storage import safetensors
from . import ckpt
from .nonweights import RUN_STATE, group_of
from .recognising import CKPT
from .tensors import Tensor, whole

#: Value under a tensor's name in a header's metadata: two 4-bit integers a byte (mindspore train/serialization.py).
_PACKED = ("qint4x2", "Int4")


class FileContent(NamedTuple):
    """Weights of a file by name, and the groups of its other tensors by name."""

    weights: Mapping[str, Tensor]
    others: Mapping[str, str]


def read_file(path: Path) -> FileContent:
    """Read the places of a file's weights, whichever kind it is."""
    return _read_ckpt(path) if path.suffix == CKPT else _read_safetensors(path)


def _read_safetensors(path: Path) -> FileContent:
    content = safetensors.read(path)
    packed = [name for name, value in content.metadata.items() if value in _PACKED]
    if packed:
        raise ConversionError(
            f"{path}: {one_line(packed[0])} holds 4-bit integers, which cannot be converted; give the weights before quantisation"
        )
    others = _groups(content.tensors)
    return FileContent({name: whole(data) for name, data in content.tensors.items() if name not in others}, others)


def _read_ckpt(path: Path) -> FileContent:
    content = ckpt.read(str(path))
    texts = {name: RUN_STATE for name, stored in content.items() if stored.is_text}
    others = {**texts, **_groups(content)}
    return FileContent({name: stored.tensor() for name, stored in content.items() if name not in others}, others)


def _groups(names: Iterable[str]) -> dict[str, str]:
    return {name: group for name in names if (group := group_of(name)) is not None}
