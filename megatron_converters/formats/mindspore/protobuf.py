"""Wire format of protocol buffers, read in place: fields with their byte ranges, so that large ones are never copied.

Source: protobuf.dev, "Encoding". Groups, which proto2 deprecated, are refused.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

from ...basics.errors import ConversionError, one_line

Buffer = bytes | mmap.mmap

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
#: Bytes of the longest varint, which carries 64 bits.
_LONGEST_VARINT = 10
#: No tensor or parameter has a longer name.
_LONGEST_TEXT = 4096
#: More numbers than any list in these messages has; hostile lists must not fill the memory.
_MOST_NUMBERS = 1 << 16


class Field(NamedTuple):
    """Field of a message: its number, its wire type, its value if that is a varint, and the bytes of its content."""

    number: int
    wire: int
    value: int
    start: int
    stop: int


class Message(NamedTuple):
    """Message in a buffer; `where` names it in errors."""

    where: str
    buffer: Buffer
    start: int
    stop: int

    def fields(self) -> Iterator[Field]:
        """Fields in the order of the file; `ConversionError` where one does not fit in."""
        at = self.start
        while at < self.stop:
            tag, at = self._varint(at)
            number, wire = tag >> 3, tag & 7
            if number == 0:
                raise self._damaged(at)
            if wire == VARINT:
                value, stop = self._varint(at)
            elif wire == BYTES:
                length, at = self._varint(at)
                value, stop = 0, at + length
            elif wire in _FIXED:
                value, stop = 0, at + _FIXED[wire]
            else:
                raise self._damaged(at)
            if stop > self.stop:
                raise self._damaged(at)
            yield Field(number, wire, value, at, stop)
            at = stop

    def inner(self, field: Field) -> Message:
        """Message that a field holds."""
        if field.wire != BYTES:
            raise self._damaged(field.start)
        return Message(self.where, self.buffer, field.start, field.stop)

    def text(self, field: Field) -> str:
        """String that a field holds."""
        if field.wire != BYTES or field.stop - field.start > _LONGEST_TEXT:
            raise self._damaged(field.start)
        try:
            text = self.buffer[field.start : field.stop].decode()
        except UnicodeDecodeError:
            raise self._damaged(field.start) from None
        if not text.isprintable():
            raise ConversionError(f"{self.where} is damaged: it names a tensor {one_line(text)}; copy it again")
        return text

    def number(self, field: Field) -> int:
        """Signed integer that a field holds."""
        if field.wire != VARINT:
            raise self._damaged(field.start)
        return _signed(field.value)

    def numbers(self, number: int) -> tuple[int, ...]:
        """Signed integers of all fields of a number, packed or one by one."""
        found: list[int] = []
        for field in self.fields():
            if field.number != number:
                continue
            if field.wire == BYTES:
                at = field.start
                while at < field.stop and len(found) <= _MOST_NUMBERS:
                    value, at = self._varint(at)
                    found.append(_signed(value))
            else:
                found.append(self.number(field))
            if len(found) > _MOST_NUMBERS:
                raise self._damaged(field.start)
        return tuple(found)

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for count in range(_LONGEST_VARINT):
            if at >= self.stop:
                raise self._damaged(at)
            byte = self.buffer[at]
            at += 1
            value |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
        raise self._damaged(at)

    def _damaged(self, at: int) -> ConversionError:
        return ConversionError(
            f"{self.where} is damaged or no protocol buffer: its message breaks off or is malformed at byte {at}; copy it again"
        )


def _signed(value: int) -> int:
    """Value of an int32 or int64 field, which stores negative numbers as 64 bits."""
    return value - (1 << 64) if value >> 63 else value
