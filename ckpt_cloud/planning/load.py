"""Load planning: boxes of stored chunks to ranged reads, and from each range where its bytes belong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.codec import Coded
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.planning.coalesce import Range, Span, coalesce
from ckpt_cloud.planning.coded import Part, Placement, Stored, Wanted, plan_units
from ckpt_cloud.planning.slices import Ints, Piece, pieces, strides


class Want(msgspec.Struct, frozen=True, gc=False):
    """A box of one stored chunk that somebody needs.

    Attributes:
        object: index of the object that holds the chunk.
        start: the chunk's first byte in it.
        itemsize: bytes of one element.
        chunk: sizes of the chunk; row-major.
        offsets, sizes: of the box in the chunk.
        coded: where and how the chunk is stored, if it is coded; then `object` and `start` say nothing.
    """

    object: int
    start: int
    itemsize: int
    chunk: Ints
    offsets: Ints
    sizes: Ints
    coded: Coded | None = None


class Fetch(msgspec.Struct, frozen=True, gc=False):
    """One ranged read of object `object`, bytes `start` to `end` (exclusive), and what it serves."""

    object: int
    start: int
    end: int
    placements: tuple[Placement | Part, ...]


_Needed = tuple[int, Piece] | Stored
"""A want with a piece of it, or stored bytes of a coded chunk."""


def plan_fetches(
    wants: Sequence[Want], objects: Sequence[ObjectEntry], *, range_size: int, gap_size: int
) -> list[Fetch]:
    """Reads that serve all `wants`, each byte fetched once unless a block's edge is needed twice.

    Raises:
        CorruptManifest: a want lies outside its object.
    """
    by_object: dict[int, list[_Needed]] = {}
    coded: dict[int, list[int]] = {}
    for index, want in enumerate(wants):
        if math.prod(want.sizes):
            _check_bounds(want, objects)
            if want.coded is not None:
                coded.setdefault(id(want.coded), []).append(index)
                continue
            needed = by_object.setdefault(want.object, [])
            for piece in _pieces(want, range_size=range_size, gap_size=gap_size):
                needed.append((index, piece))
    for indices in coded.values():
        for stored in _stored(indices, wants, range_size=range_size):
            by_object.setdefault(stored.object, []).append(stored)
    return [
        fetch
        for number, found in sorted(by_object.items())
        for fetch in _fetches(number, found, wants, objects[number], range_size=range_size, gap_size=gap_size)
    ]


def _check_bounds(want: Want, objects: Sequence[ObjectEntry]) -> None:
    if want.coded is None:
        extents: Sequence[tuple[int, int, int]] = [(want.object, want.start, math.prod(want.chunk) * want.itemsize)]
    else:
        extents = want.coded.extents
    for number, start, nbytes in extents:
        if not 0 <= number < len(objects):
            raise CorruptManifest(f"a chunk lies in object {number}, which the manifest does not have")
        if start < 0 or nbytes < 0 or start + nbytes > objects[number].size:
            raise CorruptManifest(f"a chunk lies outside {objects[number].key}")
    if want.sizes == want.chunk and want.offsets == (0,) * len(want.sizes):
        return
    alike = len(want.offsets) == len(want.sizes) == len(want.chunk)
    box = zip(want.offsets, want.sizes, want.chunk, strict=False)
    if not alike or any(offset < 0 or size < 0 or offset + size > limit for offset, size, limit in box):
        where = objects[extents[0][0]].key if extents else "the checkpoint"
        raise CorruptManifest(f"a read lies outside its chunk of {where}")


def _stored(indices: list[int], wants: Sequence[Want], *, range_size: int) -> list[Stored]:
    """What must be read of one coded chunk for all wants of it."""
    boxes = [Wanted(n, wants[n].itemsize, wants[n].chunk, wants[n].offsets, wants[n].sizes) for n in indices]
    coded = wants[indices[0]].coded
    assert coded is not None, "these are the wants of a coded chunk"
    return plan_units(coded, boxes, range_size=range_size)


def _pieces(want: Want, *, range_size: int, gap_size: int) -> Iterator[Piece]:
    return pieces(want.chunk, want.offsets, want.sizes, want.itemsize, max_span=range_size, max_gap=gap_size)


def _fetches(
    number: int,
    found: list[_Needed],
    wants: Sequence[Want],
    entry: ObjectEntry,
    *,
    range_size: int,
    gap_size: int,
) -> Iterator[Fetch]:
    spans = (_span(needed, slot, wants) for slot, needed in enumerate(found))
    ranges = coalesce(spans, object_size=entry.size, block=entry.block_size, max_range=range_size, max_gap=gap_size)
    for merged in ranges:
        yield Fetch(number, merged.start, merged.end, tuple(_placements(merged, found, wants)))


def _span(needed: _Needed, slot: int, wants: Sequence[Want]) -> Span:
    if isinstance(needed, Stored):
        return Span(needed.start, needed.end, slot)
    index, piece = needed
    return Span(wants[index].start + piece.start, wants[index].start + piece.end, slot)


def _placements(merged: Range, found: list[_Needed], wants: Sequence[Want]) -> Iterator[Placement | Part]:
    for span in merged.spans:
        needed = found[span.piece]
        begin, end = span.start - merged.start, span.end - merged.start
        if isinstance(needed, Stored):
            yield Part(needed.unit, needed.at, begin, end)
        else:
            index, piece = needed
            yield Placement(index, piece.offsets, piece.sizes, begin, end, strides(wants[index].chunk))
