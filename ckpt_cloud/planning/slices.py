"""N-dimensional boxes of a row-major chunk to byte spans of the chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import msgspec

Ints = tuple[int, ...]


class Piece(msgspec.Struct, frozen=True, gc=False):
    """A box and the span of the chunk's bytes that encloses it.

    Attributes:
        offsets: of the box, relative to the box that was asked for.
        sizes: of the box.
        start, end: enclosing bytes in the chunk, end exclusive.
    """

    offsets: Ints
    sizes: Ints
    start: int
    end: int


@lru_cache(maxsize=1024)
def strides(sizes: Ints) -> Ints:
    """Row-major strides in elements."""
    result = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        result[dim] = result[dim + 1] * max(1, sizes[dim + 1])
    return tuple(result)


def pieces(chunk: Ints, offsets: Ints, sizes: Ints, itemsize: int, *, max_span: int, max_gap: int) -> Iterator[Piece]:
    """Cuts a box of a chunk into pieces whose spans are at most `max_span` bytes and have no gap over `max_gap`.

    Args:
        chunk: sizes of the stored chunk.
        offsets, sizes: of the wanted box in it.
        itemsize: bytes of one element.
        max_span: a single row of the innermost dimension is cut too when it is longer.
        max_gap: unneeded bytes between two runs of one piece.
    """
    nbytes = math.prod(sizes) * itemsize
    if nbytes == 0:
        return
    if sizes == chunk and nbytes <= max_span:
        yield Piece((0,) * len(sizes), sizes, 0, nbytes)
        return
    steps = tuple(step * itemsize for step in strides(chunk))
    first = sum(offset * step for offset, step in zip(offsets, steps, strict=True))
    grid = _Grid(steps, itemsize, max_span, max_gap)
    for at, box in grid.cut((0,) * len(sizes), sizes, 0):
        start = first + sum(offset * step for offset, step in zip(at, steps, strict=True))
        yield Piece(at, box, start, start + grid.span(box, 0))


def flat_boxes(sizes: Ints, start: int, end: int) -> Iterator[tuple[Ints, Ints]]:
    """Offsets and sizes of boxes that, one after another, are the elements `start` to `end` in row-major order."""
    if start >= end:
        return
    if not sizes:
        yield (), ()
        return
    row = math.prod(sizes[1:])
    first, last = start // row, (end - 1) // row
    if first == last:
        for offsets, box in flat_boxes(sizes[1:], start - first * row, end - first * row):
            yield (first, *offsets), (1, *box)
        return
    whole_from, whole_to = -(-start // row), end // row
    yield from flat_boxes(sizes, start, whole_from * row)
    if whole_from < whole_to:
        yield (whole_from, *(0 for _ in sizes[1:])), (whole_to - whole_from, *sizes[1:])
    yield from flat_boxes(sizes, whole_to * row, end)


@dataclass(frozen=True, slots=True)
class _Grid:
    """Byte steps of a chunk's dimensions, and the limits of a piece."""

    steps: Ints
    itemsize: int
    max_span: int
    max_gap: int

    def span(self, box: Ints, dim: int) -> int:
        """Bytes from the first to the last element of `box`, seen from dimension `dim` inwards."""
        extents = zip(box[dim:], self.steps[dim:], strict=True)
        return sum((size - 1) * step for size, step in extents) + self.itemsize

    def fits(self, box: Ints, dim: int) -> bool:
        """Whether `box`, from dimension `dim` inwards, is one piece."""
        if self.span(box, dim) > self.max_span:
            return False
        gaps = (self.steps[d] - self.span(box, d + 1) for d in range(dim, len(box)) if box[d] > 1)
        return max(gaps, default=0) <= self.max_gap

    def cut(self, at: Ints, box: Ints, dim: int) -> Iterator[tuple[Ints, Ints]]:
        """Cuts `box` along `dim` and further inwards until each part fits; outer dimensions have size 1 by then."""
        if dim == len(box) or self.fits(box, dim):
            yield at, box
            return
        inner = self.span(box, dim + 1)
        together = self.fits(box, dim + 1) and self.steps[dim] - inner <= self.max_gap
        rows = max(1, (self.max_span - inner) // self.steps[dim] + 1) if together else 1
        for begin in range(0, box[dim], rows):
            part = (*box[:dim], min(rows, box[dim] - begin), *box[dim + 1 :])
            yield from self.cut((*at[:dim], at[dim] + begin, *at[dim + 1 :]), part, dim + 1)
