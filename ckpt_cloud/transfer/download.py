"""Fetches ranges straight into where they belong, and verifies every block.

Fetch ─► where its bytes go: destinations, a buffer for the rest ─► budget ─► get_range_into
      ─► worker: CRC32C per block, then what is in the buffer to its destinations
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from msgspec.structs import replace

from ckpt_cloud.errors import ChecksumMismatch, MissingObject, NotFound, RangeNotSatisfiable
from ckpt_cloud.events import Recorder
from ckpt_cloud.format.checksum import first_bad_block
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.options import TransferOptions
from ckpt_cloud.planning.coded import Part, Placement
from ckpt_cloud.planning.load import Fetch
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.staging import Allocate, Staging
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.workers import in_thread, to_the_end

_MIN_DIRECT = 64 << 10
"""Fewer bytes are quicker copied out of a buffer than received apart."""


class Sink(Protocol):
    """Where fetched bytes go; called on worker threads, never twice for one box."""

    def memory(self, placement: Placement | Part) -> memoryview | None:
        """The destination's own memory, if the placement's bytes lie there as they are stored; None if not."""
        ...

    def place(self, placements: Sequence[Placement | Part], data: memoryview) -> None:
        """Copies the boxes of `placements` out of `data`, the bytes of their range."""
        ...

    def describe(self, placement: Placement | Part) -> str:
        """Name of what the placement is part of, for errors."""
        ...

    @property
    def allocate(self) -> Allocate:
        """Makes memory that `place` reads from fast."""
        ...


async def download(
    store: ObjectStore,
    sink: Sink,
    fetches: Sequence[Fetch],
    objects: Sequence[ObjectEntry],
    *,
    options: TransferOptions,
    recorder: Recorder,
    verify: bool = True,
) -> None:
    """Runs all `fetches`, at most `options.max_requests` at once and within `options.memory_budget`.

    Args:
        verify: hold every block against its checksum; if off, ranges need not be whole blocks.

    Raises:
        ChecksumMismatch: a block is wrong, twice.
        MissingObject: an object is gone, or shorter than the manifest says.
    """
    staging = Staging(Budget(options.memory_budget), options.range_size, sink.allocate)
    work = _Download(store, sink, objects, staging, recorder, verify)
    recorder.report.objects += len({fetch.object for fetch in fetches})
    queue = iter(fetches)
    lanes = min(options.max_requests, len(fetches))
    await all_or_cancel(work.drain(queue) for _ in range(lanes))


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a fetch's bytes go.

    Attributes:
        views: memory of destinations, and of a buffer for what lies between them, one after another.
        moved: placements whose bytes come to lie in the buffer, and where there.
        buffer: as long as all that lies between destinations; None where nothing does.
    """

    views: list[memoryview]
    moved: list[Placement | Part]
    buffer: memoryview | None


@dataclass(frozen=True, slots=True)
class _Download:
    """What all fetches of one load share."""

    store: ObjectStore
    sink: Sink
    objects: Sequence[ObjectEntry]
    staging: Staging
    recorder: Recorder
    verify: bool

    async def drain(self, queue: Iterator[Fetch]) -> None:
        for fetch in queue:
            await self._run(fetch)

    async def _run(self, fetch: Fetch) -> None:
        direct = self._direct(fetch)
        size = fetch.end - fetch.start
        between = size - sum(map(len, direct.values()))
        # A store may need memory for the whole range while it receives.
        async with self.staging.lent(between, beside=size) as buffer:
            target = _target(fetch, direct, buffer)
            del buffer, direct
            for attempt in (1, 2):
                await self._get(fetch, target)
                # A thread that went on after a failed load had ended would spoil what is loaded next.
                bad = await to_the_end(in_thread(self._settle, fetch, target))
                if bad is None:
                    return
                if attempt == 2:
                    raise self._mismatch(fetch, bad)

    def _direct(self, fetch: Fetch) -> dict[int, memoryview]:
        """By index of its placement: memory of the destinations that take their bytes as they come."""
        found: dict[int, memoryview] = {}
        if not _overlap(fetch.placements):
            for index, placement in enumerate(fetch.placements):
                if placement.end - placement.source >= _MIN_DIRECT:
                    memory = self.sink.memory(placement)
                    if memory is not None:
                        found[index] = memory
        return found

    async def _get(self, fetch: Fetch, target: _Target) -> None:
        entry = self.objects[fetch.object]
        self.recorder.moved("down", entry.key, fetch.end - fetch.start)
        where = f"{self.store.url}/{entry.key}"
        began_unix_s = time.time()
        try:
            await self.store.get_range_into(entry.key, fetch.start, fetch.end, target.views)
            self.recorder.ended("down", entry.key, fetch.end - fetch.start, began_unix_s)
        except NotFound:
            hint = "the checkpoint was deleted meanwhile, or a lifecycle rule or another tool removed the object"
            raise MissingObject("a data object of the checkpoint is gone", where, hint) from None
        except RangeNotSatisfiable as error:
            hint = "the object was cut short; load an earlier checkpoint"
            raise MissingObject(f"a data object should have {entry.size} bytes: {error.message}", where, hint) from None

    def _settle(self, fetch: Fetch, target: _Target) -> int | None:
        """Moves on what is in the buffer, unless a block is wrong: its number."""
        entry = self.objects[fetch.object]
        bad = None
        if self.verify:
            first = fetch.start // entry.block_size
            bad = first_bad_block(target.views, first, entry.sums, entry.block_size, entry.digests)
        if bad is None and target.buffer is not None:
            self.sink.place(target.moved, target.buffer)
        return bad

    def _mismatch(self, fetch: Fetch, block: int) -> ChecksumMismatch:
        entry = self.objects[fetch.object]
        low, high = block * entry.block_size, min(entry.size, (block + 1) * entry.block_size)
        names = sorted({self.sink.describe(p) for p in fetch.placements})[:3]
        message = f"bytes {low} to {high} of the object differ from what was saved; they serve {', '.join(names)}"
        hint = "the stored object is damaged; load an earlier checkpoint"
        return ChecksumMismatch(message, f"{self.store.url}/{entry.key}", hint)


def _overlap(placements: Sequence[Placement | Part]) -> bool:
    """Whether two need the same bytes; placements come in the order of their first."""
    high = 0
    for placement in placements:
        if placement.source < high:
            return True
        high = placement.end
    return False


def _target(fetch: Fetch, direct: dict[int, memoryview], buffer: memoryview | None) -> _Target:
    """The range cut at the borders of `direct`; what lies between them goes to `buffer`, close together."""
    views: list[memoryview] = []
    moved: list[Placement | Part] = []
    # In the range and in the buffer.
    at = used = 0

    def close_up(begin: int) -> None:
        nonlocal used
        if at < begin:
            assert buffer is not None, "there is one unless all bytes go to destinations"
            views.append(buffer[used : used + begin - at])
            used += begin - at

    for index, placement in enumerate(fetch.placements):
        if index in direct:
            close_up(placement.source)
            views.append(direct[index])
            at = placement.end
        else:
            moved.append(_moved(placement, used - at))
    close_up(fetch.end - fetch.start)
    return _Target(views, moved, buffer)


def _moved(placement: Placement | Part, by: int) -> Placement | Part:
    return replace(placement, source=placement.source + by, end=placement.end + by) if by else placement
