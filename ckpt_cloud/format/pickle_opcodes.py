"""Opcodes of pickle's protocol 2 with their arguments, read as Python's own unpickler reads them.

Not `pickletools.genops`: it resolves escapes in names, which no unpickler does, so that it may see another name than is
then imported. Reference: the comments of CPython's Lib/pickletools.py.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Iterator
from typing import Any

_NAMES = {opcode.code.encode("latin1"): opcode.name for opcode in pickletools.opcodes}
_Reader = Callable[[bytes, int], tuple[Any, int]]
"""Bytes and where the argument begins, to the argument and where it ends."""


def opcodes(pickled: bytes) -> Iterator[tuple[str, Any]]:
    """Names and arguments up to STOP; what follows that is never looked at, here or elsewhere.

    Raises:
        ValueError: cut off, an argument of another form, or an opcode that `torch.save` does not write; says which.
    """
    at = 0
    name = ""
    while name != "STOP":
        if at >= len(pickled):
            raise ValueError("cut off")
        code = pickled[at : at + 1]
        if code not in _OPCODES:
            raise ValueError(f"the opcode {_NAMES.get(code, code)}, which torch.save does not write")
        name, read = _OPCODES[code]
        argument, at = read(pickled, at + 1)
        yield name, argument


def _nothing(_: bytes, at: int) -> tuple[None, int]:
    return None, at


def _number(form: str) -> _Reader:
    unpack = struct.Struct(form)

    def read(data: bytes, at: int) -> tuple[Any, int]:
        end = at + unpack.size
        return unpack.unpack(_slice(data, at, end))[0], end

    return read


def _counted(form: str, convert: Callable[[bytes], Any]) -> _Reader:
    length = _number(form)

    def read(data: bytes, at: int) -> tuple[Any, int]:
        size, start = length(data, at)
        return convert(_slice(data, start, start + size)), start + size

    return read


def _slice(data: bytes, start: int, end: int) -> bytes:
    if not start <= end <= len(data):
        raise ValueError("cut off")
    return data[start:end]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _two_lines(data: bytes, at: int) -> tuple[tuple[str, str], int]:
    middle = data.index(b"\n", at)
    end = data.index(b"\n", middle + 1)
    return (data[at:middle].decode("ascii"), data[middle + 1 : end].decode("ascii")), end + 1


_OPCODES: dict[bytes, tuple[str, _Reader]] = {
    b"\x80": ("PROTO", _number("<B")),
    b".": ("STOP", _nothing),
    b"(": ("MARK", _nothing),
    b"N": ("NONE", _nothing),
    b"\x88": ("NEWTRUE", _nothing),
    b"\x89": ("NEWFALSE", _nothing),
    b"J": ("BININT", _number("<i")),
    b"K": ("BININT1", _number("<B")),
    b"M": ("BININT2", _number("<H")),
    b"\x8a": ("LONG1", _counted("<B", _integer)),
    b"\x8b": ("LONG4", _counted("<i", _integer)),
    b"G": ("BINFLOAT", _number(">d")),
    b"X": ("BINUNICODE", _counted("<I", _text)),
    b"]": ("EMPTY_LIST", _nothing),
    b"}": ("EMPTY_DICT", _nothing),
    b")": ("EMPTY_TUPLE", _nothing),
    b"t": ("TUPLE", _nothing),
    b"\x85": ("TUPLE1", _nothing),
    b"\x86": ("TUPLE2", _nothing),
    b"\x87": ("TUPLE3", _nothing),
    b"a": ("APPEND", _nothing),
    b"e": ("APPENDS", _nothing),
    b"s": ("SETITEM", _nothing),
    b"u": ("SETITEMS", _nothing),
    b"q": ("BINPUT", _number("<B")),
    b"r": ("LONG_BINPUT", _number("<I")),
    b"h": ("BINGET", _number("<B")),
    b"j": ("LONG_BINGET", _number("<I")),
    b"c": ("GLOBAL", _two_lines),
    b"R": ("REDUCE", _nothing),
    b"b": ("BUILD", _nothing),
    b"\x81": ("NEWOBJ", _nothing),
    b"Q": ("BINPERSID", _nothing),
}
