"""Coded chunks: what to encode at a time when saving, and which stored bytes a box needs when loading.

boxes of a chunk ─► pieces of its plain bytes ─► runs of frames ─► units ─► ranges of objects
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format import codec
from ckpt_cloud.format.codec import Coded
from ckpt_cloud.planning.coalesce import Range, Span, coalesce
from ckpt_cloud.planning.slices import Ints, Piece, flat_boxes, pieces, strides

UNIT_BYTES = 4 << 20
"""Plain bytes that are undone at once, unless one frame has more."""


class Job(msgspec.Struct, frozen=True):
    """Bytes `start` to `end` (exclusive) of entry `entry`, to be coded at once."""

    entry: int
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Plain."""
        return self.end - self.start


def jobs(nbytes: Sequence[int], step: int) -> Iterator[Job]:
    """Jobs of `step` bytes, the last of each entry shorter; of entries as they are if `step` is 0."""
    for entry, size in enumerate(nbytes):
        for start in range(0, size, step or size):
            yield Job(entry, start, min(size, start + (step or size)))


class Placement(msgspec.Struct, frozen=True, gc=False):
    """Where a part of a fetched range, or of what was undone, goes.

    Attributes:
        want: index of the want that it serves.
        offsets, sizes: box in the want's destination.
        source: first byte in the range.
        end: byte after the last in the range.
        strides: in elements, of the box in the range.
    """

    want: int
    offsets: Ints
    sizes: Ints
    source: int
    end: int
    strides: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Stored bytes that are undone together.

    Attributes:
        want: index of one of the wants that they serve.
        codec: what the plain bytes went through.
        stored: bytes.
        frames: stored and plain bytes of each frame; none for a stream of transforms.
        nbytes: plain.
        placements: where boxes of the plain bytes go.
    """

    want: int
    codec: tuple[str, ...]
    stored: int
    frames: tuple[tuple[int, int], ...]
    nbytes: int
    placements: tuple[Placement, ...]


class Part(msgspec.Struct, frozen=True):
    """Bytes `source` to `end` (exclusive) of a fetched range: from the `at`th on the stored bytes of `unit`."""

    unit: Unit
    at: int
    source: int
    end: int

    @property
    def want(self) -> int:
        """Index of one of the wants that it serves."""
        return self.unit.want


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes `start` to `end` (exclusive) of object `object`: from the `at`th on the stored bytes of `unit`."""

    unit: Unit
    at: int
    object: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box of a coded chunk that somebody needs.

    Attributes:
        want: its index.
        itemsize: bytes of one element.
        chunk: sizes of the chunk.
        offsets, sizes: of the box in it.
    """

    want: int
    itemsize: int
    chunk: Ints
    offsets: Ints
    sizes: Ints


def plan_units(coded: Coded, boxes: Sequence[Wanted], *, range_size: int) -> list[Stored]:
    """What must be read of a chunk to fill `boxes` of it.

    Raises:
        CorruptManifest: the chunk contradicts itself.
    """
    nbytes = math.prod(boxes[0].chunk) * boxes[0].itemsize
    fault = codec.fault(coded, nbytes)
    if fault:
        raise CorruptManifest(f"a chunk {fault}")
    if not coded.frame:
        return _stream(coded, boxes, nbytes, range_size=range_size)
    step = max(1, min(UNIT_BYTES, range_size) // coded.frame) * coded.frame
    found = [(box, piece) for box in boxes for piece in _pieces(box, step, coded.frame)]
    spans = (Span(piece.start, piece.end, slot) for slot, (_, piece) in enumerate(found))
    frames = coded.frames(nbytes)
    ends = [0, *accumulate(stored for stored, _ in frames)]
    result: list[Stored] = []
    for run in coalesce(spans, object_size=nbytes, block=coded.frame, max_range=step, max_gap=0):
        first, last = run.start // coded.frame, -(-run.end // coded.frame)
        unit = Unit(
            boxes[0].want,
            coded.codec,
            ends[last] - ends[first],
            tuple(frames[first:last]),
            run.end - run.start,
            tuple(_placements(run, found)),
        )
        result += _places(unit, coded, ends[first], max_size=unit.stored)
    return result


def _stream(coded: Coded, boxes: Sequence[Wanted], nbytes: int, *, range_size: int) -> list[Stored]:
    found = [(box, piece) for box in boxes for piece in _pieces(box, nbytes, nbytes)]
    whole = Range(0, nbytes, tuple(Span(piece.start, piece.end, slot) for slot, (_, piece) in enumerate(found)))
    placements = tuple(_placements(whole, found))
    unit = Unit(boxes[0].want, coded.codec, coded.stored_bytes, (), nbytes, placements)
    return list(_places(unit, coded, 0, max_size=range_size))


def _pieces(box: Wanted, step: int, frame: int) -> Iterable[Piece]:
    """The box in pieces of at most `step` plain bytes, which begin and end with frames where that can be."""
    steps = strides(box.chunk)
    long = next((dim for dim, size in enumerate(box.sizes) if size > 1), len(box.sizes))
    in_a_row = box.sizes[long + 1 :] == box.chunk[long + 1 :]
    if not in_a_row or step % box.itemsize:
        return pieces(box.chunk, box.offsets, box.sizes, box.itemsize, max_span=step, max_gap=frame)
    first = sum(offset * each for offset, each in zip(box.offsets, steps, strict=True))
    return _row(box, first, step // box.itemsize)


def _row(box: Wanted, first: int, step: int) -> Iterator[Piece]:
    """Pieces of a box whose elements follow one another in the chunk, cut at multiples of `step` elements."""
    end = first + math.prod(box.sizes)
    for low in range(first // step * step, end, step):
        at = max(low, first)
        for offsets, sizes in flat_boxes(box.sizes, at - first, min(low + step, end) - first):
            count = math.prod(sizes)
            yield Piece(offsets, sizes, at * box.itemsize, (at + count) * box.itemsize)
            at += count


def _placements(run: Range, found: Sequence[tuple[Wanted, Piece]]) -> Iterator[Placement]:
    for span in run.spans:
        box, piece = found[span.piece]
        begin, end = span.start - run.start, span.end - run.start
        yield Placement(box.want, piece.offsets, piece.sizes, begin, end, strides(box.chunk))


def _places(unit: Unit, coded: Coded, first: int, *, max_size: int) -> Iterator[Stored]:
    """Where the stored bytes of `unit` lie, which begin at the `first`th of its chunk."""
    last = first + unit.stored
    at = 0
    for number, start, nbytes in coded.extents:
        low, high = max(first, at), min(last, at + nbytes)
        for begin in range(low, high, max_size):
            end = min(high, begin + max_size)
            yield Stored(unit, begin - first, number, start + begin - at, start + end - at)
        at += nbytes
