"""Files of `torch.save`: their tensors, wherever they are in nested dicts and lists, read by ranges."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ckpt_cloud.errors import CorruptFile, Unsupported
from ckpt_cloud.interop import zips
from ckpt_cloud.interop.contents import Box, Contents, Encoding, File, Item, Tensor
from ckpt_cloud.interop.torch_pickles import View, open_pickle, span
from ckpt_cloud.planning.slices import Ints, strides
from ckpt_cloud.stores import ObjectInfo, ObjectStore

MAGIC = b"PK\x03\x04"
_PICKLE_LIMIT = 1 << 30
_MAX_DEPTH = 200
_MIN_VALUES = 100_000
"""So many may always be there; a larger pickle may hold as many as it has bytes."""
_MAX_INSIDE = 256 << 20
"""Bytes of the tensors within one item, such as a tuple, which is read when the file is opened."""


async def open_torch(store: ObjectStore, info: ObjectInfo, url: str) -> Contents:
    """The tensors and values of a file that `torch.save` wrote.

    Raises:
        UntrustedItem: it would run code.
        Unsupported: the format of before torch 1.6, another byte order, or no dict.
        CorruptFile: it contradicts itself.
    """
    where = f"{store.url}/{info.key}"
    listed = {member.name: member for member in await _directory(store, info, where)}
    root = next((name[: -len("data.pkl")] for name in listed if name.endswith("/data.pkl")), None)
    if root is None:
        raise Unsupported("a zip file without data.pkl; torch.jit archives and others are not read", where)
    await _check_byte_order(store, info, listed, root, where)
    pickled = await _content(store, info, listed[f"{root}data.pkl"], where)
    state = open_pickle(pickled, where)
    if not isinstance(state, dict):
        raise Unsupported(f"the file holds a {type(state).__name__}; only dicts are read", where)
    return await _Opening(store, info, listed, root).contents(state, len(pickled), url)


async def _directory(store: ObjectStore, info: ObjectInfo, where: str) -> list[zips.Member]:
    first = max(0, info.size - zips.TAIL_BYTES)
    tail = bytes(await store.get_range(info.key, first, info.size, info.version))
    start, end = zips.directory_span(tail, info.size, where)
    missing = b"" if start >= first else bytes(await store.get_range(info.key, start, min(first, end), info.version))
    directory = missing + tail[max(0, start - first) : max(0, end - first)]
    return list(zips.members(directory, info.size, where))


async def _content(store: ObjectStore, info: ObjectInfo, member: zips.Member, where: str) -> bytes:
    if not member.stored or member.size > _PICKLE_LIMIT:
        raise CorruptFile(f"{member.name} is compressed or has {member.size} bytes", where)
    end = min(info.size, member.start + zips.LOCAL_BYTES + member.size)
    data = await store.get_range(info.key, member.start, end, info.version)
    begin = zips.data_start(data, where)
    return bytes(data[begin : begin + member.size])


async def _check_byte_order(
    store: ObjectStore, info: ObjectInfo, listed: dict[str, zips.Member], root: str, where: str
) -> None:
    order = listed.get(f"{root}byteorder")
    if order is not None and await _content(store, info, order, where) != b"little":
        raise Unsupported("the file was written on a machine of another byte order", where, "load it with torch.load")


class _Opening:
    def __init__(self, store: ObjectStore, info: ObjectInfo, listed: dict[str, zips.Member], root: str) -> None:
        self._store = store
        self._info = info
        self._listed = listed
        self._root = root
        self._where = f"{store.url}/{info.key}"

    async def contents(self, state: dict[Any, Any], nbytes: int, url: str) -> Contents:
        """Of a pickle of `nbytes`."""
        plain = _StandIns(self._where, max(_MIN_VALUES, nbytes))
        flat, paths = flatten_state_dict(plain.of(state))
        tensors: dict[str, Tensor] = {}
        items: dict[str, Item] = {}
        # By identity: one value may stand in many places.
        saved: dict[int, Item] = {}
        for fqn, value in flat.items():
            if isinstance(value, torch.Tensor):
                view = plain.views[value.shape[0]]
                tensors[fqn] = Tensor(view.dtype, view.shape, self._boxes(fqn, view))
            else:
                if id(value) not in saved:
                    saved[id(value)] = Item(_saved(await self._filled(fqn, value)))
                items[fqn] = saved[id(value)]
        file = File(self._info.key, self._info.size, self._info.version)
        return Contents(url, "torch", self._store.url, [file], tensors, items, paths)

    async def _filled(self, fqn: str, value: Any) -> Any:
        """An item with its tensors: DCP takes no tuple apart, so that they have no names to be asked for by."""
        views = list(_views_in(value))
        # As shown: a tensor may show one element endlessly often.
        size = sum(math.prod(view.shape) * view.dtype.itemsize for view in views)
        if size > _MAX_INSIDE:
            hint = "torch.load it, and torch.save them in dicts or lists"
            raise Unsupported(f"{fqn!r} holds {size} bytes of tensors in a tuple or set", self._where, hint)
        found = {id(view): await self._tensor(fqn, view) for view in views}
        return _replaced(value, found) if views else value

    async def _tensor(self, fqn: str, view: View) -> torch.Tensor:
        if not self._boxes(fqn, view):
            return torch.empty(view.shape, dtype=view.dtype)
        member = self._listed[f"{self._root}data/{view.storage.key}"]
        key, version = self._info.key, self._info.version
        end = min(self._info.size, member.start + zips.LOCAL_BYTES)
        head = await self._store.get_range(key, member.start, end, version)
        width = view.dtype.itemsize
        start = member.start + zips.data_start(head, self._where) + view.offset * width
        data = await self._store.get_range(key, start, start + span(view) * width, version)
        return torch.frombuffer(bytearray(data), dtype=view.dtype).as_strided(view.shape, view.strides).clone()

    def _boxes(self, fqn: str, view: View) -> list[Box]:
        if 0 in view.shape:
            return []
        member = self._listed.get(f"{self._root}data/{view.storage.key}")
        end = (view.offset + span(view)) * view.dtype.itemsize
        if member is None or not member.stored or end > member.size:
            raise CorruptFile(f"the storage of {fqn!r} is missing, compressed or too short", self._where)
        whole = (0,) * len(view.shape)
        inner = view.offset * view.dtype.itemsize
        steps = () if is_row_major(view.shape, view.strides) else view.strides
        return [Box(whole, view.shape, 0, member.start, member.size, Encoding.MEMBER, (), inner, steps)]


def is_row_major(shape: Ints, steps: Ints) -> bool:
    """Whether elements with these strides lie one after another; those of dimensions of one element do not count."""
    return all(size == 1 or step == wanted for size, step, wanted in zip(shape, steps, strides(shape), strict=True))


class _StandIns:
    """Meta tensors for views, since DCP's flattening looks for tensors; each has the number of its view as length."""

    def __init__(self, where: str, most: int) -> None:
        self.views: list[View] = []
        self._most = most
        self._where = where
        self._visited = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        self._visited += 1
        if depth > _MAX_DEPTH or self._visited > self._most:
            # Shared parts of a small pickle can stand for endlessly many.
            raise CorruptFile("the file's values are nested too deeply, or too many", self._where)
        if isinstance(value, View):
            self.views.append(value)
            return torch.empty(len(self.views) - 1, device="meta")
        if isinstance(value, dict):
            return {key: self.of(each, depth + 1) for key, each in value.items()}
        if isinstance(value, list):
            return [self.of(each, depth + 1) for each in value]
        if isinstance(value, tuple):
            # A leaf for DCP: counted, and left as it is.
            for each in value:
                self.of(each, depth + 1)
        return value


def _views_in(value: Any) -> Iterator[View]:
    if isinstance(value, View):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _views_in(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _views_in(each)


def _replaced(value: Any, found: Mapping[int, torch.Tensor]) -> Any:
    """The value with `found` in place of views, by their ids."""
    if isinstance(value, View):
        return found[id(value)]
    if isinstance(value, dict):
        return {key: _replaced(each, found) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_replaced(each, found) for each in value)
    return value


def _saved(value: Any) -> bytes:
    """As DCP's planner serializes an item."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
