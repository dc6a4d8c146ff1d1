"""The manifest: objects with their checksums, DCP's metadata, and where every chunk lies. MessagePack, no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.checksum import digests_length, sums_length
from ckpt_cloud.format.codec import Coded
from ckpt_cloud.format.layout import check_key, is_id
from ckpt_cloud.format.pages import (
    MAGIC_1,
    Buffer,
    Page,
    Root,
    Writer,
    check_pages,
    decode_root,
    decoded,
    in_order,
    root_length,
)
from ckpt_cloud.format.register import ManifestRef

T = TypeVar("T")


class ObjectEntry(msgspec.Struct, array_like=True, frozen=True):
    """One data object.

    Attributes:
        key: relative to the checkpoint's URL.
        size: in bytes.
        block_size: bytes under one checksum.
        sums: CRC32C of every block, little-endian, 4 bytes each.
        e_tag: the store's name for the version that was written, where it gave one.
        digests: SHA-256 of every block, 32 bytes each; empty unless the checkpoint is signed.
    """

    key: str
    size: int
    block_size: int
    sums: bytes
    e_tag: str | None = None
    digests: bytes = b""


def _objects(number: int, coded: Coded | None) -> list[int]:
    """Of what lies in object `number`, unless it is coded or stored nowhere."""
    if coded is not None:
        return coded.objects
    return [number] if number >= 0 else []


class Chunk(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Part of a tensor, stored in row-major order.

    Attributes:
        offsets, sizes: its box in the tensor, one number per dimension.
        object: index into the manifest's objects; -1 for an empty chunk, which is stored nowhere, and for a coded one.
        start: first byte in the object.
        coded: where and how the chunk is stored, if it is not in row-major order as it is.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    object: int
    start: int
    coded: Coded | None = None

    @property
    def objects(self) -> list[int]:
        """Numbers of the objects that it lies in."""
        return _objects(self.object, self.coded)

    def moved(self, places: dict[int, int] | int) -> Chunk:
        """The same with other numbers of objects: looked up, or counted from a number."""
        number = places + self.object if isinstance(places, int) else places.get(self.object, -1)
        coded = self.coded and self.coded.moved(places)
        return Chunk(self.offsets, self.sizes, number if self.object >= 0 else -1, self.start, coded)


class TensorEntry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A tensor of the state dict.

    Attributes:
        dtype: torch's name without the `torch.`.
        shape: of the whole tensor.
        chunks: together they cover it.
        requires_grad: as DCP's metadata records it.
    """

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]
    requires_grad: bool = False


class ItemEntry(msgspec.Struct, array_like=True, frozen=True):
    """A non-tensor item as DCP's planner serialized it: inline, or at `start` in an object; or a plain value.

    Attributes:
        nbytes: of the item.
        value: a list of one value, lowered by `format.plain`; None for an item that was serialized.
        coded: where and how it is stored, if it is not as it is; then `object` is -1.
    """

    inline: bytes | None
    object: int = -1
    start: int = 0
    nbytes: int = 0
    value: list[Any] | None = None
    coded: Coded | None = None

    @property
    def objects(self) -> list[int]:
        """Numbers of the objects that it lies in."""
        return _objects(self.object, self.coded)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that a reader needs beyond the data.

    Attributes:
        attempt: id of the save.
        writer: name and version of the library that wrote it.
        paths: DCP's flatten mapping, key → path in the nested state dict.
        planner_data: what a custom planner added instead, lowered by `format.plain`.
        storage_meta: DCP's `StorageMeta`: checkpoint id, save id, modules.
        ranks: how many ranks saved beside each other without coordination, each a checkpoint of its own; None for the
            one checkpoint of all ranks.
        user_metadata: what the saver added: tags, a git commit, a configuration; plain JSON values.
    """

    attempt: str
    writer: str
    objects: list[ObjectEntry]
    tensors: dict[str, TensorEntry]
    items: dict[str, ItemEntry]
    paths: dict[str, tuple[str | int, ...]] | None = None
    planner_data: Any = None
    storage_meta: dict[str, Any] | None = None
    dcp_version: str | None = None
    ranks: int | None = None
    user_metadata: dict[str, Any] | None = None


_whole_decoder = msgspec.msgpack.Decoder(Manifest)
"""Of version 1, which had everything in one piece."""
_objects_decoder = msgspec.msgpack.Decoder(list[ObjectEntry])
_tensors_decoder = msgspec.msgpack.Decoder(tuple[list[int], list[str], list[TensorEntry]])
_items_decoder = msgspec.msgpack.Decoder(tuple[list[int], list[str], list[ItemEntry]])
_paths_decoder = msgspec.msgpack.Decoder(tuple[list[int], list[str], list[tuple[str | int, ...]]])


def encode(manifest: Manifest, *, salt: bytes = b"") -> bytes:
    """The manifest as it is stored (`format.pages`).

    Args:
        salt: random bytes for its root, if it is to be encrypted.
    """
    pages = Writer()
    paths = manifest.paths or {}
    tensors = {name: _tensor_row(entry) for name, entry in manifest.tensors.items()}
    items = {name: _item_row(entry) for name, entry in manifest.items.items()}
    root = Root(
        attempt=manifest.attempt,
        writer=manifest.writer,
        counts=(len(manifest.objects), len(manifest.tensors), len(manifest.items), len(paths)),
        objects=pages.rows(manifest.objects, lambda e: len(e.sums) + len(e.digests) + 150),
        tensors=pages.columns(tensors, _bytes_of_row),
        items=pages.columns(
            items, lambda row: 16 + len(row[0] or b"") + _size_of(row[4]) + _size_of(row[5] if row[5:] else None)
        ),
        paths=pages.columns(paths, lambda path: sum(map(len, map(str, path))) + 2 * len(path)),
        has_paths=manifest.paths is not None,
        planner_data=manifest.planner_data,
        storage_meta=manifest.storage_meta,
        dcp_version=manifest.dcp_version,
        ranks=manifest.ranks,
        user_metadata=manifest.user_metadata,
        salt=salt or msgspec.UNSET,
    )
    return pages.close(root)


def _tensor_row(entry: TensorEntry) -> tuple[Any, ...]:
    """As it is stored: a chunk that is not coded says nothing of it, so that its bytes are those of older versions."""
    chunks = [
        (c.offsets, c.sizes, c.object, c.start) if c.coded is None else (c.offsets, c.sizes, c.object, c.start, c.coded)
        for c in entry.chunks
    ]
    return entry.dtype, entry.shape, chunks, entry.requires_grad


def _bytes_of_row(row: tuple[Any, ...]) -> int:
    """About what a tensor takes."""
    chunks = row[2]
    coded = sum(_size_of(chunk[4]) for chunk in chunks if len(chunk) > 4)
    return 32 + 32 * len(chunks) + coded


def _item_row(entry: ItemEntry) -> tuple[Any, ...]:
    row = entry.inline, entry.object, entry.start, entry.nbytes, entry.value
    return row if entry.coded is None else (*row, entry.coded)


def is_coded(manifest: Manifest) -> bool:
    """Whether anything in it is coded, which a reader must know."""
    return any(item.coded is not None for item in manifest.items.values()) or any(
        chunk.coded is not None for tensor in manifest.tensors.values() for chunk in tensor.chunks
    )


def reference(key: str, data: bytes) -> ManifestRef:
    """What `COMMIT` says of the encoded manifest at `key`.

    Raises:
        CorruptManifest: it is none.
    """
    if data[: len(MAGIC_1)] == MAGIC_1:
        return ManifestRef(key, len(data), hashlib.sha256(data).hexdigest())
    length = root_length(data)
    return ManifestRef(key, len(data), hashlib.sha256(data[-length:]).hexdigest(), length)


def check(data: Buffer, expected: ManifestRef, url: str) -> None:
    """Holds every byte of a manifest against what `COMMIT` says of it.

    Raises:
        CorruptManifest: its size or a digest differs.
    """
    view = memoryview(data)
    root = view[-expected.root :] if expected.root else view
    if len(view) != expected.size or hashlib.sha256(root).hexdigest() != expected.sha256:
        raise CorruptManifest("the manifest is not the one that COMMIT names: its size or SHA-256 differs", url)
    if expected.root:
        with _at(url):
            check_pages(view, decode_root(root, expected.size))


def decode(data: Buffer, expected: ManifestRef, url: str) -> Manifest:
    """The manifest in `data`, after its size, digests, magic, keys and checksum tables were checked.

    Raises:
        CorruptManifest: any of them is wrong.
    """
    check(data, expected, url)
    view = memoryview(data)
    with _at(url):
        manifest = _paged(view, expected) if expected.root else _whole(view)
    if not is_id(manifest.attempt):
        raise CorruptManifest("the manifest has a malformed attempt id", url)
    for entry in manifest.objects:
        _check_object(entry, url)
    return manifest


def without_digests(manifest: Manifest) -> Manifest:
    """For one who trusts no signature: to them digests say no more than checksums, and take longer."""
    return msgspec.structs.replace(
        manifest, objects=[msgspec.structs.replace(entry, digests=b"") for entry in manifest.objects]
    )


def in_bytes(objects: Iterable[ObjectEntry]) -> list[ObjectEntry]:
    """As if every byte were a block of its own, for reads that are not verified: nothing is read beside them."""
    return [msgspec.structs.replace(entry, block_size=1) for entry in objects]


@contextmanager
def _at(url: str) -> Iterator[None]:
    """Adds to an error where the manifest lies."""
    try:
        yield
    except CorruptManifest as error:
        raise CorruptManifest(error.message, url) from error


def decode_tensors(page: Buffer) -> dict[str, TensorEntry]:
    """The tensors of a page that was checked.

    Raises:
        CorruptManifest: it does not decode.
    """
    _, names, entries = decoded(_tensors_decoder, page, "page of tensors")
    return dict(zip(names, entries, strict=False))


def decode_items(pages: Iterable[Buffer], names: Collection[str]) -> dict[str, ItemEntry]:
    """The items `names` of pages that were checked.

    Raises:
        CorruptManifest: a page does not decode.
    """
    found: dict[str, ItemEntry] = {}
    for page in pages:
        _, all_names, entries = decoded(_items_decoder, page, "page of items")
        found |= {name: entry for name, entry in zip(all_names, entries, strict=False) if name in names}
    return found


def objects_of(tensors: Mapping[str, TensorEntry], items: Mapping[str, ItemEntry]) -> list[int]:
    """Numbers of the objects that tensors and items lie in, in ascending order."""
    numbers = {number for entry in tensors.values() for chunk in entry.chunks for number in chunk.objects}
    numbers |= {number for entry in items.values() for number in entry.objects}
    return sorted(number for number in numbers if number >= 0)


def part(
    root: Root,
    tensors: Mapping[str, TensorEntry],
    items: Mapping[str, ItemEntry],
    objects: Iterable[tuple[str | int, Buffer]],
    url: str,
) -> Manifest:
    """A manifest of some tensors and items, with only the objects that they lie in.

    Args:
        objects: pages that were checked, each with the number of its first object.

    Raises:
        CorruptManifest: a page does not decode, or lacks an object.
    """
    known: dict[int, ObjectEntry] = {}
    for first, page in objects:
        entries: list[ObjectEntry] = decoded(_objects_decoder, page, "page of objects")
        known |= dict(enumerate(entries, int(first)))
    numbers = objects_of(tensors, items)
    if not set(numbers) <= set(known):
        raise CorruptManifest("the manifest names an object that it does not have", url)
    moved = {number: place for place, number in enumerate(numbers)}
    return Manifest(
        attempt=root.attempt,
        writer=root.writer,
        objects=[known[number] for number in numbers],
        tensors={name: _moved(entry, moved) for name, entry in tensors.items()},
        items={name: _moved_item(entry, moved) for name, entry in items.items()},
        ranks=root.ranks,
        user_metadata=root.user_metadata,
    )


def _moved(entry: TensorEntry, places: dict[int, int]) -> TensorEntry:
    chunks = [chunk.moved(places) for chunk in entry.chunks]
    return TensorEntry(entry.dtype, entry.shape, chunks, entry.requires_grad)


def _moved_item(entry: ItemEntry, places: dict[int, int]) -> ItemEntry:
    coded = entry.coded and entry.coded.moved(places)
    return msgspec.structs.replace(entry, object=places.get(entry.object, -1), coded=coded)


def _whole(data: memoryview) -> Manifest:
    if bytes(data[: len(MAGIC_1)]) != MAGIC_1:
        raise CorruptManifest("the manifest has an unknown magic")
    return decoded(_whole_decoder, data[len(MAGIC_1) :], "body")


def _paged(data: memoryview, expected: ManifestRef) -> Manifest:
    root = decode_root(data[-expected.root :], expected.size)

    def contents(pages: Sequence[Page], decoder: msgspec.msgpack.Decoder[T]) -> list[T]:
        return [decoded(decoder, data[page.start : page.start + page.size], "page") for page in pages]

    objects = [entry for page in contents(root.objects, _objects_decoder) for entry in page]
    if len(objects) != root.counts[0]:
        raise CorruptManifest("the manifest's objects are not as many as its root says")
    paths = in_order(contents(root.paths, _paths_decoder), root.counts[3], "paths")
    return Manifest(
        attempt=root.attempt,
        writer=root.writer,
        objects=objects,
        tensors=in_order(contents(root.tensors, _tensors_decoder), root.counts[1], "tensors"),
        items=in_order(contents(root.items, _items_decoder), root.counts[2], "items"),
        paths=paths if root.has_paths else None,
        planner_data=root.planner_data,
        storage_meta=root.storage_meta,
        dcp_version=root.dcp_version,
        ranks=root.ranks,
        user_metadata=root.user_metadata,
    )


def _size_of(value: Any) -> int:
    return 0 if value is None else len(msgspec.msgpack.encode(value))


def _check_object(entry: ObjectEntry, url: str) -> None:
    check_key(entry.key)
    sane = entry.key.endswith(".safetensors") and entry.size >= 0 and entry.block_size > 0
    if sane and entry.digests:
        sane = len(entry.digests) == digests_length(entry.size, entry.block_size)
    if not sane or len(entry.sums) != sums_length(entry.size, entry.block_size):
        raise CorruptManifest(f"the manifest's entry of {entry.key} contradicts itself", url)
