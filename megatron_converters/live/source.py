"""Live model as a source of conversions: its processes move the weights to those that write them, bucket by bucket."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence

from ..assets.origin import Origin
from ..basics.dtypes import DType
from ..conversion.composing import Piece, Sources, StoredName
from ..model.slots import Ref, refs
from ..storage.tensor import MemoryTensor
from .exchange import Received, Wanted, in_buckets
from .export import BUCKET_BYTES
from .layout import Holding
from .model import LiveModel
from .parameters import as_array, dtype_of

#: Seconds between looks at whether received weights have been written.
_POLL = 0.002


class LiveSource:
    """Weights of a live model. The processes in `writers` read all refs in the model's order, the others call `serve`.

    Not more than two buckets of other processes' weights are held at a time.
    """

    def __init__(
        self,
        live: LiveModel,
        origin: Origin,
        writers: Sequence[int],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.spec, self.origin = live.layout.spec, origin
        self._live, self._exchange, self._writers = live, live.exchange(), tuple(writers)
        self._holdings = {ref: list(next(iter(live.layout.holdings(ref)))) for ref in refs(self.spec)}
        self._buckets = in_buckets(self._holdings, self._nbytes, bucket_bytes)
        self._received: Received = {}
        self._current: set[Ref] = set()
        self._begun = False
        self._held = _Held(bucket_bytes)

    def dtype_of(self, ref: Ref) -> DType:
        """Dtype of a ref in the model."""
        return self._live.dtype(self._holdings[ref][0])

    def read(self, ref: Ref) -> Sources:
        """Pieces of a ref, as views of this process's parameters or of a bucket from other ones."""
        while ref not in self._current:
            self._received, self._current = {}, set()
            self._held.wait()
            self._move(next(self._buckets))
        pieces: list[Piece] = []
        for holding in self._holdings[ref]:
            wanted = self._live.wanted(holding, self._live.process)
            data = self._data(holding, wanted)
            name = StoredName(f"rank {wanted.owner}", holding.key.parameter)
            pieces += self._live.layout.pieces(ref, Piece(data, holding.cut.rows, holding.cut.col, name))
        return Sources(tuple(pieces))

    def serve(self) -> None:
        """Give the writers what they want, to the end."""
        for bucket in self._buckets:
            self._move(bucket)

    def close(self) -> None:
        """Do nothing: the model matches its layout, and every parameter of that was read."""

    def _data(self, holding: Holding, wanted: Wanted) -> MemoryTensor:
        tensor = self._received[wanted.owner, holding.key]
        found = MemoryTensor(dtype_of(tensor.dtype), tuple(tensor.shape), as_array(tensor.cpu().contiguous()))
        if wanted.owner != self._live.process:
            self._held.add(found)
        return found

    def _move(self, bucket: list[Ref]) -> None:
        wanted = {
            writer: [self._live.wanted(holding, writer) for ref in bucket for holding in self._holdings[ref]]
            for writer in self._writers
        }
        if not self._begun:
            self._exchange.begin()
            self._begun = True
        self._received = self._exchange.send(wanted)
        self._current = set(bucket)

    def _nbytes(self, ref: Ref) -> int:
        """Bytes of a ref's parameters in a buffer."""
        return sum(self._live.wanted(holding).nbytes for holding in self._holdings[ref])


class _Held:
    """Tensors from other processes that are not written yet."""

    def __init__(self, limit: int) -> None:
        self._limit, self._nbytes = limit, 0
        self._lock = threading.Lock()

    def add(self, tensor: MemoryTensor) -> None:
        """Count a tensor until nothing uses it any more."""
        nbytes = tensor.values.nbytes
        with self._lock:
            self._nbytes += nbytes
        weakref.finalize(tensor, self._forget, nbytes)

    def wait(self) -> None:
        """Wait until there is room for a further bucket."""
        while self._nbytes > self._limit:
            time.sleep(_POLL)

    def _forget(self, nbytes: int) -> None:
        with self._lock:
            self._nbytes -= nbytes
