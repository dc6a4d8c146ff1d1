"""Whether a manifest contradicts itself: places outside objects, overlaps, gaps, numbers that cannot be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Protocol

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format import codec
from ckpt_cloud.format.dtypes import SIZES
from ckpt_cloud.format.manifest import Chunk, ItemEntry, Manifest, TensorEntry

MAX_DIMS = 64
"""Of a tensor; as many as torch's own kernels take."""
_TILED_DIMS = 10
"""A box has 2**n corners; in more dimensions only counts are compared."""
_END = 1 << 63
"""Sizes and places must be below: they are signed 64-bit integers to torch and to stores."""

_Span = tuple[int, int, str]
"""First byte, end, and whose."""


def check(manifest: Manifest, url: str, *, whole: bool) -> None:
    """Refuses a manifest that contradicts itself.

    Args:
        whole: it is of all ranks, so that chunks must cover their tensors.

    Raises:
        CorruptManifest: says the first contradiction.
    """
    fault = next(faults(manifest, whole=whole), None)
    if fault:
        raise CorruptManifest(f"the manifest contradicts itself: {fault}", url)


def faults(manifest: Manifest, *, whole: bool = True) -> Iterator[str]:
    """All contradictions, in words; in time that grows with the manifest, and without memory for what it claims."""
    yield from _object_faults(manifest)
    spans: list[list[_Span]] = [[] for _ in manifest.objects]
    for name, tensor in manifest.tensors.items():
        if name in manifest.items:
            yield f"{name[:100]!r} is both a tensor and an item"
        fault = _tensor_fault(tensor, spans, name, tiled=whole and manifest.ranks is None)
        if fault:
            yield f"tensor {name[:100]!r} {fault}"
    for name, item in manifest.items.items():
        fault = _item_fault(item, spans, name)
        if fault:
            yield f"item {name[:100]!r} {fault}"
    for entry, taken in zip(manifest.objects, spans, strict=True):
        taken.sort()
        if taken and max(end for _, end, _ in taken) > entry.size:
            yield f"{taken[-1][2][:100]!r} lies outside {entry.key}"
        overlap = next((b for a, b in pairwise(taken) if a[1] > b[0]), None)
        if overlap:
            yield f"{overlap[2][:100]!r} shares bytes of {entry.key} with another"


def _object_faults(manifest: Manifest) -> Iterator[str]:
    keys = Counter(entry.key for entry in manifest.objects)
    yield from (f"{key} stands there {count} times" for key, count in keys.items() if count > 1)
    yield from (f"{entry.key} is larger than can be" for entry in manifest.objects if entry.size >= _END)


def _tensor_fault(tensor: TensorEntry, spans: list[list[_Span]], name: str, *, tiled: bool) -> str | None:
    width = SIZES.get(tensor.dtype)
    if width is None:
        return f"has elements of type {tensor.dtype[:40]!r}"
    shape = tensor.shape
    if shape and (len(shape) > MAX_DIMS or min(shape) < 0 or max(shape) >= _END):
        return "has an impossible shape"
    nbytes = math.prod(shape) * width
    if nbytes >= _END:
        return "is larger than can be"
    if len(tensor.chunks) == 1 and tensor.chunks[0].sizes == shape and tensor.chunks[0].offsets == (0,) * len(shape):
        # Most tensors are one chunk.
        return _chunk_fault(tensor.chunks[0], nbytes, spans, name)
    for chunk in tensor.chunks:
        if not _inside(chunk, shape):
            return "has a chunk outside its shape"
        fault = _chunk_fault(chunk, math.prod(chunk.sizes) * width, spans, name)
        if fault:
            return fault
    filled = [chunk for chunk in tensor.chunks if 0 not in chunk.sizes]
    if len({chunk.offsets for chunk in filled}) != len(filled):
        return "has two chunks in one place"
    return None if not tiled or tiles(shape, filled) else "is not covered by its chunks, each element once"


def _chunk_fault(chunk: Chunk, nbytes: int, spans: list[list[_Span]], name: str) -> str | None:
    """Notes the bytes that a chunk of `nbytes` takes."""
    if chunk.coded is not None:
        fault = _coded_fault(chunk.coded, nbytes, spans, name)
        return fault and f"has a chunk that {fault}"
    if nbytes and not _placed(chunk.object, chunk.start, nbytes, spans, name):
        return "has a chunk in no object of the checkpoint"
    return None


def _item_fault(item: ItemEntry, spans: list[list[_Span]], name: str) -> str | None:
    if item.inline is not None or item.value is not None:
        return "is coded and in the manifest" if item.coded is not None else None
    if item.coded is not None:
        return _coded_fault(item.coded, item.nbytes, spans, name)
    return None if _placed(item.object, item.start, item.nbytes, spans, name) else "is in no object of the checkpoint"


def _coded_fault(coded: codec.Coded, nbytes: int, spans: list[list[_Span]], name: str) -> str | None:
    fault = codec.fault(coded, nbytes)
    if fault is None and not all(_placed(*extent, spans, name) for extent in coded.extents):
        return "is in no object of the checkpoint"
    return fault


def _inside(chunk: Chunk, shape: tuple[int, ...]) -> bool:
    if not len(chunk.offsets) == len(chunk.sizes) == len(shape):
        return False
    box = zip(chunk.offsets, chunk.sizes, shape, strict=True)
    return all(offset >= 0 and size >= 0 and offset + size <= limit for offset, size, limit in box)


def _placed(number: int, start: int, nbytes: int, spans: list[list[_Span]], name: str) -> bool:
    """Notes the bytes that `name` takes; False if there is no such place."""
    if not 0 <= number < len(spans) or not 0 <= start < _END or not 0 <= nbytes < _END:
        return False
    spans[number].append((start, start + nbytes, name))
    return True


class Boxed(Protocol):
    """Part of a tensor."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of its first element."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """By dimension."""
        ...


def tiles(shape: tuple[int, ...], chunks: Sequence[Boxed]) -> bool:
    """Whether boxes that lie within a shape, and are not empty, cover it, each element once.

    The corners of every box, with signs that alternate along each edge, add up to those of the whole if and only if
    they do: corners are the mixed derivative of "how many boxes are here".
    """
    if 0 in shape:
        return not chunks
    cut = [dim for dim, size in enumerate(shape) if any(chunk.sizes[dim] != size for chunk in chunks)]
    if len(cut) < 2:
        dim = cut[0] if cut else 0
        ends = sorted((chunk.offsets[dim], chunk.offsets[dim] + chunk.sizes[dim]) for chunk in chunks) if shape else []
        return len(chunks) == 1 if not ends else _in_a_row(ends, shape[dim])
    if len(shape) > _TILED_DIMS:
        return sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(shape)
    corners: Counter[tuple[int, ...]] = Counter()
    _add_corners(corners, (0,) * len(shape), shape, -1)
    for chunk in chunks:
        _add_corners(corners, chunk.offsets, chunk.sizes, 1)
    return not any(corners.values())


def _in_a_row(ends: list[tuple[int, int]], length: int) -> bool:
    return ends[0][0] == 0 and ends[-1][1] == length and all(a[1] == b[0] for a, b in pairwise(ends))


def _add_corners(
    corners: Counter[tuple[int, ...]], offsets: tuple[int, ...], sizes: tuple[int, ...], sign: int
) -> None:
    edges = [((offset, 1), (offset + size, -1)) for offset, size in zip(offsets, sizes, strict=True)]
    for corner in product(*edges):
        corners[tuple(at for at, _ in corner)] += sign * math.prod(turn for _, turn in corner)
