"""Whole tensors from files of shards: by the store's own copies where it can, else read and written in windows.

output file ─► spans: literal, copyable ranges of source files, boxes to be read ─► parts of 5 MiB and more ─► compose
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ckpt_cloud.errors import CkptCloudError
from ckpt_cloud.interop.contents import Box, Contents, Encoding, File, Tensor
from ckpt_cloud.interop.objects import Data, ObjectPlan, ObjectUploader
from ckpt_cloud.interop.pull import Pull, Pulls
from ckpt_cloud.options import MIB
from ckpt_cloud.planning.slices import flat_boxes
from ckpt_cloud.stores import ObjectStore
from ckpt_cloud.stores.compose import MAX_COPY_BYTES, MIN_PART_BYTES, Composer, Copied, Part
from ckpt_cloud.workers import in_waiting_thread

_READ_BYTES = 16 * MIB
"""Of what must be read, in one part."""


@dataclass(frozen=True, slots=True)
class Flat:
    """Elements `start` to `end` of a box of a tensor, to be read."""

    data: Data
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Of the elements."""
        return (self.end - self.start) * self.data.dtype.itemsize


Span = bytes | Copied | Flat


def spans(plan: ObjectPlan, contents: Contents) -> Iterator[Span]:
    """What an output file consists of, with every tensor whose shards lie back to back in it as ranges to copy."""
    for segment in plan.segments:
        if isinstance(segment, bytes):
            yield segment
        elif isinstance(segment, Data):
            rows = _rows(contents.tensors[segment.fqn], segment)
            if rows is None:
                yield from _flats(segment)
            else:
                yield from (_copied(contents.file_of(box), box) for box in rows if box.nbytes)


def _copied(file: File, box: Box) -> Copied:
    return Copied(file.key, box.start, box.start + box.nbytes, file.version)


def _rows(tensor: Tensor, data: Data) -> list[Box] | None:
    """The boxes of a whole tensor in order, if one after another they are its bytes."""
    if data.dtype != tensor.dtype or data.sizes != tensor.shape:
        return None
    boxes = sorted(tensor.boxes, key=lambda box: box.offsets)
    at = 0
    for box in boxes:
        whole = box.offsets[1:] == (0,) * len(box.offsets[1:]) and box.sizes[1:] == tensor.shape[1:]
        if not whole or (box.offsets[:1] or (0,))[0] != at or box.encoding is not Encoding.PLAIN or box.transforms:
            return None
        at += (box.sizes[:1] or (1,))[0]
    return boxes if at == (tensor.shape[:1] or (1,))[0] else None


def _flats(data: Data) -> Iterator[Flat]:
    count, step = math.prod(data.sizes), max(1, _READ_BYTES // data.dtype.itemsize)
    for start in range(0, count, step):
        yield Flat(data, start, min(count, start + step))


def plan_parts(found: Iterator[Span], least: int = MIN_PART_BYTES) -> list[Copied | list[Span]]:
    """Parts of at least `least` bytes (but the last): copies, and lists of spans to be read and sent."""
    parts: list[Copied | list[Span]] = []
    waiting: list[Span] = []
    for span in found:
        if isinstance(span, Copied):
            rest = _fill(waiting, span, least)
            if rest.end - rest.start >= least:
                if waiting:
                    parts.append(waiting)
                    waiting = []
                parts += _pieces(rest, least)
            elif rest.end > rest.start:
                waiting.append(rest)
        else:
            waiting.append(span)
        if _size(waiting) >= _READ_BYTES:
            parts.append(waiting)
            waiting = []
    return [*parts, waiting] if waiting else parts


def _fill(waiting: list[Span], span: Copied, least: int) -> Copied:
    """Takes from the front of `span` what the waiting spans lack to be a part."""
    lacking = least - _size(waiting) if waiting else 0
    taken = max(0, min(lacking, span.end - span.start))
    if taken:
        waiting.append(replace(span, end=span.start + taken))
    return replace(span, start=span.start + taken)


def _pieces(span: Copied, least: int) -> Iterator[Copied]:
    at = span.start
    while at < span.end:
        end = min(span.end, at + MAX_COPY_BYTES)
        if 0 < span.end - end < least:
            end = span.end
        yield replace(span, start=at, end=end)
        at = end


def _size(waiting: Sequence[Span]) -> int:
    return sum(map(_nbytes, waiting))


def _nbytes(span: Span) -> int:
    if isinstance(span, bytes):
        return len(span)
    return span.end - span.start if isinstance(span, Copied) else span.nbytes


class Consolidation:
    """Writes files of whole tensors.

    Args:
        uploader: for what is not copied.
        composer: copies on the store's side; None where it cannot.
        source: store of the shards.
        store: of the files.
    """

    def __init__(
        self,
        contents: Contents,
        puller: Pulls,
        uploader: ObjectUploader,
        composer: Composer | None,
        *,
        source: ObjectStore,
        store: ObjectStore,
    ) -> None:
        self._source = source
        self._store = store
        self._contents = contents
        self._puller = puller
        self._uploader = uploader
        self._composer = composer
        # Both grow with every file.
        self.copied_bytes = 0
        self.composed = 0

    async def write(self, plan: ObjectPlan) -> None:
        """One file."""
        parts = plan_parts(spans(plan, self._contents)) if self._composer is not None else []
        copies = sum(part.end - part.start for part in parts if isinstance(part, Copied))
        if self._composer is not None and copies and len(parts) <= self._store.max_parts:
            # Whatever stands against it, the way through this process is open.
            with contextlib.suppress(CkptCloudError):
                await self._composer.compose(plan.key, [self._part(part) for part in parts])
                self.copied_bytes += copies
                self.composed += 1
                return
        await self._uploader.upload(plan)

    def _part(self, part: Copied | list[Span]) -> Part:
        if isinstance(part, Copied):
            return part

        async def read() -> bytes:
            return b"".join([await self._read(span) for span in part])

        return read

    async def _read(self, span: Span) -> bytes:
        if isinstance(span, bytes):
            return span
        if isinstance(span, Copied):
            return bytes(await self._source.get_range(span.key, span.start, span.end, span.version))
        return await in_waiting_thread(self._pull, span)

    def _pull(self, flat: Flat) -> bytes:
        whole = torch.empty(flat.end - flat.start, dtype=flat.data.dtype)
        at, pulls = 0, []
        for offsets, sizes in flat_boxes(flat.data.sizes, flat.start, flat.end):
            count = math.prod(sizes)
            pulls.append(Pull(flat.data.fqn, offsets, sizes, whole[at : at + count].view(sizes)))
            at += count
        self._puller.pull(pulls)
        return whole.view(torch.uint8).numpy().tobytes()
