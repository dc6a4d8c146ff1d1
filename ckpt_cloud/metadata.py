"""DCP's `Metadata` and write results to the manifest, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_cloud.errors import CkptCloudError, CorruptManifest, IncompleteSave, StateMismatch
from ckpt_cloud.format import plain
from ckpt_cloud.format.codec import Coded
from ckpt_cloud.format.manifest import Chunk, ItemEntry, Manifest, ObjectEntry, TensorEntry
from ckpt_cloud.tensors import dtype_name, dtype_of


class Stored(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Where one item of a plan was stored: `nbytes` at `start` in the rank's object number `object`, or right here.

    Attributes:
        inline: the item as it was serialized.
        value: a list of the item itself, lowered by `format.plain`.
        coded: where and how it was stored, if it is not as it is; `object` is then -1.
        chunks: that it was stored as, if they are several; `object` is then -1.
    """

    inline: bytes | None
    object: int
    start: int
    nbytes: int
    value: list[Any] | None = None
    coded: Coded | None = None
    chunks: list[Chunk] | None = None

    @classmethod
    def in_chunks(cls, chunks: list[Chunk]) -> Stored:
        """Of a tensor that was stored as several."""
        return cls(None, -1, 0, 0, chunks=chunks)

    def counted_from(self, first: int) -> Stored:
        """The same with numbers of objects that begin at `first`."""
        if self.chunks is not None:
            return Stored.in_chunks([chunk.moved(first) for chunk in self.chunks])
        if self.coded is not None:
            return msgspec.structs.replace(self, coded=self.coded.moved(first))
        return msgspec.structs.replace(self, object=self.object + first) if self.object >= 0 else self

    @property
    def last_object(self) -> int:
        """The greatest number of an object that it lies in; -1 for none."""
        if self.chunks is not None:
            return max(number for chunk in self.chunks for number in chunk.objects)
        return self.object if self.coded is None else max(self.coded.objects)


NOWHERE = Stored(None, -1, 0, 0)
"""Of a chunk without elements."""
_Index = tuple[str, tuple[int, ...] | None]
"""Name and, of a tensor's chunk, offsets."""


class Uploaded(msgspec.Struct, array_like=True, frozen=True):
    """What a rank did: one result for all items of its plan.

    Attributes:
        attempt: the id that the rank minted for this save.
        objects: that it wrote.
        names, offsets, places: of each item; an item that is no tensor has no offsets.
    """

    attempt: str
    objects: list[ObjectEntry]
    names: list[str]
    offsets: list[tuple[int, ...] | None]
    places: list[Stored]

    def encode(self) -> bytes:
        """As it goes to the coordinator."""
        return _encoder.encode(self)

    @staticmethod
    def decode(data: bytes) -> Uploaded:
        """The inverse of `encode`."""
        return _decoder.decode(data)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Uploaded)


def build(
    metadata: Metadata,
    results: Sequence[Sequence[WriteResult]],
    *,
    attempt: str,
    writer: str,
    ranks: int | None,
    user_metadata: dict[str, Any] | None = None,
) -> tuple[Manifest, str]:
    """The manifest of a save, and the oldest id under which its data was written.

    Args:
        ranks: for a rank's own checkpoint, how many ranks have one.
        user_metadata: plain JSON values.

    Raises:
        IncompleteSave: a chunk of the plan that no rank reports, or that two claim.
        Unsupported: planner data that is not plain.
    """
    objects: list[ObjectEntry] = []
    places: dict[_Index, Stored] = {}
    oldest = attempt
    for rank, rank_results in enumerate(results):
        if rank_results:
            uploaded = _uploaded(rank, rank_results)
            _collect(rank, uploaded, len(objects), places)
            objects += uploaded.objects
            oldest = min(oldest, uploaded.attempt)
    tensors: dict[str, TensorEntry] = {}
    items: dict[str, ItemEntry] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensors[fqn] = _tensor(fqn, entry, places)
        else:
            stored = _place((fqn, None), places)
            items[fqn] = ItemEntry(
                stored.inline, stored.object, stored.start, stored.nbytes, stored.value, stored.coded
            )
    paths, other = _planner_data(metadata.planner_data)
    meta = metadata.storage_meta
    manifest = Manifest(
        attempt=attempt,
        writer=writer,
        objects=objects,
        tensors=tensors,
        items=items,
        paths=paths,
        planner_data=other,
        storage_meta=None if meta is None else _storage_meta(meta),
        dcp_version=metadata.version,
        ranks=ranks,
        user_metadata=user_metadata,
    )
    return manifest, oldest


def to_dcp(manifest: Manifest) -> Metadata:
    """DCP's view of a manifest.

    Raises:
        CorruptManifest: it holds what DCP has no place for, such as sizes of more than 63 bits.
        UnsupportedTensor: element types that this torch does not know.
    """
    try:
        return _to_dcp(manifest)
    except (TypeError, OverflowError) as error:
        raise CorruptManifest(f"the manifest is not one of DCP's metadata: {error}") from error


def _to_dcp(manifest: Manifest) -> Metadata:
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    alike: dict[tuple[str, bool], TensorProperties] = {}
    for fqn, tensor in manifest.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        kind = (tensor.dtype, tensor.requires_grad)
        properties = alike.get(kind)
        if properties is None:
            dtype = dtype_of(tensor.dtype)
            properties = alike[kind] = TensorProperties(dtype=dtype, requires_grad=tensor.requires_grad)
        entries[fqn] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    entries |= {fqn: BytesStorageMetadata() for fqn in manifest.items}
    planner_data = manifest.paths if manifest.paths is not None else plain.raise_up(manifest.planner_data)
    meta = StorageMeta(**manifest.storage_meta) if manifest.storage_meta else None
    return Metadata(entries, planner_data=planner_data, storage_meta=meta, version=manifest.dcp_version)


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_here() -> int:
    """This process's rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def check_own_shards(manifest: Manifest, items: Sequence[ReadItem]) -> None:
    """Refuses a load from a rank's own checkpoint that would leave a part of a tensor as it was.

    Such a checkpoint holds this rank's shards only, so it can only fill the very same shards.

    Raises:
        StateMismatch: another number of ranks, or another sharding.
    """
    hint = "load with as many ranks and the same sharding, or save with use_collectives=True to be free in both"
    if manifest.ranks != world_size():
        message = f"each of {manifest.ranks} ranks saved its own checkpoint; there are {world_size()} now"
        raise StateMismatch(message, hint=hint)
    for item in items:
        entry = manifest.tensors.get(item.storage_index.fqn)
        if entry is None or sum(math.prod(chunk.sizes) for chunk in entry.chunks) == math.prod(entry.shape):
            continue
        chunk = find_chunk(entry, item.storage_index)
        if tuple(item.dest_index.offset or ()) != chunk.offsets or tuple(item.lengths) != chunk.sizes:
            message = f"{item.dest_index.fqn!r} was sharded otherwise when this rank saved its own checkpoint"
            raise StateMismatch(message, hint=hint)


def find_chunk(entry: TensorEntry, index: MetadataIndex) -> Chunk:
    """The stored chunk that `index` names; its hint is tried before a search.

    Raises:
        CorruptManifest: there is none.
    """
    offsets = tuple(index.offset or ())
    if index.index is not None and index.index < len(entry.chunks) and entry.chunks[index.index].offsets == offsets:
        return entry.chunks[index.index]
    for chunk in entry.chunks:
        if chunk.offsets == offsets:
            return chunk
    raise CorruptManifest(f"the checkpoint has no chunk of {index.fqn!r} at {offsets}")


def _uploaded(rank: int, results: Sequence[WriteResult]) -> Uploaded:
    data = results[0].storage_data
    if len(results) != 1 or not isinstance(data, bytes):
        raise IncompleteSave(f"rank {rank} did not report its objects", hint="use one ckpt_cloud writer on all ranks")
    return Uploaded.decode(data)


def _collect(rank: int, uploaded: Uploaded, first_object: int, places: dict[_Index, Stored]) -> None:
    """Adds a rank's places, with object numbers counted over all ranks."""
    count = len(uploaded.objects)
    for name, offsets, stored in zip(uploaded.names, uploaded.offsets, uploaded.places, strict=True):
        if stored.last_object >= count:
            raise IncompleteSave(f"rank {rank} reports {name!r} in an object that it did not write")
        place = stored.counted_from(first_object) if first_object else stored
        other = places.setdefault((name, offsets), place)
        if other is place or _is_empty(place):
            continue
        if not _is_empty(other):
            raise IncompleteSave(f"two ranks wrote the same chunk of {name!r}; nothing was committed")
        places[name, offsets] = place


def _is_empty(stored: Stored) -> bool:
    return stored.inline is None and stored.nbytes == 0 and stored.value is None and stored.chunks is None


def _place(index: _Index, places: dict[_Index, Stored]) -> Stored:
    found = places.get(index)
    if found is None:
        where = "" if index[1] is None else f" at {index[1]}"
        raise IncompleteSave(f"no rank wrote {index[0]!r}{where}; nothing was committed", hint="save again")
    return found


def _tensor(fqn: str, entry: TensorStorageMetadata, places: dict[_Index, Stored]) -> TensorEntry:
    chunks: list[Chunk] = []
    for chunk in entry.chunks:
        offsets = tuple(chunk.offsets)
        stored = _place((fqn, offsets), places)
        if stored.chunks is not None:
            chunks += stored.chunks
        else:
            chunks.append(Chunk(offsets, tuple(chunk.sizes), stored.object, stored.start, stored.coded))
    properties = entry.properties
    return TensorEntry(dtype_name(properties.dtype), tuple(entry.size), chunks, properties.requires_grad)


def _planner_data(data: Any) -> tuple[dict[str, tuple[str | int, ...]] | None, Any]:
    """DCP's flatten mapping as it is, anything else lowered to plain values."""
    if isinstance(data, dict) and all(isinstance(k, str) and _is_path(v) for k, v in data.items()):
        return data, None
    return None, plain.lower(data, "the planner's data")


def _is_path(value: object) -> bool:
    return isinstance(value, tuple) and {str, int}.issuperset(map(type, value))


def _storage_meta(meta: StorageMeta) -> dict[str, Any]:
    identity = None if meta.checkpoint_id is None else str(meta.checkpoint_id)
    return {
        "checkpoint_id": identity,
        "save_id": meta.save_id,
        "load_id": meta.load_id,
        "modules": list(meta.modules),
    }


class Unavailable(Metadata):
    """Metadata of a checkpoint that could not be opened: raises the reason when it is used.

    DCP replaces an exception of `read_metadata` by an `AssertionError`; this keeps it typed.
    """

    def __init__(self, error: CkptCloudError) -> None:
        self.error = error

    def __getattribute__(self, name: str) -> Any:
        if name in {"state_dict_metadata", "planner_data", "storage_data", "storage_meta"}:
            raise object.__getattribute__(self, "error")
        return object.__getattribute__(self, name)
