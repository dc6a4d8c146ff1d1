"""`torch.save` files as they are to be written: one tensor for DCP's `.distcp` files, or a whole nested state.

data.pkl    everything but the tensors' bytes, with a reference to a storage for each tensor
byteorder   little
data/N      the storages
version     3
"""

from __future__ import annotations

import io
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._utils

from ckpt_cloud.interop.objects import Data, Segment
from ckpt_cloud.interop.torch_pickles import STORAGES
from ckpt_cloud.interop.zips import ZipLayout
from ckpt_cloud.planning.slices import Ints, strides

_ROOT = "archive"
_TYPES = {name: storage for storage, name in STORAGES.items()}


class Placeholder:
    """Stands for a tensor in a state that is pickled before the tensor is there."""

    def __init__(self, data: Data) -> None:
        self.data = data


@dataclass(frozen=True, slots=True)
class _Storage:
    key: str
    dtype: torch.dtype
    nbytes: int


class _Pickler(pickle.Pickler):
    """As torch.save pickles, with placeholders for tensors; collects their data in the order of their storages.

    Tensors that are there, since they are within an item, are bytes of the file.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=2)
        self.found: list[Data | bytes] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        name = _TYPES.get(str(obj.dtype).removeprefix("torch."))
        kind: Any = torch.UntypedStorage if name is None else getattr(torch, name)
        length = obj.nbytes if name is None else obj.nbytes // obj.dtype.itemsize
        return "storage", kind, obj.key, "cpu", length

    def reducer_override(self, obj: Any) -> Any:
        hooks: OrderedDict[str, Any] = OrderedDict()
        if isinstance(obj, Placeholder):
            return self._rebuilt(obj.data, obj.data.dtype, obj.data.sizes, obj.data.nbytes, grad=False)
        if isinstance(obj, torch.nn.Parameter):
            return torch._utils._rebuild_parameter, (obj.data, obj.requires_grad, hooks)  # noqa: SLF001 - as torch.save
        if type(obj) is torch.Tensor and obj.layout is torch.strided:
            whole = obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return self._rebuilt(whole, obj.dtype, tuple(obj.shape), len(whole), grad=obj.requires_grad)
        return NotImplemented

    def _rebuilt(self, data: Data | bytes, dtype: torch.dtype, sizes: Ints, nbytes: int, *, grad: bool) -> Any:
        hooks: OrderedDict[str, Any] = OrderedDict()
        storage = _Storage(str(len(self.found)), dtype, nbytes)
        self.found.append(data)
        told = (storage, 0, sizes, strides(sizes), grad, hooks)
        if str(dtype).removeprefix("torch.") in _TYPES:
            return torch._utils._rebuild_tensor_v2, told  # noqa: SLF001 - as torch.save does
        return torch._utils._rebuild_tensor_v3, (*told, dtype, None)  # noqa: SLF001


def layout(state: Any) -> tuple[int, list[Segment]]:
    """Size and segments of a file that holds `state`, in which placeholders stand for tensors."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(state)
    archive = _Archive()
    archive.add_bytes("data.pkl", buffer.getvalue())
    archive.add_bytes("byteorder", b"little")
    for number, data in enumerate(pickler.found):
        if isinstance(data, bytes):
            archive.add_bytes(f"data/{number}", data)
        else:
            archive.add_data(f"data/{number}", data)
    archive.add_bytes("version", b"3\n")
    return archive.finished()


class _Archive:
    def __init__(self) -> None:
        self._zip = ZipLayout()
        self._crcs: list[int] = []
        self._segments: list[Segment] = []

    def add_bytes(self, name: str, content: bytes) -> None:
        number = len(self._crcs)
        self._crcs.append(zlib.crc32(content))
        head = self._zip.add(f"{_ROOT}/{name}", len(content))
        self._segments.append(head + content + self._zip.descriptor(number, self._crcs[number]))

    def add_data(self, name: str, data: Data) -> None:
        number = len(self._crcs)
        self._crcs.append(0)
        head = self._zip.add(f"{_ROOT}/{name}", data.nbytes)
        noting = Data(data.fqn, data.dtype, data.offsets, data.sizes, self._noting(number))
        self._segments += [head, noting, lambda: self._zip.descriptor(number, self._crcs[number])]

    def finished(self) -> tuple[int, list[Segment]]:
        return self._zip.size + self._zip.end_size, [*self._segments, lambda: self._zip.end(self._crcs)]

    def _noting(self, number: int) -> Callable[[int], None]:
        def note(crc: int) -> None:
            self._crcs[number] = crc

        return note
