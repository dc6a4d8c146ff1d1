"""How a manifest lies in its object: pages that can be fetched apart, and a root that names each with its digest.

    8 bytes      magic, `CKPTCLD2`
    pages        MessagePack, one after another: objects, then tensors, items and paths, each sorted by name
    root         MessagePack: what belongs to the whole checkpoint, and where each page lies
    8 bytes      length of the root, little-endian

`COMMIT` holds the root's length and SHA-256; the root holds those of the pages, so that every byte is covered and a
reader of one tensor fetches the root, one page of tensors and a few of objects.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import msgspec

from ckpt_cloud.errors import CorruptManifest

MAGIC = b"CKPTCLD2"
MAGIC_1 = b"CKPTCLD1"
"""Of manifests in one piece, which version 1 had."""
LENGTH_BYTES = 8
"""Of the root's length at the end."""
PAGE_BYTES = 128 << 10
"""About this much is in one page; an entry that is larger has one of its own."""

T = TypeVar("T")
Buffer = bytes | memoryview


class Page(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where a page lies.

    Attributes:
        first: name of its first entry, or for objects the number of it.
        start, size: of its bytes in the manifest's object.
        sha256: of these bytes.
    """

    first: str | int
    start: int
    size: int
    sha256: bytes


class Root(msgspec.Struct, frozen=True, kw_only=True):
    """What belongs to the whole checkpoint, as in `Manifest`, and the pages of the rest.

    Attributes:
        counts: how many objects, tensors, items and paths there are.
        has_paths: whether there is a flatten mapping; it may be empty.
        salt: random bytes, in an encrypted checkpoint alone: without them the root's digest, which `COMMIT` shows to
            all, would confirm a guess of what is in it.
    """

    attempt: str
    writer: str
    counts: tuple[int, int, int, int]
    objects: list[Page]
    tensors: list[Page]
    items: list[Page]
    paths: list[Page]
    has_paths: bool
    planner_data: Any = None
    storage_meta: dict[str, Any] | None = None
    dcp_version: str | None = None
    ranks: int | None = None
    user_metadata: dict[str, Any] | None = None
    salt: bytes | msgspec.UnsetType = msgspec.UNSET


_encoder = msgspec.msgpack.Encoder()
_root_decoder = msgspec.msgpack.Decoder(Root)


def is_manifest(data: Buffer) -> bool:
    """Whether `data` begins as a manifest does: one that is encrypted begins at random."""
    return bytes(data[: len(MAGIC)]) in (MAGIC_1, MAGIC)


class Writer:
    """Collects pages, then closes the manifest with its root."""

    def __init__(self) -> None:
        # Both grow with every page.
        self._pieces = [MAGIC]
        self._at = len(MAGIC)

    def rows(self, entries: Sequence[T], size: Callable[[T], int]) -> list[Page]:
        """Pages of entries that are found by number."""
        return [self._page(number, list(group)) for number, group in _groups(entries, size)]

    def columns(self, named: Mapping[str, T], size: Callable[[T], int]) -> list[Page]:
        """Pages of entries that are found by name; each keeps its place in the order in which they came."""
        orders = {name: order for order, name in enumerate(named)}
        names = sorted(named)
        pages = []
        for _, group in _groups(names, lambda name: len(name) + size(named[name])):
            pages.append(self._page(group[0], ([orders[n] for n in group], group, [named[n] for n in group])))
        return pages

    def close(self, root: Root) -> bytes:
        """The whole manifest."""
        body = _encoder.encode(root)
        return b"".join([*self._pieces, body, len(body).to_bytes(LENGTH_BYTES, "little")])

    def _page(self, first: str | int, content: Any) -> Page:
        data = _encoder.encode(content)
        page = Page(first, self._at, len(data), hashlib.sha256(data).digest())
        self._pieces.append(data)
        self._at += len(data)
        return page


def root_length(data: Buffer) -> int:
    """Bytes of the root at the end of a whole manifest, its length included.

    Raises:
        CorruptManifest: it cannot be that long.
    """
    length = int.from_bytes(data[-LENGTH_BYTES:], "little") + LENGTH_BYTES
    if not LENGTH_BYTES < length <= len(data) - len(MAGIC):
        raise CorruptManifest("the manifest's root has an impossible length")
    return length


def decode_root(data: Buffer, size: int) -> Root:
    """The root in the last bytes of a manifest of `size` bytes; its digest was checked before.

    Raises:
        CorruptManifest: not a root, or its pages do not fill the manifest.
    """
    root = decoded(_root_decoder, data[:-LENGTH_BYTES], "root")
    at = len(MAGIC)
    for page in (*root.objects, *root.tensors, *root.items, *root.paths):
        if page.start != at or page.size < 1:
            raise CorruptManifest("the manifest's pages do not follow one another")
        at += page.size
    if at != size - len(data) or min(root.counts) < 0:
        raise CorruptManifest("the manifest's pages do not fill it")
    if not (_ascend(root.objects, int) and all(_ascend(p, str) for p in (root.tensors, root.items, root.paths))):
        raise CorruptManifest("the manifest's pages are not in the order of what is on them")
    return root


def _ascend(pages: Sequence[Page], kind: type) -> bool:
    """Whether an entry can be looked up in `pages` by a key of this kind."""
    firsts: list[Any] = [page.first for page in pages]
    return all(type(first) is kind for first in firsts) and all(low < high for low, high in pairwise(firsts))


def page_of(pages: Sequence[Page], key: str | int) -> Page | None:
    """The page that has `key`, if any has."""
    at = bisect_right(pages, key, key=lambda page: page.first) if pages else 0
    return pages[at - 1] if at else None


def check_pages(data: memoryview, root: Root) -> None:
    """Holds the magic and all pages of a whole manifest against its root.

    Raises:
        CorruptManifest: they are not those that were written.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise CorruptManifest("the manifest has an unknown magic")
    for page in (*root.objects, *root.tensors, *root.items, *root.paths):
        check_page(page, data[page.start : page.start + page.size])


def check_page(page: Page, data: Buffer) -> None:
    """Holds the bytes of a page against the root.

    Raises:
        CorruptManifest: they are not those that were written.
    """
    if len(data) != page.size or hashlib.sha256(data).digest() != page.sha256:
        raise CorruptManifest("a page of the manifest is not the one that its root names")


def decoded(decoder: msgspec.msgpack.Decoder[T], data: Buffer, what: str) -> T:
    """What `decoder` makes of `data`.

    Raises:
        CorruptManifest: nothing.
    """
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptManifest(f"the manifest's {what} does not decode: {error}") from error


def in_order(columns: Iterable[tuple[list[int], list[str], list[T]]], count: int, what: str) -> dict[str, T]:
    """The entries of all pages in the order in which they were saved.

    Raises:
        CorruptManifest: names that are not in ascending order, or places that do not add up.
    """
    places: list[tuple[str, T] | None] = []
    last = None
    for orders, names, entries in columns:
        if not len(orders) == len(names) == len(entries) or len(places) + len(names) > count:
            raise CorruptManifest(f"the manifest's {what} are not as many as its root says")
        places.extend([None] * len(names))
        for name in names:
            if last is not None and name <= last:
                raise CorruptManifest(f"the manifest's {what} are not in order")
            last = name
    if len(places) != count:
        raise CorruptManifest(f"the manifest's {what} are not as many as its root says")
    for orders, names, entries in columns:
        for order, name, entry in zip(orders, names, entries, strict=True):
            if not 0 <= order < count:
                raise CorruptManifest(f"the manifest's {what} have impossible places")
            places[order] = (name, entry)
    if None in places:
        raise CorruptManifest(f"two of the manifest's {what} have one place")
    return dict(places)  # type: ignore[arg-type]


def _groups(entries: Sequence[T], size: Callable[[T], int]) -> Iterator[tuple[int, list[T]]]:
    """Runs of about `PAGE_BYTES`, each with the number of its first entry."""
    first = filled = 0
    for number, entry in enumerate(entries):
        nbytes = size(entry)
        if filled and filled + nbytes > PAGE_BYTES:
            yield first, list(entries[first:number])
            first, filled = number, 0
        filled += nbytes
    if first < len(entries):
        yield first, list(entries[first:])
