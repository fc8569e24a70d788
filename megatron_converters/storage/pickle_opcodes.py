"""A first look at a pickle, before it is interpreted: only known opcodes, within bounds.

It closes what the interpreter leaves open: extension codes, which may name objects without being asked about them, and
memo numbers, for which it would reserve up to 64 GB.
"""

from __future__ import annotations

import pickle
import pickletools

#: Bytes of the length that stands before an argument, by pickletools' description of the argument.
_COUNTS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
#: Protocol 2 and later need none of these: extensions, old ways to make instances, buffers outside the pickle.
_REFUSED = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}
_GLOBAL, _LONG_BINPUT, _STOP = pickle.GLOBAL[0], pickle.LONG_BINPUT[0], pickle.STOP[0]


def _tables() -> tuple[dict[int, int], dict[int, int]]:
    fixed, counted = {}, {}
    for opcode in pickletools.opcodes:
        width = opcode.arg.n if opcode.arg else 0
        if opcode.name in _REFUSED or width == pickletools.UP_TO_NEWLINE:
            continue
        if width >= 0:
            fixed[ord(opcode.code)] = 1 + width
        else:
            counted[ord(opcode.code)] = _COUNTS[width]
    del fixed[_LONG_BINPUT], fixed[_STOP]
    return fixed, counted


#: Whole size of an opcode with an argument of fixed size; bytes of the length of one of variable size.
_FIXED, _COUNTED = _tables()


def check(data: bytes) -> None:
    """Raise `pickle.UnpicklingError` unless `data` is a run of opcodes of protocol 2 and later up to STOP."""
    at, end = 0, len(data)
    while at < end:
        code = data[at]
        size = _FIXED.get(code)
        if size is not None:
            at += size
        elif code == _LONG_BINPUT:
            number = int.from_bytes(data[at + 1 : at + 5], "little")
            if number > end:
                raise pickle.UnpicklingError(f"it numbers an object {number}")
            at += 5
        elif code in _COUNTED:
            start = at + 1 + _COUNTED[code]
            at = start + int.from_bytes(data[at + 1 : start], "little")
        elif code == _GLOBAL:
            at = data.index(b"\n", data.index(b"\n", at) + 1) + 1
        elif code == _STOP:
            return
        else:
            raise pickle.UnpicklingError(f"it has the opcode {code:#04x}")
    raise pickle.UnpicklingError("it has no end")
