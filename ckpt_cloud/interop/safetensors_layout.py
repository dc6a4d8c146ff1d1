"""Safetensors files as they are to be written: headers, Hugging Face's file names, and the index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ckpt_cloud.errors import InvalidOption, UnknownKey, UnsupportedTensor
from ckpt_cloud.format.pack import HEADER_ALIGNMENT, MAX_HEADER_BYTES
from ckpt_cloud.interop.objects import Data, ObjectPlan
from ckpt_cloud.interop.safetensors_files import NAMES, SINGLE_KEY, SUFFIX

MAX_SHARD_BYTES = 5_000_000_000
"""Of one file, as in Hugging Face's libraries."""
RESERVED = "__metadata__"
"""In a header: what is said of the file."""


def nbytes_of(entry: TensorStorageMetadata) -> int:
    """Of the whole tensor."""
    dtype: torch.dtype = entry.properties.dtype
    return math.prod(entry.size) * dtype.itemsize


def check_types(tensors: Mapping[str, TensorStorageMetadata], url: str) -> None:
    """Refuses tensors that safetensors cannot hold.

    Raises:
        UnsupportedTensor: naming them.
    """
    check_names(tensors)
    types = {fqn: entry.properties.dtype for fqn, entry in tensors.items()}
    others = [f"{fqn} ({dtype})" for fqn, dtype in types.items() if dtype not in NAMES]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise UnsupportedTensor(f"safetensors has no such elements: {', '.join(others[:5])}{more}", url)


def check_names(names: Iterable[str]) -> None:
    """Refuses the one name that a header has another use for.

    Raises:
        UnsupportedTensor: a tensor has it.
    """
    if RESERVED in names:
        raise UnsupportedTensor(f"safetensors has no room for a tensor of the name {RESERVED!r}", hint="rename it")


def header(entries: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file of tensors back to back: name, element type, shape.

    Raises:
        UnsupportedTensor: more than a header can hold.
    """
    table: dict[str, object] = {RESERVED: {"format": "pt", **metadata}}
    at = 0
    for name, dtype, shape in entries:
        nbytes = math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = msgspec.json.encode(table)
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise UnsupportedTensor(f"a header of {len(text)} bytes is more than safetensors allows", hint="use more files")
    return len(text).to_bytes(8, "little") + text


def file_plan(key: str, tensors: Mapping[str, TensorStorageMetadata], fqns: Sequence[str]) -> ObjectPlan:
    """One file of whole tensors."""
    data = []
    for fqn in fqns:
        shape = tuple(tensors[fqn].size)
        data.append(Data(fqn, tensors[fqn].properties.dtype, (0,) * len(shape), shape))
    first = header([(each.fqn, each.dtype, each.sizes) for each in data], {})
    return ObjectPlan(key, len(first) + sum(each.nbytes for each in data), [first, *data])


def split(
    tensors: Mapping[str, TensorStorageMetadata], max_shard_bytes: int, mapping: Mapping[str, int] | None
) -> dict[str, list[str]]:
    """Which tensors go into which file.

    Args:
        max_shard_bytes: files are filled in order up to it; a larger tensor has one of its own.
        mapping: number of the file by key, from 1; goes before `max_shard_bytes`.

    Raises:
        UnknownKey: a tensor that `mapping` does not have.
        InvalidOption: as `check_split`.
    """
    check_split(max_shard_bytes, mapping)
    groups = by_mapping(tensors, mapping) if mapping is not None else by_size(tensors, max_shard_bytes)
    if len(groups) <= 1 and mapping is None:
        return {SINGLE_KEY: groups[0] if groups else []}
    return {file_name(number, len(groups)): group for number, group in enumerate(groups, 1)}


def check_split(max_shard_bytes: int, mapping: Mapping[str, int] | None) -> None:
    """Refuses sizes and numbers that no files can have.

    Raises:
        InvalidOption: naming it.
    """
    if max_shard_bytes < 1:
        raise InvalidOption(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    if mapping is not None and any(number < 1 for number in mapping.values()):
        raise InvalidOption("fqn_to_index_mapping counts files from 1")


def check_mapped(names: Iterable[str], mapping: Mapping[str, int]) -> None:
    """Refuses tensors that `mapping` has no file for.

    Raises:
        UnknownKey: naming the first.
    """
    for name in names:
        if name not in mapping:
            raise UnknownKey(f"fqn_to_index_mapping does not say in which file {name!r} goes")


def file_name(number: int, count: int) -> str:
    """As Hugging Face's libraries name the files of a model."""
    return f"model-{number:05d}-of-{count:05d}{SUFFIX}"


def by_size(tensors: Mapping[str, TensorStorageMetadata], max_shard_bytes: int) -> list[list[str]]:
    """Keys in order, in groups of at most `max_shard_bytes`."""
    groups: list[list[str]] = []
    room = 0
    for fqn, entry in tensors.items():
        size = nbytes_of(entry)
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(fqn)
        room -= size
    return groups


def by_mapping(tensors: Mapping[str, TensorStorageMetadata], mapping: Mapping[str, int]) -> list[list[str]]:
    """Keys in groups by their number in `mapping`; every number up to the largest has one."""
    check_mapped(tensors, mapping)
    groups: list[list[str]] = [[] for _ in range(max(mapping.values(), default=1))]
    for fqn in tensors:
        groups[mapping[fqn] - 1].append(fqn)
    return groups


def index(files: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorStorageMetadata]) -> bytes:
    """The index of a repository: which file holds which key."""
    weights = {fqn: name for name, fqns in files.items() for fqn in fqns}
    size = sum(nbytes_of(tensors[fqn]) for fqn in weights)
    return json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=2).encode()
