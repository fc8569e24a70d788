"""Opcode check of a pickle before it is interpreted: only known opcodes, within bounds.

It refuses what the unpickler would accept: extension codes, which may name objects without a call of `find_class`, and
memo numbers for which it would reserve up to 64 GB.
"""

from __future__ import annotations

import pickle
import pickletools

#: Bytes of the length prefix of an argument, by pickletools' code for the argument's size.
_PREFIX_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
#: Protocol 2 and later need none of these: extensions, old ways to make instances, buffers outside the pickle.
_REFUSED = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
_GLOBAL, _LONG_BINPUT, _STOP = pickle.GLOBAL[0], pickle.LONG_BINPUT[0], pickle.STOP[0]


def _tables() -> tuple[list[int], dict[int, int]]:
    fixed, prefixed = {}, {}
    for opcode in pickletools.opcodes:
        width = opcode.arg.n if opcode.arg else 0
        if opcode.name in _REFUSED or width == pickletools.UP_TO_NEWLINE:
            continue
        if width >= 0:
            fixed[ord(opcode.code)] = 1 + width
        else:
            prefixed[ord(opcode.code)] = _PREFIX_BYTES[width]
    del fixed[_LONG_BINPUT], fixed[_STOP]
    return [fixed.get(code, 0) for code in range(256)], prefixed


#: By opcode: bytes of the opcode and its fixed-size argument, 0 for others; bytes of the length prefix of a variable-size argument.
_FIXED, _PREFIXED = _tables()


def check(data: bytes) -> None:
    """Raise `pickle.UnpicklingError` unless `data` is a sequence of opcodes of protocol 2 or later that ends with STOP."""
    position, end, fixed = 0, len(data), _FIXED
    while position < end:
        code = data[position]
        size = fixed[code]
        if size:
            position += size
        elif code == _LONG_BINPUT:
            number = int.from_bytes(data[position + 1 : position + 5], "little")
            if number > end:
                raise pickle.UnpicklingError(f"it has the memo number {number}")
            position += 5
        elif code in _PREFIXED:
            start = position + 1 + _PREFIXED[code]
            position = start + int.from_bytes(data[position + 1 : start], "little")
        elif code == _GLOBAL:
            position = data.index(b"\n", data.index(b"\n", position) + 1) + 1
        elif code == _STOP:
            return
        else:
            raise pickle.UnpicklingError(f"it has the opcode {code:#04x}")
    raise pickle.UnpicklingError("it has no end")
