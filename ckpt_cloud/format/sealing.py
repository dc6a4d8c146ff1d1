"""Sealed objects: what encryption makes of an object, block by block, so that any range of it can be read.

    12 bytes                nonce, random
    up to 64 KiB            ciphertext (AES-256-GCM, NIST SP 800-38D); shorter in the last block only
    16 bytes                tag

An object has one block for each 64 KiB begun, and at least one. Each object has a key of its own, derived from the
user's by its name (HKDF, RFC 5869), and each block is bound to the object, to its place, and to whether it is the last:
no block can be moved, no object swapped, no end cut off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ckpt_cloud.errors import InvalidOption, Unsupported

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ALGORITHM = "aes-256-gcm"
KEY_BYTES = 32
BLOCK = 64 << 10
"""Bytes of an object in one sealed block."""
NONCE_BYTES = 12
TAG_BYTES = 16
OVERHEAD = NONCE_BYTES + TAG_BYTES
SEALED_BLOCK = BLOCK + OVERHEAD
_OBJECT = b"ckpt-cloud sealed object 1\n"
_CHECK = b"ckpt-cloud key check 1\n"
_CHECK_BYTES = 8

Buffer = bytes | bytearray | memoryview


def blocks_of(size: int) -> int:
    """How many blocks an object of `size` bytes has."""
    return max(1, -(-size // BLOCK))


def sealed_size(size: int) -> int:
    """Bytes that an object of `size` bytes takes when it is sealed."""
    return size + blocks_of(size) * OVERHEAD


def plain_size(stored: int) -> int | None:
    """Bytes of the object in `stored` sealed ones; None if no object has so many."""
    size = stored - max(1, -(-stored // SEALED_BLOCK)) * OVERHEAD
    return size if size >= 0 and sealed_size(size) == stored else None


def plain_within(stored: int) -> int:
    """Bytes, of whole blocks, that at most `stored` sealed ones hold."""
    return stored // SEALED_BLOCK * BLOCK


class MasterKey:
    """A user's key of 32 bytes, which nothing shows and no pickle carries.

    Raises:
        InvalidOption: it is of another length.
        Unsupported: the library `cryptography` is not installed, or too old.
    """

    __slots__ = ("_bytes", "check")

    def __init__(self, given: bytes) -> None:
        if len(given) != KEY_BYTES:
            raise InvalidOption(f"an encryption key has {KEY_BYTES} bytes, this one {len(given)}")
        self._bytes = bytes(given)
        self.check = _derived(self._bytes, _CHECK)[:_CHECK_BYTES].hex()
        """Tells this key from others, and nothing about it."""

    def __repr__(self) -> str:
        return "<MasterKey>"

    def __reduce__(self) -> str:
        raise TypeError("an encryption key is not pickled")

    def of_object(self, key: str) -> ObjectKey:
        """What seals the object at the data key `key`, relative to its checkpoint."""
        name = _OBJECT + key.encode()
        with _library():
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        if not hasattr(AESGCM, "encrypt_into"):
            raise Unsupported("encryption needs cryptography 47 or later", hint="pip install 'ckpt-cloud[crypto]'")
        return ObjectKey(AESGCM(_derived(self._bytes, name)), name)


class ObjectKey:
    """Seals and opens the blocks of one object."""

    __slots__ = ("_cipher", "_name")

    def __init__(self, cipher: AESGCM, name: bytes) -> None:
        self._cipher = cipher
        self._name = name + b"\n"

    def seal(self, pieces: Iterable[Buffer], into: memoryview, nonces: bytes, *, first_block: int, last: bool) -> None:
        """Fills `into` with sealed blocks of what is in `pieces`, one after another.

        Args:
            pieces: whole blocks, but that the object's last may be short.
            into: as long as `sealed_size` of them.
            nonces: random, 12 bytes for each block.
            first_block: number of the first block.
            last: whether the last of them is the object's last.
        """
        self._seal(_blocks(pieces), into, nonces, first_block=first_block, last=last)

    def seal_within(self, into: memoryview, size: int, nonces: bytes, *, first_block: int, last: bool) -> None:
        """The same, of the `size` bytes that lie at the end of `into` (`room_within`)."""
        # A block is moved out before sealed ones, which come to lie before the rest, reach it.
        blocks = _blocks([room_within(into, size)], moved=True)
        self._seal(blocks, into, nonces, first_block=first_block, last=last)

    def open(
        self, sealed: memoryview, into: Sequence[memoryview], *, first_block: int, last: bool, skip: int = 0
    ) -> list[int]:
        """Fills `into`, one buffer after another, with what was sealed, from the `skip`th byte of the first block on.

        Args:
            sealed: whole blocks, the first of them number `first_block`.
            into: writable; may end before the last block does.
            last: whether the last of them is the object's last.

        Returns:
            Numbers of the blocks that are not what was sealed there; what `into` then holds has no meaning.
        """
        bad: list[int] = []
        targets = _Targets(into)
        count = -(-len(sealed) // SEALED_BLOCK)
        for index in range(count):
            block = sealed[index * SEALED_BLOCK : (index + 1) * SEALED_BLOCK]
            name = self._of(first_block + index, last=last and index == count - 1)
            low = skip if index == 0 else 0
            if not self._open(block, name, targets, low):
                bad.append(first_block + index)
        return bad

    def _seal(self, blocks: Iterator[Buffer], into: memoryview, nonces: bytes, *, first_block: int, last: bool) -> None:
        at = 0
        count = len(nonces) // NONCE_BYTES
        for index in range(count):
            plain = next(blocks, b"")
            nonce = nonces[index * NONCE_BYTES : (index + 1) * NONCE_BYTES]
            end = at + OVERHEAD + len(plain)
            into[at : at + NONCE_BYTES] = nonce
            name = self._of(first_block + index, last=last and index == count - 1)
            self._cipher.encrypt_into(nonce, plain, name, into[at + NONCE_BYTES : end])
            at = end
        assert at == len(into), "a nonce for each block, and room for them"

    def _open(self, block: memoryview, name: bytes, targets: _Targets, low: int) -> bool:
        from cryptography.exceptions import InvalidTag

        size = len(block) - OVERHEAD
        if size < 0:
            return False
        straight = targets.whole(size) if low == 0 else None
        target = straight if straight is not None else targets.scratch[:size]
        try:
            self._cipher.decrypt_into(block[:NONCE_BYTES], block[NONCE_BYTES:], name, target)
        except InvalidTag:
            targets.skip(size - low if straight is None else 0)
            return False
        if straight is None:
            targets.put(target[low:])
        return True

    def _of(self, number: int, *, last: bool) -> bytes:
        return self._name + number.to_bytes(8, "little") + (b"\1" if last else b"\0")


def room_within(into: memoryview, size: int) -> memoryview:
    """The last `size` bytes of a buffer of `sealed_size(size)`, for `seal_within`."""
    return into[len(into) - size :]


def _blocks(pieces: Iterable[Buffer], *, moved: bool = False) -> Iterator[Buffer]:
    """What lies in `pieces`, cut into blocks: where they lie, or if `moved` or in several pieces, in memory beside."""
    scratch = memoryview(bytearray(BLOCK))
    filled = 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            if not filled and not moved and len(rest) >= BLOCK:
                yield rest[:BLOCK]
                rest = rest[BLOCK:]
                continue
            take = min(BLOCK - filled, len(rest))
            scratch[filled : filled + take] = rest[:take]
            rest = rest[take:]
            filled += take
            if filled == BLOCK:
                yield scratch
                filled = 0
    if filled:
        yield scratch[:filled]


class _Targets:
    """Buffers that are filled one after another."""

    def __init__(self, into: Sequence[memoryview]) -> None:
        self.scratch = memoryview(bytearray(BLOCK))
        # Both change with every block: what is left of the first buffer, and the others.
        self._rest = memoryview(b"")
        self._others = iter(into)

    def whole(self, size: int) -> memoryview | None:
        """The next `size` bytes, if they lie in one buffer."""
        self._advance()
        if len(self._rest) < size:
            return None
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def put(self, data: memoryview) -> None:
        """Copies as much of `data` as there is room for."""
        while len(data) and self._advance():
            take = min(len(data), len(self._rest))
            self._rest[:take] = data[:take]
            self._rest, data = self._rest[take:], data[take:]

    def skip(self, size: int) -> None:
        """Leaves out the next `size` bytes."""
        while size and self._advance():
            take = min(size, len(self._rest))
            self._rest = self._rest[take:]
            size -= take

    def _advance(self) -> bool:
        while not len(self._rest):
            following = next(self._others, None)
            if following is None:
                return False
            self._rest = following
        return True


def _derived(key: bytes, info: bytes) -> bytes:
    with _library():
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(key)


@contextlib.contextmanager
def _library() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        hint = "pip install 'ckpt-cloud[crypto]'"
        raise Unsupported("encryption needs the library cryptography", hint=hint) from error
