"""CRC32C against its published vectors and a bit-by-bit reference; sums independent of how a stream is cut."""

import os

import google_crc32c
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.format.checksum import (
    BlockSums,
    first_bad_block,
    pack_sums,
    sums_length,
    unpack_sums,
    whole_sum,
)


def reference(data):
    """CRC32C one bit at a time (RFC 3720, appendix B.4: reflected polynomial 0x82F63B78)."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def blocks(data, size):
    return [data[at : at + size] for at in range(0, len(data), size)]


BLOCK_SIZES = st.integers(1, 40)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_published_vectors(data, expected):
    assert crc32c(data) == reference(data) == expected


@given(st.binary(max_size=200), st.data())
def test_continues_where_it_left_off(data, draw):
    cut = draw.draw(st.integers(0, len(data)))
    assert crc32c(data[cut:], crc32c(data[:cut])) == crc32c(data) == reference(data)


@given(BLOCK_SIZES, st.lists(st.binary(max_size=100), max_size=8), st.sampled_from([bytes, bytearray, memoryview]))
def test_sums_do_not_depend_on_the_cuts(block_size, pieces, buffer):
    sums = BlockSums(block_size)
    for piece in pieces:
        sums.update(buffer(piece))
    packed = sums.finish()

    data = b"".join(pieces)
    assert list(unpack_sums(packed)) == [reference(block) for block in blocks(data, block_size)]
    assert len(packed) == sums_length(len(data), block_size)


@pytest.mark.parametrize("skipped", range(8))
def test_long_blocks_at_any_address(skipped):
    data = os.urandom((1 << 18) + skipped)
    sums = BlockSums(1 << 16)
    sums.update(memoryview(data)[skipped:])
    assert list(unpack_sums(sums.finish())) == [google_crc32c.value(block) for block in blocks(data[skipped:], 1 << 16)]


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_packed_sums_are_little_endian_words(sums):
    packed = pack_sums(sums)
    assert packed == b"".join(value.to_bytes(4, "little") for value in sums)
    assert list(unpack_sums(packed)) == sums


@given(st.binary(min_size=1, max_size=300), BLOCK_SIZES, st.data())
def test_any_flipped_bit_is_found(data, block_size, draw):
    sums = BlockSums(block_size)
    sums.update(data)
    whole = sums.finish()
    first = draw.draw(st.integers(0, len(whole) // 4 - 1))
    last = draw.draw(st.integers(first, len(whole) // 4 - 1))
    part = bytearray(data[first * block_size : (last + 1) * block_size])
    assert first_bad_block([part], first, whole, block_size) is None

    bit = draw.draw(st.integers(0, 8 * len(part) - 1))
    part[bit // 8] ^= 1 << bit % 8

    assert first_bad_block([memoryview(part)[:3], part[3:]], first, whole, block_size) == first + bit // 8 // block_size


@given(st.binary(min_size=1, max_size=300), BLOCK_SIZES, st.data())
def test_a_short_last_block_is_found(data, block_size, draw):
    sums = BlockSums(block_size)
    sums.update(data)
    short = data[: draw.draw(st.integers(0, len(data) - 1))]
    if len(short) % block_size:
        assert first_bad_block([short], 0, sums.finish(), block_size) == len(short) // block_size


@given(st.binary(max_size=3000), st.sampled_from([1, 7, 64, 1000, 4096]))
def test_the_whole_from_its_blocks(data, block_size):
    sums = BlockSums(block_size)
    sums.update(data)
    assert whole_sum(sums.finish(), block_size, len(data)) == crc32c(data)
