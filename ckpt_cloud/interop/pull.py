"""Boxes and items out of any checkpoint that a `StorageReader` reads, without a state dict."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader

from ckpt_cloud.errors import StateMismatch
from ckpt_cloud.planning.slices import Ints


@dataclass(frozen=True, slots=True)
class Pull:
    """A box of a tensor, and what it is to fill: a tensor of `sizes`."""

    fqn: str
    offsets: Ints
    sizes: Ints
    target: torch.Tensor


class Pulls(Protocol):
    """Fills boxes from wherever the tensors are."""

    def pull(self, pulls: Sequence[Pull]) -> None:
        """Fills all targets."""
        ...


_ARCHIVE = b"PK"
"""Of a zip file."""


class Puller:
    """A checkpoint that was opened by `reader`, and what it holds."""

    def __init__(self, reader: StorageReader, keys: Collection[str] | None = None) -> None:
        self._reader = reader
        self.metadata: Metadata = reader.read_metadata()
        if keys is not None:
            self.metadata = _only(self.metadata, keys)
        entries = self.metadata.state_dict_metadata
        self.tensors = {fqn: entry for fqn, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self.items = [fqn for fqn, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]

    def pull(self, pulls: Sequence[Pull]) -> None:
        """Fills all targets, in one go."""
        reads = [
            replace(item, dest_index=MetadataIndex(pull.fqn, item.dest_index.offset, number))
            for number, pull in enumerate(pulls)
            for item in self._reads(pull)
        ]
        self._reader.read_data(LoadPlan(reads), _Into(pulls)).wait()

    def pull_items(self, fqns: Iterable[str]) -> dict[str, bytes]:
        """Items as DCP's planner serialized them."""
        into = _Into(())
        index = {fqn: MetadataIndex(fqn) for fqn in fqns}
        none = torch.Size((0,))
        reads = [ReadItem(LoadItemType.BYTE_IO, at, none, at, none, none) for at in index.values()]
        self._reader.read_data(LoadPlan(reads), into).wait()
        return into.items

    def _reads(self, pull: Pull) -> list[ReadItem]:
        box = ChunkStorageMetadata(torch.Size(pull.offsets), torch.Size(pull.sizes))
        found: list[ReadItem] = create_read_items_for_chunk_list(pull.fqn, self.tensors[pull.fqn], [box])
        stored, wanted = sum(math.prod(item.lengths) for item in found), math.prod(pull.sizes)
        if stored < wanted:
            hint = "ask for a part that this rank saved, or load with as many ranks and the same sharding"
            raise StateMismatch(
                f"{stored} of the {wanted} elements of {pull.fqn!r} are in this rank's own checkpoint", hint=hint
            )
        return found


def _only(metadata: Metadata, keys: Collection[str]) -> Metadata:
    entries = {key: entry for key, entry in metadata.state_dict_metadata.items() if key in keys}
    return replace(metadata, state_dict_metadata=entries)


class _Into(LoadPlanner):
    """Gives the reader the targets of `pulls`, and keeps the items that it brings."""

    def __init__(self, pulls: Sequence[Pull]) -> None:
        self._pulls = pulls
        self.items: dict[str, bytes] = {}

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        number = read_item.dest_index.index
        assert number is not None, "pull numbers them"
        target = self._pulls[number].target
        for dim, (offset, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, size)
        return target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.items[read_item.dest_index.fqn] = _in_an_archive(value.getvalue())

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It is the target."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to plan."""

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


def _in_an_archive(value: bytes) -> bytes:
    """The item in `torch.save`'s present form; our reader gives plain values in the older one, quicker to open."""
    if value.startswith(_ARCHIVE):
        return value
    saved = io.BytesIO()
    torch.save(opened_item(value), saved)
    return saved.getvalue()


def opened_item(value: bytes) -> Any:
    """The value of an item that a reader gave, which has screened it unless it was told to trust it."""
    return torch.load(io.BytesIO(value), map_location="cpu", weights_only=False)  # noqa: TID251 - screened
