"""The manifest: objects with their checksums, DCP's metadata, and where every chunk lies. MessagePack, no pickle."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.checksum import digests_length, sums_length
from ckpt_cloud.format.layout import check_key, is_id
from ckpt_cloud.format.register import ManifestRef

MAGIC = b"CKPTCLD1"
"""First bytes of a manifest; the digit is the major version."""


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


class Chunk(msgspec.Struct, array_like=True, frozen=True):
    """Part of a tensor, stored in row-major order.

    Attributes:
        offsets, sizes: its box in the tensor, one number per dimension.
        object: index into the manifest's objects; -1 for an empty chunk, which is stored nowhere.
        start: first byte in the object.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    object: int
    start: int


class TensorEntry(msgspec.Struct, array_like=True, frozen=True):
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
    """A non-tensor item as DCP's planner serialized it: inline, or at `start` in an object."""

    inline: bytes | None
    object: int = -1
    start: int = 0
    nbytes: int = 0


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


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """Magic and MessagePack body."""
    return MAGIC + _encoder.encode(manifest)


def reference(key: str, data: bytes) -> ManifestRef:
    """What `COMMIT` says of the encoded manifest at `key`."""
    return ManifestRef(key, len(data), hashlib.sha256(data).hexdigest())


def check(data: bytes, expected: ManifestRef, url: str) -> None:
    """Holds `data` against what `COMMIT` says of it.

    Raises:
        CorruptManifest: its size or digest differs.
    """
    if len(data) != expected.size or hashlib.sha256(data).hexdigest() != expected.sha256:
        raise CorruptManifest("the manifest is not the one that COMMIT names: its size or SHA-256 differs", url)


def decode(data: bytes, expected: ManifestRef, url: str) -> Manifest:
    """The manifest in `data`, after its size, digest, magic, keys and checksum tables were checked.

    Raises:
        CorruptManifest: any of them is wrong.
    """
    check(data, expected, url)
    if data[: len(MAGIC)] != MAGIC:
        raise CorruptManifest("the manifest has an unknown magic", url)
    try:
        manifest = _decoder.decode(memoryview(data)[len(MAGIC) :])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptManifest(f"the manifest does not decode: {error}", url) from error
    if not is_id(manifest.attempt):
        raise CorruptManifest("the manifest has a malformed attempt id", url)
    for entry in manifest.objects:
        _check_object(entry, url)
    return manifest


def _check_object(entry: ObjectEntry, url: str) -> None:
    check_key(entry.key)
    sane = entry.key.endswith(".safetensors") and entry.size >= 0 and entry.block_size > 0
    if sane and entry.digests:
        sane = len(entry.digests) == digests_length(entry.size, entry.block_size)
    if not sane or len(entry.sums) != sums_length(entry.size, entry.block_size):
        raise CorruptManifest(f"the manifest's entry of {entry.key} contradicts itself", url)
