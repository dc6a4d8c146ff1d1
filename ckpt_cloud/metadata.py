"""DCP's `Metadata` and write results to the manifest, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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

from ckpt_cloud.errors import CorruptManifest, IncompleteSave, StateMismatch
from ckpt_cloud.format import plain
from ckpt_cloud.format.manifest import Chunk, ItemEntry, Manifest, ObjectEntry, TensorEntry
from ckpt_cloud.tensors import dtype_name, dtype_of


class Stored(msgspec.Struct, array_like=True, frozen=True):
    """Where one item of a plan was stored: inline, or `nbytes` at `start` in the rank's object number `object`."""

    inline: bytes | None
    object: int
    start: int
    nbytes: int


class Uploaded(msgspec.Struct, frozen=True):
    """A rank's first result: what all its results share, sent once, and its own place.

    Attributes:
        attempt: the id that the rank minted for this save.
        objects: that it wrote.
        first: place of the first item.
    """

    attempt: str
    objects: list[ObjectEntry]
    first: Stored


def build(
    metadata: Metadata, results: Sequence[Sequence[WriteResult]], *, attempt: str, writer: str, ranks: int | None
) -> tuple[Manifest, str]:
    """The manifest of a save, and the oldest id under which its data was written.

    Args:
        ranks: for a rank's own checkpoint, how many ranks have one.

    Raises:
        IncompleteSave: a chunk of the plan that no rank reports, or that two claim.
        Unsupported: planner data that is not plain.
    """
    objects: list[ObjectEntry] = []
    places: dict[MetadataIndex, Stored] = {}
    oldest = attempt
    for rank, rank_results in enumerate(results):
        uploaded = _uploaded(rank, rank_results)
        if uploaded is not None:
            _collect(rank, rank_results, uploaded, len(objects), places)
            objects += uploaded.objects
            oldest = min(oldest, uploaded.attempt)
    tensors: dict[str, TensorEntry] = {}
    items: dict[str, ItemEntry] = {}
    for fqn, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            tensors[fqn] = _tensor(fqn, entry, places)
        else:
            items[fqn] = _item(_place(MetadataIndex(fqn), places))
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
    for fqn, tensor in manifest.tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        properties = TensorProperties(dtype=dtype_of(tensor.dtype), requires_grad=tensor.requires_grad)
        entries[fqn] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    entries |= {fqn: BytesStorageMetadata() for fqn in manifest.items}
    planner_data = manifest.paths if manifest.paths is not None else plain.raise_up(manifest.planner_data)
    meta = StorageMeta(**manifest.storage_meta) if manifest.storage_meta else None
    return Metadata(entries, planner_data=planner_data, storage_meta=meta, version=manifest.dcp_version)


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


def _uploaded(rank: int, results: Sequence[WriteResult]) -> Uploaded | None:
    if not results:
        return None
    first = results[0].storage_data
    if not isinstance(first, Uploaded):
        raise IncompleteSave(f"rank {rank} did not report its objects", hint="use one ckpt_cloud writer on all ranks")
    return first


def _collect(
    rank: int,
    results: Iterable[WriteResult],
    uploaded: Uploaded,
    first_object: int,
    places: dict[MetadataIndex, Stored],
) -> None:
    """Adds a rank's places, with object numbers counted over all ranks."""
    for result in results:
        stored = result.storage_data.first if isinstance(result.storage_data, Uploaded) else result.storage_data
        if stored.object >= len(uploaded.objects):
            raise IncompleteSave(f"rank {rank} reports {result.index.fqn!r} in an object that it did not write")
        if stored.object >= 0:
            stored = msgspec.structs.replace(stored, object=stored.object + first_object)
        other = places.setdefault(result.index, stored)
        if other is not stored and _is_empty(other):
            places[result.index] = stored
        elif other is not stored and not _is_empty(stored):
            raise IncompleteSave(f"two ranks wrote the same chunk of {result.index.fqn!r}; nothing was committed")


def _is_empty(stored: Stored) -> bool:
    return stored.inline is None and stored.nbytes == 0


def _place(index: MetadataIndex, places: dict[MetadataIndex, Stored]) -> Stored:
    if index not in places:
        where = "" if index.offset is None else f" at {tuple(index.offset)}"
        raise IncompleteSave(f"no rank wrote {index.fqn!r}{where}; nothing was committed", hint="save again")
    return places[index]


def _tensor(fqn: str, entry: TensorStorageMetadata, places: dict[MetadataIndex, Stored]) -> TensorEntry:
    chunks = []
    for chunk in entry.chunks:
        stored = _place(MetadataIndex(fqn, chunk.offsets), places)
        chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), stored.object, stored.start))
    properties = entry.properties
    return TensorEntry(dtype_name(properties.dtype), tuple(entry.size), chunks, properties.requires_grad)


def _item(stored: Stored) -> ItemEntry:
    return ItemEntry(stored.inline, stored.object, stored.start, stored.nbytes)


def _planner_data(data: Any) -> tuple[dict[str, tuple[str | int, ...]] | None, Any]:
    """DCP's flatten mapping as it is, anything else lowered to plain values."""
    if isinstance(data, dict) and all(isinstance(k, str) and _is_path(v) for k, v in data.items()):
        return data, None
    return None, plain.lower(data, "the planner's data")


def _is_path(value: object) -> bool:
    return isinstance(value, tuple) and all(type(step) in (str, int) for step in value)


def _storage_meta(meta: StorageMeta) -> dict[str, Any]:
    identity = None if meta.checkpoint_id is None else str(meta.checkpoint_id)
    return {
        "checkpoint_id": identity,
        "save_id": meta.save_id,
        "load_id": meta.load_id,
        "modules": list(meta.modules),
    }
