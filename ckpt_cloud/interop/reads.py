"""One rank's read items of a checkpoint of another format, carried out."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem

from ckpt_cloud.errors import CorruptFile, StateMismatch
from ckpt_cloud.interop.contents import Box, Contents, Encoding, Item, Tensor
from ckpt_cloud.interop.fetch import Fetcher, Span
from ckpt_cloud.interop.quantized import Dequantizer
from ckpt_cloud.interop.records import HEAD_BYTES, open_record, open_view, plain_start, record_limit
from ckpt_cloud.interop.zips import LOCAL_BYTES, data_start
from ckpt_cloud.items import screened
from ckpt_cloud.planning.load import Want
from ckpt_cloud.planning.slices import Ints
from ckpt_cloud.tensors import Destination
from ckpt_cloud.transforms import Undo

_ITEM_LIMIT = 2 << 30
"""Of an item that a transform unpacks."""
_SMALL_RECORD = 64 << 10
"""Records up to this size are fetched whole at once, rather than their beginning first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor that is to be filled: a box of a stored box.

    Attributes:
        name: of the tensor, for messages.
        stored: the box that it is in.
        dtype: of the stored elements.
        offsets, sizes: of the part in the stored box.
        target: of `sizes`.
    """

    name: str
    stored: Box
    dtype: torch.dtype
    offsets: Ints
    sizes: Ints
    target: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Of the part."""
        return math.prod(self.sizes) * self.dtype.itemsize

    def take(self, whole: torch.Tensor) -> None:
        """Fills the part from the whole stored box."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(dim, offset, size)
        self.target.copy_(whole)


class Reads:
    """What a plan asks for, sorted by how it is stored.

    Args:
        located: where boxes were found to lie, kept between plans.
    """

    def __init__(
        self,
        contents: Contents,
        planner: LoadPlanner,
        dequantizer: Dequantizer | None,
        undo: Undo,
        located: dict[Box, Box],
    ) -> None:
        self._located = located
        self._contents = contents
        self._planner = planner
        self._dequantizer = dequantizer
        self._undo = undo
        self._parts: list[Part] = []
        self._tensors: list[tuple[ReadItem, torch.Tensor]] = []
        self._items: list[tuple[ReadItem, Item]] = []
        self._values: dict[int, bytes] = {}
        self._afterwards: list[Callable[[], None]] = []

    def add(self, items: Sequence[ReadItem]) -> None:
        """Resolves the planner's targets.

        Raises:
            StateMismatch: a target has another shape than its read.
        """
        for item in items:
            fqn = item.storage_index.fqn
            if item.type is LoadItemType.BYTE_IO:
                self._items.append((item, self._contents.items[fqn]))
                continue
            target = self._planner.resolve_tensor(item).detach()
            self._tensors.append((item, target))
            offsets, sizes = tuple(item.storage_offsets), tuple(item.lengths)
            if tuple(target.shape) != sizes:
                raise StateMismatch(f"{item.dest_index.fqn!r} has shape {tuple(target.shape)}, the read has {sizes}")
            tensor = self._contents.tensors[fqn]
            if not math.prod(sizes):
                continue
            box = find_box(fqn, tensor, tuple(item.storage_index.offset or (0,) * len(sizes)))
            if self._dequantizer is not None and self._dequantizer.handles(fqn):
                parts, finish = self._dequantizer.parts(self._contents, fqn, box, (offsets, sizes), target)
                self._parts += [self._part(*part) for part in parts]
                self._afterwards.append(finish)
            else:
                self._parts.append(self._part(fqn, box, offsets, sizes, target))

    def _part(self, fqn: str, box: Box, offsets: Ints, sizes: Ints, target: torch.Tensor) -> Part:
        return Part(fqn, box, self._contents.tensors[fqn].dtype, offsets, sizes, target)

    @property
    def total_bytes(self) -> int:
        """That were asked for."""
        return sum(part.nbytes for part in self._parts) + sum(item.nbytes for _, item in self._items)

    def check_dtypes(self, *, cast: bool) -> None:
        """Before anything is changed."""
        differ = [
            f"{p.name}: stored {p.dtype}, state {p.target.dtype}" for p in self._parts if p.target.dtype != p.dtype
        ]
        if differ and not cast:
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            hint = "give the state the stored dtypes, or convert while loading with cast=True"
            raise StateMismatch(f"dtypes differ: {'; '.join(differ[:5])}{more}", self._contents.url, hint)

    async def run(self, fetcher: Fetcher) -> None:
        """Fetches everything: what must be looked at first, then the bytes themselves."""
        groups: dict[Box, list[Part]] = {}
        for part in self._parts:
            groups.setdefault(part.stored, []).append(part)
        unknown = [box for box in groups if box not in self._located and _must_look(box)]
        # Together only where hardly anything lies between: what does is read again.
        await fetcher.wholes([self._look(box, groups[box][0]) for box in unknown], gap=LOCAL_BYTES)
        ranged: list[Part] = []
        whole: list[tuple[Box, list[Part]]] = []
        for stored, parts in groups.items():
            box = self._located.get(stored, stored)
            if box.encoding is Encoding.PLAIN and not box.strides:
                ranged += [dataclasses.replace(part, stored=box) for part in parts]
            else:
                whole.append((box, parts))
        await fetcher.boxes([_want(part) for part in ranged], [_destination(part) for part in ranged])
        await fetcher.wholes([self._whole(box, parts) for box, parts in whole] + self._item_spans())

    def hand_over(self, *, trust: bool) -> None:
        """Gives everything to the planner, after all items were screened."""
        for finish in self._afterwards:
            finish()
        values = [self._value(number, item) for number, (_, item) in enumerate(self._items)]
        if not trust:
            named = zip(self._items, values, strict=True)
            values = [screened(request.storage_index.fqn, value) for (request, _), value in named]
        for request, tensor in self._tensors:
            self._planner.commit_tensor(request, tensor)
        for (request, _), value in zip(self._items, values, strict=True):
            self._planner.load_bytes(request, io.BytesIO(value))

    def _look(self, box: Box, part: Part) -> Span:
        """Reads the beginning of what is stored, which tells where the tensor's bytes are."""
        file = self._contents.file_of(box)
        if box.encoding is Encoding.MEMBER:
            end = min(file.size, box.start + LOCAL_BYTES)

            def take(head: memoryview) -> None:
                start = box.start + data_start(head, self._contents.where(box.file)) + box.inner
                self._located[box] = dataclasses.replace(box, start=start, encoding=Encoding.PLAIN)
        else:
            end = box.start + min(box.nbytes, HEAD_BYTES)

            def take(head: memoryview) -> None:
                start = plain_start(head, box, part.dtype)
                if start is None:
                    self._located[box] = box
                else:
                    self._located[box] = dataclasses.replace(box, start=box.start + start, encoding=Encoding.PLAIN)

        return Span(box.file, box.start, end, take)

    def _whole(self, box: Box, parts: list[Part]) -> Span:
        """Reads all that is stored, and fills every part from it."""
        name, dtype = parts[0].name, parts[0].dtype
        nbytes = _strided_bytes(box, dtype) if box.encoding is Encoding.PLAIN else box.nbytes

        def take(data: memoryview) -> None:
            if box.encoding is Encoding.PLAIN:
                tensor = open_view(data, box, dtype)
            else:
                plain = self._undo(data, box.transforms, record_limit(box, dtype), name)
                tensor = open_record(plain, box, dtype, name)
            for part in parts:
                part.take(tensor)

        return Span(box.file, box.start, box.start + nbytes, take)

    def _item_spans(self) -> list[Span]:
        return [self._item_span(n, item) for n, (_, item) in enumerate(self._items) if item.inline is None]

    def _item_span(self, number: int, item: Item) -> Span:
        name = self._items[number][0].storage_index.fqn

        def take(data: memoryview) -> None:
            self._values[number] = bytes(self._undo(data, item.transforms, _ITEM_LIMIT, name))

        return Span(item.file, item.start, item.start + item.nbytes, take)

    def _value(self, number: int, item: Item) -> bytes:
        return item.inline if item.inline is not None else self._values[number]


def find_box(fqn: str, tensor: Tensor, offsets: Ints) -> Box:
    """The stored box at `offsets`.

    Raises:
        CorruptFile: there is none.
    """
    for box in tensor.boxes:
        if box.offsets == offsets:
            return box
    raise CorruptFile(f"the checkpoint has no chunk of {fqn!r} at {offsets}")


def _must_look(box: Box) -> bool:
    if box.encoding is Encoding.MEMBER:
        return True
    return box.encoding is Encoding.RECORD and not box.transforms and box.nbytes > _SMALL_RECORD


def _strided_bytes(box: Box, dtype: torch.dtype) -> int:
    last = sum((size - 1) * step for size, step in zip(box.sizes, box.strides, strict=True))
    return (last + 1) * dtype.itemsize


def _want(part: Part) -> Want:
    box = part.stored
    return Want(box.file, box.start, part.dtype.itemsize, box.sizes, part.offsets, part.sizes)


def _destination(part: Part) -> Destination:
    return Destination(part.name, part.target, part.dtype)
