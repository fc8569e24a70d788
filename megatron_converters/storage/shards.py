"""Tensors to be stored as safetensors, in files of a limited size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..basics.dtypes import DType
from . import safetensors
from .output_file import FileLayout


@dataclass(frozen=True)
class Stored:
    """Tensor to be stored, filled by `parts` fills."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    parts: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def split(tensors: Sequence[Stored], limit: int) -> list[list[Stored]]:
    """Split tensors into files: each is filled until the next tensor would exceed `limit` bytes, as in huggingface_hub."""
    shards: list[list[Stored]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def layout(tensors: Sequence[Stored], metadata: Mapping[str, str]) -> FileLayout:
    """Layout of a file with these tensors."""
    plain = safetensors.layout({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}, metadata)
    return dataclasses.replace(plain, parts=parts_of(tensors))


def parts_of(tensors: Sequence[Stored]) -> dict[str, int]:
    """Number of parts of each tensor that has several."""
    return {tensor.name: tensor.parts for tensor in tensors if tensor.parts > 1}
