"""Ways to damage a file, drawn at random: any bytes, and the opcodes, names and numbers of a pickle."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from functools import lru_cache
from random import Random

Damage = Callable[[bytes, Random], bytes]

_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
_TEXT = ("\0", "\n", "\x1b[2J", "/", "..", "\ud800", "é", " " * 300)
_TEXTS = ("", ".", "..", "/etc/passwd", "\0", "a\0b", "\ud800", "x" * 5000, "model", "os", "system")
_INTS = (-1, 0, 1, 3, 255, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 62, 1 << 63, 1 << 200, 1 << 40000)
#: Names that a pickle must not reach, and such as it may with arguments that it would not have.
_GLOBALS = (
    ("os", "system"),
    ("builtins", "getattr"),
    ("builtins", "slice"),
    ("builtins", "frozenset"),
    ("builtins", "complex"),
    ("collections", "OrderedDict"),
    ("argparse", "Namespace"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("torch", "bfloat16"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("megatron.core\n", "x\0y"),
)


def any_bytes(data: bytes, draw: Random) -> bytes:
    """The file with one stretch changed, lost, added or moved."""
    return draw.choice(_OF_BYTES)(data, draw)


def _flip(data: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def _overwrite(data: bytes, draw: Random) -> bytes:
    start, stop = _stretch(data, draw)
    return data[:start] + draw.choice((bytes(stop - start), draw.randbytes(stop - start))) + data[stop:]


def _truncate(data: bytes, draw: Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _insert(data: bytes, draw: Random) -> bytes:
    at = draw.randrange(len(data) + 1)
    return data[:at] + draw.randbytes(draw.randint(1, 16)) + data[at:]


def _delete(data: bytes, draw: Random) -> bytes:
    start, stop = _stretch(data, draw)
    return data[:start] + data[stop:]


def _renumber(data: bytes, draw: Random) -> bytes:
    """Another number where a length may be."""
    width = draw.choice((1, 2, 4, 8))
    at = draw.randrange(max(len(data) - width, 1))
    number = int.from_bytes(data[at : at + width], "little") + draw.choice((-1, 1, 64))
    value = draw.choice((*_NUMBERS, number)) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def _swap(data: bytes, draw: Random) -> bytes:
    (a, b), (c, d) = sorted((_stretch(data, draw), _stretch(data, draw)))
    return data if b > c else data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _stretch(data: bytes, draw: Random) -> tuple[int, int]:
    start = draw.randrange(len(data))
    return start, min(start + draw.choice((1, 4, 16, 256)), len(data))


_OF_BYTES = (_flip, _overwrite, _truncate, _insert, _delete, _renumber, _swap)


def any_opcodes(data: bytes, draw: Random) -> bytes:
    """The pickle with one to three of its opcodes lost, added, moved, or with other arguments; frames are left out."""
    codes = list(_codes(data))
    for _ in range(draw.randint(1, 3)):
        draw.choice(_OF_OPCODES)(codes, draw)
    return b"".join(codes)


@lru_cache
def _codes(data: bytes) -> tuple[bytes, ...]:
    """Each opcode with its argument."""
    found = [(opcode.name, at) for opcode, _, at in pickletools.genops(data)]
    ends = [at for _, at in found[1:]] + [len(data)]
    return tuple(data[at:end] for (name, at), end in zip(found, ends, strict=True) if name != "FRAME")


def _drop(codes: list[bytes], draw: Random) -> None:
    del codes[draw.randrange(len(codes))]


def _repeat(codes: list[bytes], draw: Random) -> None:
    codes.insert(draw.randrange(len(codes)), draw.choice(codes))


def _exchange(codes: list[bytes], draw: Random) -> None:
    one, other = draw.randrange(len(codes)), draw.randrange(len(codes))
    codes[one], codes[other] = codes[other], codes[one]


def _add(codes: list[bytes], draw: Random) -> None:
    kind = draw.choice(pickletools.opcodes)
    argument = draw.randbytes(kind.arg.n if kind.arg and kind.arg.n > 0 else draw.randrange(9) if kind.arg else 0)
    codes.insert(draw.randrange(len(codes)), kind.code.encode("latin1") + argument)


def _call(codes: list[bytes], draw: Random) -> None:
    """A call of some name with what lies on the stack, or with nothing."""
    name = b"".join(map(_text, draw.choice(_GLOBALS))) + pickle.STACK_GLOBAL
    call = draw.choice((b"", pickle.EMPTY_TUPLE + pickle.REDUCE, pickle.REDUCE, pickle.EMPTY_DICT + pickle.BUILD))
    codes.insert(draw.randrange(len(codes)), name + call)


def _nest(codes: list[bytes], draw: Random) -> None:
    """A value inside many others."""
    depth = draw.choice((1, 500, 5000))
    codes.insert(draw.randrange(len(codes)), draw.choice((pickle.TUPLE1, pickle.EMPTY_LIST + pickle.APPEND)) * depth)


def _retype(codes: list[bytes], draw: Random) -> None:
    """Another value in place of a constant."""
    constants = [at for at, code in enumerate(codes) if code[:1] in _CONSTANTS]
    if constants:
        at = draw.choice(constants)
        kind = codes[at][:1]
        edit = _edit_text if kind in _TEXT_CODES else _edit_number if kind in _NUMBER_CODES else _any_value
        codes[at] = draw.choice((edit, edit, _any_value))(codes[at], draw)


def _edit_text(code: bytes, draw: Random) -> bytes:
    text = code[5 if code[:1] == pickle.BINUNICODE else 2 :].decode("utf-8", "replace")
    at = draw.randrange(len(text) + 1)
    return _text(text[:at] + draw.choice(_TEXT) + text[at + draw.randrange(2) :])


def _edit_number(code: bytes, draw: Random) -> bytes:
    return _int(int.from_bytes(code[1:], "little") + draw.choice((-1, 1, 64)))


def _any_value(_: bytes, draw: Random) -> bytes:
    return draw.choice((_text(draw.choice(_TEXTS)), _int(draw.choice(_INTS)), *_VALUES))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _int(number: int) -> bytes:
    data = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG4 + struct.pack("<i", len(data)) + data


_TEXT_CODES = (pickle.BINUNICODE, pickle.SHORT_BINUNICODE)
_NUMBER_CODES = (pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1)
_VALUES = (
    pickle.NONE,
    pickle.NEWTRUE,
    pickle.NEWFALSE,
    pickle.EMPTY_LIST,
    pickle.EMPTY_DICT,
    pickle.EMPTY_TUPLE,
    pickle.BINFLOAT + struct.pack(">d", float("nan")),
    pickle.BINFLOAT + struct.pack(">d", -1e300),
)
_CONSTANTS = (*_TEXT_CODES, *_NUMBER_CODES, *(value[:1] for value in _VALUES))
_OF_OPCODES = (_drop, _repeat, _exchange, _add, _call, _nest, _retype, _retype, _retype, _retype)


def any_json(data: bytes, draw: Random) -> bytes:
    """The object with another name or value in one of its entries."""
    content = json.loads(data)
    name = draw.choice(list(content))
    entry = content[name]
    value = draw.choice((*_TEXTS, *_INTS[:-1], 10**4000, None, True, 1.5, [], {}, [[]] * 3, [1 << 62] * 300))
    if draw.random() < 0.3:
        content[name + draw.choice(_TEXT)] = content.pop(name)
    elif draw.random() < 0.5:
        entry[draw.choice(list(entry))] = value
    else:
        place = draw.choice([item for item in entry.values() if isinstance(item, list)] or [[0]])
        place[draw.randrange(len(place))] = value
    return json.dumps(content).encode()


def in_archive(data: bytes, draw: Random, change: Damage) -> bytes:
    """An archive of `torch.save` whose pickle alone is changed, with the right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content, draw) if name.endswith("/data.pkl") else content)
    return out.getvalue()


def in_header(data: bytes, draw: Random, change: Damage) -> bytes:
    """A safetensors file whose header alone is changed, with the right length."""
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
