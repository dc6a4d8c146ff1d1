"""Uploads the packs of one rank: staging and checksums on worker threads while earlier parts are under way.

PackPlan ─► parts ─► worker: views or staged copies, CRC32C per block ─► put_multipart ─► ObjectEntry
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt_cloud.events import Recorder
from ckpt_cloud.format.checksum import BlockSums
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.options import TransferOptions
from ckpt_cloud.planning.save import PackPlan, Segment, parts
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.workers import in_thread

_PACKS_AT_ONCE = 4
"""Enough to overlap their first and last requests, few enough that each has several parts in flight."""
_MAX_VIEWS = 16
"""A part of more segments is staged as one buffer: handing over a small buffer costs more than copying it."""


class Source(Protocol):
    """Where the bytes of entries come from; called on worker threads."""

    def view(self, entry: int) -> memoryview | None:
        """The entry's own memory, if its bytes lie there in row-major order; None if they must be copied."""
        ...

    def copy(self, entry: int, start: int, end: int, into: memoryview) -> None:
        """Writes bytes `start` to `end` (exclusive) of the entry to `into`."""
        ...

    def release(self, entry: int) -> None:
        """The entry has been handed over in full; what was kept for it may go, though it may be asked for again."""
        ...


async def upload_packs(
    store: ObjectStore,
    source: Source,
    packs: Sequence[tuple[str, PackPlan]],
    nbytes: Sequence[int],
    *,
    options: TransferOptions,
    recorder: Recorder,
) -> list[ObjectEntry]:
    """Uploads each pack under its key and returns what the manifest says of the objects, in the same order.

    Memory: staged parts stay within `options.memory_budget`; views of the caller's tensors cost nothing.

    Args:
        nbytes: of every entry that the packs index.

    Raises:
        Whatever the store or the source raises; the other uploads are then cancelled and aborted.
    """
    at_once = max(1, min(len(packs), _PACKS_AT_ONCE, options.max_requests))
    upload = _Upload(store, source, nbytes, options, Budget(options.memory_budget), recorder, at_once)
    gate = asyncio.Semaphore(at_once)

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
    budget: Budget
    recorder: Recorder
    at_once: int

    async def pack(self, key: str, plan: PackPlan) -> ObjectEntry:
        begun: list[BlockSums] = []
        began_unix_s = time.time()

        def source() -> AsyncIterator[memoryview]:
            # Anew for an upload that begins again.
            begun.append(BlockSums(self.options.block_size))
            return self._buffers(key, plan, begun[-1])

        if plan.size <= plan.part_size:
            version = await self.store.put(key, b"".join([piece async for piece in source()]))
        else:
            lanes = max(1, self.options.max_requests // self.at_once)
            version = await self.store.put_multipart(key, source, part_size=plan.part_size, concurrency=lanes)
        self.recorder.report.objects += 1
        self.recorder.stored(key, plan.size, began_unix_s)
        return ObjectEntry(key, plan.size, self.options.block_size, begun[-1].finish(), version)

    async def _buffers(self, key: str, plan: PackPlan, sums: BlockSums) -> AsyncIterator[memoryview]:
        """The pack's bytes in order; only the buffers of one part are held here at a time."""
        for segments in parts(plan, self.nbytes):
            pieces = await self._views(plan, segments) or [await self._staged(plan, segments)]
            await in_thread(_add, sums, pieces)
            self.recorder.moved("up", key, sum(map(len, pieces)))
            while pieces:
                yield pieces.pop(0)
            for segment in segments:
                if segment.entry >= 0 and segment.end == self.nbytes[segment.entry]:
                    self.source.release(segment.entry)

    async def _views(self, plan: PackPlan, segments: list[Segment]) -> list[memoryview]:
        """Views of the memory that the segments lie in, or nothing if some must be copied or they are many."""
        if len(segments) > _MAX_VIEWS:
            return []
        return await in_thread(self._find_views, plan, segments)

    def _find_views(self, plan: PackPlan, segments: list[Segment]) -> list[memoryview]:
        views = []
        for segment in segments:
            view = memoryview(plan.header) if segment.entry < 0 else self.source.view(segment.entry)
            if view is None:
                return []
            views.append(view[segment.start : segment.end])
        return views

    async def _staged(self, plan: PackPlan, segments: list[Segment]) -> memoryview:
        """The segments copied into one buffer of the budget."""
        into = memoryview(await self.budget.buffer(sum(s.end - s.start for s in segments)))
        await in_thread(self._copy, plan, segments, into)
        return into

    def _copy(self, plan: PackPlan, segments: list[Segment], into: memoryview) -> None:
        at = 0
        for segment in segments:
            target = into[at : at + segment.end - segment.start]
            view = memoryview(plan.header) if segment.entry < 0 else self.source.view(segment.entry)
            if view is not None:
                target[:] = view[segment.start : segment.end]
            else:
                self.source.copy(segment.entry, segment.start, segment.end, target)
            at += len(target)


def _add(sums: BlockSums, pieces: list[memoryview]) -> None:
    # In a function of its own: a loop variable in the generator would hold on to a part that waits for the budget.
    for piece in pieces:
        sums.update(piece)
