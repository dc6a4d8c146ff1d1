"""Merging byte spans of one object into ranged reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec


class Span(msgspec.Struct, frozen=True, gc=False):
    """Needed bytes `start` to `end` (exclusive) of an object, and which piece needs them."""

    start: int
    end: int
    piece: int


class Range(msgspec.Struct, frozen=True, gc=False):
    """One ranged read, `start` to `end` (exclusive), and the spans inside it."""

    start: int
    end: int
    spans: tuple[Span, ...]


def coalesce(spans: Iterable[Span], *, object_size: int, block: int, max_range: int, max_gap: int) -> Iterator[Range]:
    """Covers `spans`, which may overlap, with ranges in ascending order.

    Ranges of spans that do not overlap share the block between them at most; a span within a range joins it.

    Args:
        block: ranges begin and end at multiples of it (the last at `object_size`), so that each can be verified.
        max_range: spans are merged only while the range stays within it; a longer span has a range of its own.
        max_gap: unneeded bytes between two spans that are read over.
    """
    group: list[Span] = []
    start = end = 0
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        low = span.start // block * block
        high = min(object_size, -(-span.end // block) * block)
        if group and high > end and (low > end + max_gap or high - start > max_range):
            yield Range(start, end, tuple(group))
            group = []
        if not group:
            start, end = low, high
        group.append(span)
        end = max(end, high)
    if group:
        yield Range(start, end, tuple(group))
