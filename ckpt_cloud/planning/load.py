"""Load planning: boxes of stored chunks to ranged reads, and from each range where its bytes belong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.planning.coalesce import Range, Span, coalesce
from ckpt_cloud.planning.slices import Ints, Piece, pieces, strides


@dataclass(frozen=True, slots=True)
class Want:
    """A box of one stored chunk that somebody needs.

    Attributes:
        object: index of the object that holds the chunk.
        start: the chunk's first byte in it.
        itemsize: bytes of one element.
        chunk: sizes of the chunk; row-major.
        offsets, sizes: of the box in the chunk.
    """

    object: int
    start: int
    itemsize: int
    chunk: Ints
    offsets: Ints
    sizes: Ints


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a part of a fetched range goes.

    Attributes:
        want: index of the want that it serves.
        offsets, sizes: box in the want's destination.
        source: first byte in the fetched range.
        end: byte after the last in the fetched range.
        strides: in elements, of the box in the fetched bytes.
    """

    want: int
    offsets: Ints
    sizes: Ints
    source: int
    end: int
    strides: Ints


@dataclass(frozen=True, slots=True)
class Fetch:
    """One ranged read of object `object`, bytes `start` to `end` (exclusive), and what it serves."""

    object: int
    start: int
    end: int
    placements: tuple[Placement, ...]


def plan_fetches(
    wants: Sequence[Want], objects: Sequence[ObjectEntry], *, range_size: int, gap_size: int
) -> list[Fetch]:
    """Reads that serve all `wants`, each byte fetched once unless a block's edge is needed twice.

    Raises:
        CorruptManifest: a want lies outside its object.
    """
    by_object: dict[int, list[tuple[int, Piece]]] = {}
    for index, want in enumerate(wants):
        if math.prod(want.sizes):
            _check_bounds(want, objects)
            found = _pieces(want, range_size=range_size, gap_size=gap_size)
            by_object.setdefault(want.object, []).extend((index, piece) for piece in found)
    return [
        fetch
        for number, found in sorted(by_object.items())
        for fetch in _fetches(number, found, wants, objects[number], range_size=range_size, gap_size=gap_size)
    ]


def _check_bounds(want: Want, objects: Sequence[ObjectEntry]) -> None:
    if not 0 <= want.object < len(objects):
        raise CorruptManifest(f"a chunk lies in object {want.object}, which the manifest does not have")
    end = want.start + math.prod(want.chunk) * want.itemsize
    if want.start < 0 or end > objects[want.object].size:
        raise CorruptManifest(f"a chunk lies outside {objects[want.object].key}")
    alike = len(want.offsets) == len(want.sizes) == len(want.chunk)
    box = zip(want.offsets, want.sizes, want.chunk, strict=False)
    if not alike or any(offset < 0 or size < 0 or offset + size > limit for offset, size, limit in box):
        raise CorruptManifest(f"a read lies outside its chunk of {objects[want.object].key}")


def _pieces(want: Want, *, range_size: int, gap_size: int) -> Iterator[Piece]:
    return pieces(want.chunk, want.offsets, want.sizes, want.itemsize, max_span=range_size, max_gap=gap_size)


def _fetches(
    number: int,
    found: list[tuple[int, Piece]],
    wants: Sequence[Want],
    entry: ObjectEntry,
    *,
    range_size: int,
    gap_size: int,
) -> Iterator[Fetch]:
    spans = (
        Span(wants[index].start + piece.start, wants[index].start + piece.end, slot)
        for slot, (index, piece) in enumerate(found)
    )
    ranges = coalesce(spans, object_size=entry.size, block=entry.block_size, max_range=range_size, max_gap=gap_size)
    for merged in ranges:
        yield Fetch(number, merged.start, merged.end, tuple(_placements(merged, found, wants)))


def _placements(merged: Range, found: list[tuple[int, Piece]], wants: Sequence[Want]) -> Iterator[Placement]:
    for span in merged.spans:
        index, piece = found[span.piece]
        steps = strides(wants[index].chunk)
        begin, end = span.start - merged.start, span.end - merged.start
        yield Placement(index, piece.offsets, piece.sizes, begin, end, steps)
