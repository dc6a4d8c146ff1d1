"""Safetensors files, one or many, with or without the index that Hugging Face model repositories have.

Format: the README of safetensors 0.8 (an 8-byte length, a JSON header of at most 100 MB, data without holes). DCP's own
writers note in `__metadata__` where a shard lies in its tensor (`DCP_SHARDING_INFO`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from ckpt_cloud.errors import CorruptFile, MissingObject, NotFound, RangeNotSatisfiable, UnsupportedTensor
from ckpt_cloud.format.pack import MAX_HEADER_BYTES
from ckpt_cloud.interop.contents import Box, Contents, File, Tensor, check_cover, plain
from ckpt_cloud.interop.dcp_metadata import ints, safe_path
from ckpt_cloud.planning.slices import Ints
from ckpt_cloud.stores import ObjectInfo, ObjectStore
from ckpt_cloud.transfer.structured import all_or_cancel

INDEX_KEY = "model.safetensors.index.json"
INDEX_SUFFIX = ".safetensors.index.json"
SUFFIX = ".safetensors"
SINGLE_KEY = f"model{SUFFIX}"
SHARDING_KEY = "DCP_SHARDING_INFO"
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""Element types whose elements are whole bytes."""
NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "F8_E8M0"}
"""For writing: the one that is left out is not known to safetensors 0.8's own loader for torch."""

_FIRST_READ = 256 << 10
"""Most headers are shorter, so that one request is enough."""
_INDEX_LIMIT = 256 << 20
_MAX_FILES = 100_000


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor, or shard, of a file: `start` counts from the file's first byte."""

    dtype: torch.dtype
    shape: Ints
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header: its entries, and where each lies in its tensor if that is noted."""

    entries: dict[str, Entry]
    offsets: dict[str, Ints] | None


def parse_header(text: bytes | memoryview, size: int, where: str) -> Header:
    """The header of a file of `size` bytes; `text` is its JSON.

    Raises:
        CorruptFile: it does not decode, or its entries overlap, leave holes or lie outside the file.
        UnsupportedTensor: an element type that this torch does not have.
    """
    try:
        table = msgspec.json.decode(text, type=dict[str, dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptFile(f"the header does not decode: {error}", where) from None
    metadata = table.pop("__metadata__", {})
    first = 8 + len(text)
    entries = {key: _entry(key, told, first, where) for key, told in table.items()}
    _check_layout(entries, first, size, where)
    return Header(entries, _offsets(metadata.get(SHARDING_KEY), entries, where))


def _entry(key: str, told: dict[str, Any], first: int, where: str) -> Entry:
    name = plain(told.get("dtype"), str, f"the dtype of {key!r} in {where}")
    if name not in DTYPES:
        raise UnsupportedTensor(f"{key!r} has elements of type {name[:40]!r}, which cannot be read", where)
    shape = ints(told.get("shape"), f"the shape of {key!r} in {where}")
    offsets = ints(told.get("data_offsets"), f"data_offsets of {key!r} in {where}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[name].itemsize:
        raise CorruptFile(f"{key!r} of shape {shape} and type {name} has data_offsets {offsets}", where)
    return Entry(DTYPES[name], shape, first + offsets[0], offsets[1] - offsets[0])


def _check_layout(entries: dict[str, Entry], first: int, size: int, where: str) -> None:
    at = first
    for key, entry in sorted(entries.items(), key=lambda named: (named[1].start, named[1].nbytes)):
        if entry.start != at:
            said = "overlaps the one before it" if entry.start < at else "leaves a hole before it"
            raise CorruptFile(f"{key!r} {said}", where)
        at += entry.nbytes
        if at > size:
            raise CorruptFile(f"{key!r} ends at byte {at} of a file of {size} bytes: it was cut short", where)
    if at != size:
        raise CorruptFile(f"the file has {size} bytes, its header describes {at}", where)


def _offsets(told: Any, entries: dict[str, Entry], where: str) -> dict[str, Ints] | None:
    if told is None:
        return None
    try:
        table = msgspec.json.decode(told, type=dict[str, dict[str, Any]])
    except (msgspec.DecodeError, TypeError, RecursionError) as error:
        raise CorruptFile(f"{SHARDING_KEY} does not decode: {error}", where) from None
    found = {}
    for key, entry in entries.items():
        offsets = ints(table.get(key, {}).get("saved_offsets"), f"saved_offsets of {key!r} in {where}")
        if len(offsets) != len(entry.shape):
            raise CorruptFile(f"{key!r} of shape {entry.shape} has saved_offsets {offsets}", where)
        found[key] = offsets
    return found


async def read_header(store: ObjectStore, info: ObjectInfo) -> Header:
    """The header of one file.

    Raises:
        CorruptFile, UnsupportedTensor: as `parse_header`, or it is not a safetensors file.
    """
    where = f"{store.url}/{info.key}"
    start = await store.get_range(info.key, 0, min(info.size, _FIRST_READ), info.version) if info.size else b""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(MAX_HEADER_BYTES, info.size - 8):
        raise CorruptFile(f"not a safetensors file: its header should have {length} bytes of {info.size}", where)
    text = bytes(start[8 : 8 + length])
    if len(text) < length:
        text += await store.get_range(info.key, 8 + len(text), 8 + length, info.version)
    return parse_header(text, info.size, where)


async def open_safetensors(store: ObjectStore, files: Sequence[ObjectInfo], url: str) -> Contents:
    """All tensors of `files`, which no index describes.

    Raises:
        CorruptFile: two files have one key and do not say that they hold parts of one tensor; or as `parse_header`.
    """
    return await _gather(store, files, url, None)


async def open_indexed(store: ObjectStore, index_key: str, url: str) -> Contents:
    """The tensors that the index at `index_key` names, and no others.

    Raises:
        MissingObject: it names a file that is not there.
        CorruptFile: it names a key that its file does not have, or does not decode; or as `open_safetensors`.
    """
    weights = await read_index(store, index_key)

    async def head(name: str) -> ObjectInfo:
        try:
            return await store.head(name)
        except NotFound:
            keys = [key for key, file in weights.items() if file == name]
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            message = f"the index names {name} for {keys[0]!r}{more}, and it is not there"
            raise MissingObject(message, f"{store.url}/{name}", "download or copy the whole repository") from None

    names = list(dict.fromkeys(weights.values()))
    if len(names) > _MAX_FILES:
        raise CorruptFile(f"the index names {len(names)} files", f"{store.url}/{index_key}")
    files = await _few_at_once([head(name) for name in names])
    return await _gather(store, files, url, weights)


async def read_index(store: ObjectStore, index_key: str) -> dict[str, str]:
    """Which file holds which key, by the index at `index_key`; files are relative to the store's URL.

    Raises:
        NotFound: there is none.
        CorruptFile: as `parse_index`.
    """
    data, _ = await store.get(index_key, limit=_INDEX_LIMIT)
    weights = parse_index(data, f"{store.url}/{index_key}")
    folder = index_key.rpartition("/")[0]
    return {key: f"{folder}/{name}" if folder else name for key, name in weights.items()}


def parse_index(data: bytes, where: str) -> dict[str, str]:
    """The weight map of an index: file by key.

    Raises:
        CorruptFile: it does not decode, names a file outside the repository, or gives a key two files.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            key = next(name for name in names if names.count(name) > 1)
            raise CorruptFile(f"the index names {key!r} more than once", where, "keep the entry of the right file")
        return table

    try:
        index = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"the index does not decode: {error}", where) from None
    weights = plain(index.get("weight_map") if isinstance(index, dict) else None, dict, f"the weight map of {where}")
    return {key: safe_path(plain(name, str, f"the file of {key!r}"), repr(key)) for key, name in weights.items()}


async def _gather(
    store: ObjectStore, infos: Sequence[ObjectInfo], url: str, weights: dict[str, str] | None
) -> Contents:
    async def header(info: ObjectInfo) -> Header:
        try:
            return await read_header(store, info)
        except RangeNotSatisfiable as error:
            raise CorruptFile(f"the file was cut short: {error.message}", f"{store.url}/{info.key}") from None

    headers = await _few_at_once([header(info) for info in infos])
    files = [File(info.key, info.size, info.version) for info in infos]
    if weights is not None:
        _check_index(weights, files, headers, store.url)
    tensors: dict[str, Tensor] = {}
    for number, found in enumerate(headers):
        for key in found.entries:
            if weights is None or key in weights:
                _add(tensors, key, number, found, files)
    for key, tensor in tensors.items():
        _check_overlap(key, tensor, files)
        check_cover(key, tensor.shape, tensor.boxes)
    return Contents(url, "safetensors", store.url, files, tensors)


def _check_index(weights: dict[str, str], files: list[File], headers: list[Header], url: str) -> None:
    by_name = {file.key: header for file, header in zip(files, headers, strict=True)}
    for key, name in weights.items():
        if key not in by_name[name].entries:
            raise CorruptFile(f"the index says that {key!r} is in {name}, which does not have it", f"{url}/{name}")


def _add(tensors: dict[str, Tensor], key: str, number: int, header: Header, files: list[File]) -> None:
    entry = header.entries[key]
    offsets = header.offsets[key] if header.offsets is not None else (0,) * len(entry.shape)
    box = Box(offsets, entry.shape, number, entry.start, entry.nbytes)
    other = tensors.get(key)
    if other is None:
        shape = tuple(offset + size for offset, size in zip(offsets, entry.shape, strict=True))
        tensors[key] = Tensor(entry.dtype, shape, [box])
        return
    alike = other.dtype == entry.dtype and len(other.shape) == len(offsets)
    if header.offsets is None or not alike:
        first, second = files[other.boxes[0].file].key, files[number].key
        raise CorruptFile(f"{key!r} is in {first} and in {second}, which do not hold different parts of it")
    ends = (offset + size for offset, size in zip(offsets, entry.shape, strict=True))
    other.boxes.append(box)
    tensors[key] = Tensor(entry.dtype, tuple(map(max, other.shape, ends)), other.boxes)


def _check_overlap(key: str, tensor: Tensor, files: list[File]) -> None:
    """Shards that have more elements than their tensor overlap."""
    if sum(math.prod(box.sizes) for box in tensor.boxes) > math.prod(tensor.shape):
        named = ", ".join(files[box.file].key for box in tensor.boxes[:4])
        raise CorruptFile(f"the parts of {key!r} overlap; they are in {named}")


async def _few_at_once(work: Sequence[Any], limit: int = 16) -> list[Any]:
    """Runs coroutines in order of their beginning, `limit` at once."""
    results: list[Any] = [None] * len(work)
    queue = iter(enumerate(work))

    async def lane() -> None:
        for number, each in queue:
            results[number] = await each

    try:
        await all_or_cancel([lane() for _ in range(min(limit, len(work)))])
    finally:
        for each in work:
            each.close()
    return results
