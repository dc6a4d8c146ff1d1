"""`ckpt_cloud.open`: a checkpoint as a mapping whose tensors are fetched when they are asked for."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import EllipsisType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ckpt_cloud.encryption import EncryptionKey, Keyring
from ckpt_cloud.errors import SliceOutOfBounds, UnknownKey
from ckpt_cloud.events import Report
from ckpt_cloud.interop.any_format import AnyReader, reader_for
from ckpt_cloud.interop.pull import Pull, Puller, opened_item
from ckpt_cloud.options import StoreOptions, TransferOptions
from ckpt_cloud.signing import TrustedKey

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


def open(  # noqa: A001 - as ckpt_cloud.open
    url: str | os.PathLike[str],
    *,
    keys: Collection[str] | None = None,
    dequantize: torch.dtype | None = None,
    block_size: int = 128,
    extensions: ExtensionRegistry | None = None,
    store: StoreOptions | None = None,
    transfer: TransferOptions | None = None,
    memory_budget: int | None = None,
    trust: bool = False,
    trusted_keys: TrustedKey | Iterable[TrustedKey] | None = None,
    require_signature: bool | None = None,
    encryption_key: EncryptionKey | Keyring | None = None,
    require_encryption: bool | None = None,
    **store_options: Any,
) -> Checkpoint:
    """Opens a checkpoint of any format that is known, and fetches nothing yet but what it holds.

    Ours, DCP's own, safetensors files and Hugging Face repositories, and `torch.save` files. No process group is
    needed, and nothing read from the checkpoint runs code.

    Args:
        url: of the checkpoint; a directory or a single file.
        keys: of what will be asked for. The mapping then holds no others, and of a checkpoint of ours with a million
            chunks some hundred KiB are fetched to find them.
        dequantize, block_size: as for `ForeignReader`; for other formats than ours.
        extensions: DCP's registry of stream transforms, where others than its own were used.
        store, transfer, memory_budget, trust: as for `ObjectStoreReader`.
        trusted_keys, require_signature, require_encryption: likewise; with them only checkpoints of ours are opened,
            since no other format is signed or encrypted.
        encryption_key: likewise; other formats are opened with it too, as they are.

    Returns:
        A mapping from key to tensor or value.

    Raises:
        CheckpointNotFound: nothing that can be read is there.
        CorruptManifest, CorruptFile, MissingObject, Unsupported, UntrustedItem, ...: it cannot be read.
    """
    settings = {"store": store, "transfer": transfer, "memory_budget": memory_budget, "trust": trust, **store_options}
    demands = {
        "trusted_keys": trusted_keys,
        "require_signature": require_signature,
        "require_encryption": require_encryption or None,
    }
    foreign = {"dequantize": dequantize, "block_size": block_size, "extensions": extensions}
    own = {"encryption_key": Keyring.of(encryption_key)}
    # Locals may be shown beside a traceback.
    del encryption_key
    return Checkpoint(reader_for(url, settings, foreign, demands, own=own, keys=keys), keys)


class Checkpoint(Mapping[str, Any]):
    """A checkpoint that was opened: keys in the order in which they were saved, values fetched when asked for.

    `checkpoint["model.weight"]` is the whole tensor, or the value of what is no tensor. `get_slice` gives a part.
    """

    def __init__(self, reader: AnyReader, keys: Collection[str] | None = None) -> None:
        self._reader = reader
        self._puller = Puller(reader, keys)

    def __repr__(self) -> str:
        size = sum(_nbytes(entry) for entry in self._puller.tensors.values())
        what = f"{len(self._puller.tensors)} tensors of {size} bytes, {len(self._puller.items)} items"
        return f"<Checkpoint {self.url}: {self.format}, {what}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open; for symmetry with files."""

    @property
    def url(self) -> str:
        """Of the checkpoint, in normal form."""
        return self._reader.checkpoint_id or ""

    @property
    def format(self) -> str:
        """`ckpt-cloud`, `dcp`, `safetensors` or `torch`."""
        return getattr(self._reader, "format", "") or "ckpt-cloud"

    @property
    def report(self) -> Report:
        """What has been fetched so far: bytes, requests."""
        return self._reader.report

    def __len__(self) -> int:
        return len(self._puller.metadata.state_dict_metadata)

    def __iter__(self) -> Iterator[str]:
        return iter(self._puller.metadata.state_dict_metadata)

    def __contains__(self, key: object) -> bool:
        return key in self._puller.metadata.state_dict_metadata

    def __getitem__(self, key: str) -> Any:
        """The whole tensor, or the value of an item; an item that could run code is refused unless `trust` is on.

        Raises:
            UnknownKey: there is none of that name.
            UntrustedItem: it is an item that could run code.
        """
        if key in self._puller.tensors:
            return self.get_slice(key)[...]
        self._check(key)
        return opened_item(self._puller.pull_items([key])[key])

    @property
    def tensors(self) -> list[str]:
        """Keys of tensors."""
        return list(self._puller.tensors)

    @property
    def items_only(self) -> list[str]:
        """Keys of everything else."""
        return list(self._puller.items)

    def get_slice(self, key: str) -> TensorSlice:
        """The tensor `key`, of which nothing is fetched until it is indexed: `get_slice("w")[10:20, :]`.

        Raises:
            UnknownKey: there is no tensor of that name.
        """
        if key not in self._puller.tensors:
            self._check(key)
            raise UnknownKey(f"{key!r} is not a tensor", self.url, f"take it whole: checkpoint[{key!r}]")
        return TensorSlice(self._puller, key, self.url)

    def _check(self, key: str) -> None:
        if key in self:
            return
        near = difflib.get_close_matches(str(key), list(self), n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "list(checkpoint) has all keys"
        raise UnknownKey(f"the checkpoint has no {key!r}", self.url, hint)


class TensorSlice:
    """A tensor of an opened checkpoint; indexing it fetches what the index covers, and no more.

    Attributes:
        key: its name.
    """

    def __init__(self, puller: Puller, key: str, url: str) -> None:
        self.key = key
        self._puller = puller
        self._url = url
        self._entry = puller.tensors[key]

    def __repr__(self) -> str:
        return f"<TensorSlice {self.key}: {self.dtype}, {tuple(self.shape)}>"

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self._entry.size

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        dtype: torch.dtype = self._entry.properties.dtype
        return dtype

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return _nbytes(self._entry)

    def __getitem__(self, index: Index) -> torch.Tensor:
        """The part that `index` covers: integers, slices with positive steps, and `...`.

        Raises:
            SliceOutOfBounds: it reaches outside the tensor; slices are not cut to fit.
        """
        sides = self._sides(index)
        sizes = tuple(max(0, stop - start) for start, stop, _, _ in sides)
        box = torch.empty(sizes, dtype=self.dtype)
        if math.prod(sizes):
            self._puller.pull([Pull(self.key, tuple(side[0] for side in sides), sizes, box)])
        steps = tuple(0 if single else slice(None, None, step) for _, _, step, single in sides)
        return box[steps]

    def _sides(self, index: Index) -> list[tuple[int, int, int, bool]]:
        """Start, stop, step, and whether the dimension goes, for each dimension."""
        given = [_plain(each) for each in (index if isinstance(index, tuple) else (index,))]
        dots = [at for at, each in enumerate(given) if each is Ellipsis]
        missing = len(self.shape) - (len(given) - len(dots))
        if len(dots) > 1 or missing < 0:
            raise self._outside(index)
        at = dots[0] if dots else len(given)
        given[at : at + 1] = [slice(None)] * missing
        return [self._side(each, size, index) for each, size in zip(given, self.shape, strict=True)]

    def _side(self, each: Any, size: int, index: Index) -> tuple[int, int, int, bool]:
        if isinstance(each, slice) and all(part is None or type(part) is int for part in (each.start, each.stop)):
            step = 1 if each.step is None else each.step
            start, stop = (0 if each.start is None else each.start), (size if each.stop is None else each.stop)
            inside = -size <= start <= size and -size <= stop <= size
            if inside and type(step) is int and step > 0:
                return start % size if start < 0 else start, stop % size if stop < 0 else stop, step, False
        elif type(each) is int and -size <= each < size:
            return each % size, each % size + 1, 1, True
        raise self._outside(index)

    def _outside(self, index: Any) -> SliceOutOfBounds:
        hint = "integers, slices with positive steps and ... inside the shape are understood"
        message = f"{self.key!r} of shape {tuple(self.shape)} has no part [{_shown(index)}]"
        return SliceOutOfBounds(message, self._url, hint)


def _plain(each: Any) -> Any:
    """numpy's integers, also in slices, as Python's."""
    if isinstance(each, slice):
        return slice(_plain(each.start), _plain(each.stop), _plain(each.step))
    return int(each) if isinstance(each, np.integer) else each


def _shown(index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(_shown_part(part) for part in parts)


def _shown_part(part: Any) -> str:
    if isinstance(part, slice):
        ends = ["" if each is None else str(each) for each in (part.start, part.stop)]
        return ":".join(ends if part.step is None else [*ends, str(part.step)])
    return "..." if part is Ellipsis else repr(part)[:40]


def _nbytes(entry: TensorStorageMetadata) -> int:
    dtype: torch.dtype = entry.properties.dtype
    return math.prod(entry.size) * dtype.itemsize
