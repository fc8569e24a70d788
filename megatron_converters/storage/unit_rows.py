"""Matrix whose rows are divided by their lengths as they are read, as `torch.nn.functional.normalize` does (Baichuan2's head)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..basics.casting import floats, rounded
from ..basics.dtypes import DType
from ..basics.pickle_proof import Sealed
from .tensor import StoredTensor

#: Length by which shorter rows are divided (torch.nn.functional.normalize).
_SHORTEST = 1e-12


@dataclass(frozen=True)
class UnitRows(Sealed):
    """Rows of a stored matrix, each divided by its Euclidean length, in the precision of float32 or the matrix's own."""

    name: str
    weight: StoredTensor

    @property
    def dtype(self) -> DType:
        """Dtype of the elements, which is that of the stored ones."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.weight.shape

    @property
    def path(self) -> str:
        """File of the matrix."""
        return self.weight.path

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """Stored tensor, by name."""
        return {self.name: self.weight}

    @property
    def exact(self) -> bool:
        """False, since the quotients are rounded."""
        return False

    @property
    def computed(self) -> str:
        """Words for what is done to the stored tensor."""
        return "each row divided by its length"

    def read(self, rows: slice | npt.NDArray[np.int64], cols: slice) -> npt.NDArray[Any]:
        """Compute these rows and columns, as an array of the dtype's carrier type; lengths are those of whole rows."""
        whole = floats(self.weight.array()[rows], self.dtype)
        lengths = np.sqrt(np.square(whole, dtype=np.float64).sum(axis=1, keepdims=True))
        lengths[np.abs(lengths - 1) <= np.finfo(whole.dtype).eps] = 1  # what was divided before stays as it is
        return rounded(whole[:, cols] / np.maximum(lengths, _SHORTEST).astype(whole.dtype), self.dtype)
