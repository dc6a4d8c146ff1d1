"""CRC32C (Castagnoli, RFC 3720 appendix B.4) per fixed-size block of an object, so that any range can be verified."""

from __future__ import annotations

import array
import hashlib
import sys
from collections.abc import Iterable

from crc32c import crc32c

Buffer = bytes | bytearray | memoryview
DIGEST_BYTES = 32
"""Of a SHA-256."""


class BlockSums:
    """Checksums of a byte stream that arrives in pieces of any size.

    Every block has `block_size` bytes but the last, which may be shorter.

    Args:
        digests: take the SHA-256 of every block too.
    """

    def __init__(self, block_size: int, *, digests: bool = False) -> None:
        self.block_size = block_size
        # What follows changes with every piece.
        self._digest = hashlib.sha256() if digests else None
        self._digests = bytearray()
        self._sums = array.array("I")
        self._current = 0
        self._filled = 0

    def update(self, piece: Buffer) -> None:
        """Takes in the next bytes of the stream."""
        view = memoryview(piece)
        at = self._fill_block(view, 0) if self._filled else 0
        if self._digest is None:
            # Of a GiB there are 16,384, so that each call and attribute counts.
            size, add = self.block_size, self._sums.append
            end = at + (len(view) - at) // size * size
            for start in range(at, end, size):
                add(crc32c(view[start : start + size]))
            at = end
        while at < len(view):
            at = self._fill_block(view, at)

    def finish(self) -> bytes:
        """All checksums so far, little-endian, 4 bytes each; closes a last, shorter block."""
        if self._filled:
            self._close_block()
        return pack_sums(self._sums)

    @property
    def digests(self) -> bytes:
        """SHA-256 of all blocks, one after another, once `finish` was called; nothing if they were not asked for."""
        return bytes(self._digests)

    def _fill_block(self, view: memoryview, at: int) -> int:
        """Takes in what the block that is open has room for; where that ends in `view`."""
        take = min(self.block_size - self._filled, len(view) - at)
        self._current = crc32c(view[at : at + take], self._current)
        if self._digest is not None:
            self._digest.update(view[at : at + take])
        self._filled += take
        if self._filled == self.block_size:
            self._close_block()
        return at + take

    def _close_block(self) -> None:
        if self._digest is not None:
            self._digests += self._digest.digest()
            self._digest = hashlib.sha256()
        self._sums.append(self._current)
        self._current = self._filled = 0


def whole_sum(sums: bytes, block_size: int, size: int) -> int:
    """CRC32C of a whole object of `size` bytes, from the packed checksums of its blocks."""
    words = unpack_sums(sums)
    if not words:
        return 0
    last = size - (len(words) - 1) * block_size
    after_block = _tables(_after_zeros(block_size))
    found = 0
    for word in words[:-1]:
        found = _applied(after_block, found) ^ word
    return _applied(_tables(_after_zeros(last)), found) ^ words[-1]


def _after_zeros(count: int) -> list[int]:
    """What so many bytes of zeros make of a CRC: its image of each bit, since the map is linear over GF(2)."""
    # One bit of zeros: shifted, and reduced by the polynomial where a one falls out.
    step = [0x82F63B78, *(1 << bit for bit in range(31))]
    result = [1 << bit for bit in range(32)]
    bits = 8 * count
    while bits:
        if bits & 1:
            result = [_image(step, column) for column in result]
        step = [_image(step, column) for column in step]
        bits >>= 1
    return result


def _image(columns: list[int], vector: int) -> int:
    found = 0
    for column in columns:
        if vector & 1:
            found ^= column
        vector >>= 1
    return found


def _tables(columns: list[int]) -> list[list[int]]:
    """The same map by bytes, which is quicker to apply many times."""
    return [[_image(columns[8 * at : 8 * at + 8], byte) for byte in range(256)] for at in range(4)]


def _applied(tables: list[list[int]], value: int) -> int:
    low, second, third, high = tables
    return low[value & 255] ^ second[value >> 8 & 255] ^ third[value >> 16 & 255] ^ high[value >> 24]


def pack_sums(sums: Iterable[int]) -> bytes:
    """Checksums as little-endian 32-bit words."""
    words = array.array("I", sums)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def unpack_sums(data: bytes) -> array.array[int]:
    """The inverse of `pack_sums`."""
    words = array.array("I")
    words.frombytes(data)
    if sys.byteorder == "big":
        words.byteswap()
    return words


def sums_length(size_bytes: int, block_size: int) -> int:
    """Bytes that the packed checksums of an object of `size_bytes` take."""
    return -(-size_bytes // block_size) * 4


def digests_length(size_bytes: int, block_size: int) -> int:
    """Bytes that the digests of an object of `size_bytes` take."""
    return -(-size_bytes // block_size) * DIGEST_BYTES


def first_bad_block(
    pieces: Iterable[Buffer], first_block: int, sums: bytes, block_size: int, digests: bytes = b""
) -> int | None:
    """Number of the first block in `pieces` that is not what it was, or None when all are right.

    Args:
        pieces: together whole blocks, the first of them number `first_block`; the object's last may be short.
        sums: packed checksums of the whole object.
        digests: of the whole object, or empty: then they are not looked at.
    """
    runs = bad_blocks(pieces, first_block, sums, block_size, digests)
    return runs[0][0] if runs else None


def bad_blocks(
    pieces: Iterable[Buffer], first_block: int, sums: bytes, block_size: int, digests: bytes = b""
) -> list[tuple[int, int]]:
    """Runs of blocks in `pieces` that are not what they were: the first block's number, and that after the last.

    Args are those of `first_bad_block`.
    """
    found = BlockSums(block_size, digests=bool(digests))
    for piece in pieces:
        found.update(piece)
    got = found.finish()
    right = _same(got, sums, first_block, 4) and (
        not digests or _same(found.digests, digests, first_block, DIGEST_BYTES)
    )
    return [] if right else _runs(got, found.digests, first_block, sums, digests)


def _same(got: bytes, expected: bytes, first_block: int, width: int) -> bool:
    return got == expected[width * first_block : width * first_block + len(got)]


def _runs(got: bytes, got_digests: bytes, first_block: int, sums: bytes, digests: bytes) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for at in range(len(got) // 4):
        number = first_block + at
        right = got[4 * at : 4 * at + 4] == sums[4 * number : 4 * number + 4]
        low, high = DIGEST_BYTES * at, DIGEST_BYTES * (at + 1)
        if right and digests:
            right = _same(got_digests[low:high], digests, number, DIGEST_BYTES)
        if right:
            continue
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
