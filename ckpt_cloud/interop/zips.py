"""Zip files as `torch.save` writes them (members stored, never compressed), read by ranges and written as a stream.

Format: PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ckpt_cloud.errors import CorruptFile

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64_MAGIC, _LOCATOR64_MAGIC = b"PK\x06\x06", b"PK\x06\x07"
_DESCRIPTOR64 = struct.Struct("<4sIQQ")
_FLAGS = 0x0808
"""Sizes follow the data; names are UTF-8."""
_ALIGNMENT = 64
"""Of torch's storages, so that a file may be mapped into memory."""
_DATE = 33
"""1980-01-01: no time, so that equal contents make equal files."""
TAIL_BYTES = 64 << 10
"""From the end of a file; holds the end record, and mostly the directory too."""
LOCAL_BYTES = _LOCAL.size + 4096
"""Holds a member's local header."""


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the central directory: `start` is its local header's."""

    name: str
    start: int
    size: int
    stored: bool


def directory_span(tail: bytes, size: int, where: str) -> tuple[int, int]:
    """First byte and end of the central directory of a file of `size` bytes that ends with `tail`.

    Raises:
        CorruptFile: there is none.
    """
    at = tail.rfind(_END_MAGIC)
    if at < 0 or at + _END.size > len(tail):
        raise CorruptFile("not a zip file, or cut short: it has no end record", where)
    length, start = _END.unpack_from(tail, at)[5:7]
    locator = at - _LOCATOR64.size
    if locator >= 0 and tail[locator : locator + 4] == _LOCATOR64_MAGIC:
        at64 = _LOCATOR64.unpack_from(tail, locator)[2] - (size - len(tail))
        if not 0 <= at64 <= len(tail) - _END64.size or tail[at64 : at64 + 4] != _END64_MAGIC:
            raise CorruptFile("its zip64 end record is not where it should be", where)
        length, start = _END64.unpack_from(tail, at64)[8:10]
    if start + length > size:
        raise CorruptFile("its directory lies outside the file", where)
    return start, start + length


def members(directory: bytes, size: int, where: str) -> Iterator[Member]:
    """The members that a central directory lists.

    Raises:
        CorruptFile: it does not decode, or a member lies outside the file.
    """
    at = 0
    while at < len(directory):
        if at + _CENTRAL.size > len(directory) or directory[at : at + 4] != _CENTRAL_MAGIC:
            raise CorruptFile("its directory does not decode", where)
        told = _CENTRAL.unpack_from(directory, at)
        compressed, nbytes, name_length, extra_length, comment_length = told[8:13]
        name_end = at + _CENTRAL.size + name_length
        name = directory[at + _CENTRAL.size : name_end].decode(errors="replace")
        extra = directory[name_end : name_end + extra_length]
        nbytes, compressed, start = _widened(extra, nbytes, compressed, told[16], where)
        if start + _LOCAL.size + compressed > size:
            raise CorruptFile(f"its member {name!r} lies outside the file", where)
        yield Member(name, start, nbytes, told[4] == 0 and nbytes == compressed)
        at = name_end + extra_length + comment_length


def _widened(extra: bytes, nbytes: int, compressed: int, start: int, where: str) -> tuple[int, int, int]:
    """Sizes and place, from the zip64 extra field where they do not fit into 32 bits."""
    values = [nbytes, compressed, start]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            inside = extra[at + 4 : at + 4 + length]
            for number, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    if len(inside) < 8:
                        raise CorruptFile("its directory has a zip64 entry without sizes", where)
                    values[number], inside = int.from_bytes(inside[:8], "little"), inside[8:]
        at += 4 + length
    return values[0], values[1], values[2]


def data_start(header: bytes | memoryview, where: str) -> int:
    """Where a member's data begin, counted from its local header, which `header` begins with.

    Raises:
        CorruptFile: it is none.
    """
    if len(header) < _LOCAL.size or bytes(header[:4]) != _LOCAL_MAGIC:
        raise CorruptFile("a member has no local header", where)
    told = _LOCAL.unpack_from(header)
    if told[3] != 0 or told[2] & 1:
        raise CorruptFile("a member is compressed or encrypted, which torch never does", where)
    return _LOCAL.size + int(told[9]) + int(told[10])


def member_name(header: bytes | memoryview) -> str:
    """Name in the local header that `header` begins with; empty if it is none."""
    if len(header) < _LOCAL.size or bytes(header[:4]) != _LOCAL_MAGIC:
        return ""
    length = _LOCAL.unpack_from(header)[9]
    return bytes(header[_LOCAL.size : _LOCAL.size + length]).decode(errors="replace")


class ZipLayout:
    """A zip file, laid out before its data are there: where each member lies, and what stands between them.

    Members are added in order; each has a header, its data, and a trailer that takes the data's CRC32.
    """

    def __init__(self) -> None:
        # Both grow with every member.
        self.size = 0
        self._members: list[tuple[bytes, int, int]] = []

    def add(self, name: str, nbytes: int) -> bytes:
        """Adds a member and returns its local header, padded so that the data are aligned."""
        raw = name.encode()
        wide = struct.pack("<HHQQ", 1, 16, 0, 0)
        room = -(self.size + _LOCAL.size + len(raw) + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", room) + b"Z" * room
        header = _LOCAL.pack(_LOCAL_MAGIC, 45, _FLAGS, 0, 0, _DATE, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(raw), len(extra))
        self._members.append((raw, self.size, nbytes))
        self.size += _LOCAL.size + len(raw) + len(extra) + nbytes + _DESCRIPTOR64.size
        return header + raw + extra

    def descriptor(self, number: int, crc: int) -> bytes:
        """What follows the data of member `number`."""
        nbytes = self._members[number][2]
        return _DESCRIPTOR64.pack(b"PK\x07\x08", crc, nbytes, nbytes)

    @property
    def end_size(self) -> int:
        """Bytes of `end`."""
        return len(self.end([0] * len(self._members)))

    def end(self, crcs: list[int]) -> bytes:
        """The central directory and the end records, with the members' CRC32s."""
        entries = b"".join(
            _entry(name, start, nbytes, crc) for (name, start, nbytes), crc in zip(self._members, crcs, strict=True)
        )
        count, at = len(self._members), self.size
        end64 = _END64.pack(_END64_MAGIC, _END64.size - 12, 45, 45, 0, 0, count, count, len(entries), at)
        locator = _LOCATOR64.pack(_LOCATOR64_MAGIC, 0, at + len(entries), 1)
        short = min(count, 0xFFFF)
        last = _END.pack(_END_MAGIC, 0, 0, short, short, min(len(entries), 0xFFFFFFFF), min(at, 0xFFFFFFFF), 0)
        return entries + end64 + locator + last


def _entry(name: bytes, start: int, nbytes: int, crc: int) -> bytes:
    extra = struct.pack("<HHQQQ", 1, 24, nbytes, nbytes, start)
    wide = 0xFFFFFFFF
    return (
        _CENTRAL.pack(
            _CENTRAL_MAGIC, 45, 45, _FLAGS, 0, 0, _DATE, crc, wide, wide, len(name), len(extra), 0, 0, 0, 0, wide
        )
        + name
        + extra
    )
