"""From wanted boxes to fetched bytes and back, held against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.planning.load import Want, plan_fetches

ID = "0190b5c4f00e7abc8def0123456789ab"


def entry(size, block_size=16, number=0):
    return ObjectEntry(f"data/{ID}/{number}.safetensors", size, block_size, b"")


def box_of(array, offsets, sizes):
    return array[*(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)), ...]


@st.composite
def stored_chunks(draw):
    """A chunk's sizes and element width, and some boxes of it."""
    chunk = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        offsets = tuple(draw(st.integers(0, size - 1)) for size in chunk)
        sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(chunk, offsets, strict=True))
        boxes.append((offsets, sizes))
    return chunk, draw(st.sampled_from([1, 2, 4, 8])), boxes


@st.composite
def loads(draw):
    """Objects as bytes, and wants with what they should give."""
    contents, entries, wants, expected = [], [], [], []
    for number in range(draw(st.integers(1, 3))):
        data = bytearray(draw(st.binary(max_size=20)))
        for chunk, width, boxes in draw(st.lists(stored_chunks(), max_size=3)):
            nbytes = math.prod(chunk) * width
            memory = np.frombuffer(draw(st.randoms(use_true_random=False)).randbytes(nbytes), f"V{width}")
            for offsets, sizes in boxes:
                wants.append(Want(number, len(data), width, chunk, offsets, sizes))
                expected.append(box_of(memory.reshape(chunk), offsets, sizes).tobytes())
            data += memory.tobytes() + bytes(draw(st.integers(0, 20)))
        contents.append(bytes(data))
        entries.append(entry(len(data), draw(st.integers(1, 40)), number))
    order = draw(st.permutations(range(len(wants))))
    return contents, entries, [wants[i] for i in order], [expected[i] for i in order]


@given(loads(), st.integers(40, 200), st.integers(0, 100))
def test_fetched_ranges_rebuild_every_box(load, range_size, gap_size):
    contents, entries, wants, expected = load
    built = [np.zeros(want.sizes, f"V{want.itemsize}") for want in wants]
    times = [np.zeros(want.sizes, int) for want in wants]

    for fetch in plan_fetches(wants, entries, range_size=range_size, gap_size=gap_size):
        data = contents[fetch.object][fetch.start : fetch.end]
        assert len(data) == fetch.end - fetch.start
        for placement in fetch.placements:
            width = wants[placement.want].itemsize
            steps = [step * width for step in placement.strides]
            source = np.ndarray(placement.sizes, f"V{width}", data, placement.source, steps)
            box_of(built[placement.want], placement.offsets, placement.sizes)[...] = source
            box_of(times[placement.want], placement.offsets, placement.sizes)[...] += 1

    assert [array.tobytes() for array in built] == expected
    assert all((count == 1).all() for count in times)


@given(loads(), st.integers(40, 200), st.integers(0, 100))
def test_ranges_are_bounded_and_verifiable(load, range_size, gap_size):
    _, entries, wants, _ = load
    for fetch in plan_fetches(wants, entries, range_size=range_size, gap_size=gap_size):
        block, size = entries[fetch.object].block_size, entries[fetch.object].size
        assert fetch.start % block == 0
        assert fetch.end % block == 0 or fetch.end == size
        assert fetch.end - fetch.start <= range_size + 2 * (block - 1)
        assert fetch.placements


@given(loads(), st.integers(40, 200))
def test_without_gaps_only_blocks_that_hold_something_are_fetched(load, range_size):
    _, entries, wants, _ = load
    for fetch in plan_fetches(wants, entries, range_size=range_size, gap_size=0):
        needed = np.zeros(entries[fetch.object].size + 40, bool)
        for placement in fetch.placements:
            want = wants[placement.want]
            first = fetch.start + placement.source
            steps = [step * want.itemsize for step in placement.strides]
            box = np.lib.stride_tricks.as_strided(needed[first:], (*placement.sizes, want.itemsize), (*steps, 1))
            box[...] = True
        block = entries[fetch.object].block_size
        assert all(needed[at : at + block].any() for at in range(fetch.start, fetch.end, block))


def test_a_whole_chunk_is_fetched_once_but_for_the_blocks_at_the_cuts():
    want = Want(0, 100, 4, (1000,), (0,), (1000,))
    fetches = plan_fetches([want], [entry(5000, 16)], range_size=512, gap_size=0)
    assert sum(fetch.end - fetch.start for fetch in fetches) <= 4000 + 16 * (len(fetches) + 1)
    assert len(fetches) == 8


def test_two_wants_of_one_chunk_share_its_fetch():
    # Not at a block's edge, and as long as a range may be.
    wants = [Want(0, 3, 1, (512,), (0,), (512,))] * 2
    fetches = plan_fetches(wants, [entry(1000, 16)], range_size=512, gap_size=0)
    assert [(fetch.start, fetch.end, len(fetch.placements)) for fetch in fetches] == [(0, 528, 2)]


def test_empty_wants_need_nothing():
    empty = Want(-1, 0, 4, (0, 3), (0, 0), (0, 3))
    assert plan_fetches([empty], [], range_size=512, gap_size=0) == []


@pytest.mark.parametrize(
    "want",
    [
        pytest.param(Want(1, 0, 4, (5,), (0,), (5,)), id="no-such-object"),
        pytest.param(Want(-1, 0, 4, (5,), (0,), (5,)), id="stored-nowhere"),
        pytest.param(Want(0, 81, 4, (5,), (0,), (5,)), id="chunk-beyond-the-end"),
        pytest.param(Want(0, -1, 4, (5,), (0,), (5,)), id="chunk-before-the-start"),
        pytest.param(Want(0, 2**62, 4, (2**62,), (0,), (1,)), id="huge"),
        pytest.param(Want(0, 0, 4, (5,), (1,), (5,)), id="box-beyond-its-chunk"),
        pytest.param(Want(0, 0, 4, (5,), (-1,), (3,)), id="box-before-its-chunk"),
        pytest.param(Want(0, 0, 4, (5, 5), (0, 6), (1, 1)), id="box-beside-its-chunk"),
        pytest.param(Want(0, 0, 4, (5, 5), (0, 0), (-1, -1)), id="negative-box"),
        pytest.param(Want(0, 0, 4, (-5, -5), (0, 0), (1, 1)), id="negative-chunk"),
        pytest.param(Want(0, 0, 4, (5,), (0, 0), (5, 1)), id="fewer-dimensions"),
        pytest.param(Want(0, 0, 4, (5, 1), (0,), (5,)), id="more-dimensions"),
        pytest.param(Want(0, 0, 4, (), (0,), (1,)), id="no-dimensions"),
    ],
)
def test_a_want_outside_is_corrupt(want):
    with pytest.raises(CorruptManifest):
        plan_fetches([want], [entry(100)], range_size=512, gap_size=0)
