"""The `data.pkl` of a `torch.save` file: which tensors it holds, as views of which storages, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckpt_cloud.errors import CorruptFile
from ckpt_cloud.format.dtypes import SIZES
from ckpt_cloud.interop.dcp_metadata import ints
from ckpt_cloud.interop.pickles import load, ordered_class
from ckpt_cloud.interop.torch_values import value_names
from ckpt_cloud.planning.slices import Ints
from ckpt_cloud.tensors import dtype_of

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}
_UNTYPED = "untyped"


class _AsMade:
    """What a pickle may refer to and not change."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise CorruptFile("the pickle changes what was read of a tensor")


class Storage(_AsMade):
    """A storage: a member of the file."""

    __slots__ = ("dtype", "key")

    def __init__(self, key: str, dtype: str) -> None:
        self.key = key
        self.dtype = dtype


class View(_AsMade):
    """A tensor: a view of a storage."""

    __slots__ = ("dtype", "offset", "shape", "storage", "strides")

    def __init__(self, storage: Storage, offset: int, shape: Ints, strides: Ints, dtype: torch.dtype) -> None:
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides
        self.dtype = dtype


def open_pickle(data: bytes, where: str) -> Any:
    """What a `data.pkl` holds, with `View` for tensors, and plain values.

    Raises:
        UntrustedItem: it would run code.
        CorruptFile: it does not decode.
    """
    return load(data, _names(where), where, persistent=lambda pid: _storage(pid, where))


def _names(where: str) -> Mapping[tuple[str, str], Any]:
    def rebuild(*told: Any) -> View:
        return _view(told, None, where)

    def rebuild_typed(*told: Any) -> View:
        # After the gradient and hooks comes what an untyped storage does not say.
        return _view(told, told[6] if len(told) > 6 else None, where)

    def parameter(*told: Any) -> Any:
        return told[0]

    names: dict[tuple[str, str], Any] = {
        ("torch", name): getattr(torch, name) for name in SIZES if hasattr(torch, name)
    }
    names |= {("torch", storage): dtype for storage, dtype in STORAGES.items()}
    names["torch.storage", "UntypedStorage"] = names["torch", "UntypedStorage"] = _UNTYPED
    names["torch._utils", "_rebuild_tensor_v2"] = rebuild
    names["torch._utils", "_rebuild_tensor"] = rebuild
    names["torch._utils", "_rebuild_tensor_v3"] = rebuild_typed
    names["torch._utils", "_rebuild_parameter"] = parameter
    names |= value_names(where)
    names["collections", "OrderedDict"] = ordered_class()
    return names


def _storage(pid: Any, where: str) -> Storage:
    alike = isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"
    if not alike or type(pid[1]) is not str or type(pid[2]) is not str or type(pid[4]) is not int or pid[4] < 0:
        raise CorruptFile("a storage is not described as torch does", where)
    return Storage(pid[2], pid[1])


def _view(told: tuple[Any, ...], dtype: Any, where: str) -> View:
    storage, offset, shape, strides = told[:4]
    if not isinstance(storage, Storage) or type(offset) is not int or offset < 0:
        raise CorruptFile("a tensor is not described as torch does", where)
    sizes, steps = ints(shape, f"a shape in {where}"), ints(strides, f"strides in {where}")
    if len(sizes) != len(steps) or (storage.dtype == _UNTYPED and not isinstance(dtype, torch.dtype)):
        raise CorruptFile("a tensor is not described as torch does", where)
    return View(storage, offset, sizes, steps, dtype if isinstance(dtype, torch.dtype) else dtype_of(storage.dtype))


def span(view: View) -> int:
    """Elements of the storage from the view's first to its last, inclusive; 0 for an empty one."""
    if 0 in view.shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(view.shape, view.strides, strict=True))
