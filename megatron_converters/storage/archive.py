"""Records of a `torch.save` archive that is a whole file or embedded in one.

Source: `torch/serialization.py` of torch 1.13 to 2.13; section numbers refer to PKWARE's APPNOTE.TXT 6.3.10.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from typing import BinaryIO, cast

from ..basics.errors import ConversionError
from .opening import file_size

#: Records that every archive has: the pickle of the object, and (torch >= 2.1) the byte order of its tensors.
PICKLE = "data.pkl"
BYTE_ORDER = "byteorder"
_LOCAL_SIGNATURE = b"PK\3\4"
_LOCAL_HEADER_BYTES = 30
#: First bytes of a file of torch < 1.6: a pickle of `torch.serialization.MAGIC_NUMBER`.
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


class _Window:
    """Byte range of a file as a file object, with the methods that `zipfile` uses."""

    def __init__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        self._fd = file.fileno()
        self._start = start
        self._nbytes = nbytes
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        if base + offset < 0:
            raise OSError("seek to before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        left = max(self._nbytes - self._position, 0)
        data = os.pread(self._fd, left if count < 0 else min(count, left), self._start + self._position)
        self._position += len(data)
        return data


class Archive:
    """Directory of a `torch.save` archive; offsets count from the start of the file that holds it."""

    def __init__(self, path: str, file: BinaryIO, start: int, nbytes: int) -> None:
        self.path = path
        self.where = path if nbytes == file_size(file) else f"{path} from byte {start} on"
        self._window = _Window(file, start, nbytes)
        self._start = start
        self._size = nbytes
        infos = self._directory()
        self._folder = infos[0].filename.partition("/")[0] if infos else ""
        self._infos = {info.filename: info for info in infos}
        if len(self._infos) != len(infos):  # readers disagree about which one to use
            raise ConversionError(
                f"{self.where} has several records with the same name; the file is damaged, copy it again"
            )
        if f"{self._folder}/{PICKLE}" not in self._infos:
            raise ConversionError(f"{self.where} is a zip file without {PICKLE}, so torch.save did not write it")
        order = self.content(BYTE_ORDER) if self.has(BYTE_ORDER) else b"little"
        if order != b"little":
            raise ConversionError(
                f"{self.where} was written on a big-endian machine; save it again on a little-endian one"
            )

    def _directory(self) -> list[zipfile.ZipInfo]:
        try:
            archive = zipfile.ZipFile(cast(BinaryIO, self._window))
            #: Offset of the directory from the start of the archive.
            self.directory_start = archive.start_dir
            return archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OSError) as error:
            start = self._bytes(0, len(_LEGACY_START))
            if start.startswith(_LOCAL_SIGNATURE):
                fault = "is truncated: the directory at its end is missing; copy it again"
            elif start == _LEGACY_START:
                fault = "has the format of torch < 1.6; load it with torch and save it again"
            else:
                fault = "is not a file of torch.save"
            raise ConversionError(f"{self.where} {fault}") from error

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        self._window.seek(offset)
        return self._window.read(nbytes)

    @property
    def count(self) -> int:
        """Number of records."""
        return len(self._infos)

    def has(self, name: str) -> bool:
        """Whether it has a record of this name."""
        return f"{self._folder}/{name}" in self._infos

    def span(self, name: str) -> tuple[int, int]:
        """Offset of a record's data in the file, and its size in bytes."""
        info = self._infos.get(f"{self._folder}/{name}")
        if info is None:
            raise ConversionError(f"{self.where} lacks its record {name}; the file is damaged, copy it again")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ConversionError(
                f"{self.where} has a compressed or encrypted record {name}, which torch.save never writes; save it again with torch"
            )
        if not 0 <= info.header_offset < self._size:
            raise ConversionError(
                f"{self.where} places its record {name} outside the file; it is damaged, copy it again"
            )
        # The local header repeats the name, and its extra field differs from the directory's (APPNOTE 4.3.7).
        header = self._bytes(info.header_offset, _LOCAL_HEADER_BYTES)
        if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(_LOCAL_SIGNATURE):
            raise ConversionError(
                f"{self.where} has no record {name} where its directory places it; the file is damaged, copy it again"
            )
        offset = info.header_offset + _LOCAL_HEADER_BYTES + sum(struct.unpack_from("<2H", header, 26))
        if offset + info.file_size > self._size:
            raise ConversionError(f"{self.where} ends within its record {name}; the file is damaged, copy it again")
        return self._start + offset, info.file_size

    def content(self, name: str) -> bytes:
        """Content of a record, checked against its CRC-32."""
        offset, nbytes = self.span(name)
        data = self._bytes(offset - self._start, nbytes)
        # torch.serialization.set_crc32_options(False) leaves all checksums zero
        if self._infos[f"{self._folder}/{name}"].CRC not in (0, zlib.crc32(data)):
            raise ConversionError(
                f"{self.where}: {name} does not match its checksum; the file is damaged, copy it again"
            )
        return data
