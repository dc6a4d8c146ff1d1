"""Ranged reads of files that have no checksums of ours: pinned to the version that was opened, within one budget.

Wants ─► plan_fetches ─► get_range, at most `max_requests` at once ─► sink, on worker threads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ckpt_cloud.errors import CheckpointChanged, MissingObject, NotFound, PreconditionFailed, RangeNotSatisfiable
from ckpt_cloud.events import Recorder
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.interop.contents import File
from ckpt_cloud.options import TransferOptions
from ckpt_cloud.planning.coded import Placement
from ckpt_cloud.planning.load import Fetch, Want, plan_fetches
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.tensors import Destination, TensorSink
from ckpt_cloud.transfer.budget import Budget
from ckpt_cloud.transfer.structured import all_or_cancel
from ckpt_cloud.workers import in_thread, to_the_end


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` to `end` of a file, handed whole to `take` on a worker thread."""

    file: int
    start: int
    end: int
    take: Callable[[memoryview], None]


class Fetcher:
    """Reads from the files of one checkpoint."""

    def __init__(self, store: ObjectStore, files: Sequence[File], options: TransferOptions, recorder: Recorder) -> None:
        self._store = store
        self._files = files
        self._options = options
        self._recorder = recorder
        self._budget = Budget(options.memory_budget)

    async def boxes(self, wants: Sequence[Want], destinations: Sequence[Destination]) -> None:
        """Puts the box of each want into its destination."""
        sink = TensorSink(destinations)
        # Nothing to verify: blocks of one byte.
        objects = [ObjectEntry(file.key, file.size, 1, b"") for file in self._files]
        options = self._options
        fetches = plan_fetches(wants, objects, range_size=options.range_size, gap_size=options.gap_size)

        def place(fetch: Fetch) -> Callable[[memoryview], None]:
            boxes = [placement for placement in fetch.placements if isinstance(placement, Placement)]

            def take(data: memoryview) -> None:
                sink.place(boxes, data)

            return take

        await self.spans([Span(f.object, f.start, f.end, place(f)) for f in fetches])

    async def spans(self, spans: Sequence[Span]) -> None:
        """Reads all `spans`, one request each.

        Raises:
            CheckpointChanged: a file was replaced since it was opened.
            MissingObject: a file is gone, or shorter than it was.
        """
        queue = iter(spans)
        lanes = min(self._options.max_requests, len(spans))
        await all_or_cancel(self._drain(queue) for _ in range(lanes))

    async def wholes(self, spans: Sequence[Span], *, gap: int | None = None) -> None:
        """Reads all `spans`: small ones in one request if at most `gap` lies between, large ones in several."""
        limit = self._options.range_size
        small = [span for span in spans if span.end - span.start <= limit]
        await self.spans(list(_merged(small, limit, self._options.gap_size if gap is None else gap)))
        for span in spans:
            if span.end - span.start > limit:
                await self._large(span)

    async def _large(self, span: Span) -> None:
        size = span.end - span.start
        whole = np.empty(size, dtype=np.uint8)
        want = Want(span.file, span.start, 1, (size,), (0,), (size,))
        await self.boxes([want], [Destination("", whole, torch.uint8)])
        await to_the_end(in_thread(span.take, memoryview(whole.data)))

    async def _drain(self, queue: Iterator[Span]) -> None:
        for span in queue:
            size = span.end - span.start
            await self._budget.take(size)
            try:
                data = await self._get(span)
                await to_the_end(in_thread(span.take, data))
                del data
            finally:
                self._budget.give_back(size)

    async def _get(self, span: Span) -> memoryview:
        file = self._files[span.file]
        where = f"{self._store.url}/{file.key}"
        self._recorder.moved("down", file.key, span.end - span.start)
        try:
            return await self._store.get_range(file.key, span.start, span.end, file.version)
        except PreconditionFailed:
            raise CheckpointChanged("a file was replaced while it was being read", where, "load again") from None
        except (NotFound, RangeNotSatisfiable) as error:
            hint = "it was removed or cut short meanwhile; load another checkpoint"
            raise MissingObject(
                f"a file of the checkpoint is gone or too short: {error.message}", where, hint
            ) from None


def _merged(spans: Sequence[Span], limit: int, gap: int) -> Iterator[Span]:
    """Spans that serve several of `spans` each."""
    group: list[Span] = []
    for span in sorted(spans, key=lambda each: (each.file, each.start, each.end)):
        if group and not _joins(span, group, limit, gap):
            yield _together(group)
            group = []
        group.append(span)
    if group:
        yield _together(group)


def _joins(span: Span, group: list[Span], limit: int, gap: int) -> bool:
    near = span.file == group[0].file and span.start <= group[-1].end + gap
    return near and span.end - group[0].start <= limit


def _together(group: list[Span]) -> Span:
    first, end = group[0].start, max(span.end for span in group)

    def take(data: memoryview) -> None:
        for span in group:
            span.take(data[span.start - first : span.end - first])

    return Span(group[0].file, first, end, take)
