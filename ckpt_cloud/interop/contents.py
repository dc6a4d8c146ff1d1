"""What a checkpoint of another format holds and where, whatever the format."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_cloud.errors import CorruptFile
from ckpt_cloud.format.structure import tiles
from ckpt_cloud.planning.slices import Ints


class Encoding(Enum):
    """How the bytes of a box lie in its file."""

    PLAIN = auto()
    """In row-major order, from `start`."""
    RECORD = auto()
    """A `torch.save` file of one tensor, from `start`: DCP's `.distcp` files are made of them."""
    MEMBER = auto()
    """A member of a zip file whose header is at `start`: a storage of a `torch.save` file."""


@dataclass(frozen=True, slots=True)
class File:
    """An object that holds data.

    Attributes:
        key: relative to the checkpoint's URL.
        size: in bytes.
        version: the store's name for what was there when the checkpoint was opened; reads are pinned to it.
    """

    key: str
    size: int
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Box:
    """A stored part of a tensor.

    Attributes:
        offsets, sizes: its place in the tensor, one number per dimension.
        file: index into the files.
        start, nbytes: what is stored for it.
        transforms: descriptors of DCP's extensions that the stored bytes went through.
        inner: MEMBER: first byte of the tensor in the storage.
        strides: MEMBER: in elements.
    """

    offsets: Ints
    sizes: Ints
    file: int
    start: int
    nbytes: int
    encoding: Encoding = Encoding.PLAIN
    transforms: tuple[str, ...] = ()
    inner: int = 0
    strides: Ints = ()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor, whole or in boxes that together cover it."""

    dtype: torch.dtype
    shape: Ints
    boxes: list[Box]

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Item:
    """Something else, as DCP's planner serializes it: `torch.save` bytes, inline or in a file."""

    inline: bytes | None = None
    file: int = -1
    start: int = 0
    nbytes: int = 0
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Contents:
    """A checkpoint of another format as one rank found it; can be sent to the others.

    Attributes:
        url: of the checkpoint.
        format: `dcp`, `safetensors` or `torch`.
        under: URL that the files' keys are relative to.
        paths: DCP's flatten mapping, where the format has one.
        own: whether it is one rank's own, saved without coordination.
    """

    url: str
    format: str
    under: str
    files: list[File]
    tensors: dict[str, Tensor]
    items: dict[str, Item] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] | None = None
    own: bool = False

    @property
    def identity(self) -> str:
        """Differs when anything that was found differs."""
        said = repr((self.url, self.files, self.tensors, sorted(self.items.items())))
        return hashlib.sha256(said.encode()).hexdigest()

    def to_dcp(self) -> Metadata:
        """DCP's view."""
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for fqn, tensor in self.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in tensor.boxes]
            properties = TensorProperties(dtype=tensor.dtype)
            entries[fqn] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        entries |= {fqn: BytesStorageMetadata() for fqn in self.items}
        meta = StorageMeta(checkpoint_id=self.url, load_id=self.identity)
        return Metadata(entries, planner_data=self.paths, storage_meta=meta)

    def file_of(self, box: Box | Item) -> File:
        """The file that a box or an item lies in."""
        return self.files[box.file]

    def where(self, file: int) -> str:
        """URL of a file, for messages."""
        return f"{self.under}/{self.files[file].key}"


def checked_box(fqn: str, box: Box, shape: Ints, files: list[File]) -> Box:
    """`box`, if it lies inside its tensor and its file.

    Raises:
        CorruptFile: it does not.
    """
    alike = len(box.offsets) == len(box.sizes) == len(shape)
    if not alike or any(o < 0 or s < 0 or o + s > n for o, s, n in zip(box.offsets, box.sizes, shape, strict=True)):
        raise CorruptFile(f"{fqn!r} of shape {shape} has a chunk at {box.offsets} of sizes {box.sizes}")
    entry = files[box.file]
    if box.start < 0 or box.nbytes < 0 or box.start + box.nbytes > entry.size:
        end = box.start + box.nbytes
        raise CorruptFile(f"{fqn!r} should lie at bytes {box.start} to {end} of {entry.key}, which has {entry.size}")
    return box


def check_cover(fqn: str, shape: Ints, boxes: Iterable[Box]) -> None:
    """Refuses boxes that leave a part of the tensor out, or have one twice: one of them is not what belongs there.

    Raises:
        CorruptFile: they do.
    """
    # What is stored twice in one place, as when ranks saved replicas, is the same tensor.
    filled = list({(box.offsets, box.sizes): box for box in boxes if math.prod(box.sizes)}.values())
    if not tiles(shape, filled):
        stored = sum(math.prod(box.sizes) for box in filled)
        wanted = math.prod(shape)
        fault = "parts overlap" if stored > wanted else "parts overlap and leave a hole" if stored == wanted else ""
        said = f"whose {fault}" if fault else f"of which {stored} are stored"
        raise CorruptFile(f"{fqn!r} has {wanted} elements, {said}")


def plain(value: Any, kind: type, what: str) -> Any:
    """`value`, if it is a `kind`; for parts of files that anybody may have written.

    Raises:
        CorruptFile: it is not.
    """
    if type(value) is not kind:
        raise CorruptFile(f"{what} should be a {kind.__name__} and is a {type(value).__name__}")
    return value
