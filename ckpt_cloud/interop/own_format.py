"""From any reader to a checkpoint of ours: each batch of chunks is saved as a rank of its own would save it.

chunks ─► batches ─► read one ahead ─► a writer each ─► one manifest and one commit
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_cloud.errors import CommitStateUnknown
from ckpt_cloud.interop.dcp_layout import chunks
from ckpt_cloud.interop.objects import Data
from ckpt_cloud.interop.pull import Pull, Puller
from ckpt_cloud.options import MIB
from ckpt_cloud.writer import ObjectStoreWriter

BATCH_BYTES = 128 * MIB
"""Read, and written, at once; the next batch is read while one is written."""
ITEMS_AT_ONCE = 256

Values = dict[MetadataIndex, torch.Tensor | io.BytesIO]


class OwnFormat:
    """Writes what `puller` reads to `url` as a checkpoint of ours.

    Args:
        options: keyword arguments of `ObjectStoreWriter`.
    """

    def __init__(self, puller: Puller, url: str, options: Mapping[str, Any]) -> None:
        self._puller = puller
        self._url = url
        self._options = options
        self.writers: list[ObjectStoreWriter] = []

    def write(self) -> None:
        """All of it, and the commit.

        Raises:
            As `ckpt_cloud.save`; what was uploaded is then deleted, unless it may have been committed.
        """
        coordinator = self._writer()
        coordinator.set_up_storage_writer(is_coordinator=True)
        try:
            results = self._write_batches()
        except BaseException:
            # Interrupts too: nothing can be committed yet.
            self._discard()
            raise
        try:
            coordinator.finish(self._metadata(), results)
        except CommitStateUnknown:
            raise
        except Exception:
            self._discard()
            raise

    def _discard(self) -> None:
        for writer in self.writers:
            writer.discard()

    def _write_batches(self) -> list[list[WriteResult]]:
        results: list[list[WriteResult]] = []
        batches = list(self._batches())
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self._read, batches[0]) if batches else None
            for number in range(len(batches)):
                assert coming is not None, "one is read ahead"
                values = coming.result()
                coming = ahead.submit(self._read, batches[number + 1]) if number + 1 < len(batches) else None
                results.append(self._save(values))
        for at in range(0, len(self._puller.items), ITEMS_AT_ONCE):
            items = self._puller.pull_items(self._puller.items[at : at + ITEMS_AT_ONCE])
            results.append(self._save({MetadataIndex(fqn): io.BytesIO(value) for fqn, value in items.items()}))
        return results

    def _batches(self) -> Iterator[list[Data]]:
        batch: list[Data] = []
        size = 0
        for fqn, entry in self._puller.tensors.items():
            for data in chunks(fqn, entry, BATCH_BYTES):
                if batch and size + data.nbytes > BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
                batch.append(data)
                size += data.nbytes
        if batch:
            yield batch

    def _read(self, batch: Sequence[Data]) -> Values:
        tensors = [torch.empty(data.sizes, dtype=data.dtype) for data in batch]
        pulls = [Pull(data.fqn, data.offsets, data.sizes, each) for data, each in zip(batch, tensors, strict=True)]
        self._puller.pull([pull for pull in pulls if pull.target.numel()])
        named = zip(batch, tensors, strict=True)
        return {MetadataIndex(data.fqn, torch.Size(data.offsets)): each for data, each in named}

    def _save(self, values: Values) -> list[WriteResult]:
        writer = self._writer()
        writer.set_up_storage_writer(is_coordinator=False)
        plan = writer.prepare_local_plan(SavePlan([self._item(index, value) for index, value in values.items()]))
        done = writer.write_data(plan, _Planner(values))
        results: list[WriteResult] = done.value()
        return results

    def _item(self, index: MetadataIndex, value: torch.Tensor | io.BytesIO) -> WriteItem:
        if isinstance(value, io.BytesIO):
            return WriteItem(index, WriteItemType.BYTE_IO)
        assert index.offset is not None, "tensors have a place"
        box = ChunkStorageMetadata(index.offset, value.size())
        told = TensorWriteData(box, TensorProperties(dtype=value.dtype), self._puller.tensors[index.fqn].size)
        return WriteItem(index, WriteItemType.SHARD, tensor_data=told)

    def _metadata(self) -> Metadata:
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for fqn, entry in self._puller.tensors.items():
            boxes = [
                ChunkStorageMetadata(torch.Size(data.offsets), torch.Size(data.sizes))
                for data in chunks(fqn, entry, BATCH_BYTES)
            ]
            properties = TensorProperties(dtype=entry.properties.dtype, requires_grad=entry.properties.requires_grad)
            entries[fqn] = TensorStorageMetadata(properties, entry.size, boxes)
        entries |= {fqn: BytesStorageMetadata() for fqn in self._puller.items}
        return Metadata(entries, planner_data=self._puller.metadata.planner_data)

    def _writer(self) -> ObjectStoreWriter:
        writer = ObjectStoreWriter(self._url, **self._options)
        self.writers.append(writer)
        return writer


class _Planner(DefaultSavePlanner):
    """Resolves the values of one batch."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        self._values = values

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._values[write_item.index]
