"""Outline of a conversion's output, fixed before anything is written: every file to the byte, and the fills of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..basics.dtypes import DType
from ..model.layouts import RowMap
from ..model.values import Affine
from ..storage.output_file import FileLayout
from ..storage.tensor import MemoryTensor, StoredTensor


class Fill(NamedTuple):
    """Tensor of an output file, or the part of it that begins at byte `start`, as rows and columns of a slot.

    Row i is the slot's row `rows[i]`, column 0 the slot's column `col`. Where `transposed`, the file stores the transposed
    matrix, and `shape` is that before transposing. `padding` counts the rows at the end that repeat another row. The elements
    are `value` of the slot's, which None leaves as they are; where `only` is given, those of the rows where it is true.
    """

    file: str
    name: str
    dtype: DType
    shape: tuple[int, ...]
    rows: RowMap
    col: int
    start: int = 0
    transposed: bool = False
    padding: int = 0
    value: Affine | None = None
    only: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Outline:
    """Files of a target, by path within the output folder `name`, and the options that decided them.

    `extra_tensors` has, by file and name, small tensors that belong to no slot and are written as they are. `content` has what the
    files hold besides tensors, as JSON values. `notes` say what the user should know of how the model is written.
    """

    name: str
    files: Mapping[str, FileLayout]
    options: Mapping[str, Any]
    extra_tensors: Mapping[str, Mapping[str, StoredTensor | MemoryTensor]] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of all files together, in bytes."""
        return sum(layout.nbytes for layout in self.files.values())

    def tensor_bytes(self, file: str) -> int:
        """Size of one file's tensors, in bytes."""
        return sum(nbytes for _, nbytes in self.files[file].regions.values())
