"""Pickles that others wrote, opened without running anything: an allow-list of names and of opcodes.

bytes ─► walk: only opcodes that plain data needs, bounded memo ─► C unpickler: only names that the caller allows

What the names stand for is the caller's: builtin types, constants, and classes made anew for each pickle, so that not
even an attribute that a hostile pickle sets on one outlives it.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, Self

from ckpt_cloud.errors import CorruptFile, UntrustedItem

MAX_BYTES = 2 << 30
"""Of one pickle; DCP's metadata takes some 150 bytes for each stored chunk."""

_PLAIN = frozenset(
    "MARK STOP POP POP_MARK PROTO FRAME NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "  # noqa: SIM905 - a list of 48 lines says no more
    "SHORT_BINBYTES BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GLOBAL "
    "STACK_GLOBAL REDUCE BUILD NEWOBJ BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE BINPERSID".split()
)
_LINES = -1
"""Instead of a width: two lines of text follow."""
_PREFIXES = {
    pickletools.TAKEN_FROM_ARGUMENT1: ("<B", 1),
    pickletools.TAKEN_FROM_ARGUMENT4: ("<i", 4),
    pickletools.TAKEN_FROM_ARGUMENT4U: ("<I", 4),
    pickletools.TAKEN_FROM_ARGUMENT8U: ("<Q", 8),
}
_STOP = ord(".")
_PUTS = {ord("q"): 1, ord("r"): 4}
"""Opcodes that name a place in the memo, and the bytes that it takes."""
_MEMOIZE = 0x94
_GETS = frozenset(b"hj")
_PLACED = _GETS | _PUTS.keys()
_SHORT = frozenset(b"hq")
_LONG = struct.Struct("<I")
_NO_TUPLES_NAMED = frozenset(
    "GLOBAL STACK_GLOBAL REDUCE NEWOBJ EMPTY_LIST LIST EMPTY_DICT DICT EMPTY_SET FROZENSET SHORT_BINBYTES BINBYTES "  # noqa: SIM905
    "BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 LONG1 LONG4".split()
)
_NO_TUPLES = frozenset(ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in _NO_TUPLES_NAMED)
"""Opcodes after which the topmost value is certainly no tuple."""
_MAX_HASHED = 1e9
"""Elements of tuples within tuples, counted as often as they are met: hashing a key of a dict meets them all."""


class Record:
    """An instance of a class that a pickle names: its state, and none of its code."""

    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        """An instance whose state is `args`, unless the pickle gives another."""
        record = super().__new__(cls)
        record.state = args
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def record_class(name: str) -> type[Record]:
    """A class of its own for one pickle."""
    return type(name, (Record,), {})


def load(
    data: bytes,
    names: Mapping[tuple[str, str], Any],
    where: str,
    *,
    persistent: Callable[[Any], Any] | None = None,
    bounded: bool = False,
) -> Any:
    """What the pickle in `data` holds, in terms of what `names` gives for each (module, name).

    Args:
        persistent: what stands for a persistent id.
        bounded: refuse tuples that could take forever to hash; nothing in `names` may then make a tuple of tuples.

    Raises:
        UntrustedItem: it names anything else, or has an opcode that plain data does not need.
        CorruptFile: it is not a pickle, or cut short.
    """
    walk(data, where)
    if bounded:
        check_sharing(data, where)
    try:
        return _Unpickler(data, names, where, persistent).load()
    except UntrustedItem:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a malformed pickle makes the unpickler raise
        raise CorruptFile(f"the pickle does not decode: {type(error).__name__}: {error}", where) from None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        names: Mapping[tuple[str, str], Any],
        where: str,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names
        self._where = where
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        hint = "it is not of a kind that checkpoints hold, and would run code; do not open it with pickle either"
        raise UntrustedItem(f"the pickle names {module[:100]}.{name[:100]}", self._where, hint)

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise UntrustedItem("the pickle refers to objects outside it", self._where)
        return self._persistent(pid)


def walk(data: bytes | memoryview, where: str = "") -> int:
    """Where the pickle that `data` begins with ends, after every opcode was looked at.

    Raises:
        UntrustedItem: an opcode that plain data does not need.
        CorruptFile: it is cut short, too large, or asks for more memory than it has bytes.
    """
    if len(data) > MAX_BYTES:
        raise CorruptFile(f"the pickle has {len(data)} bytes, more than {MAX_BYTES}", where)
    view, at, size = memoryview(data), 0, len(data)
    while at < size:
        code = view[at]
        width = _WIDTHS[code]
        if width is None:
            raise UntrustedItem(f"the pickle has opcode {code:#04x}, which plain data does not need", where)
        if code == _STOP:
            return at + 1
        if code in _PUTS and int.from_bytes(view[at + 1 : at + 1 + _PUTS[code]], "little") > at:
            # The memo is as long as its largest index.
            raise CorruptFile("the pickle asks for a memo larger than itself", where)
        at = _after(view, at + 1, width)
    raise CorruptFile("the pickle is cut short", where)


def check_sharing(data: bytes, where: str) -> None:
    """Refuses a pickle, already walked, whose tuples may hold each other so often that hashing one never ends.

    Only a tuple that is met again can multiply. With `hits` of them on `levels` of tuples that each hold earlier ones,
    no tuple has more than (hits / levels) ** levels of them, counted as often as they are met.

    Raises:
        CorruptFile: the bound is too high.
    """
    view, at, last, memoized, hits, levels = memoryview(data), 0, _STOP, 0, 0, 0
    put = False
    # By place in the memo, for what may be a tuple: how many levels there were when it was made.
    made: dict[int, int] = {}
    while (code := data[at]) != _STOP:
        if code in _PLACED:
            place = data[at + 1] if code in _SHORT else _LONG.unpack_from(data, at + 1)[0]
            if code in _GETS:
                level = made.get(place)
                if level is not None:
                    hits, levels = hits + 1, max(levels, level + 1)
            else:
                made[place] = levels
                put = True
                if last in _NO_TUPLES:
                    del made[place]
        elif code == _MEMOIZE:
            if last not in _NO_TUPLES:
                made[memoized] = levels
            memoized += 1
        last = code
        width = _WIDTHS[code]
        assert width is not None, "it was walked"
        at = at + 1 + width if type(width) is int and width >= 0 else _after(view, at + 1, width)
    if put and memoized:
        raise CorruptFile("the pickle numbers its memo in two ways, which pickle never does", where)
    if levels and levels * math.log(hits / levels) > math.log(_MAX_HASHED):
        raise CorruptFile("the pickle holds tuples within tuples that would take forever to hash", where)


def _after(view: memoryview, at: int, width: int | tuple[str, int]) -> int:
    """Where the next opcode begins; beyond the end if the argument is cut short."""
    if isinstance(width, tuple):
        layout, taken = width
        if at + taken > len(view):
            return len(view)
        length = struct.unpack_from(layout, view, at)[0]
        return at + taken + length if length >= 0 else len(view)
    if width != _LINES:
        return at + width
    for _ in range(2):
        # Names are short.
        found = bytes(view[at : at + 1000]).find(b"\n")
        if found < 0:
            return len(view)
        at += found + 1
    return at


def _width(argument: Any) -> int | tuple[str, int]:
    if argument is None:
        return 0
    if argument.n >= 0:
        return int(argument.n)
    return _PREFIXES.get(argument.n, _LINES)


_WIDTHS: list[int | tuple[str, int] | None] = [None] * 256
for _opcode in pickletools.opcodes:
    if _opcode.name in _PLAIN:
        _WIDTHS[ord(_opcode.code)] = _width(_opcode.arg)
