"""The parts of one multipart upload that are under way, counted from outside the engine that sends them."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from ckpt_cloud import events
from ckpt_cloud.errors import Throttled
from ckpt_cloud.stores.base import Buffer, Source
from ckpt_cloud.stores.pace import Pace, Pass


class PartsInFlight:
    """Hands buffers over no faster than `pace` allows.

    An engine takes buffers, cuts them into parts and sends these by itself. A part has its turn from before its first
    byte is handed over until the engine has let go of its last buffer, which it does once the part is stored.
    """

    def __init__(self, source: Source, part_size: int, pace: Pace, key: str = "") -> None:
        self._source = source
        self._key = key
        self._recorder = events.current()
        self._part_size = part_size
        self._pace = pace
        self._loop = asyncio.get_running_loop()
        # What changes: the parts under way, and the latest of them.
        self._flying: set[_Part] = set()
        self._latest: Pass | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Throttled) and self._latest is not None:
            self._pace.throttled(self._latest)
        for part in list(self._flying):
            self._over(part)

    async def stream(self) -> AsyncIterator[Buffer]:
        """The source's buffers, cut where parts end; those that end with a part, or within, are the source's own."""
        part = _Part(room=0)
        last: weakref.ref[memoryview] | None = None
        async for buffer in self._source():
            rest = [_flat(buffer)]
            del buffer
            while rest and len(rest[0]):
                if part.room == 0:
                    # The buffer first, the turn second: whoever has a turn waits for nobody.
                    part = await self._begin()
                piece = [rest.pop() if len(rest[0]) <= part.room else rest[0][: part.room]]
                if rest:
                    rest[0] = rest[0][part.room :]
                part.room -= len(piece[0])
                last = weakref.ref(piece[0])
                if part.room == 0:
                    self._watch(part, piece[0])
                yield piece.pop()
            rest.clear()
        if part.room and last is not None:
            self._watch_rest(part, last())

    async def _begin(self) -> _Part:
        self._latest = await self._pace.enter()
        part = _Part(room=self._part_size)
        self._flying.add(part)
        return part

    def _watch_rest(self, part: _Part, last: memoryview | None) -> None:
        if last is None:
            self._stored(part)
        else:
            self._watch(part, last)

    def _watch(self, part: _Part, last: memoryview) -> None:
        """A part is stored when its last piece is let go; the others go with it."""
        weakref.finalize(last, self._let_go, part).atexit = False

    def _let_go(self, part: _Part) -> None:
        """Called on whichever thread lets go of the piece."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stored, part)

    def _stored(self, part: _Part) -> None:
        if part in self._flying:
            self._pace.answered()
            self._over(part)
            if self._recorder is not None:
                self._recorder.ended("up", self._key, self._part_size - part.room, part.began_unix_s)

    def _over(self, part: _Part) -> None:
        self._flying.remove(part)
        self._pace.leave()


class _Part:
    """A part under way, and bytes that it has room for; compared by identity."""

    __slots__ = ("began_unix_s", "room")

    def __init__(self, room: int) -> None:
        self.room = room
        self.began_unix_s = time.time()


def _flat(buffer: Buffer) -> memoryview:
    """`buffer` itself where it can be: who made it may watch for its end."""
    if isinstance(buffer, memoryview) and buffer.format == "B" and buffer.ndim == 1:
        return buffer
    return memoryview(buffer).cast("B")
