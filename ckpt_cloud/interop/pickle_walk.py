"""A pickle's opcodes, looked at one by one before it is opened: which there are, and what its keys cost to hash.

A tuple is hashed by its elements, on the C stack, as often as it is met: a hundred bytes can hold one of 2**60
elements, or one so deep that the process dies. So each value on the pickle machine's stack stands here by its weight:
1, or of a tuple what hashing it meets. Lists weigh 1, since nobody hashes them; what makes a tuple of one must look at
it first.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Sequence

from ckpt_cloud.errors import CorruptFile, UntrustedItem

MAX_BYTES = 2 << 30
"""Of one pickle; DCP's metadata takes some 150 bytes for each stored chunk."""
MAX_KEY_WEIGHT = 1000
"""Of one key of a dict, or element of a set."""
_SATURATED = 1 << 62

_PLAIN = frozenset(
    "MARK STOP POP POP_MARK DUP PROTO FRAME NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT "  # noqa: SIM905 - a list of 48 lines says no more
    "SHORT_BINBYTES BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GLOBAL "
    "STACK_GLOBAL REDUCE BUILD NEWOBJ BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE BINPERSID".split()
)
_LINES = -1
"""Instead of a width: two lines of text follow."""
_PREFIXES = {
    pickletools.TAKEN_FROM_ARGUMENT1: struct.Struct("<B"),
    pickletools.TAKEN_FROM_ARGUMENT4: struct.Struct("<i"),
    pickletools.TAKEN_FROM_ARGUMENT4U: struct.Struct("<I"),
    pickletools.TAKEN_FROM_ARGUMENT8U: struct.Struct("<Q"),
}
_Width = int | struct.Struct


def walk(data: bytes | memoryview, where: str = "") -> int:
    """Where the pickle that `data` begins with ends, after every opcode was looked at.

    Raises:
        UntrustedItem: an opcode that plain data does not need.
        CorruptFile: it is cut short, too large, asks for more memory than it has bytes, or for endless time.
    """
    if len(data) > MAX_BYTES:
        raise CorruptFile(f"the pickle has {len(data)} bytes, more than {MAX_BYTES}", where)
    try:
        return _Walk(memoryview(data), where).run()
    except (IndexError, KeyError, struct.error):
        raise CorruptFile("the pickle is cut short, or its opcodes do not fit together", where) from None


class _Walk:
    """The pickle machine, with weights in place of values."""

    def __init__(self, view: memoryview, where: str) -> None:
        self._view = view
        self._where = where
        # What follows changes with every opcode.
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}
        self._hashing_left = (16 << 20) + 16 * len(view)

    def run(self) -> int:
        """Where it ends."""
        view, stack, memo = self._view, self._stack, self._memo
        at = 0
        while True:
            code = view[at]
            begin = at + 1
            fixed = _FIXED[code]
            at = begin + fixed if fixed >= 0 else self._after(begin, code)
            if _ATOM[code]:
                stack.append(1)
            elif code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _BINGET:
                stack.append(memo[view[begin]])
            elif code in _STEPS:
                _STEPS[code](self)
            elif code in _NUMBERED:
                self._numbered(code, int.from_bytes(view[begin:at], "little"), begin)
            elif code == _STOP:
                return at
            elif code == _LONG4:
                stack.append(1 + (at - begin) // 8)

    def _after(self, at: int, code: int) -> int:
        """Where the next opcode begins; beyond the end if the argument is cut short."""
        width = _WIDTHS[code]
        if width is None:
            raise UntrustedItem(f"the pickle has opcode {code:#04x}, which plain data does not need", self._where)
        if isinstance(width, struct.Struct):
            (length,) = width.unpack_from(self._view, at)
            return at + width.size + length if length >= 0 else len(self._view)
        for _ in range(2):
            # Names are short.
            found = bytes(self._view[at : at + 1000]).find(b"\n")
            if found < 0:
                return len(self._view)
            at += found + 1
        return at

    def _numbered(self, code: int, index: int, at: int) -> None:
        """Takes from a place in the memo, or puts there."""
        if code == _LONG_BINGET:
            self._stack.append(self._memo[index])
            return
        if index > at:
            # The memo is as long as its largest index.
            raise CorruptFile("the pickle asks for a memo larger than itself", self._where)
        self._memo[index] = self._stack[-1]

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def since_mark(self) -> list[int]:
        """What was pushed since the last mark, which goes too."""
        at = self._marks.pop()
        weights = self._stack[at:]
        del self._stack[at:]
        return weights

    def drop(self) -> None:
        """As Python's own unpickler: a mark, where one is topmost."""
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def tuple_of(self, weights: Sequence[int]) -> None:
        self._stack.append(min(_SATURATED, 1 + sum(weights)))

    def last(self, count: int) -> list[int]:
        """What was pushed last, which goes."""
        weights = self._stack[-count:]
        if len(weights) < count:
            raise IndexError("stack underflow")
        del self._stack[-count:]
        return weights

    def push(self, _: object) -> None:
        """What weighs 1, whatever it was made of."""
        self._stack.append(1)

    def again(self) -> None:
        self._stack.append(self._stack[-1])

    def hashed(self, weights: Sequence[int]) -> Sequence[int]:
        """The same, once it was counted what hashing these takes."""
        for weight in weights:
            self._hashing_left -= weight
            if weight > MAX_KEY_WEIGHT or self._hashing_left < 0:
                raise CorruptFile("the pickle has keys that would take forever to hash", self._where)
        return weights

    def set_item(self) -> None:
        self._stack.pop()
        self.hashed([self._stack.pop()])

    def call(self) -> None:
        """What comes of it weighs what was given to it, or less."""
        weight = self._stack.pop()
        self._stack[-1] = weight


def _named(*names: str) -> frozenset[int]:
    return frozenset(ord(opcode.code) for opcode in pickletools.opcodes if opcode.name in names)


def _width(argument: pickletools.ArgumentDescriptor | None) -> _Width:
    if argument is None:
        return 0
    return int(argument.n) if argument.n >= 0 else _PREFIXES.get(argument.n, _LINES)


_WIDTHS: list[_Width | None] = [None] * 256
for _opcode in pickletools.opcodes:
    if _opcode.name in _PLAIN:
        _WIDTHS[ord(_opcode.code)] = _width(_opcode.arg)
_FIXED = [width if isinstance(width, int) else _LINES for width in _WIDTHS]
_STOP, _LONG4, _MEMOIZE, _BINGET, _LONG_BINGET = (
    min(_named(name)) for name in ("STOP", "LONG4", "MEMOIZE", "BINGET", "LONG_BINGET")
)
_NUMBERED = _named("LONG_BINGET", "BINPUT", "LONG_BINPUT")
_BY_NAME: dict[str, Callable[[_Walk], object]] = {
    "MARK": _Walk.mark,
    "POP": _Walk.drop,
    "POP_MARK": lambda w: w.since_mark().clear(),
    "DUP": _Walk.again,
    "APPEND": lambda w: w.last(1).clear(),
    "APPENDS": lambda w: w.since_mark().clear(),
    "BUILD": lambda w: w.last(1).clear(),
    "LIST": lambda w: w.push(w.since_mark()),
    "TUPLE": lambda w: w.tuple_of(w.since_mark()),
    "TUPLE1": lambda w: w.tuple_of(w.last(1)),
    "TUPLE2": lambda w: w.tuple_of(w.last(2)),
    "TUPLE3": lambda w: w.tuple_of(w.last(3)),
    "DICT": lambda w: w.push(w.hashed(w.since_mark()[::2])),
    "SETITEM": _Walk.set_item,
    "SETITEMS": lambda w: w.hashed(w.since_mark()[::2]),
    "ADDITEMS": lambda w: w.hashed(w.since_mark()),
    "FROZENSET": lambda w: w.push(w.hashed(w.since_mark())),
    "STACK_GLOBAL": lambda w: w.push(w.last(2)),
    "REDUCE": _Walk.call,
    "NEWOBJ": _Walk.call,
    "BINPERSID": lambda w: w.push(w.last(1)),
}
_STEPS = {code: step for name, step in _BY_NAME.items() for code in _named(name)}
_OTHERS = {"PROTO", "FRAME", "STOP", "LONG4", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT"}
_ATOMS = _named(*(_PLAIN - _BY_NAME.keys() - _OTHERS))
_ATOM = [code in _ATOMS for code in range(256)]
"""Opcodes that push something of their own."""
