"""What a rule applies to, when it is due, and what it does to an operation."""

# ruff: noqa: D102 - hooks are documented once, on Rule

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

from ckpt_cloud.errors import CkptCloudError, RangeNotSatisfiable

Error = type[Exception] | Exception | Callable[[str, str], Exception]
"""What to raise: a class, an instance, or a function of operation and key that makes one."""

_TOP_BIT = 0x80
"""No ASCII has it, so that flipping it shows in text too."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operation as it was asked for.

    Attributes:
        operation: name of the method.
        keys: at least one.
        url: of the first key's object.
        start, end: the byte range of a read, `end` exclusive and None for the object's own.
    """

    operation: str
    keys: tuple[str, ...]
    url: str
    start: int = 0
    end: int | None = None


@dataclass(slots=True, eq=False)
class Rule:
    """Which operations something happens to, and when; on its own, nothing happens.

    Attributes:
        operation, key: `fnmatch` patterns; of several keys one must match.
        times: how many operations use it up; None for no end.
        after: how many it lets through first.
    """

    operation: str
    key: str
    times: int | None = None
    after: int = 0
    # Both count up, under the lock of `Faults`.
    met: int = field(default=0, init=False)
    used: int = field(default=0, init=False)

    def matches(self, call: Call) -> bool:
        """Whether it is about such operations."""
        return fnmatchcase(call.operation, self.operation) and any(fnmatchcase(key, self.key) for key in call.keys)

    def due(self, call: Call) -> bool:
        """Counts `call` if it matches, and tells whether it is the rule's turn."""
        if not self.matches(call):
            return False
        self.met += 1
        return self.met > self.after and (self.times is None or self.used < self.times)

    async def before(self, call: Call) -> None:
        """Awaited before the operation is carried out; may raise."""

    def afterwards(self, call: Call) -> None:
        """Called when it has been carried out; may raise."""

    def read(self, data: memoryview, start: int) -> memoryview:
        """What a read returns instead of `data`, the object's bytes from `start`."""
        del start
        return data

    def release(self) -> None:
        """Lets go what it holds."""


@dataclass(slots=True, eq=False)
class Fail(Rule):
    """Raises `error`, before the operation or, if `applied`, after it."""

    error: Error = field(kw_only=True)
    applied: bool = False

    async def before(self, call: Call) -> None:
        if not self.applied:
            raise _made(self.error, call)

    def afterwards(self, call: Call) -> None:
        if self.applied:
            raise _made(self.error, call)


@dataclass(slots=True, eq=False)
class Hang(Rule):
    """Waits until it is released."""

    gate: Future[None] = field(default_factory=Future, init=False)

    async def before(self, call: Call) -> None:
        del call
        # One that gives up waiting must not take the others along.
        await asyncio.shield(asyncio.wrap_future(self.gate))

    def release(self) -> None:
        self.gate.set_result(None)


@dataclass(slots=True, eq=False)
class Corrupt(Rule):
    """Flips a bit of the byte `at` in the object, or in the middle of what is read."""

    at: int | None = None

    def matches(self, call: Call) -> bool:
        beyond = call.end is not None and self.at is not None and not call.start <= self.at < call.end
        return not beyond and Rule.matches(self, call)

    def read(self, data: memoryview, start: int) -> memoryview:
        position = len(data) // 2 if self.at is None else self.at - start
        if position >= len(data):
            return data
        flipped = bytearray(data)
        flipped[position] ^= _TOP_BIT
        return memoryview(flipped)


@dataclass(slots=True, eq=False)
class Shorten(Rule):
    """Makes the object end after `size` bytes."""

    size: int = 0

    def matches(self, call: Call) -> bool:
        within = call.end is not None and call.end <= self.size
        return not within and Rule.matches(self, call)

    async def before(self, call: Call) -> None:
        if call.end is not None:
            message = f"read: the object has {self.size} bytes, {call.end} were asked for"
            raise RangeNotSatisfiable(message, call.url)

    def read(self, data: memoryview, start: int) -> memoryview:
        assert start == 0, "ranges that end beyond the cut are refused before"
        return data[: self.size]


def _made(error: Error, call: Call) -> Exception:
    if isinstance(error, Exception):
        return error.with_traceback(None)
    if not isinstance(error, type):
        return error(call.operation, call.keys[0])
    # To mypy every class is also a function.
    kind = cast("type[Exception]", error)
    message = f"{call.operation}: a fault that the test asked for"
    return kind(message, call.url) if issubclass(kind, CkptCloudError) else kind(message)
