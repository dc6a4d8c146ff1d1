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
from ckpt_cloud.format.sealing import BLOCK, NONCE_BYTES, ObjectKey, blocks_of, room_within, sealed_size
from ckpt_cloud.options import TransferOptions
from ckpt_cloud.planning.save import PackPlan, Segment, parts
from ckpt_cloud.stores import AtHand, ObjectStore
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.staging import Allocate, Staging
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.workers import in_thread

_PACKS_AT_ONCE = 8
"""Enough that the last parts of one are under way beside the first of others; each may use all requests."""
_MAX_VIEWS = 16
"""A part of more segments is staged as one buffer: handing over a small buffer costs more than copying it."""


class Source(Protocol):
    """Where the bytes of entries come from; called on worker threads."""

    def view(self, entry: int) -> memoryview | None:
        """The entry's own memory, if its bytes lie there in row-major order; None if they must be copied."""
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


async def upload_packs(
    store: ObjectStore,
    source: Source,
    packs: Sequence[tuple[str, PackPlan]],
    nbytes: Sequence[int],
    *,
    options: TransferOptions,
    recorder: Recorder,
    seal: Callable[[str], ObjectKey] | None = None,
) -> list[ObjectEntry]:
    """Uploads each pack under its key and returns what the manifest says of the objects, in the same order.

    Memory: staged parts stay within `options.memory_budget`; views of the caller's tensors cost nothing, but sealed
    parts are staged. At most `options.max_requests` parts, of all packs together, are under way.

    Args:
        nbytes: of every entry that the packs index.
        seal: gives what encrypts the object of a key; `store` then takes it as it comes.

    Raises:
        Whatever the store or the source raises; the other uploads are then cancelled and aborted.
    """
    part_size = sealed_size(_whole_blocks(options.part_size)) if seal else options.part_size
    upload = _Upload(
        store,
        source,
        nbytes,
        options,
        Budget(options.max_requests),
        Staging(Budget(options.memory_budget), part_size, source.allocate),
        recorder,
        seal,
        lanes=max(1, options.max_requests // max(1, min(_PACKS_AT_ONCE, len(packs)))),
    )
    gate = asyncio.Semaphore(min(_PACKS_AT_ONCE, options.max_requests))

    async def one(key: str, plan: PackPlan) -> ObjectEntry:
        async with gate:
            return await upload.pack(key, plan)

    return await all_or_cancel(one(key, plan) for key, plan in packs)


@dataclass(frozen=True, slots=True)
class _Upload:
    """What all packs of one save share."""

    store: ObjectStore
    source: Source
    nbytes: Sequence[int]
    options: TransferOptions
    requests: Budget
    staging: Staging
    recorder: Recorder
    seal: Callable[[str], ObjectKey] | None
    lanes: int
    """Requests of one pack when each has its share."""

    async def pack(self, key: str, plan: PackPlan) -> ObjectEntry:
        began_unix_s = time.time()
        sums = self._sums()
        sealing = None
        stored, part_size = plan.size, plan.part_size
        if self.seal is not None:
            sealing = self.seal(key)
            plan = replace(plan, part_size=_whole_blocks(plan.part_size))
            stored, part_size = sealed_size(plan.size), sealed_size(plan.part_size)
        if plan.size <= plan.part_size:
            version = await self._put(key, plan, sums, sealing)
        elif not sealing and not self.recorder.watched and (views := await in_thread(self._all_views, plan)):
            version = await self._put_views(key, plan, views, sums)
        else:
            begun = [sums]

            def source() -> AsyncIterator[memoryview]:
                # Anew for an upload that begins again.
                begun.append(self._sums())
                return self._buffers(key, plan, begun[-1], sealing)

            lanes = self.options.max_requests
            version = await self.store.put_multipart(key, source, part_size=part_size, concurrency=lanes)
            sums = begun[-1]
        self.recorder.report.objects += 1
        self.recorder.stored(key, stored, began_unix_s)
        return ObjectEntry(key, plan.size, self.options.block_size, sums.finish(), version, sums.digests)

    def _sums(self) -> BlockSums:
        return BlockSums(self.options.block_size, digests=self.options.block_digests)

    async def _put(self, key: str, plan: PackPlan, sums: BlockSums, sealing: ObjectKey | None) -> str | None:
        """A pack of one part, in one request from one buffer."""
        (segments,) = parts(plan, self.nbytes)
        await self.requests.take(1)
        try:
            if sealing is None:
                whole = await self._staged(plan, segments, sums)
            else:
                whole = await self._sealed(plan, segments, sums, _Place(sealing, 0, last=True))
            self.recorder.moved("up", key, len(whole))
            return await self.store.put(key, whole)
        finally:
            self.requests.give_back(1)
            self._release(segments)

    async def _buffers(
        self, key: str, plan: PackPlan, sums: BlockSums, sealing: ObjectKey | None
    ) -> AsyncIterator[memoryview]:
        """The pack's bytes in order; only the buffers of one part are held here at a time."""
        for number, segments in enumerate(parts(plan, self.nbytes)):
            await self.requests.take(1)
            try:
                if sealing is None:
                    pieces = await self._views(plan, segments, sums) or [await self._staged(plan, segments, sums)]
                else:
                    place = _Place.of_part(sealing, plan, number)
                    pieces = [await self._sealed(plan, segments, sums, place)]
                self.requests.give_back_with(pieces[-1], 1)
            except BaseException:
                self.requests.give_back(1)
                raise
            self.recorder.moved("up", key, sum(map(len, pieces)))
            while pieces:
                yield pieces.pop(0)
            self._release(segments)

    async def _put_views(self, key: str, plan: PackPlan, views: list[list[memoryview]], sums: BlockSums) -> str | None:
        """A pack of which nothing is copied, so that it takes no more than handing over its views."""

        def source() -> AtHand:
            for part in views:
                self.recorder.moved("up", key, sum(map(len, part)))
            return AtHand([view for part in views for view in part])

        def check() -> None:
            for part in views:
                for view in part:
                    sums.update(view)

        await self.requests.take(self.lanes)
        try:
            put = self.store.put_multipart(key, source, part_size=plan.part_size, concurrency=self.lanes)
            version, _ = await all_or_cancel((put, in_thread(check)))
        finally:
            self.requests.give_back(self.lanes)
        for segments in parts(plan, self.nbytes):
            self._release(segments)
        return version

    def _all_views(self, plan: PackPlan) -> list[list[memoryview]]:
        """By part, the views of all that the pack holds; nothing if some must be copied, or a part has many."""
        found = []
        for segments in parts(plan, self.nbytes):
            views = self._find_views(plan, segments) if len(segments) <= _MAX_VIEWS else []
            if not views:
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
        into = await self.staging.lend(sealed_size(size))
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
        into = await self.staging.lend(sum(s.end - s.start for s in segments))
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
