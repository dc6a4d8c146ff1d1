"""Sealed objects: what was sealed opens, whole and in part; anything else does not."""

import os
import pickle
from random import Random

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.format.sealing import (
    BLOCK,
    NONCE_BYTES,
    OVERHEAD,
    SEALED_BLOCK,
    MasterKey,
    blocks_of,
    plain_size,
    room_within,
    sealed_size,
)

BYTES = bytes(range(32))
KEY = MasterKey(BYTES)
NAME = f"data/{'0' * 32}/0.safetensors"
sizes = st.integers(0, 5 * BLOCK) | st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])


def seal(data, key=KEY, name=NAME, *, first=0, last=True, pieces=None):
    into = memoryview(bytearray(sealed_size(len(data))))
    nonces = os.urandom(blocks_of(len(data)) * NONCE_BYTES)
    key.of_object(name).seal(pieces or [data], into, nonces, first_block=first, last=last)
    return into


def opened(sealed, key=KEY, name=NAME, *, first=0, last=True, skip=0, size=None):
    """What was sealed, or the numbers of the blocks that do not open."""
    into = memoryview(bytearray((plain_size(len(sealed)) or 0) - skip if size is None else size))
    bad = key.of_object(name).open(memoryview(sealed), [into], first_block=first, last=last, skip=skip)
    return bad or bytes(into)


@given(st.integers(0, 1 << 50))
def test_sizes_are_arithmetic(size):
    stored = sealed_size(size)
    assert plain_size(stored) == size
    assert stored - size == max(1, -(-size // BLOCK)) * OVERHEAD


@given(st.integers(0, 1 << 50))
def test_no_two_sizes_look_alike(stored):
    size = plain_size(stored)
    assert size is None or sealed_size(size) == stored


@given(sizes, st.randoms(use_true_random=False), st.data())
def test_what_was_sealed_opens_in_whole_and_in_part(size, random, data):
    plain = random.randbytes(size)
    cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=4)))
    pieces = [plain[a:b] for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    sealed = seal(plain, pieces=pieces)
    assert opened(sealed) == plain
    if size:
        start = data.draw(st.integers(0, size - 1))
        end = data.draw(st.integers(start + 1, size))
        first, stop = start // BLOCK, -(-end // BLOCK)
        blocks = sealed[first * SEALED_BLOCK : stop * SEALED_BLOCK]
        cut = data.draw(st.integers(0, end - start))
        into = bytearray(end - start)
        views = [memoryview(into)[:cut], memoryview(into)[cut:]]
        last = stop == blocks_of(size)
        assert not KEY.of_object(NAME).open(blocks, views, first_block=first, last=last, skip=start - first * BLOCK)
        assert into == plain[start:end]


@given(sizes, st.integers(0, 1 << 32))
def test_sealed_where_it_lies(size, seed):
    # Hypothesis's own would write all that it gives into its notes.
    random = Random(seed)
    plain = random.randbytes(size)
    into = memoryview(bytearray(sealed_size(size)))
    room_within(into, size)[:] = plain
    nonces = random.randbytes(blocks_of(size) * NONCE_BYTES)
    KEY.of_object(NAME).seal_within(into, size, nonces, first_block=0, last=True)
    beside = memoryview(bytearray(len(into)))
    KEY.of_object(NAME).seal([plain], beside, nonces, first_block=0, last=True)
    assert into == beside
    assert opened(into) == plain


@given(st.integers(0, 3 * BLOCK), st.data())
def test_any_bit_that_flipped_is_found_in_its_block(size, data):
    sealed = bytearray(seal(bytes(size)))
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= 1 << data.draw(st.integers(0, 7))
    assert opened(sealed) == [at // SEALED_BLOCK]


def test_the_others_of_a_range_come_all_the_same():
    plain = os.urandom(3 * BLOCK)
    sealed = bytearray(seal(plain))
    sealed[SEALED_BLOCK] ^= 1
    into = memoryview(bytearray(3 * BLOCK))
    assert KEY.of_object(NAME).open(memoryview(sealed), [into], first_block=0, last=True) == [1]
    assert into[:BLOCK] == plain[:BLOCK]
    assert into[2 * BLOCK :] == plain[2 * BLOCK :]


def test_a_block_belongs_to_its_place_its_object_and_its_key():
    sealed = bytes(seal(bytes(3 * BLOCK)))
    first, second, third = (sealed[n * SEALED_BLOCK : (n + 1) * SEALED_BLOCK] for n in range(3))
    assert opened(second + first + third) == [0, 1]
    assert opened(first + second) == [1], "cut off at the border of a block"
    assert opened(first + second + third + third) == [2, 3]
    assert opened(sealed, name=NAME.replace("0.s", "1.s")) == [0, 1, 2]
    assert opened(sealed, MasterKey(bytes(32))) == [0, 1, 2]
    assert opened(sealed, first=1) == [0 + 1, 2, 3]
    assert opened(sealed[:10], size=0) == [0]


def test_as_the_page_says():
    """docs/format.md, by hand."""
    sealed = bytes(seal(bytes(BLOCK) + b"end"))
    info = b"ckpt-cloud sealed object 1\n" + NAME.encode()
    cipher = AESGCM(HKDF(SHA256(), 32, salt=None, info=info).derive(BYTES))
    for number, start, last in ((0, 0, 0), (1, SEALED_BLOCK, 1)):
        block = sealed[start : start + SEALED_BLOCK]
        name = info + b"\n" + number.to_bytes(8, "little") + bytes([last])
        assert cipher.decrypt(block[:12], block[12:], name) == (b"end" if last else bytes(BLOCK))
    check = HKDF(SHA256(), 32, salt=None, info=b"ckpt-cloud key check 1\n").derive(BYTES)[:8]
    assert KEY.check == check.hex()


def test_no_two_blocks_look_alike():
    sealed = bytes(seal(bytes(4 * BLOCK))) + bytes(seal(bytes(4 * BLOCK)))
    assert len({sealed[n * SEALED_BLOCK :][:SEALED_BLOCK] for n in range(8)}) == 8


def test_a_key_shows_and_carries_nothing():
    assert repr(KEY) == "<MasterKey>"
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(KEY)
    for wrong in (b"", bytes(16), bytes(33)):
        with pytest.raises(InvalidOption, match="32 bytes"):
            MasterKey(wrong)
