"""The zip archive that `torch.save` writes, laid out before its contents are known.

Section numbers refer to PKWARE's APPNOTE.TXT 6.3.10. What PyTorch adds (`caffe2/serialize/inline_container.cc` over its
miniz): every record is stored, not compressed; its data starts at a multiple of 64 bytes, the gap filled by an extra
field `FB`; sizes and CRC follow the data in a descriptor, except after an empty record. The result equals
`torch.save`'s byte for byte, so that `torch.load` may also compute offsets instead of reading them
(`config.load.calculate_storage_offsets`).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .output_file import Writes

#: torch.utils.serialization.config.save.storage_alignment
ALIGNMENT = 64
#: The largest value that fits a 32-bit field; from it on the value goes to a zip64 extra field (4.5.3).
_MAX32 = 0xFFFFFFFF
_MAX16 = 0xFFFF
#: 4.4.4: bit 11, the name is UTF-8; bit 3, sizes and CRC are in a descriptor after the data.
_FLAG_UTF8 = 0x0800
_FLAG_DESCRIPTOR = 0x0008

_LOCAL = struct.Struct("<4s5H3I2H")  # 4.3.7
_CENTRAL = struct.Struct("<4s6H3I5H2I")  # 4.3.12
_END64 = struct.Struct("<4sQ2H2I4Q")  # 4.3.14
_LOCATOR64 = struct.Struct("<4sIQI")  # 4.3.15
_END = struct.Struct("<4s4H2IH")  # 4.3.16
_EXTRA = struct.Struct("<2H")  # 4.5.1: id, bytes that follow
_DESCRIPTOR = struct.Struct("<4s3I")  # 4.3.9
_DESCRIPTOR64 = struct.Struct("<4sI2Q")  # 4.3.9.2
_ZIP64_ID = 0x0001
_PADDING_ID = int.from_bytes(b"FB", "little")
#: "Version made by" of the zip64 end record as miniz writes it: 3 (Unix), 3.0; and 4.5 to extract.
_MADE_BY, _NEEDED = 0x031E, 45


@dataclass(frozen=True)
class Record:
    """A file of the archive: its content, or None for `nbytes` that are filled in later."""

    name: str
    nbytes: int
    data: bytes | None = None


class ZipLayout:
    """Places of an archive's records. `offsets` has the file offset of each record's data; `nbytes` is exact."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.offsets: dict[str, int] = {}
        self._placed: list[_Placed] = []
        end = 0
        for record in records:
            placed = _Placed(record, record.name.encode(), end)
            self.offsets[record.name] = placed.data_offset
            self._placed.append(placed)
            end = placed.end
        #: Numbers of the records to be filled in, by name.
        self._hollow = {record.name: number for number, record in enumerate(records) if record.data is None}
        #: Bytes between records to be filled in, by the number of the first record there. Files of one structure share them.
        self._fixed: dict[int, bytes] = {}
        self._directory_offset = end
        self._directory_nbytes = sum(_CENTRAL.size + len(placed.name) + len(placed.zip64) for placed in self._placed)
        self.nbytes = end + self._directory_nbytes + _END64.size + _LOCATOR64.size + _END.size

    def writes(self, crcs: Mapping[str, int]) -> Writes:
        """All bytes of the archive except the records to be filled in, whose CRC-32 `crcs` gives by record name."""
        offset, run = 0, self._until_hollow(0)
        for name, number in self._hollow.items():
            yield offset, run
            offset, run = self._placed[number].data_end, self.after(name, crcs[name])
        yield offset, run + self._end(crcs)

    def after(self, name: str, crc: int) -> bytes:
        """Bytes between a record to be filled in, whose CRC-32 this is, and the next one, or the directory."""
        number = self._hollow[name]
        return self._placed[number].descriptor(crc) + self._until_hollow(number + 1)

    def _until_hollow(self, number: int) -> bytes:
        """Bytes from a record on up to the content of the next one to be filled in, or the directory."""
        known = self._fixed.get(number)
        if known is None:
            found = []
            for index in range(number, len(self._placed)):
                placed = self._placed[index]
                data = placed.record.data
                found.append(placed.local_header())
                if data is None:
                    break
                found += (data, placed.descriptor(placed.crc))
            known = self._fixed[number] = b"".join(found)
        return known

    def _end(self, crcs: Mapping[str, int]) -> bytes:
        """Directory and end records."""
        entries = [
            placed.central_header(crcs[placed.record.name]) if placed.record.data is None else placed.fixed_header
            for placed in self._placed
        ]
        return b"".join((*entries, self._end_records))

    @cached_property
    def _end_records(self) -> bytes:
        count, nbytes, offset = len(self._placed), self._directory_nbytes, self._directory_offset
        end64 = _END64.pack(b"PK\6\6", _END64.size - 12, _MADE_BY, _NEEDED, 0, 0, count, count, nbytes, offset)
        locator = _LOCATOR64.pack(b"PK\6\7", 0, offset + nbytes, 1)
        short = min(count, _MAX16)
        end = _END.pack(b"PK\5\6", 0, 0, short, short, min(nbytes, _MAX32), min(offset, _MAX32), 0)
        return end64 + locator + end


class _Placed:
    """A record at its place in the archive: `offset` of its local header, `data_offset` to `data_end`, `end` of its descriptor.

    Where its content is known, `crc` is the CRC-32 of that, and `fixed_header` its entry in the directory.
    """

    __slots__ = (
        *("_descriptor", "_flags", "crc", "data_end", "data_offset", "end", "fixed_header", "name", "offset"),
        *("record", "zip64"),
    )

    def __init__(self, record: Record, name: bytes, offset: int) -> None:
        self.record = record
        self.name = name
        self.offset = offset
        self.crc = zlib.crc32(record.data or b"")
        self.zip64 = _zip64_extra(record.nbytes, record.nbytes, offset)
        unpadded = offset + _LOCAL.size + len(name) + len(self.zip64) + _EXTRA.size
        self.data_offset = unpadded + -unpadded % ALIGNMENT
        self._flags = _FLAG_UTF8 | (_FLAG_DESCRIPTOR if record.nbytes else 0)
        self._descriptor = _DESCRIPTOR64 if self.zip64 else _DESCRIPTOR
        self.data_end = self.data_offset + record.nbytes
        self.end = self.data_end + (self._descriptor.size if record.nbytes else 0)
        self.fixed_header = b"" if record.data is None else self.central_header(self.crc)

    def local_header(self) -> bytes:
        extra_nbytes = self.data_offset - self.offset - _LOCAL.size - len(self.name)
        padding = extra_nbytes - len(self.zip64) - _EXTRA.size
        fields = _LOCAL.pack(b"PK\3\4", 0, self._flags, 0, 0, 0, 0, 0, 0, len(self.name), extra_nbytes)
        zip64 = _zip64_extra(self.record.nbytes, 0, self.offset)  # as miniz: the compressed size is not known yet
        return b"".join((fields, self.name, zip64, _EXTRA.pack(_PADDING_ID, padding), b"Z" * padding))

    def descriptor(self, crc: int) -> bytes:
        if not self.record.nbytes:
            return b""
        return self._descriptor.pack(b"PK\7\10", crc, self.record.nbytes, self.record.nbytes)

    def central_header(self, crc: int) -> bytes:
        nbytes, offset = (min(value, _MAX32) for value in (self.record.nbytes, self.offset))
        lengths = (len(self.name), len(self.zip64), 0)
        fields = _CENTRAL.pack(b"PK\1\2", 0, 0, self._flags, 0, 0, 0, crc, nbytes, nbytes, *lengths, 0, 0, 0, offset)
        return fields + self.name + self.zip64


def _zip64_extra(nbytes: int, compressed: int, offset: int) -> bytes:
    """Both sizes and the offset, as far as they need 64 bits (4.5.3)."""
    values = [nbytes, compressed] if nbytes >= _MAX32 else []
    if offset >= _MAX32:
        values.append(offset)
    return _EXTRA.pack(_ZIP64_ID, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values) if values else b""
