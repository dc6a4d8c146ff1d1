"""Coded chunks: stored otherwise than as plain bytes, and how that is told and undone.

A chunk is coded by frames, each of a fixed number of plain bytes and compressed on its own, so that a part of it can
be read; or as one stream, which went through transforms of DCP's extensions and can only be undone whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import msgspec

from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.format.checksum import pack_sums, unpack_sums

Buffer = bytes | bytearray | memoryview
ZSTD = "zstd"
CODECS = (ZSTD,)
"""Of ours, which work by frames."""
MAX_FRAME = 16 << 20
"""Plain bytes of a frame, so that a small read never has to undo more."""
_MAX_RATIO = 1 << 15
"""Zstandard's: a block of 128 KiB takes 4 bytes at least (RFC 8878, section 3.1.1.2)."""
_WORTH = 64
"""A frame that compression makes smaller by less than one part in so many is stored as it is."""

Extent = tuple[int, int, int]
"""Number of an object, first byte in it, bytes."""


class Coded(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a chunk, or an item, was coded and where it lies.

    Attributes:
        codec: what its bytes went through, in that order: `zstd`, or descriptors of DCP's stream transforms.
        frame: plain bytes of every frame but the last; 0 where all is one stream of transforms.
        sizes: stored bytes of every frame, little-endian, 4 bytes each; empty for a stream. A frame that is stored with
            as many bytes as it has plain ones is stored as it is.
        extents: where the stored bytes lie, frame after frame; each has whole frames.
    """

    codec: tuple[str, ...]
    frame: int
    sizes: bytes
    extents: tuple[Extent, ...]

    @property
    def stored_bytes(self) -> int:
        """Of all extents."""
        return sum(nbytes for _, _, nbytes in self.extents)

    @property
    def objects(self) -> list[int]:
        """Numbers of the objects that it lies in."""
        return [number for number, _, _ in self.extents]

    def moved(self, places: dict[int, int] | int) -> Coded:
        """The same with other numbers of objects: looked up, or counted from a number."""
        extents = tuple(
            (places + number if isinstance(places, int) else places[number], start, nbytes)
            for number, start, nbytes in self.extents
        )
        return Coded(self.codec, self.frame, self.sizes, extents)

    def frames(self, nbytes: int) -> list[tuple[int, int]]:
        """Stored and plain bytes of each frame of a chunk of `nbytes`."""
        return [
            (stored, min(self.frame, nbytes - self.frame * number))
            for number, stored in enumerate(unpack_sums(self.sizes))
        ]


def fault(coded: Coded, nbytes: int) -> str | None:
    """What contradicts itself in how a chunk of `nbytes` is coded, if anything does.

    That its extents lie within objects is for the caller to see.
    """
    if nbytes < 1 or not coded.codec or not coded.extents:
        return "is coded without a codec, a place or a byte"
    if any(min(extent) < 0 or extent[2] < 1 for extent in coded.extents):
        return "is coded in an impossible place"
    if coded.frame == 0:
        return "is one stream with sizes of frames" if coded.sizes else None
    if not 0 < coded.frame <= MAX_FRAME:
        return f"is coded in frames of {coded.frame} bytes"
    if len(coded.sizes) != 4 * -(-nbytes // coded.frame):
        return "has another number of frames than its size asks for"
    return _frames_fault(coded, nbytes)


def _frames_fault(coded: Coded, nbytes: int) -> str | None:
    sizes = unpack_sums(coded.sizes)
    last = nbytes - coded.frame * (len(sizes) - 1)
    if min(sizes) < 1 or max(sizes) > coded.frame or sizes[-1] > last:
        return "has a frame of an impossible size"
    ends = set(accumulate(sizes))
    if any(end not in ends for end in accumulate(nbytes for _, _, nbytes in coded.extents)) or (
        coded.stored_bytes != max(ends)
    ):
        return "has extents that do not hold its frames"
    bombs = min(sizes[:-1], default=coded.frame) * _MAX_RATIO < coded.frame or sizes[-1] * _MAX_RATIO < last
    return "has a frame that cannot hold so much" if bombs and coded.codec == (ZSTD,) else None


class Zstd:
    """Compresses frames by Zstandard, each with a checksum and its length in its header.

    Args:
        frame: plain bytes of a frame.
        level: 1 to 22, or negative for less.
    """

    codec = (ZSTD,)

    def __init__(self, frame: int, level: int) -> None:
        self.frame = frame
        self._level = level

    def code(self, plain: memoryview) -> tuple[bytes, bytes]:
        """The frames of whole frames' plain bytes, back to back, and their packed sizes."""
        compressor = _library().ZstdCompressor(level=self._level, write_checksum=True, write_content_size=True)
        frames = [_shorter(compressor, plain[at : at + self.frame]) for at in range(0, len(plain), self.frame)]
        return b"".join(frames), pack_sums(map(len, frames))


def _shorter(compressor: Any, plain: memoryview) -> Buffer:
    frame: bytes = compressor.compress(plain)
    return frame if len(frame) < len(plain) - len(plain) // _WORTH else plain


class BadFrame(ValueError):
    """A frame does not undo to what it should."""


def undone(stored: memoryview, frames: tuple[tuple[int, int], ...]) -> Iterator[Buffer]:
    """The plain bytes of each frame of `stored`, which holds them back to back; never more than they should have.

    Args:
        frames: stored and plain bytes of each.

    Raises:
        BadFrame: one is damaged, or of another length.
    """
    library = _library()
    decompressor = library.ZstdDecompressor()
    at = 0
    for size, nbytes in frames:
        frame = stored[at : at + size]
        at += size
        yield frame if size == nbytes else _decompressed(library, decompressor, frame, nbytes)


def _decompressed(library: Any, decompressor: Any, frame: memoryview, nbytes: int) -> bytes:
    try:
        # Asked first: the library takes memory for whatever a frame says of itself.
        if library.frame_content_size(frame) != nbytes:
            raise BadFrame(f"a frame does not say that it has {nbytes} bytes")
        plain: bytes = decompressor.decompress(frame, allow_extra_data=False)
    except library.ZstdError as error:
        raise BadFrame(f"a frame does not decompress: {error}") from None
    if len(plain) != nbytes:
        raise BadFrame(f"a frame has {len(plain)} bytes and should have {nbytes}")
    return plain


def is_available() -> bool:
    """Whether the library of our codec is installed."""
    try:
        _library()
    except ImportError:
        return False
    return True


def require(codec: str) -> None:
    """Refuses a codec that cannot be used here.

    Raises:
        InvalidOption: it is none of ours, or its library is missing.
    """
    if codec not in CODECS:
        raise InvalidOption(f"compression is {codec!r}; it is one of {', '.join(map(repr, CODECS))}, or None")
    if not is_available():
        hint = "pip install 'ckpt-cloud[zstd]'"
        raise InvalidOption(f"compression={codec!r} needs the library zstandard, which is not installed", hint=hint)


def _library() -> Any:
    import zstandard

    return zstandard
