"""One rank's part of a load plan: what is wanted of stored chunks, and where it goes."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from ckpt_cloud.errors import CorruptManifest, StateMismatch, Unsupported
from ckpt_cloud.format import plain
from ckpt_cloud.format.manifest import ItemEntry, Manifest, ObjectEntry
from ckpt_cloud.items import screened, serialized
from ckpt_cloud.metadata import find_chunk
from ckpt_cloud.planning.load import Want
from ckpt_cloud.selection import SelectiveLoadPlanner
from ckpt_cloud.tensors import Destination, ItemBytes, dtype_of
from ckpt_cloud.transfer.decode import check_codec
from ckpt_cloud.transforms import Undo


@dataclass(frozen=True, slots=True)
class Reads:
    """A rank's read items as wants and destinations; items' bytes are gathered until the planner takes them."""

    wants: list[Want] = field(default_factory=list)
    destinations: list[Destination] = field(default_factory=list)
    tensors: list[tuple[ReadItem, torch.Tensor]] = field(default_factory=list)
    items: list[tuple[ReadItem, bytes | np.ndarray | ItemBytes]] = field(default_factory=list)
    values: list[tuple[ReadItem, Any]] = field(default_factory=list)
    """Items that the manifest holds as plain values, and which therefore need no screening."""

    @classmethod
    def of(cls, items: list[ReadItem], planner: LoadPlanner, manifest: Manifest) -> Reads:
        """Of the items of a plan, whose tensors the planner resolves."""
        reads = cls()
        for item in items:
            if item.type is LoadItemType.BYTE_IO:
                reads._add_item(item, manifest.items[item.storage_index.fqn], manifest.objects)
            else:
                reads._add_tensor(item, planner.resolve_tensor(item), manifest)
        return reads

    @property
    def total_bytes(self) -> int:
        """That are wanted."""
        return sum(math.prod(want.sizes) * want.itemsize for want in self.wants)

    def check_dtypes(self, url: str, *, cast: bool) -> None:
        """Before anything is changed."""
        differ = [
            f"{d.name}: stored {d.dtype}, state {d.target.dtype}"
            for d in self.destinations
            if isinstance(d.target, torch.Tensor) and d.target.dtype != d.dtype
        ]
        if differ and not cast:
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            hint = "give the state the stored dtypes, or convert while loading with ObjectStoreReader(url, cast=True)"
            raise StateMismatch(f"dtypes differ: {'; '.join(differ[:5])}{more}", url, hint)

    def check_codecs(self, undo: Undo, url: str) -> None:
        """Before anything is changed."""
        known: set[tuple[tuple[str, ...], bool]] = set()
        for want, destination in zip(self.wants, self.destinations, strict=True):
            if want.coded is None or (want.coded.codec, want.coded.frame > 0) in known:
                continue
            names, framed = want.coded.codec, want.coded.frame > 0
            try:
                check_codec(names, framed=framed, name=destination.name)
                if not framed:
                    undo.extensions(names, destination.name)
            except Unsupported as error:
                raise Unsupported(error.message, url, error.hint) from None
            known.add((names, framed))

    def hand_over(self, planner: LoadPlanner, *, trust: bool) -> None:
        """Gives everything to the planner, after all items were screened."""
        values = [(item, _bytes(value)) for item, value in self.items]
        if not trust:
            values = [(item, screened(item.storage_index.fqn, value)) for item, value in values]
        for item, tensor in self.tensors:
            planner.commit_tensor(item, tensor)
        if _takes_values(planner):
            for item, value in self.values:
                planner.load_value(item, value)
        else:
            values += [(item, serialized(value)) for item, value in self.values]
        for item, value in values:
            planner.load_bytes(item, io.BytesIO(value))

    def _add_item(self, item: ReadItem, entry: ItemEntry, objects: list[ObjectEntry]) -> None:
        if entry.value:
            self.values.append((item, plain.raise_up(entry.value[0])))
            return
        if entry.inline is not None:
            self.items.append((item, entry.inline))
            return
        whole = (entry.nbytes,)
        if entry.coded is not None:
            gathered = ItemBytes(entry.nbytes)
            self.items.append((item, gathered))
            self.wants.append(Want(-1, 0, 1, whole, (0,), whole, entry.coded))
            self.destinations.append(Destination(item.storage_index.fqn, gathered, torch.uint8))
            return
        if not 0 <= entry.object < len(objects) or not 0 <= entry.nbytes <= objects[entry.object].size:
            raise CorruptManifest(f"item {item.storage_index.fqn!r} lies outside its object")
        target = np.empty(entry.nbytes, dtype=np.uint8)
        self.items.append((item, target))
        self.wants.append(Want(entry.object, entry.start, 1, whole, (0,), whole))
        self.destinations.append(Destination(item.storage_index.fqn, target, torch.uint8))

    def _add_tensor(self, item: ReadItem, target: torch.Tensor, manifest: Manifest) -> None:
        entry = manifest.tensors[item.storage_index.fqn]
        chunk = find_chunk(entry, item.storage_index)
        dtype = dtype_of(entry.dtype)
        if target.requires_grad:
            target = target.detach()
        self.tensors.append((item, target))
        offsets, sizes = tuple(item.storage_offsets), tuple(item.lengths)
        if target.shape != sizes:
            raise StateMismatch(f"{item.dest_index.fqn!r} has shape {tuple(target.shape)}, the read has {sizes}")
        self.wants.append(Want(chunk.object, chunk.start, dtype.itemsize, chunk.sizes, offsets, sizes, chunk.coded))
        self.destinations.append(Destination(item.dest_index.fqn, target, dtype))


def _takes_values(planner: LoadPlanner) -> TypeGuard[SelectiveLoadPlanner]:
    """Whether the planner puts items into the state as they are, but for `torch.load`."""
    hears: Any = getattr(planner.load_bytes, "__func__", None)
    return isinstance(planner, SelectiveLoadPlanner) and hears is SelectiveLoadPlanner.load_bytes


def _bytes(value: bytes | np.ndarray | ItemBytes) -> bytes:
    if isinstance(value, ItemBytes):
        value = value.array
    return value if isinstance(value, bytes) else value.tobytes()
