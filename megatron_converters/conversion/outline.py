"""What a conversion will write, decided before anything is written: files to the byte, and what fills each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..basics.dtypes import DType
from ..model.layouts import RowMap
from ..storage.checksum import digest
from ..storage.output_file import FileLayout
from ..storage.tensor import StoredTensor


class Fill(NamedTuple):
    """A tensor of an output file, or one part of it that begins at byte `start`, as rows and columns of a slot.

    `rows[i]` is the slot's row of row i and `col` the slot's first column. Where `transposed`, the slot's rows are columns of
    the file: `shape` is then what the part would be without that. `padding` counts the rows at the end that repeat another.
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


@dataclass(frozen=True)
class Outline:
    """A target's files by path within the folder that will be shown as `name`, and the options that decided them.

    `given` has, by file and name, small tensors that belong to no slot and are copied as they are; `content` has what the files
    will say beside their tensors, as JSON values.
    """

    name: str
    files: Mapping[str, FileLayout]
    options: Mapping[str, Any]
    given: Mapping[str, Mapping[str, StoredTensor]] = field(default_factory=dict)
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes on the disk, all files together."""
        return sum(layout.nbytes for layout in self.files.values())

    def tensor_bytes(self, file: str) -> int:
        """Bytes of one file's tensors."""
        return sum(nbytes for _, nbytes in self.files[file].regions.values())

    def outside(self, file: str, checksums: Mapping[str, int]) -> str:
        """A digest of the bytes that a finished file has beside its tensors, in their order, whose CRC-32s `checksums` gives.

        It differs from a layout's `structure` in that it can be computed from the file: a zip's directory repeats its tensors'
        checksums.
        """
        return digest(data for _, data in sorted(self.files[file].finish(checksums)))
