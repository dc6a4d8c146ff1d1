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
        """The source's buffers, cut where parts end."""
        part = _Part(room=0)
        async for buffer in self._source():
            rest = [memoryview(buffer).cast("B")]
            del buffer
            while len(rest[0]):
                if part.room == 0:
                    # The buffer first, the turn second: whoever has a turn waits for nobody.
                    part = await self._begin()
                piece = [rest[0][: part.room]]
                rest[0] = rest[0][len(piece[0]) :]
                self._watch(part, piece[0])
                yield piece.pop()
            rest.clear()
        part.room = 0
        self._settle(part)

    async def _begin(self) -> _Part:
        self._latest = await self._pace.enter()
        part = _Part(room=self._part_size)
        self._flying.add(part)
        return part

    def _watch(self, part: _Part, piece: memoryview) -> None:
        part.room -= len(piece)
        part.size += len(piece)
        part.held += 1
        weakref.finalize(piece, self._let_go, part).atexit = False

    def _let_go(self, part: _Part) -> None:
        """Called on whichever thread lets go of the piece."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._gone, part)

    def _gone(self, part: _Part) -> None:
        part.held -= 1
        self._settle(part)

    def _settle(self, part: _Part) -> None:
        if part.room == 0 and part.held == 0 and part in self._flying:
            self._pace.answered()
            self._over(part)
            if self._recorder is not None:
                self._recorder.ended("up", self._key, part.size, part.began_unix_s)

    def _over(self, part: _Part) -> None:
        self._flying.remove(part)
        self._pace.leave()


class _Part:
    """Bytes that it has room for, and pieces of it that are held; compared by identity."""

    __slots__ = ("began_unix_s", "held", "room", "size")

    def __init__(self, room: int) -> None:
        self.room = room
        self.held = 0
        self.size = 0
        self.began_unix_s = time.time()
