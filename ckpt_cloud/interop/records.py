"""From what is stored to plain bytes: where a tensor's data begin in a record, and records opened in memory.

first bytes of a record ─► local headers ─► data.pkl: one tensor, row-major? ─► where its bytes begin
anything unusual        ─► the whole record, transforms undone, torch's own loader, once it was screened
"""

from __future__ import annotations

import math

import torch

from ckpt_cloud.errors import CkptCloudError, CorruptFile
from ckpt_cloud.format.pickles import NotPlain
from ckpt_cloud.interop import zips
from ckpt_cloud.interop.contents import Box
from ckpt_cloud.interop.pickle_walk import walk
from ckpt_cloud.interop.torch_files import is_row_major
from ckpt_cloud.interop.torch_pickles import View, open_pickle
from ckpt_cloud.items import opened

HEAD_BYTES = 4096
"""Of a record; what stands before the data of one tensor takes some 700."""
_OTHERS = (".format_version", ".storage_alignment", "byteorder")
"""Members that torch writes between `data.pkl` and the data, all of a few bytes."""
_SLACK = 1 << 20
"""What a record may have beside its tensor's bytes."""


def plain_start(head: memoryview, box: Box, dtype: torch.dtype) -> int | None:
    """Where in the record, which begins with `head`, the tensor's bytes lie in row-major order.

    None if they do not, or if that cannot be told from `head`.
    """
    try:
        return _plain_start(bytes(head), box, dtype)
    except CkptCloudError:
        # Opened whole, it will say what is wrong with it.
        return None


def _plain_start(head: bytes, box: Box, dtype: torch.dtype) -> int | None:
    if not zips.member_name(head).endswith("/data.pkl"):
        return None
    begin = zips.data_start(head, "")
    end = begin + walk(memoryview(head)[begin:])
    view = open_pickle(head[begin:end], "")
    if not isinstance(view, View) or not _fits(view, box, dtype):
        return None
    at = head.find(b"PK\x03\x04", end)
    while at >= 0:
        name = zips.member_name(head[at:]).partition("/")[2]
        start = at + zips.data_start(head[at:], "")
        if name == f"data/{view.storage.key}":
            start += view.offset * dtype.itemsize
            return start if start + math.prod(box.sizes) * dtype.itemsize <= box.nbytes else None
        if name not in _OTHERS or (name == "byteorder" and not head[start:].startswith(b"little")):
            return None
        at = head.find(b"PK\x03\x04", start)
    return None


def _fits(view: View, box: Box, dtype: torch.dtype) -> bool:
    return view.dtype == dtype and view.shape == box.sizes and is_row_major(view.shape, view.strides)


def record_limit(box: Box, dtype: torch.dtype) -> int:
    """Bytes that the record of a tensor can have."""
    return math.prod(box.sizes) * dtype.itemsize + _SLACK


def open_record(data: bytes | memoryview, box: Box, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The tensor of a record.

    Raises:
        CorruptFile: it holds anything else.
    """
    try:
        tensor = opened(data)
    except NotPlain as error:
        raise CorruptFile(f"the record of {name!r} cannot be opened: {error}") from None
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != box.sizes or tensor.dtype != dtype:
        raise CorruptFile(f"the record of {name!r} does not hold the tensor that the metadata describe")
    return tensor.detach()


def open_view(data: memoryview, box: Box, dtype: torch.dtype) -> torch.Tensor:
    """A strided tensor from the bytes of its storage, from its first element on."""
    flat = torch.frombuffer(bytearray(data), dtype=dtype)
    return flat.as_strided(box.sizes, box.strides)
