"""Boxes of row-major chunks as byte spans, held against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.planning.slices import flat_boxes, pieces, strides

WIDTHS = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def boxes(draw):
    """A chunk's sizes, and a box in it."""
    chunk = tuple(draw(st.lists(st.integers(2, 5) | st.integers(1, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in chunk)
    room = [size - offset for size, offset in zip(chunk, offsets, strict=True)]
    # Mostly large, since those have gaps; and sometimes empty.
    least = 0 if draw(st.integers(0, 9)) == 9 else 1
    sizes = tuple(size - draw(st.integers(0, size - least)) for size in room)
    return chunk, offsets, sizes


def chunk_of(sizes, width):
    """Elements of `width` bytes, each of its own bytes, in row-major order."""
    count = math.prod(sizes)
    elements = np.zeros((count, width), np.uint8)
    elements[:, :2] = np.arange(count, dtype="<u2").view(np.uint8).reshape(count, 2)[:, : min(width, 2)]
    return elements.view(f"V{width}").reshape(sizes)


def box_of(array, offsets, sizes):
    return array[*(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)), ...]


def gaps(chunk, offsets, sizes, width):
    """Lengths of the runs of unneeded bytes inside the span of a box."""
    needed = np.zeros(chunk, bool)
    box_of(needed, offsets, sizes)[...] = True
    at = np.flatnonzero(needed.reshape(-1))
    return (np.diff(at) - 1) * width, int((at[-1] - at[0] + 1) * width)


@st.composite
def cuts(draw):
    """A chunk, a box in it, the width of its elements, and limits that are just kept or just broken."""
    chunk, offsets, sizes = draw(boxes())
    width = draw(WIDTHS)
    inside, span = gaps(chunk, offsets, sizes, width) if math.prod(sizes) else ([], 1)
    near = [int(value) + off for value in {*inside, span} for off in (-1, 0, 1)]
    max_gap = draw(st.sampled_from([max(0, value) for value in near]) | st.integers(0, 200))
    max_span = draw(st.sampled_from([max(1, value) for value in near]) | st.just(10_000) | st.integers(1, 400))
    return chunk, offsets, sizes, width, max_span, max_gap


@given(st.lists(st.integers(1, 9), max_size=5).map(tuple), WIDTHS)
def test_strides_are_numpys(sizes, width):
    assert tuple(step * width for step in strides(sizes)) == chunk_of(sizes, width).strides


def test_strides_of_an_empty_box_are_defined():
    assert strides((3, 0, 2)) == (2, 2, 1)


@given(cuts())
def test_pieces_rebuild_the_box(cut):
    chunk, offsets, sizes, width, max_span, max_gap = cut
    array = chunk_of(chunk, width)
    memory = array.tobytes()
    rebuilt = np.zeros(sizes, f"V{width}")
    times = np.zeros(sizes, int)

    for piece in pieces(chunk, offsets, sizes, width, max_span=max_span, max_gap=max_gap):
        fetched = memory[piece.start : piece.end]
        steps = [step * width for step in strides(chunk)]
        box_of(rebuilt, piece.offsets, piece.sizes)[...] = np.ndarray(piece.sizes, f"V{width}", fetched, 0, steps)
        box_of(times, piece.offsets, piece.sizes)[...] += 1

    assert (times == 1).all()
    assert rebuilt.tobytes() == box_of(array, offsets, sizes).tobytes()


@given(cuts())
def test_pieces_keep_their_limits(cut):
    chunk, offsets, sizes, width, max_span, max_gap = cut
    for piece in pieces(chunk, offsets, sizes, width, max_span=max_span, max_gap=max_gap):
        inside, span = gaps(chunk, [o + p for o, p in zip(offsets, piece.offsets, strict=True)], piece.sizes, width)
        assert piece.end - piece.start == span
        assert span <= max_span or math.prod(piece.sizes) == 1
        assert max(inside, default=0) <= max_gap


@given(cuts())
def test_what_fits_is_not_cut(cut):
    chunk, offsets, sizes, width, max_span, max_gap = cut
    found = list(pieces(chunk, offsets, sizes, width, max_span=max_span, max_gap=max_gap))
    if not math.prod(sizes):
        assert found == []
        return
    inside, span = gaps(chunk, offsets, sizes, width)
    if span <= max_span and max(inside, default=0) <= max_gap:
        assert len(found) == 1
        assert found[0].sizes == sizes


@pytest.mark.parametrize("max_span", [8, 9, 16, 24, 4096])
def test_a_contiguous_box_is_cut_into_full_spans(max_span):
    found = list(pieces((512,), (0,), (512,), 8, max_span=max_span, max_gap=0))
    assert [piece.end - piece.start for piece in found][:-1] == [max_span // 8 * 8] * (len(found) - 1)
    assert len(found) == math.ceil(512 / (max_span // 8))


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple), st.data())
def test_flat_boxes_are_numpys_flat_order(sizes, draw):
    array = np.arange(math.prod(sizes)).reshape(sizes)
    start = draw.draw(st.integers(0, array.size))
    end = draw.draw(st.integers(start, array.size))

    found = list(flat_boxes(sizes, start, end))

    parts = [box_of(array, offsets, box).reshape(-1) for offsets, box in found]
    assert np.concatenate([[], *parts]).tolist() == list(range(start, end))
    assert len(found) <= max(1, 2 * len(sizes) - 1)
