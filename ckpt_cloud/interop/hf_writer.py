"""DCP's `StorageWriter` for Hugging Face model repositories, on any store and without a local disk.

write_data   each rank's chunks ─► sharded/shard-…safetensors, with their places noted; or, from one rank, the files
finish       shards ─► files of whole tensors, copied by the store where it can ─► model.safetensors.index.json, last
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckpt_cloud import bridge
from ckpt_cloud.errors import CkptCloudError, IncompleteSave, Unsupported, UnsupportedTensor
from ckpt_cloud.events import Listener, Recorder, Report
from ckpt_cloud.interop.consolidate import Consolidation
from ckpt_cloud.interop.contents import Box, Contents, File, Tensor
from ckpt_cloud.interop.objects import Data, ObjectPlan, ObjectUploader
from ckpt_cloud.interop.pull import Pull, Puller
from ckpt_cloud.interop.reader import ForeignReader
from ckpt_cloud.interop.repository import Repository
from ckpt_cloud.interop.safetensors_files import INDEX_KEY, NAMES, SHARDING_KEY, SINGLE_KEY, SUFFIX
from ckpt_cloud.interop.safetensors_layout import (
    MAX_SHARD_BYTES,
    check_mapped,
    check_names,
    check_split,
    check_types,
    file_plan,
    header,
    index,
    split,
)
from ckpt_cloud.options import StoreOptions, TransferOptions
from ckpt_cloud.session import Settings, location_of
from ckpt_cloud.stores import ObjectStore, open_store, supports
from ckpt_cloud.stores.compose import open_composer
from ckpt_cloud.tensors import check_storable

_SHARDED = "sharded"


@dataclasses.dataclass(frozen=True, slots=True)
class _Stored:
    """Where a chunk was written."""

    key: str
    size: int
    start: int
    nbytes: int


class HuggingFaceWriter(StorageWriter):
    """Saves a model as a Hugging Face repository: `model-0000x-of-0000N.safetensors`, and the index at the end.

    Every rank uploads its shards; the coordinator then puts whole tensors together, by UploadPartCopy on S3 and in
    windows of fixed size elsewhere, and removes the shards. A crash leaves no index, and `sharded/` to delete.

    Args:
        url: of the repository. May be left out and given to DCP as `checkpoint_id`.
        fqn_to_index_mapping: number of the file for each key, from 1; by default files are filled in order.
        max_shard_bytes: of one file, 5 GB by default; not with `fqn_to_index_mapping`.
        consolidate: if False, the shards stay as they are, with their places noted, for readers that know.
        overwrite: replace a repository that is there; with `consolidate` it stays until all shards are uploaded.
        store, transfer, memory_budget, on_event: as for `ObjectStoreWriter`.

    Raises:
        InvalidURL, InvalidOption: at once.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        fqn_to_index_mapping: Mapping[str, int] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        consolidate: bool = True,
        overwrite: bool = False,
        store: StoreOptions | None = None,
        transfer: TransferOptions | None = None,
        memory_budget: int | None = None,
        on_event: Listener | None = None,
        **store_options: Any,
    ) -> None:
        super().__init__()
        self._settings = Settings.of(store, transfer, None, memory_budget, store_options)
        check_split(max_shard_bytes, fqn_to_index_mapping)
        self._mapping = fqn_to_index_mapping
        self._max_shard_bytes = max_shard_bytes
        self._consolidate = consolidate
        self._overwrite = overwrite
        self._on_event = on_event
        # What follows changes: the URL with every reset, the rest with every save.
        self._url = url
        self._recorder = Recorder(on_event)
        self._replaced: Repository | None = None
        self.copied_bytes = 0
        if url is not None:
            location_of(url)

    def __repr__(self) -> str:
        return f"<HuggingFaceWriter {self.checkpoint_id or 'without a URL'}>"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_event": None, "_recorder": Recorder(), "_replaced": None}

    @property
    def checkpoint_id(self) -> str | None:
        """The URL in normal form, or None."""
        return None if self._url is None else location_of(self._url).url

    @property
    def report(self) -> Report:
        """Figures of this rank's last save; `copied_bytes` beside it are what the store copied by itself."""
        return self._recorder.report

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` is a URL, or a path, that can be opened."""
        return supports(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begins a new save, at `checkpoint_id` if given; all options stay."""
        if checkpoint_id is not None:
            self._url = checkpoint_id

    def storage_meta(self) -> StorageMeta | None:
        """What planners may want to record of the storage."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The coordinator looks whether a repository is there.

        Raises:
            CheckpointExists: one is, and `overwrite` is off.
            Unsupported: ranks that do not coordinate.
        """
        if not kwargs.get("use_collectives", True):
            raise Unsupported("a repository is one for all ranks", self.checkpoint_id or "", "leave use_collectives on")
        self._recorder = Recorder(self._on_event)
        self.copied_bytes = 0
        if is_coordinator:
            self._replaced = Repository(self._store())
            self._replaced.claim(overwrite=self._overwrite)
            if not self._consolidate:
                # Shards are written under their names at once, and would mix with those that are there.
                self._replaced.clear()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is.

        Raises:
            UnsupportedTensor: an item that is no tensor, or elements that safetensors has no name for.
            UnknownKey: `fqn_to_index_mapping` lacks a key.
        """
        names = [item.index.fqn for item in plan.items]
        check_names(names)
        if self._mapping is not None:
            check_mapped(names, self._mapping)
        for item in plan.items:
            data = item.tensor_data
            if item.type is WriteItemType.BYTE_IO or data is None:
                hint = "save the model's tensors alone, and the rest with ObjectStoreWriter"
                raise UnsupportedTensor(f"{item.index.fqn!r} is no tensor; safetensors holds nothing else", hint=hint)
            check_storable(item.index.fqn, data.properties.dtype, data.properties.layout)
            if data.properties.dtype not in NAMES:
                raise UnsupportedTensor(f"safetensors has no {data.properties.dtype}, which {item.index.fqn!r} is of")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Numbers the ranks, for the names of their files."""
        return [dataclasses.replace(plan, storage_data=number) for number, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Uploads this rank's chunks."""
        with self._recorder.phase("write"):
            results: list[WriteResult] = []
            for number, items in enumerate(_without_doubles(plan.items), 1):
                name = f"shard-{plan.storage_data:05d}-model-{number:05d}-of-{number:05d}{SUFFIX}"
                results += self._write_shards(f"{_SHARDED}/{name}" if self._consolidate else name, items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_shards(self, key: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        data = [_data(item) for item in items]
        places = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in items}
        entries = [(item.index.fqn, each.dtype, each.sizes) for item, each in zip(items, data, strict=True)]
        first = header(entries, {SHARDING_KEY: json.dumps(places), "DCP_VERSION": "1.0"})
        plan = ObjectPlan(key, len(first) + sum(each.nbytes for each in data), [first, *data])
        source = _Planned({each.fqn: item for each, item in zip(data, items, strict=True)}, planner)
        uploader = ObjectUploader(self._store(), source, self._settings.transfer, self._recorder)
        bridge.run(uploader.upload(plan))
        results, at = [], len(first)
        for item, each in zip(items, data, strict=True):
            results.append(WriteResult(item.index, each.nbytes, _Stored(key, plan.size, at, each.nbytes)))
            at += each.nbytes
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Puts whole tensors together, and writes the index.

        Raises:
            IncompleteSave: a chunk that no rank reports.
        """
        if not self._consolidate:
            return
        with self._recorder.phase("consolidate"):
            stored = {result.index: result.storage_data for rank in results for result in rank}
            entries = metadata.state_dict_metadata
            tensors = {fqn: entry for fqn, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
            check_types(tensors, self.checkpoint_id or "")
            contents = _contents(self._store().url, tensors, stored)
            files = split(tensors, self._max_shard_bytes, self._mapping)
            store = self._store()
            replaced = self._replaced or Repository(store)
            replaced.begin(files)
            work = self._consolidation(store, contents)
            for name, fqns in files.items():
                bridge.run(work.write(file_plan(name, tensors, fqns)))
            self.copied_bytes = work.copied_bytes
            if list(files) != [SINGLE_KEY]:
                bridge.run(store.put(INDEX_KEY, index(files, tensors)))
            replaced.end(files if list(files) == [SINGLE_KEY] else [INDEX_KEY, *files])
            with contextlib.suppress(CkptCloudError):
                bridge.run(store.delete(sorted({place.key for place in stored.values()})))

    def _consolidation(self, store: ObjectStore, contents: Contents) -> Consolidation:
        reader = ForeignReader(self._url, store=self._settings.store, transfer=self._settings.transfer)
        reader.adopt(contents)
        puller = Puller(reader)
        uploader = ObjectUploader(store, puller, self._settings.transfer, self._recorder)
        location = location_of(self._url)
        composer = open_composer(location, self._settings.store, location)
        return Consolidation(contents, puller, uploader, composer, source=store, store=store)

    def _store(self) -> ObjectStore:
        return open_store(location_of(self._url), self._settings.store)


class _Planned:
    """Boxes of what a planner resolves; the last tensor is kept, since its windows follow each other."""

    def __init__(self, items: Mapping[str, WriteItem], planner: SavePlanner) -> None:
        self._items = items
        self._planner = planner
        self._last: tuple[str, torch.Tensor] | None = None

    def pull(self, pulls: Sequence[Pull]) -> None:
        for pull in pulls:
            if self._last is None or self._last[0] != pull.fqn:
                value = self._planner.resolve_data(self._items[pull.fqn])
                assert isinstance(value, torch.Tensor), "items are refused in prepare_local_plan"
                self._last = pull.fqn, value.detach()
            tensor = self._last[1]
            for dim, (offset, size) in enumerate(zip(pull.offsets, pull.sizes, strict=True)):
                tensor = tensor.narrow(dim, offset, size)
            pull.target.copy_(tensor)


def _without_doubles(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Items in as many groups as some key has chunks: a file holds a key once."""
    groups: list[list[WriteItem]] = []
    seen: dict[str, int] = {}
    for item in items:
        number = seen.get(item.index.fqn, 0)
        seen[item.index.fqn] = number + 1
        if number == len(groups):
            groups.append([])
        groups[number].append(item)
    return groups


def _data(item: WriteItem) -> Data:
    told = item.tensor_data
    assert told is not None, "items are refused in prepare_local_plan"
    sizes = tuple(told.chunk.sizes)
    return Data(item.index.fqn, told.properties.dtype, (0,) * len(sizes), sizes)


def _contents(
    url: str, tensors: Mapping[str, TensorStorageMetadata], stored: Mapping[MetadataIndex, _Stored]
) -> Contents:
    """The shards that were written, as something to read."""
    files: dict[str, File] = {place.key: File(place.key, place.size) for place in stored.values()}
    numbers = {key: number for number, key in enumerate(files)}
    found = {}
    for fqn, entry in tensors.items():
        boxes = []
        for chunk in entry.chunks:
            place = stored.get(MetadataIndex(fqn, chunk.offsets))
            if place is None:
                raise IncompleteSave(f"no rank wrote {fqn!r} at {tuple(chunk.offsets)}; there is no index", url)
            boxes.append(Box(tuple(chunk.offsets), tuple(chunk.sizes), numbers[place.key], place.start, place.nbytes))
        found[fqn] = Tensor(entry.properties.dtype, tuple(entry.size), boxes)
    return Contents(url, "safetensors", url, list(files.values()), found)
