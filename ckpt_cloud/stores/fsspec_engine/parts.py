"""A stream of buffers, cut into parts and sent several at a time.

source ─► Parts.next ─┬► lane: send ─► Part.release
                      └► lane: send ─► Part.release     (a lane for each part in flight, and one that collects)
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from ckpt_cloud.stores.base import Buffer

T = TypeVar("T")


class Part:
    """Bytes to be sent as one, in pieces that lie where the source has put them.

    Attributes:
        pieces: the bytes, in order.
        size: in bytes.
    """

    __slots__ = ("_held", "pieces", "size")

    def __init__(self) -> None:
        self.pieces: list[memoryview] = []
        self.size = 0
        # The source's own objects: it may watch when each is let go.
        self._held: list[Buffer] = []

    def add(self, piece: memoryview, origin: Buffer) -> None:
        """Appends `piece`, a view of `origin`."""
        self.pieces.append(piece)
        self._held.append(origin)
        self.size += len(piece)

    def release(self) -> None:
        """Lets go of all buffers."""
        self.pieces.clear()
        self._held.clear()


def joined(pieces: Sequence[memoryview]) -> bytes:
    """`pieces` as one object; a copy, unless they are one already."""
    if len(pieces) == 1:
        whole = pieces[0].obj
        if isinstance(whole, bytes) and len(whole) == len(pieces[0]):
            return whole
    return b"".join(pieces)


async def streamed(pieces: Iterable[memoryview]) -> AsyncIterator[memoryview]:
    """A body that can be sent once, without a copy."""
    for piece in pieces:
        if len(piece):
            yield piece


async def filled(size: int, chunks: AsyncIterator[bytes]) -> bytearray:
    """Up to `size` bytes of `chunks`, each placed where it belongs as it comes; what comes beyond them is not held."""
    whole = bytearray(size)
    at = 0
    async for chunk in chunks:
        fits = min(len(chunk), size - at)
        whole[at : at + fits] = chunk[:fits]
        at += fits
    return whole if at == size else whole[:at]


class Parts:
    """`buffers` as parts of exactly `part_size` bytes, but for the last; asks for no buffer before it is needed."""

    def __init__(self, buffers: AsyncIterable[Buffer], part_size: int) -> None:
        self._buffers = aiter(buffers)
        self._part_size = part_size
        # What changes: what is left of the last buffer, and whether there may be another.
        self._rest: tuple[memoryview, Buffer] | None = None
        self._ended = False

    async def next(self) -> Part | None:
        """The next part; None at the end, and from then on. One call at a time."""
        part = Part()
        while part.size < self._part_size:
            if self._rest is not None:
                self._rest = _move(*self._rest, part, self._part_size - part.size)
            elif self._ended:
                break
            else:
                await self._pull()
        return part if part.size else None

    async def close(self) -> None:
        """Ends the source, which may be in the middle."""
        self._ended, self._rest = True, None
        close = getattr(self._buffers, "aclose", None)
        if close is not None:
            await close()

    async def _pull(self) -> None:
        try:
            buffer = await anext(self._buffers)
        except StopAsyncIteration:
            self._ended = True
            return
        view = memoryview(buffer).cast("B")
        self._rest = (view, buffer) if len(view) else None


def _move(view: memoryview, origin: Buffer, part: Part, room: int) -> tuple[memoryview, Buffer] | None:
    """Moves as much of `view` to `part` as there is room for; the rest."""
    part.add(view[:room], origin)
    return (view[room:], origin) if len(view) > room else None


async def in_lanes(
    take: Callable[[], Awaitable[Part | None]], send: Callable[[int, Part], Awaitable[T]], *, concurrency: int
) -> Sequence[T]:
    """Runs `send(number, part)` for each part that `take` gives; what it returned, by number from 0.

    At most `concurrency` parts are being sent while one more is collected. The first failure, of `take` or of `send`,
    cancels all else and comes out as it is.
    """
    turn = asyncio.Lock()
    slots = asyncio.Semaphore(concurrency)
    numbers = itertools.count()
    sent: dict[int, T] = {}

    async def lane() -> None:
        while True:
            async with turn:
                part = await take()
                number = next(numbers)
            if part is None:
                return
            try:
                async with slots:
                    sent[number] = await send(number, part)
            finally:
                part.release()
                del part

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency + 1):
                group.create_task(lane())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [sent[number] for number in sorted(sent)]
