"""Objects that are written while their tensors are read: laid out before a byte is there, streamed in fixed memory.

Segments (literal bytes, boxes of tensors, what depends on a checksum) ─► windows ─► read one ahead ─► put_multipart
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ckpt_cloud.events import Recorder
from ckpt_cloud.interop.pull import Pull, Pulls
from ckpt_cloud.options import MIB, TransferOptions
from ckpt_cloud.planning.slices import Ints, flat_boxes
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.workers import in_thread, in_waiting_thread

WINDOW_BYTES = 64 * MIB
"""Read at once; one window is read while the one before it is sent."""
_LANES = 4
"""Parts of one object in flight."""
_ALIGNMENT = 16
"""Of the largest element."""


@dataclass(frozen=True, slots=True)
class Data:
    """A box of a tensor, in row-major order.

    Attributes:
        done: takes the CRC32 of the bytes when all of them have gone.
    """

    fqn: str
    dtype: torch.dtype
    offsets: Ints
    sizes: Ints
    done: Callable[[int], None] | None = None

    @property
    def nbytes(self) -> int:
        """Of the box."""
        return math.prod(self.sizes) * self.dtype.itemsize


Segment = bytes | Data | Callable[[], bytes]
"""A function is called when its turn comes, for what depends on the data before it."""


@dataclass(frozen=True, slots=True)
class ObjectPlan:
    """One object: its key, its size in bytes, and what it consists of."""

    key: str
    size: int
    segments: list[Segment]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements `start` to `end` of a segment, at `at` in the window's buffer."""

    segment: int
    start: int
    end: int
    at: int


@dataclass(slots=True)
class _Window:
    pieces: list[_Piece] = field(default_factory=list)
    size: int = 0


class ObjectUploader:
    """Writes planned objects of tensors that `puller` reads."""

    def __init__(self, store: ObjectStore, puller: Pulls, options: TransferOptions, recorder: Recorder) -> None:
        self._store = store
        self._puller = puller
        self._options = options
        self._recorder = recorder

    async def upload(self, plan: ObjectPlan) -> None:
        """Stores the object; nothing becomes visible if it fails."""
        if plan.size <= self._options.part_size:
            await self._store.put(plan.key, b"".join([piece async for piece in self._stream(plan)]))
        else:
            part = part_size(plan.size, self._options.part_size, self._store)
            await self._store.put_multipart(plan.key, lambda: self._stream(plan), part_size=part, concurrency=_LANES)
        self._recorder.report.objects += 1

    async def _stream(self, plan: ObjectPlan) -> AsyncIterator[memoryview]:
        windows = list(_windows(plan.segments))
        pieces = self._pieces(plan, windows)
        try:
            for number, segment in enumerate(plan.segments):
                if isinstance(segment, Data):
                    async for piece in self._data(number, segment, pieces):
                        self._recorder.moved("up", plan.key, len(piece))
                        yield piece
                        del piece
                else:
                    yield memoryview(segment if isinstance(segment, bytes) else segment())
        finally:
            await pieces.aclose()

    async def _data(
        self, number: int, segment: Data, pieces: AsyncIterator[tuple[int, memoryview]]
    ) -> AsyncIterator[memoryview]:
        crc, left = 0, segment.nbytes
        while left:
            owner, piece = await anext(pieces)
            assert owner == number, "windows follow the segments"
            if segment.done is not None:
                crc = await in_thread(zlib.crc32, piece, crc)
            left -= len(piece)
            yield piece
            del piece
        if segment.done is not None:
            segment.done(crc)

    async def _pieces(self, plan: ObjectPlan, windows: list[_Window]) -> AsyncGenerator[tuple[int, memoryview], None]:
        """Segment number and bytes, in order; the next window is read while this one is used."""
        reading: asyncio.Task[torch.Tensor] | None = None
        try:
            for number, window in enumerate(windows):
                buffer = await (reading or self._reading(plan, window))
                reading = self._reading(plan, windows[number + 1]) if number + 1 < len(windows) else None
                whole = memoryview(buffer.numpy().data)
                for piece in window.pieces:
                    segment = plan.segments[piece.segment]
                    assert isinstance(segment, Data), "only data are in windows"
                    width = segment.dtype.itemsize
                    yield piece.segment, whole[piece.at : piece.at + (piece.end - piece.start) * width]
        finally:
            if reading is not None:
                await asyncio.gather(reading, return_exceptions=True)

    def _reading(self, plan: ObjectPlan, window: _Window) -> asyncio.Task[torch.Tensor]:
        # A thread of its own: readers are synchronous, and wait for this very loop.
        return asyncio.create_task(in_waiting_thread(self._read, plan, window))

    def _read(self, plan: ObjectPlan, window: _Window) -> torch.Tensor:
        buffer = torch.empty(window.size, dtype=torch.uint8)
        parts = [_pulls(plan.segments[piece.segment], piece, buffer) for piece in window.pieces]
        self._puller.pull([pull for pulls in parts for pull in pulls])
        return buffer


def _pulls(segment: Segment, piece: _Piece, buffer: torch.Tensor) -> Iterator[Pull]:
    assert isinstance(segment, Data), "only data are in windows"
    width, at = segment.dtype.itemsize, piece.at
    for offsets, sizes in flat_boxes(segment.sizes, piece.start, piece.end):
        count = math.prod(sizes)
        target = buffer[at : at + count * width].view(segment.dtype).view(sizes)
        place = tuple(a + b for a, b in zip(segment.offsets, offsets, strict=True))
        yield Pull(segment.fqn, place, sizes, target)
        at += count * width


def _windows(segments: Sequence[Segment]) -> Iterator[_Window]:
    window = _Window()
    for number, segment in enumerate(segments):
        if not isinstance(segment, Data):
            continue
        start, count, width = 0, math.prod(segment.sizes), segment.dtype.itemsize
        while start < count:
            at = -(-window.size // _ALIGNMENT) * _ALIGNMENT
            room = (WINDOW_BYTES - at) // width
            if room <= 0:
                yield window
                window = _Window()
                continue
            end = min(count, start + room)
            window.pieces.append(_Piece(number, start, end, at))
            window.size = at + (end - start) * width
            start = end
    if window.pieces:
        yield window


def part_size(size: int, wanted: int, store: ObjectStore) -> int:
    """Of the parts of an object of `size` bytes: `wanted`, or more where there would be too many."""
    least = -(-size // (store.max_parts - 1))
    return max(wanted, -(-least // MIB) * MIB)
