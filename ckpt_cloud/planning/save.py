"""Save planning: entries to pack objects, and a pack's bytes to upload parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from ckpt_cloud.errors import Unsupported
from ckpt_cloud.format.dtypes import SIZES
from ckpt_cloud.format.pack import MAX_HEADER_BYTES, PackEntry, header, header_bytes_bound

_MIN_PART = 5 << 20
"""S3 takes no smaller part but the last of an object."""
_ROUND = 1 << 20
_PARTS_PER_REQUEST = 6
"""So that, at the end, requests that find nothing left to send wait for a sixth of the time at most."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What objects and parts should and may be.

    Attributes:
        pack: bytes of an object, unless one entry alone is larger.
        part: bytes of a part, unless the object would have too many.
        max_parts: of one object.
        max_part: most bytes of a part.
    """

    pack: int
    part: int
    max_parts: int
    max_part: int


@dataclass(frozen=True, slots=True)
class PackPlan:
    """One object to write.

    Attributes:
        entries: indices into the list that was planned, in the order of their bytes.
        starts: first byte of each entry in the object.
        header: the object's first bytes.
        size: of the whole object, in bytes.
        part_size: of its upload; `size <= part_size` means a single request.
    """

    entries: tuple[int, ...]
    starts: tuple[int, ...]
    header: bytes
    size: int
    part_size: int


class Segment(msgspec.Struct, frozen=True, gc=False):
    """Bytes `start` to `end` (exclusive) of entry `entry`; `entry` is -1 for the pack's header."""

    entry: int
    start: int
    end: int


def plan_packs(entries: Sequence[PackEntry], attempt: str, sizes: Sizes) -> list[PackPlan]:
    """Spreads `entries` over objects of nearly equal size, at most `sizes.pack` unless one entry alone is larger.

    Entries keep their order from object to object, so that neighbours in the state dict are neighbours in storage.
    """
    return [_pack(entries, group, attempt, sizes) for group in _groups(entries, pack_size=sizes.pack) if group]


def shared_part_size(total: int, *, most: int, requests: int, block: int) -> int:
    """Bytes of a part if `total` bytes, of all objects together, are to keep so many requests busy until the end.

    Args:
        most: never more, and where there is much no less; at least 5 MiB. What fits into one goes as one.
        block: the part is a multiple of it; a power of two.
    """
    if total <= most:
        return most
    unit = max(_ROUND, block)
    share = max(_MIN_PART, -(-total // (requests * _PARTS_PER_REQUEST)))
    return min(most, -(-share // unit) * unit)


def part_size_for(size: int, sizes: Sizes) -> int:
    """`sizes.part`, doubled until `size` bytes fit into `sizes.max_parts` parts; at last parts as large as may be.

    Raises:
        Unsupported: not even those would do.
    """
    if size > sizes.max_parts * sizes.max_part:
        raise Unsupported(f"a tensor of {size} bytes is more than one object can hold", hint="shard it further")
    part_size = sizes.part
    while -(-size // part_size) > sizes.max_parts:
        part_size *= 2
    return min(part_size, sizes.max_part)


def shares(sizes: Sequence[int], requests: int, *, at_once: int) -> list[int]:
    """Requests that each of several uploads may have in flight: by its bytes, and at least one.

    Where no more than `at_once` go beside each other, all `requests` are given out, by the method of largest
    remainders; of more, each gets at least what an equal part of them would be.
    """
    total = max(1, sum(sizes))
    if len(sizes) > at_once:
        return [max(1, requests // at_once, requests * size // total) for size in sizes]
    found = [max(1, requests * size // total) for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda n: -(requests * sizes[n] % total))
    for number in by_remainder[: max(0, requests - sum(found))]:
        found[number] += 1
    return found


def parts(plan: PackPlan, nbytes: Sequence[int]) -> Iterator[list[Segment]]:
    """The segments of each part of `plan`, in order; `nbytes` are the sizes of all planned entries."""
    part: list[Segment] = []
    room = plan.part_size
    for entry, length in _pieces(plan, nbytes):
        at = 0
        while at < length:
            take = min(room, length - at)
            part.append(Segment(entry, at, at + take))
            at += take
            room -= take
            if room == 0:
                yield part
                part, room = [], plan.part_size
    if part:
        yield part


def _pieces(plan: PackPlan, nbytes: Sequence[int]) -> Iterator[tuple[int, int]]:
    yield -1, len(plan.header)
    for entry in plan.entries:
        yield entry, nbytes[entry]


def _groups(entries: Sequence[PackEntry], *, pack_size: int) -> Iterator[list[int]]:
    """Consecutive runs of about the same number of bytes."""
    rest = sum(entry.nbytes for entry in entries)
    target = _even_share(rest, pack_size)
    group: list[int] = []
    filled = header_bound = 0
    for index, entry in enumerate(entries):
        over_header = header_bound + header_bytes_bound(entry) > MAX_HEADER_BYTES // 2
        # Closes where the boundary is nearer before this entry than after it.
        over_size = 2 * filled + entry.nbytes > 2 * target or filled + entry.nbytes > pack_size
        if group and (over_size or over_header):
            yield group
            rest -= filled
            # Anew for each, so that what one leaves to the others does not pile up in the last.
            target = _even_share(rest, pack_size)
            group, filled, header_bound = [], 0, 0
        group.append(index)
        filled += entry.nbytes
        header_bound += header_bytes_bound(entry)
    yield group


def _even_share(total: int, pack_size: int) -> int:
    """Bytes for each of as few packs as hold `total`."""
    return -(-total // max(1, -(-total // pack_size)))


def _pack(entries: Sequence[PackEntry], group: list[int], attempt: str, sizes: Sizes) -> PackPlan:
    # Wide elements first, so that every tensor is aligned to its element size, as safetensors' own writer does.
    order = sorted(group, key=lambda index: -SIZES.get(entries[index].dtype, 1))
    head = header([entries[index] for index in order], attempt)
    starts = []
    at = len(head)
    for index in order:
        starts.append(at)
        at += entries[index].nbytes
    return PackPlan(tuple(order), tuple(starts), head, at, part_size_for(at, sizes))
