"""Shards cut into chunks side by side: they make up the shard, and there are no more than pay."""

import math
from typing import NamedTuple

from hypothesis import example, given
from hypothesis import strategies as st

from ckpt_cloud.format.structure import tiles
from ckpt_cloud.planning.columns import LEAST, column_chunks

MIB = 1 << 20


class Box(NamedTuple):
    """A part of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@st.composite
def shards(draw):
    """A tensor's shape and the sizes of a shard of it, from a few bytes to some MiB."""
    sizes = tuple(draw(st.lists(st.sampled_from([1, 2, 7, 64, 513, 2048]), max_size=4)))
    return tuple(size * draw(st.integers(1, 3)) for size in sizes), sizes


@given(shards(), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 9))
@example(((2048, 2048), (2048, 512)), 4, 4)
@example(((2048, 2050), (2048, 515)), 4, 4)
def test_chunks_make_up_the_shard_and_are_worth_a_request(shard, itemsize, most):
    shape, sizes = shard
    chunks = column_chunks(shape, sizes, itemsize, most=most)
    assert tiles(sizes, [Box(*chunk) for chunk in chunks])
    assert 1 <= len(chunks) <= most
    if len(chunks) > 1:
        # The last may be what is left over.
        assert all(math.prod(box) * itemsize >= LEAST for _, box in chunks[:-1])
        assert len({box for _, box in chunks[:-1]}) == 1


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 3))
def test_a_shard_of_whole_rows_is_one_chunk(rows, columns, more):
    sizes = (rows * 1000, columns * 1000)
    assert column_chunks((sizes[0] * more, sizes[1]), sizes, 4, most=8) == [((0, 0), sizes)]


def test_a_shard_along_an_inner_dimension_is_cut_along_it():
    assert column_chunks((2048, 2048), (2048, 512), 4, most=4) == [((0, n), (2048, 128)) for n in range(0, 512, 128)]
    halves = [((0, 0, 0), (8, 64, 2048)), ((0, 64, 0), (8, 64, 2048))]
    assert column_chunks((8, 512, 2048), (8, 128, 2048), 1, most=2) == halves
    # Along two: the inner one.
    assert [box for _, box in column_chunks((4, 4096, 4096), (2, 1024, 1024), 4, most=4)] == [(2, 1024, 256)] * 4


def test_small_shards_and_long_rows_stay_whole():
    assert len(column_chunks((512, 2048), (512, 512), 2, most=4)) == 1
    assert len(column_chunks((64, 4 * MIB), (64, MIB), 1, most=4)) == 1
    assert len(column_chunks((1, 4 * MIB), (1, MIB), 4, most=4)) == 1
