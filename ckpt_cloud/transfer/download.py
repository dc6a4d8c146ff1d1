"""Fetches ranges, verifies every block, and hands the bytes on to where they belong.

Fetch ─► budget ─► get_range ─► worker: CRC32C per block ─► worker: place in the destination
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ckpt_cloud.errors import ChecksumMismatch, MissingObject, NotFound, RangeNotSatisfiable
from ckpt_cloud.events import Recorder
from ckpt_cloud.format.checksum import first_bad_block, unpack_sums
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.options import TransferOptions
from ckpt_cloud.planning.load import Fetch, Placement
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.structured import all_or_cancel, to_the_end
from ckpt_cloud.workers import in_thread


class Sink(Protocol):
    """Where fetched bytes go; called on worker threads, never twice for one box."""

    def place(self, placement: Placement, data: memoryview) -> None:
        """Copies the box of `placement` out of `data`, the bytes of its range."""
        ...

    def describe(self, placement: Placement) -> str:
        """Name of what the placement is part of, for errors."""
        ...


async def download(
    store: ObjectStore,
    sink: Sink,
    fetches: Sequence[Fetch],
    objects: Sequence[ObjectEntry],
    *,
    options: TransferOptions,
    recorder: Recorder,
) -> None:
    """Runs all `fetches`, at most `options.max_requests` at once and within `options.memory_budget`.

    Raises:
        ChecksumMismatch: a block is wrong, twice.
        MissingObject: an object is gone, or shorter than the manifest says.
    """
    sums = {number: unpack_sums(objects[number].sums) for number in {fetch.object for fetch in fetches}}
    work = _Download(store, sink, objects, sums, Budget(options.memory_budget), recorder)
    recorder.report.objects += len(sums)
    queue = iter(fetches)
    lanes = min(options.max_requests, len(fetches))
    await all_or_cancel(work.drain(queue) for _ in range(lanes))


@dataclass(frozen=True, slots=True)
class _Download:
    """What all fetches of one load share."""

    store: ObjectStore
    sink: Sink
    objects: Sequence[ObjectEntry]
    sums: dict[int, array[int]]
    budget: Budget
    recorder: Recorder

    async def drain(self, queue: Iterator[Fetch]) -> None:
        for fetch in queue:
            size = fetch.end - fetch.start
            await self.budget.take(size)
            try:
                data = await self._verified(fetch)
                # A thread that went on after a failed load had ended would spoil what is loaded next.
                await to_the_end(in_thread(self._place, fetch, data))
                del data
            finally:
                self.budget.give_back(size)

    async def _verified(self, fetch: Fetch) -> memoryview:
        for attempt in (1, 2):
            data = await self._get(fetch)
            bad = await in_thread(self._bad_block, fetch, data)
            if bad is None:
                return data
            if attempt == 2:
                raise self._mismatch(fetch, bad)
        raise AssertionError("unreachable")

    async def _get(self, fetch: Fetch) -> memoryview:
        entry = self.objects[fetch.object]
        self.recorder.moved("down", entry.key, fetch.end - fetch.start)
        where = f"{self.store.url}/{entry.key}"
        began_unix_s = time.time()
        try:
            data = await self.store.get_range(entry.key, fetch.start, fetch.end)
            self.recorder.ended("down", entry.key, len(data), began_unix_s)
            return data
        except NotFound:
            hint = "the checkpoint was deleted meanwhile, or a lifecycle rule or another tool removed the object"
            raise MissingObject("a data object of the checkpoint is gone", where, hint) from None
        except RangeNotSatisfiable as error:
            hint = "the object was cut short; load an earlier checkpoint"
            raise MissingObject(f"a data object should have {entry.size} bytes: {error.message}", where, hint) from None

    def _bad_block(self, fetch: Fetch, data: memoryview) -> int | None:
        size = self.objects[fetch.object].block_size
        return first_bad_block(data, fetch.start // size, self.sums[fetch.object], size)

    def _mismatch(self, fetch: Fetch, block: int) -> ChecksumMismatch:
        entry = self.objects[fetch.object]
        low, high = block * entry.block_size, min(entry.size, (block + 1) * entry.block_size)
        names = sorted({self.sink.describe(p) for p in fetch.placements})[:3]
        message = f"bytes {low} to {high} of the object differ from what was saved; they serve {', '.join(names)}"
        hint = "the stored object is damaged; load an earlier checkpoint"
        return ChecksumMismatch(message, f"{self.store.url}/{entry.key}", hint)

    def _place(self, fetch: Fetch, data: memoryview) -> None:
        for placement in fetch.placements:
            self.sink.place(placement, data)
