"""One rank's part of a save plan, sorted into what rides in the manifest, what is empty, and entries to pack."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_cloud.errors import Unsupported
from ckpt_cloud.format import plain
from ckpt_cloud.format.manifest import Chunk, ObjectEntry
from ckpt_cloud.format.pack import ITEM_DTYPE, PackEntry
from ckpt_cloud.metadata import NOWHERE, Stored, Uploaded
from ckpt_cloud.planning.columns import column_chunks
from ckpt_cloud.planning.slices import Ints
from ckpt_cloud.tensors import TensorSource, box_of, dtype_name

Box = tuple[Ints, Ints]
"""Offsets and sizes."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What `sorted_out` makes of a plan.

    Attributes:
        items: of the plan.
        places: by item, where it is known at once; None for an entry.
        entries: to pack.
        owners: by entry, index of its item.
        boxes: by entry, where it is a part of its item's tensor: offsets in that, and sizes.
        values: by entry, non-tensor items too large for the manifest, resolved already since only that tells their
            size.
    """

    items: list[WriteItem]
    places: list[Stored | None] = field(default_factory=list)
    entries: list[PackEntry] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    boxes: dict[int, Box] = field(default_factory=dict)
    values: dict[int, io.BytesIO] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Of all entries."""
        return sum(entry.nbytes for entry in self.entries)

    def source(self, planner: SavePlanner, numbers: Sequence[int]) -> TensorSource:
        """The bytes of the entries `numbers`, counted anew."""
        cut = _Cut(self, planner, numbers)

        def resolve(entry: int) -> torch.Tensor | io.BytesIO:
            number = numbers[entry]
            if number in self.boxes:
                return cut.part(number)
            value: torch.Tensor | io.BytesIO = self.values.get(number) or planner.resolve_data(
                self.items[self.owners[number]]
            )
            return value

        return TensorSource([self.entries[number] for number in numbers], resolve, lasting=_finds_only(planner))

    def results(self, places: Mapping[int, Stored], attempt: str, objects: list[ObjectEntry]) -> list[WriteResult]:
        """One result for all items: DCP gathers them by pickle and looks at none, and one is quick to send.

        Args:
            places: by entry.
        """
        if not self.items:
            return []
        found = list(self.places)
        chunks: dict[int, list[Chunk]] = {}
        for entry, place in places.items():
            if entry in self.boxes:
                box = self.entries[entry]
                chunk = Chunk(box.offsets, box.sizes, place.object, place.start, place.coded)
                chunks.setdefault(self.owners[entry], []).append(chunk)
            else:
                found[self.owners[entry]] = place
        for owner, parts in chunks.items():
            found[owner] = Stored.in_chunks(sorted(parts, key=lambda chunk: chunk.offsets))
        names = [item.index.fqn for item in self.items]
        offsets = [None if item.index.offset is None else tuple(item.index.offset) for item in self.items]
        assert None not in found, "every entry is stored"
        uploaded = Uploaded(attempt, objects, names, offsets, found)  # type: ignore[arg-type]
        return [WriteResult(MetadataIndex(""), self.total_bytes, uploaded.encode())]


class _Cut:
    """Tensors that are stored in parts, each held until all its parts were asked for; for one thread at a time."""

    def __init__(self, batch: Batch, planner: SavePlanner, numbers: Sequence[int]) -> None:
        self._batch = batch
        self._planner = planner
        self._parts = Counter(batch.owners[number] for number in numbers if number in batch.boxes)
        # By item: its tensor, and how many of its parts are still to come.
        self._held: dict[int, tuple[torch.Tensor | io.BytesIO, int]] = {}

    def part(self, entry: int) -> torch.Tensor:
        """The entry's part of its item's tensor."""
        owner = self._batch.owners[entry]
        item = self._batch.items[owner]
        assert item.tensor_data is not None, "an item with parts is a tensor"
        held = self._held.pop(owner, None)
        whole, left = held or (self._planner.resolve_data(item), self._parts[owner])
        assert isinstance(whole, torch.Tensor)
        if left > 1:
            self._held[owner] = (whole, left - 1)
        else:
            # A part whose upload begins again is asked for alone.
            self._parts[owner] = 1
        # Of another shape than was planned, it is refused by whoever gets it.
        return (
            box_of(whole, *self._batch.boxes[entry])
            if tuple(whole.shape) == tuple(item.tensor_data.chunk.sizes)
            else whole
        )


def sorted_out(items: Iterable[WriteItem], planner: SavePlanner, *, inline_limit: int, most_chunks: int) -> Batch:
    """Sorts the items of a plan; non-tensor items are resolved.

    Args:
        inline_limit: bytes of an item that is kept in the manifest; negative for none.
        most_chunks: that a shard is stored as at most.
    """
    batch = Batch(list(items))
    as_they_are = inline_limit >= 0 and _keeps_values(planner)
    for index, item in enumerate(batch.items):
        if item.type is WriteItemType.BYTE_IO:
            place = _value(item, planner, inline_limit) if as_they_are else None
            place = place or _serialized(batch, item, planner, inline_limit)
        else:
            place = _tensor(batch, item, most_chunks)
        batch.places.append(place)
        batch.owners.extend([index] * (len(batch.entries) - len(batch.owners)))
    return batch


def _keeps_values(planner: SavePlanner) -> bool:
    """Whether the planner hands over values of the state as they are, but for `torch.save`."""
    kind: Any = type(planner)
    return (
        isinstance(planner, DefaultSavePlanner)
        and kind.resolve_data is DefaultSavePlanner.resolve_data
        and kind.transform_object is DefaultSavePlanner.transform_object
    )


def _finds_only(planner: SavePlanner) -> bool:
    """Whether tensors that the planner resolves are the state's own."""
    kind: Any = type(planner)
    return _keeps_values(planner) and kind.lookup_object is DefaultSavePlanner.lookup_object


def _value(item: WriteItem, planner: Any, limit: int) -> Stored | None:
    """The item itself, if it is plain and small; None if only `torch.save` can say it."""
    value = planner.lookup_object(item.index)
    try:
        lowered = plain.lower(value, item.index.fqn)
        small = type(value) in (bool, int, float, type(None)) or len(msgspec.msgpack.encode(lowered)) <= limit
    except (Unsupported, UnicodeEncodeError):
        return None
    return Stored(None, -1, 0, 0, [lowered]) if small else None


def _serialized(batch: Batch, item: WriteItem, planner: SavePlanner, limit: int) -> Stored | None:
    value = planner.resolve_data(item)
    assert isinstance(value, io.BytesIO)
    size = value.getbuffer().nbytes
    if size <= limit:
        return Stored(value.getvalue(), -1, 0, 0)
    batch.values[len(batch.entries)] = value
    batch.entries.append(PackEntry(item.index.fqn, ITEM_DTYPE, (size,), (0,), (size,), size))
    return None


def _tensor(batch: Batch, item: WriteItem, most: int) -> Stored | None:
    data = item.tensor_data
    assert data is not None, "DCP gives tensor_data for every tensor"
    shape, sizes, offsets = tuple(data.size), tuple(data.chunk.sizes), tuple(data.chunk.offsets)
    dtype = data.properties.dtype
    nbytes = math.prod(sizes) * dtype.itemsize
    if nbytes == 0:
        return NOWHERE
    name = dtype_name(dtype)
    if sizes == shape or most == 1:
        batch.entries.append(PackEntry(item.index.fqn, name, shape, offsets, sizes, nbytes))
        return None
    boxes = column_chunks(shape, sizes, dtype.itemsize, most=most)
    for box in boxes:
        if len(boxes) > 1:
            batch.boxes[len(batch.entries)] = box
        at = tuple(offset + inner for offset, inner in zip(offsets, box[0], strict=True))
        nbytes = math.prod(box[1]) * dtype.itemsize
        batch.entries.append(PackEntry(item.index.fqn, name, shape, at, box[1], nbytes))
    return None
