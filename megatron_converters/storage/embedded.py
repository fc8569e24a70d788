"""Tensors in many embedded archives, of which most differ in nothing but their bytes and checksums.

A distributed checkpoint has an archive for each chunk: a hundred thousand in a mixture of experts, of a few structures. To parse
the directory and the pickle of each takes many times as long as to find it equal to one that was parsed before.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from . import torch_zip
from .archive import BYTE_ORDER, PICKLE, Archive
from .opening import open_source
from .tensor import StoredTensor, mapped

#: Structures of one size that are remembered at most.
_MAX_KNOWN = 16
_ENTRY = struct.Struct("<4s6H3I3H")  # APPNOTE 4.3.12, up to the lengths of name, extra field and comment
_ENTRY_BYTES, _CRC_AT, _CRC_BYTES = 46, 16, 4


class _Known(NamedTuple):
    """Archive that was parsed: all bytes by which it was, as (offset in it, content), and its tensor; it begins at `start`."""

    consulted: tuple[tuple[int, bytes], ...]
    tensor: StoredTensor
    start: int


class EmbeddedTensors:
    """Reader of archives that hold one tensor each, which remembers their structures."""

    def __init__(self) -> None:
        self._known: dict[int, list[_Known]] = {}

    def read(self, path: str, start: int, nbytes: int) -> Any:
        """Object of an archive inside a file, `nbytes` bytes from byte `start` on, as `torch_zip.read_embedded` gives it."""
        content, alike = mapped(path), self._known.setdefault(nbytes, [])
        for known in alike:
            for at, data in known.consulted:
                if content[start + at : start + at + len(data)] != data:
                    break
            else:
                tensor = known.tensor
                offset = start + tensor.offset - known.start
                return StoredTensor(path, offset, tensor.dtype, tensor.shape, tensor.strides)
        found = torch_zip.read_embedded(path, start, nbytes)
        if isinstance(found, StoredTensor) and len(alike) < _MAX_KNOWN:
            with open_source(path) as file:
                consulted = _consulted(
                    Archive(path, file, start, nbytes), content[start : start + nbytes], found, start
                )
            if consulted:
                alike.append(_Known(consulted, found, start))
        return found


def _consulted(archive: Archive, content: bytes, tensor: StoredTensor, start: int) -> tuple[tuple[int, bytes], ...]:
    """What decides how an archive is read: its start and its directory, but for the checksums that no reader compares.

    Nothing where the start does not hold the pickle.
    """
    data = tensor.offset - start
    checked = {name for name in (PICKLE, BYTE_ORDER) if archive.has(name)}
    if any(sum(archive.span(name)) > tensor.offset for name in checked):
        return ()
    found, begin, entry = [(0, content[:data])], archive.directory_start, archive.directory_start
    for _ in range(archive.count):
        *_, name_bytes, extra_bytes, comment_bytes = _ENTRY.unpack_from(content, entry)
        name = content[entry + _ENTRY_BYTES : entry + _ENTRY_BYTES + name_bytes].decode(errors="replace")
        if name.partition("/")[2] not in checked:
            found.append((begin, content[begin : entry + _CRC_AT]))
            begin = entry + _CRC_AT + _CRC_BYTES
        entry += _ENTRY_BYTES + name_bytes + extra_bytes + comment_bytes
    return (*found, (begin, content[begin:]))
