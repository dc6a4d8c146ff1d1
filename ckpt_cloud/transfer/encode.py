"""Codes entries and uploads what becomes of them, whose size is not known before.

entries ─► jobs ─► workers: frames, or a stream of transforms ─► in order: packs of a bounded size ─► upload, meanwhile
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Protocol

from ckpt_cloud.events import Recorder
from ckpt_cloud.format.checksum import unpack_sums
from ckpt_cloud.format.codec import Coded, Extent
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.format.pack import CodedPart, PackEntry, header, header_bytes_bound
from ckpt_cloud.format.sealing import sealed_size
from ckpt_cloud.options import TransferOptions
from ckpt_cloud.planning.coded import UNIT_BYTES, Job, jobs
from ckpt_cloud.planning.save import PackPlan, Segment, part_size_for
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.pieces import Pieces
from ckpt_cloud.transfer.staging import plain_memory
from ckpt_cloud.transfer.structured import first_of
from ckpt_cloud.transfer.upload import PACKS_AT_ONCE, Line, SealOf, Source
from ckpt_cloud.workers import COUNT, in_thread, in_waiting_thread

PACK_BYTES = 64 << 20
"""Of an object of coded chunks, which is held in memory until it is stored."""
_MAX_HEADER = 4 << 20
_PIECE = 1 << 20
"""Bytes of a stream that are handed on together."""

Piece = tuple[bytes, bytes]
"""Stored bytes, and the packed sizes of the frames that they are."""


class FrameCoder(Protocol):
    """Codes frames; called on worker threads."""

    @property
    def codec(self) -> tuple[str, ...]:
        """What plain bytes go through, in that order."""
        ...

    @property
    def frame(self) -> int:
        """Plain bytes of a frame."""
        ...

    def code(self, plain: memoryview) -> Piece:
        """Of whole frames; the last may be shorter."""
        ...


class StreamCoder(Protocol):
    """Codes each entry as one stream; called on worker threads."""

    @property
    def codec(self) -> tuple[str, ...]:
        """What plain bytes go through, in that order."""
        ...

    @property
    def frame(self) -> int:
        """0."""
        ...

    def stream(self, write: Callable[[bytes], None]) -> IO[bytes]:
        """Takes plain bytes, and hands what becomes of them to `write`; all of it once it is closed."""
        ...


async def upload_coded(
    store: ObjectStore,
    source: Source,
    entries: Sequence[PackEntry],
    coder: FrameCoder | StreamCoder,
    *,
    attempt: str,
    new_key: Callable[[int], str],
    options: TransferOptions,
    recorder: Recorder,
    expect: Callable[[int], None],
    seal: SealOf | None = None,
) -> tuple[list[Coded], list[ObjectEntry]]:
    """Codes all `entries` and uploads them; where each came to lie, and the objects.

    Memory: a quarter of `options.memory_budget` for what is being coded, half for what is coded and not yet stored,
    and a quarter for what must be copied, or sealed, to be sent.

    Args:
        entries: none is empty.
        new_key: of the object of that number, counted from 0; it is called before anything is stored under it.
        expect: is told how many bytes all objects will have, ever better as entries are coded, and at last exactly.
        seal: if the packs are to be encrypted; `store` then takes them as they come.

    Raises:
        Whatever the store, the source or the coder raises; uploads that are under way are then aborted.
    """
    line = Line.of(
        store,
        options,
        recorder,
        staging_bytes=options.memory_budget // 4,
        allocate=plain_memory,
        seal=seal,
    )
    budget = Budget(options.memory_budget // 2)
    places = [_Place() for _ in entries]
    work = _Coding(line, source, entries, coder, attempt, new_key, expect, budget, places)
    try:
        async with asyncio.TaskGroup() as group:
            await work.run(group)
    except BaseExceptionGroup as failures:
        raise first_of(failures) from None
    return work.coded(), work.objects()


@dataclass(slots=True)
class _Held:
    """Consecutive stored bytes of one entry in a pack."""

    entry: int
    at: int
    offset: int
    nbytes: int
    sizes: list[int]


@dataclass(slots=True)
class _Pack:
    """An object that is being filled."""

    pieces: list[bytes] = field(default_factory=list)
    held: list[_Held] = field(default_factory=list)
    size: int = 0
    header_bound: int = 0


@dataclass(slots=True)
class _Place:
    """Where an entry lies so far."""

    stored: int = 0
    sizes: bytearray = field(default_factory=bytearray)
    extents: list[Extent] = field(default_factory=list)


@dataclass(slots=True)
class _Coding:
    """One save's coded entries."""

    line: Line
    source: Source
    entries: Sequence[PackEntry]
    coder: FrameCoder | StreamCoder
    attempt: str
    new_key: Callable[[int], str]
    expect: Callable[[int], None]
    budget: Budget
    # All that follows changes with every piece.
    places: list[_Place]
    open: _Pack = field(default_factory=_Pack)
    stored: list[ObjectEntry | None] = field(default_factory=list)
    coded_bytes: int = 0
    left_bytes: int = 0
    closed_bytes: int = 0

    @property
    def ahead_bytes(self) -> int:
        """That may be coded before their turn, with what is copied for it."""
        return self.line.options.memory_budget // 4

    @property
    def pack_bytes(self) -> int:
        """Of a pack, unless one piece alone has more; few enough that there is room for the next meanwhile."""
        return min(PACK_BYTES, self.line.options.memory_budget // 8)

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Returns when all is coded; the last uploads are then still under way in `group`."""
        self.left_bytes = sum(entry.nbytes for entry in self.entries)
        async with contextlib.aclosing(self._coded(group)) as coded:
            async for job, pieces in coded:
                for piece in pieces:
                    await self._add(group, job.entry, piece)
                del pieces
                self.coded_bytes += job.nbytes
                self.left_bytes -= job.nbytes
                if job.end == self.entries[job.entry].nbytes:
                    self.source.release(job.entry)
        self._close(group)

    def coded(self) -> list[Coded]:
        """Where each entry lies."""
        coder = self.coder
        return [Coded(coder.codec, coder.frame, bytes(p.sizes), tuple(p.extents)) for p in self.places]

    def objects(self) -> list[ObjectEntry]:
        """That were stored."""
        return [entry for entry in self.stored if entry is not None]

    async def _coded(self, group: asyncio.TaskGroup) -> AsyncGenerator[tuple[Job, list[Piece]], None]:
        """Jobs in order with what became of them; those that follow are coded meanwhile."""
        frame = self.coder.frame
        step = max(1, min(UNIT_BYTES, self.ahead_bytes // 4) // frame) * frame if frame else 0
        ahead: deque[tuple[Job, asyncio.Task[list[Piece]]]] = deque()
        used = 0
        for job in jobs([entry.nbytes for entry in self.entries], step):
            # The plain bytes may be a copy.
            need = 2 * job.nbytes
            while ahead and (used + need > self.ahead_bytes or len(ahead) > COUNT):
                done, task = ahead.popleft()
                yield done, await task
                del task
                used -= 2 * done.nbytes
            if need > self.ahead_bytes and not frame:
                await self._stream_through(group, job)
                yield job, []
                continue
            ahead.append((job, group.create_task(in_thread(self._code, job))))
            used += need
        while ahead:
            done, task = ahead.popleft()
            yield done, await task

    def _code(self, job: Job) -> list[Piece]:
        coder = self.coder
        if coder.frame:
            return [coder.code(self._plain(job))]  # type: ignore[union-attr] # a coder of frames
        pieces: list[Piece] = []
        self._stream(job, lambda data: pieces.append((data, b"")))
        return pieces

    def _plain(self, job: Job) -> memoryview:
        """The entry's own memory, or a copy."""
        view = self.source.view(job.entry)
        if view is not None:
            return view[job.start : job.end]
        copy = memoryview(self.source.allocate(job.nbytes).data)
        self.source.copy([Segment(job.entry, job.start, job.end)], copy)
        return copy

    def _stream(self, job: Job, emit: Callable[[bytes], None]) -> None:
        """Puts the entry through the transforms, a few bytes at a time."""
        gathered = _Gathered(emit)
        stream = self.coder.stream(gathered.add)  # type: ignore[union-attr] # a coder of streams
        for start in range(job.start, job.end, _PIECE):
            stream.write(self._plain(Job(job.entry, start, min(job.end, start + _PIECE))))
        stream.close()
        gathered.flush()

    async def _stream_through(self, group: asyncio.TaskGroup, job: Job) -> None:
        """An entry too large to be held: its thread waits while there is no room for what it gives."""
        loop = asyncio.get_running_loop()
        stopped = threading.Event()
        adding: set[asyncio.Task[None] | None] = set()

        async def add(data: bytes) -> None:
            task = asyncio.current_task()
            adding.add(task)
            try:
                await self._add(group, job.entry, (data, b""))
            finally:
                adding.discard(task)

        def emit(data: bytes) -> None:
            if stopped.is_set():
                raise asyncio.CancelledError
            asyncio.run_coroutine_threadsafe(add(data), loop).result()

        work = asyncio.ensure_future(in_waiting_thread(self._stream, job, emit))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            stopped.set()
            for task in adding:
                if task is not None:
                    task.cancel()
            await asyncio.gather(work, return_exceptions=True)
            raise

    async def _add(self, group: asyncio.TaskGroup, entry: int, piece: Piece) -> None:
        """Puts the next stored bytes of an entry into the open pack."""
        data, packed = piece
        sizes = list(unpack_sums(packed))
        bound = header_bytes_bound(self.entries[entry]) + 100 + 12 * len(sizes)
        full = self.open.size + len(data) > self.pack_bytes or self.open.header_bound + bound > _MAX_HEADER
        if self.open.size and full:
            self._close(group)
        await self.budget.take(len(data))
        pack, place = self.open, self.places[entry]
        last = pack.held[-1] if pack.held else None
        if last is None or last.entry != entry:
            last = _Held(entry, place.stored, pack.size, 0, [])
            pack.held.append(last)
        last.nbytes += len(data)
        last.sizes += sizes
        pack.pieces.append(data)
        pack.size += len(data)
        pack.header_bound += bound
        place.stored += len(data)
        place.sizes += packed

    def _close(self, group: asyncio.TaskGroup) -> None:
        """Begins to upload the open pack, whose size is now known."""
        pack, self.open = self.open, _Pack()
        if not pack.size:
            return
        number = len(self.stored)
        self.stored.append(None)
        head = header([self._told(held) for held in pack.held], self.attempt)
        for held in pack.held:
            self.places[held.entry].extents.append((number, len(head) + held.offset, held.nbytes))
        size = len(head) + pack.size
        self.closed_bytes += sealed_size(size) if self.line.seal else size
        # What is still to be coded will shrink as the rest did.
        share = self.closed_bytes / self.coded_bytes if self.coded_bytes else 1.0
        self.expect(self.closed_bytes + round(self.left_bytes * share))
        sending = self._send(number, self.new_key(number), head, pack)
        try:
            group.create_task(sending)
        except RuntimeError:
            # Another upload has failed.
            sending.close()
            raise

    def _told(self, held: _Held) -> PackEntry:
        """What a pack's header says of bytes in it."""
        entry = self.entries[held.entry]
        part = CodedPart(self.coder.codec, self.coder.frame, entry.nbytes, held.at, held.sizes)
        return PackEntry(entry.fqn, entry.dtype, entry.shape, entry.offsets, entry.sizes, held.nbytes, part)

    async def _send(self, number: int, key: str, head: bytes, pack: _Pack) -> None:
        starts = []
        at = len(head)
        for piece in pack.pieces:
            starts.append(at)
            at += len(piece)
        try:
            part_size = part_size_for(at, self.line.sizes)
            plan = PackPlan(tuple(range(len(starts))), tuple(starts), head, at, part_size)
            nbytes = [len(piece) for piece in pack.pieces]
            lanes = max(1, self.line.options.max_requests // PACKS_AT_ONCE)
            self.stored[number] = await self.line.upload(Pieces(pack.pieces), key, plan, nbytes, lanes=lanes)
        finally:
            self.budget.give_back(pack.size)


class _Gathered:
    """Makes few pieces of many small ones."""

    def __init__(self, emit: Callable[[bytes], None]) -> None:
        self._emit = emit
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, data: bytes) -> None:
        """The next bytes."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size >= _PIECE:
            self.flush()

    def flush(self) -> None:
        """Hands on what there is."""
        if self._size:
            joined, self._pieces, self._size = b"".join(self._pieces), [], 0
            self._emit(joined)
