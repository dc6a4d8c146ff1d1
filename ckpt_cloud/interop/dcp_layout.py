"""DCP's own files as they are to be written: `.distcp` files of `torch.save` records, and the pickled `.metadata`."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_cloud.interop.objects import Data, ObjectPlan, Segment
from ckpt_cloud.interop.torch_layout import Placeholder, layout
from ckpt_cloud.options import GIB, MIB
from ckpt_cloud.planning.slices import Ints

_FILE = re.compile(r"__\d+_(\d+)\.distcp")

FILE_BYTES = 1 * GIB
"""Of one `.distcp` file, about."""
CHUNK_BYTES = 512 * MIB
"""A larger tensor is cut into chunks along its first dimension: DCP's own reader takes a chunk whole into memory."""


def file_number(key: str) -> int | None:
    """Number of a file of DCP's own, of whichever rank; None for anything else."""
    found = _FILE.fullmatch(key)
    return int(found[1]) if found else None


class DcpLayout:
    """A checkpoint of DCP's format: files to write, in order, and then the metadata.

    Args:
        first: number of the first file, where others are there already.
    """

    def __init__(self, tensors: Mapping[str, TensorStorageMetadata], paths: Any, url: str, *, first: int = 0) -> None:
        self._tensors = tensors
        # Filled as files are planned and items are written.
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._items: list[str] = []
        self._files = first
        self._paths = paths
        self._url = url

    def files(self) -> Iterator[ObjectPlan]:
        """The files of all tensors."""
        segments: list[Segment] = []
        size, key = 0, self._next_key()
        for data in (data for fqn, entry in self._tensors.items() for data in chunks(fqn, entry)):
            nbytes, parts = layout(Placeholder(data))
            if segments and size + nbytes > FILE_BYTES:
                yield ObjectPlan(key, size, segments)
                segments, size, key = [], 0, self._next_key()
            index = MetadataIndex(data.fqn, torch.Size(data.offsets))
            self._storage[index] = _StorageInfo(key, size, nbytes)
            segments += parts
            size += nbytes
        if segments:
            yield ObjectPlan(key, size, segments)

    def add_items(self, items: Mapping[str, bytes]) -> tuple[str, bytes]:
        """Key and content of a file that holds `items`."""
        key, at = self._next_key(), 0
        for fqn, value in items.items():
            self._storage[MetadataIndex(fqn)] = _StorageInfo(key, at, len(value))
            self._items.append(fqn)
            at += len(value)
        return key, b"".join(items.values())

    def metadata(self) -> bytes:
        """The `.metadata` of everything that was planned."""
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            fqn: TensorStorageMetadata(
                TensorProperties(dtype=entry.properties.dtype),
                torch.Size(entry.size),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks(fqn, entry)],
            )
            for fqn, entry in self._tensors.items()
        }
        entries |= {fqn: BytesStorageMetadata() for fqn in self._items}
        meta = StorageMeta(checkpoint_id=self._url)
        told = Metadata(entries, self._paths, self._storage, meta, CURRENT_DCP_VERSION)
        return pickle.dumps(told)

    def _next_key(self) -> str:
        self._files += 1
        return f"__0_{self._files - 1}.distcp"


def chunks(fqn: str, entry: TensorStorageMetadata, limit: int = CHUNK_BYTES) -> Iterator[Data]:
    """A tensor in boxes of at most about `limit` bytes: rows of its first dimension."""
    dtype: torch.dtype = entry.properties.dtype
    shape: Ints = tuple(entry.size)
    row = math.prod(shape[1:]) * dtype.itemsize
    if not shape or not math.prod(shape):
        yield Data(fqn, dtype, (0,) * len(shape), shape)
        return
    step = max(1, limit // row)
    for start in range(0, shape[0], step):
        yield Data(fqn, dtype, (start, *(0 for _ in shape[1:])), (min(step, shape[0] - start), *shape[1:]))
