"""Uploads the packs of one rank: staging and checksums on worker threads while earlier parts are under way.

PackPlan ─┬► parts ─► request ─► worker: views or a staged copy, CRC32C per block ─┬► put_multipart ─► ObjectEntry
          │                      └► if encrypted: sealed into a staged buffer      │
          └► views of all of it, where nothing is to be copied; worker: CRC32C ────┘
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ckpt_cloud.events import Recorder
from ckpt_cloud.format.checksum import BlockSums
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.format.sealing import BLOCK, NONCE_BYTES, ObjectKey, blocks_of, plain_within, room_within, sealed_size
from ckpt_cloud.options import TransferOptions
from ckpt_cloud.planning.save import PackPlan, Segment, Sizes, parts, shares
from ckpt_cloud.stores import AtHand, ObjectStore
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.staging import Allocate, Staging
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.workers import in_thread

PACKS_AT_ONCE = 8
"""Enough that the last parts of one are under way beside the first of others."""
_MAX_VIEWS = 16
"""A part of more segments is staged as one buffer: handing over a small buffer costs more than copying it."""


SealOf = Callable[[str], ObjectKey]
"""What encrypts the object of a key."""


class Source(Protocol):
    """Where the bytes of entries come from; called on worker threads."""

    def view(self, entry: int) -> memoryview | None:
        """The entry's own memory, if its bytes lie there in row-major order; None if they must be copied."""
        ...

    def lasts(self, entry: int) -> bool:
        """Whether the memory of the entry's view is there anyway, so that holding on to it costs nothing."""
        ...

    def copy(self, segments: Sequence[Segment], into: memoryview) -> None:
        """Writes the bytes of the segments, one after another, to `into`."""
        ...

    def release(self, entry: int) -> None:
        """The entry has been handed over in full; what was kept for it may go, though it may be asked for again."""
        ...

    @property
    def allocate(self) -> Allocate:
        """Makes memory that `copy` writes to fast."""
        ...


def sizes_for(store: ObjectStore, options: TransferOptions, *, sealed: bool) -> Sizes:
    """What packs and their parts should and may be, before they are sealed if they are to be."""
    max_part = plain_within(store.max_part_bytes) if sealed else store.max_part_bytes
    return Sizes(options.pack_size, options.part_size, store.max_parts, max_part)


async def upload_packs(
    store: ObjectStore,
    source: Source,
    packs: Sequence[tuple[str, PackPlan]],
    nbytes: Sequence[int],
    *,
    options: TransferOptions,
    recorder: Recorder,
    seal: SealOf | None = None,
) -> list[ObjectEntry]:
    """Uploads each pack under its key and returns what the manifest says of the objects, in the same order.

    Memory: staged parts stay within `options.memory_budget`; views of the caller's tensors cost nothing, but sealed
    parts are staged. At most `options.max_requests` parts, of all packs together, are under way. The largest packs
    begin first and get more of them, so that none goes on alone at the end.

    Args:
        nbytes: of every entry that the packs index.
        seal: if the packs are to be encrypted; `store` then takes them as they come.

    Raises:
        Whatever the store or the source raises; the other uploads are then cancelled and aborted.
    """
    staging = options.memory_budget
    allocate = source.allocate
    line = Line.of(store, options, recorder, staging_bytes=staging, allocate=allocate, seal=seal)
    lanes = shares([plan.size for _, plan in packs], options.max_requests, at_once=PACKS_AT_ONCE)
    order = sorted(range(len(packs)), key=lambda n: -packs[n][1].size)
    stored = await all_or_cancel(line.upload(source, *packs[n], nbytes, lanes=lanes[n]) for n in order)
    return [entry for _, entry in sorted(zip(order, stored, strict=True), key=lambda each: each[0])]


@dataclass(frozen=True, slots=True)
class Line:
    """What all packs of one save share on their way up.

    Attributes:
        finding: of the pack whose views are being found; who waits gets it in turn.
        seal: if the packs are to be encrypted; `store` then takes them as they come.
    """

    store: ObjectStore
    options: TransferOptions
    requests: Budget
    staging: Staging
    gate: asyncio.Semaphore
    finding: asyncio.Lock
    recorder: Recorder
    seal: SealOf | None

    @classmethod
    def of(
        cls,
        store: ObjectStore,
        options: TransferOptions,
        recorder: Recorder,
        *,
        staging_bytes: int,
        allocate: Allocate,
        seal: SealOf | None,
    ) -> Line:
        """For one save, on one event loop."""
        part_size = sealed_size(_whole_blocks(options.part_size)) if seal else options.part_size
        staging = Staging(Budget(staging_bytes), min(part_size, staging_bytes), allocate)
        gate = asyncio.Semaphore(min(PACKS_AT_ONCE, options.max_requests))
        return cls(store, options, Budget(options.max_requests), staging, gate, asyncio.Lock(), recorder, seal)

    @property
    def sizes(self) -> Sizes:
        """What packs and their parts may be."""
        return sizes_for(self.store, self.options, sealed=self.seal is not None)

    async def upload(
        self, source: Source, key: str, plan: PackPlan, nbytes: Sequence[int], *, lanes: int
    ) -> ObjectEntry:
        """Uploads one pack, once few enough others are under way, by so many requests at a time."""
        async with self.gate:
            return await _Upload(self, source, nbytes, lanes).pack(key, plan)


@dataclass(frozen=True, slots=True)
class _Upload:
    """Packs of one source."""

    line: Line
    source: Source
    nbytes: Sequence[int]
    lanes: int

    async def pack(self, key: str, plan: PackPlan) -> ObjectEntry:
        began_unix_s = time.time()
        sums = self._sums()
        sealing = None
        stored, part_size = plan.size, plan.part_size
        if self.line.seal is not None:
            sealing = self.line.seal(key)
            plan = replace(plan, part_size=_whole_blocks(plan.part_size))
            stored, part_size = sealed_size(plan.size), sealed_size(plan.part_size)
        if plan.size <= plan.part_size:
            version = await self._put(key, plan, sums, sealing)
        elif not sealing and not self.line.recorder.watched and (views := await self._views_of_all(plan)):
            version = await self._put_views(key, plan, views, sums)
        else:
            begun = [sums]

            def source() -> AsyncIterator[memoryview]:
                # Anew for an upload that begins again.
                begun.append(self._sums())
                return self._buffers(key, plan, begun[-1], sealing)

            lanes = self.line.options.max_requests
            version = await self.line.store.put_multipart(key, source, part_size=part_size, concurrency=lanes)
            sums = begun[-1]
        self.line.recorder.report.objects += 1
        self.line.recorder.stored(key, stored, began_unix_s)
        return ObjectEntry(key, plan.size, self.line.options.block_size, sums.finish(), version, sums.digests)

    def _sums(self) -> BlockSums:
        return BlockSums(self.line.options.block_size, digests=self.line.options.block_digests)

    async def _put(self, key: str, plan: PackPlan, sums: BlockSums, sealing: ObjectKey | None) -> str | None:
        """A pack of one part, in one request from one buffer."""
        (segments,) = parts(plan, self.nbytes)
        await self.line.requests.take(1)
        try:
            if sealing is None:
                whole = await self._staged(plan, segments, sums)
            else:
                whole = await self._sealed(plan, segments, sums, _Place(sealing, 0, last=True))
            self.line.recorder.moved("up", key, len(whole))
            return await self.line.store.put(key, whole)
        finally:
            self.line.requests.give_back(1)
            self._release(segments)

    async def _buffers(
        self, key: str, plan: PackPlan, sums: BlockSums, sealing: ObjectKey | None
    ) -> AsyncIterator[memoryview]:
        """The pack's bytes in order; only the buffers of one part are held here at a time."""
        for number, segments in enumerate(parts(plan, self.nbytes)):
            await self.line.requests.take(1)
            try:
                if sealing is None:
                    pieces = await self._views(plan, segments, sums) or [await self._staged(plan, segments, sums)]
                else:
                    place = _Place.of_part(sealing, plan, number)
                    pieces = [await self._sealed(plan, segments, sums, place)]
                self.line.requests.give_back_with(pieces[-1], 1)
            except BaseException:
                self.line.requests.give_back(1)
                raise
            self.line.recorder.moved("up", key, sum(map(len, pieces)))
            while pieces:
                yield pieces.pop(0)
            self._release(segments)

    async def _put_views(self, key: str, plan: PackPlan, views: list[list[memoryview]], sums: BlockSums) -> str | None:
        """A pack of which nothing is copied, so that it takes no more than handing over its views."""

        def source() -> AtHand:
            for part in views:
                self.line.recorder.moved("up", key, sum(map(len, part)))
            return AtHand([view for part in views for view in part])

        def check() -> None:
            for part in views:
                for view in part:
                    sums.update(view)

        async def summed() -> None:
            # After the packs that are about to find their views: threads that sum make that ten times as slow, since
            # torch lets go of the GIL in each small call.
            async with self.line.finding:
                pass
            await in_thread(check)

        await self.line.requests.take(self.lanes)
        try:
            put = self.line.store.put_multipart(key, source, part_size=plan.part_size, concurrency=self.lanes)
            version, _ = await all_or_cancel((put, summed()))
        finally:
            self.line.requests.give_back(self.lanes)
        for segments in parts(plan, self.nbytes):
            self._release(segments)
        return version

    async def _views_of_all(self, plan: PackPlan) -> list[list[memoryview]]:
        async with self.line.finding:
            return await in_thread(self._all_views, plan)

    def _all_views(self, plan: PackPlan) -> list[list[memoryview]]:
        """By part, the views of all that the pack holds.

        Nothing if some must be copied, or were made to be saved: those must go one by one. Nor if a part has many.
        """
        found = []
        for segments in parts(plan, self.nbytes):
            views = self._find_views(plan, segments) if len(segments) <= _MAX_VIEWS else []
            if not views or not all(self.source.lasts(segment.entry) for segment in segments if segment.entry >= 0):
                return []
            found.append(views)
        return found

    def _release(self, segments: list[Segment]) -> None:
        for segment in segments:
            if segment.entry >= 0 and segment.end == self.nbytes[segment.entry]:
                self.source.release(segment.entry)

    async def _views(self, plan: PackPlan, segments: list[Segment], sums: BlockSums) -> list[memoryview]:
        """Views of the memory that the segments lie in, or nothing if some must be copied or they are many."""
        if len(segments) > _MAX_VIEWS:
            return []
        return await in_thread(self._summed_views, plan, segments, sums)

    async def _sealed(self, plan: PackPlan, segments: list[Segment], sums: BlockSums, place: _Place) -> memoryview:
        """The segments sealed into one buffer of the budget, which also is all the room that is needed on the way."""
        size = sum(s.end - s.start for s in segments)
        into = await self.line.staging.lend(sealed_size(size))
        await in_thread(self._seal, plan, segments, into, sums, place)
        return into

    def _seal(self, plan: PackPlan, segments: list[Segment], into: memoryview, sums: BlockSums, place: _Place) -> None:
        size = sum(s.end - s.start for s in segments)
        nonces = os.urandom(blocks_of(size) * NONCE_BYTES)
        views = self._summed_views(plan, segments, sums) if len(segments) <= _MAX_VIEWS else []
        if views:
            place.sealing.seal(views, into, nonces, first_block=place.first_block, last=place.last)
        else:
            self._copy(plan, segments, room_within(into, size), sums)
            place.sealing.seal_within(into, size, nonces, first_block=place.first_block, last=place.last)

    def _summed_views(self, plan: PackPlan, segments: list[Segment], sums: BlockSums) -> list[memoryview]:
        views = self._find_views(plan, segments)
        for view in views:
            sums.update(view)
        return views

    def _find_views(self, plan: PackPlan, segments: list[Segment]) -> list[memoryview]:
        views = []
        for segment in segments:
            view = memoryview(plan.header) if segment.entry < 0 else self.source.view(segment.entry)
            if view is None:
                return []
            views.append(view[segment.start : segment.end])
        return views

    async def _staged(self, plan: PackPlan, segments: list[Segment], sums: BlockSums) -> memoryview:
        """The segments copied into one buffer of the budget."""
        into = await self.line.staging.lend(sum(s.end - s.start for s in segments))
        await in_thread(self._copy, plan, segments, into, sums)
        return into

    def _copy(self, plan: PackPlan, segments: list[Segment], into: memoryview, sums: BlockSums) -> None:
        if segments[0].entry < 0:
            head, *segments = segments
            size = head.end - head.start
            into[:size] = plan.header[head.start : head.end]
            self.source.copy(segments, into[size:])
        else:
            self.source.copy(segments, into)
        sums.update(into)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a part lies in its object, which `sealing` seals."""

    sealing: ObjectKey
    first_block: int
    last: bool

    @classmethod
    def of_part(cls, sealing: ObjectKey, plan: PackPlan, number: int) -> _Place:
        """Of the part with this number."""
        return cls(sealing, number * (plan.part_size // BLOCK), last=(number + 1) * plan.part_size >= plan.size)


def _whole_blocks(part_size: int) -> int:
    """A part of an object that is to be sealed is whole blocks, the last apart."""
    return blocks_of(part_size) * BLOCK
