"""torch and bytes: element types, views of tensors' memory, and where fetched bytes land. The first room with torch."""

from __future__ import annotations

import ctypes
import io
import math
import threading
from collections.abc import Callable, Sequence
from functools import cache

import msgspec
import numpy as np
import torch

from ckpt_cloud import gpu
from ckpt_cloud.errors import PlanMismatch, UnsupportedTensor
from ckpt_cloud.format.dtypes import SIZES
from ckpt_cloud.format.pack import ITEM_DTYPE, PackEntry
from ckpt_cloud.planning.coded import Part, Placement
from ckpt_cloud.planning.save import Segment
from ckpt_cloud.planning.slices import Ints, flat_boxes
from ckpt_cloud.transfer.staging import Allocate, plain_memory

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types that stand in for all others when bits are copied, so that no NaN and no exotic type is touched."""


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of an element type without the `torch.`."""
    return str(dtype).removeprefix("torch.")


@cache
def dtype_of(name: str) -> torch.dtype:
    """The element type of that name.

    Raises:
        UnsupportedTensor: this torch has no such type.
    """
    found = getattr(torch, name, None) if name in SIZES else None
    if not isinstance(found, torch.dtype):
        raise UnsupportedTensor(f"the checkpoint has elements of type {name[:40]!r}, which this torch does not know")
    return found


def check_storable(fqn: str, dtype: torch.dtype, layout: torch.layout) -> None:
    """Refuses a tensor whose values are not plain bytes.

    Raises:
        UnsupportedTensor: sparse, nested or quantized.
    """
    if layout is not torch.strided:
        hint = "save its indices and values as separate tensors, or call .to_dense() first"
        raise UnsupportedTensor(f"{fqn!r} has layout {layout}; only dense tensors can be saved", hint=hint)
    if dtype_name(dtype) not in SIZES:
        hint = "save .int_repr() with scale and zero point as separate entries, or .dequantize() first"
        raise UnsupportedTensor(f"{fqn!r} has elements of type {dtype}, which have no plain bytes", hint=hint)


def byte_view(tensor: torch.Tensor) -> memoryview | None:
    """The memory of a contiguous CPU tensor, without a copy; None for any other."""
    if not _has_bytes_in_order(tensor):
        return None
    size = tensor.element_size()
    flat = torch.empty(0, dtype=torch.uint8)
    flat.set_(tensor.untyped_storage(), tensor.storage_offset() * size, (tensor.numel() * size,), (1,))
    return memoryview(flat.numpy().data)


def _has_bytes_in_order(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and not _is_lazy(tensor)


def _copy_strided(tensor: torch.Tensor, start: int, end: int, into: memoryview) -> None:
    """Copies bytes `start` to `end` of a tensor that is not contiguous or not on the CPU."""
    source = carrier(tensor)
    width = source.element_size()
    target = torch.from_numpy(np.frombuffer(into, dtype=np.uint8)).view(source.dtype)
    at = 0
    with gpu.beside(source) as free:
        for offsets, sizes in flat_boxes(tuple(source.shape), start // width, end // width):
            count = math.prod(sizes)
            target[at : at + count].view(sizes).copy_(box_of(source, offsets, sizes), non_blocking=free)
            at += count


def carrier(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width; a 16-byte element becomes a last dimension of two."""
    if tensor.element_size() == 16:
        return torch.view_as_real(tensor)
    return tensor.view(_CARRIERS[tensor.element_size()])


class TensorSource:
    """Bytes of what a save plan names, resolved through the planner when their turn comes.

    Args:
        entries: of the packs.
        resolve: gives the tensor, or the `BytesIO`, of an entry; called by one thread at a time, since planners
            are not made for more, and once for each unless its upload begins again.
        lasting: what is resolved is the state's own memory, and not made to be saved.
    """

    def __init__(
        self,
        entries: Sequence[PackEntry],
        resolve: Callable[[int], torch.Tensor | io.BytesIO],
        *,
        lasting: bool = False,
    ) -> None:
        self._entries = entries
        self._resolve = resolve
        self._lasting = lasting
        self._lock = threading.Lock()
        # What was resolved and is not yet handed over in full, and which of it was made here.
        self._held: dict[int, torch.Tensor | memoryview] = {}
        self._made: set[int] = set()

    @property
    def allocate(self) -> Allocate:
        """Memory to copy to: pinned where tensors may be on a GPU, whose copies then need no other copy."""
        return gpu.pinned_memory if gpu.in_use() else plain_memory

    def view(self, entry: int) -> memoryview | None:
        """The entry's own memory, or None if it must be copied."""
        held = self._get(entry)
        return held if isinstance(held, memoryview) else byte_view(held)

    def lasts(self, entry: int) -> bool:
        """Whether the memory of the entry's view is there anyway, so that holding on to it costs nothing."""
        return self._lasting and entry not in self._made

    def copy(self, segments: Sequence[Segment], into: memoryview) -> None:
        """Copies bytes of entries, one after another; where that can be by address, since most are small."""
        base = np.frombuffer(into, dtype=np.uint8).ctypes.data
        at = 0
        for segment in segments:
            held = self._get(segment.entry)
            size = segment.end - segment.start
            if isinstance(held, memoryview):
                into[at : at + size] = held[segment.start : segment.end]
            elif _has_bytes_in_order(held):
                ctypes.memmove(base + at, held.data_ptr() + segment.start, size)
            else:
                _copy_strided(held, segment.start, segment.end, into[at : at + size])
            at += size

    def release(self, entry: int) -> None:
        """Forgets what was resolved for the entry."""
        self._held.pop(entry, None)

    def _get(self, entry: int) -> torch.Tensor | memoryview:
        with self._lock:
            held = self._held.get(entry)
            if held is None:
                held = self._held[entry] = self._checked(entry, self._resolve(entry))
            return held

    def _checked(self, entry: int, value: torch.Tensor | io.BytesIO) -> torch.Tensor | memoryview:
        plan = self._entries[entry]
        if plan.dtype == ITEM_DTYPE:
            assert isinstance(value, io.BytesIO)
            return value.getbuffer()
        assert isinstance(value, torch.Tensor)
        # Each of these calls is a part of what a small tensor costs.
        tensor = value.detach() if value.requires_grad else value
        if _is_lazy(tensor):
            tensor = tensor.resolve_conj().resolve_neg()
            self._made.add(entry)
        check_storable(plan.fqn, tensor.dtype, tensor.layout)
        if tensor.is_meta:
            raise UnsupportedTensor(f"{plan.fqn!r} is on the meta device and has no data", hint="materialize it first")
        name = dtype_name(tensor.dtype)
        if name != plan.dtype or tensor.shape != plan.sizes:
            hint = "a planner that converts data must change tensor_data in its plan as well"
            got = f"{name} {tuple(tensor.shape)}"
            message = f"{plan.fqn!r} was planned as {plan.dtype} {plan.sizes} and resolved to {got}"
            raise PlanMismatch(message, hint=hint)
        return tensor


class ItemBytes:
    """Memory for an item, made when its first bytes are there rather than for what somebody claims."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._lock = threading.Lock()
        # Set once.
        self._array: np.ndarray | None = None

    @property
    def array(self) -> np.ndarray:
        """Of bytes."""
        with self._lock:
            if self._array is None:
                self._array = np.empty(self.nbytes, dtype=np.uint8)
            return self._array


class Destination(msgspec.Struct, frozen=True):
    """Where a want goes: a tensor, or a numpy byte array for an item.

    Attributes:
        name: for messages.
        target: of the want's sizes.
        dtype: of the stored elements.
    """

    name: str
    target: torch.Tensor | np.ndarray | ItemBytes
    dtype: torch.dtype

    @property
    def memory(self) -> torch.Tensor | np.ndarray:
        """The target itself."""
        return self.target.array if isinstance(self.target, ItemBytes) else self.target


class TensorSink:
    """Puts fetched boxes where they belong."""

    def __init__(self, destinations: Sequence[Destination]) -> None:
        self._destinations = destinations

    def describe(self, placement: Placement | Part) -> str:
        """Name of what the placement is part of."""
        return self._destinations[placement.want].name

    @property
    def allocate(self) -> Allocate:
        """As `TensorSource.allocate`."""
        return gpu.pinned_memory if gpu.in_use() else plain_memory

    def memory(self, placement: Placement) -> memoryview | None:
        """The bytes of the placement's box in its destination, if they lie there as they are stored."""
        destination = self._destinations[placement.want]
        target = destination.target
        if isinstance(target, ItemBytes):
            return None
        if isinstance(target, np.ndarray):
            whole = target[placement.offsets[0] : placement.offsets[0] + placement.sizes[0]].data
        elif target.dtype != destination.dtype:
            return None
        else:
            view = byte_view(box_of(target, placement.offsets, placement.sizes))
            if view is None:
                return None
            whole = view
        # Shorter than its span in the object, it has gaps there.
        return whole if len(whole) == placement.end - placement.source else None

    def place(self, placements: Sequence[Placement], data: memoryview) -> None:
        """Copies the boxes out of `data` without looking at what the bits mean."""
        base = np.frombuffer(data, dtype=np.uint8).ctypes.data
        for placement in placements:
            destination = self._destinations[placement.want]
            target = destination.target
            size = placement.end - placement.source
            if isinstance(target, torch.Tensor) and _takes_whole(target, destination.dtype, placement, size):
                # Most are small and whole, so that only the number of calls counts.
                ctypes.memmove(target.data_ptr(), base + placement.source, size)
            else:
                _place_box(destination, placement, data)


def _takes_whole(target: torch.Tensor, dtype: torch.dtype, placement: Placement, size: int) -> bool:
    """Whether the placement is all of `target`, which has its bytes in order."""
    whole = target.shape == placement.sizes and target.dtype == dtype and size == target.nbytes
    return whole and _has_bytes_in_order(target)


def _place_box(destination: Destination, placement: Placement, data: memoryview) -> None:
    source = _strided(data, placement, destination.dtype)
    target = destination.memory
    if isinstance(target, np.ndarray):
        np.copyto(_array_box(target, placement), source)
        return
    box = box_of(target.detach(), placement.offsets, placement.sizes)
    if target.dtype == destination.dtype and target.device.type == "cpu" and not _is_lazy(target):
        np.copyto(carrier(box).numpy(), source)
    else:
        if not source.flags.writeable:
            # torch wraps no other.
            source = np.array(source, order="C")
        with gpu.beside(box) as free:
            box.copy_(_as_elements(torch.from_numpy(source), destination.dtype), non_blocking=free)


def box_of(tensor: torch.Tensor, offsets: Ints, sizes: Ints) -> torch.Tensor:
    """A box of `tensor`; dimensions beyond those of the box stay whole."""
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=False)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, offset, size)
    return tensor


def _array_box(array: np.ndarray, placement: Placement) -> np.ndarray:
    return array[tuple(slice(o, o + s) for o, s in zip(placement.offsets, placement.sizes, strict=True))]


def _strided(data: memoryview, placement: Placement, dtype: torch.dtype) -> np.ndarray:
    """The placement's box inside the fetched bytes, as integers of the element's width, without a copy."""
    width = dtype.itemsize
    shape, steps = list(placement.sizes), [step * width for step in placement.strides]
    if width == 16:
        return np.ndarray([*shape, 2], np.float64, data, placement.source, [*steps, 8])
    return np.ndarray(shape, f"i{width}" if width > 1 else np.uint8, data, placement.source, steps)


def _as_elements(whole: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.view_as_complex(whole) if dtype.itemsize == 16 else whole.view(dtype)


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()
