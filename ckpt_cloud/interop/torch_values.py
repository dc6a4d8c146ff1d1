"""Values beside tensors in `torch.save` files: what a pickle's names for them stand for.

All of them are plain: bytes, sets, complex numbers, numpy scalars and the like. Each stand-in takes what torch.save
writes and nothing else, and is made anew for each pickle, so that nothing set on one outlives it.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ckpt_cloud.errors import UntrustedItem
from ckpt_cloud.interop.dcp_metadata import as_sizes

_HOMES = ("builtins", "__builtin__")
_NUMPY_HOMES = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMPY_TYPE = re.compile(r"b1|[iu][1248]|f[248]|c(8|16)|[SU][0-9]{1,6}")
_LAYOUTS = {f"torch.{name}": getattr(torch, name) for name in ("strided", "sparse_coo", "sparse_csr")}


def value_names(where: str) -> Mapping[tuple[str, str], Any]:
    """What each name of a plain value stands for.

    Every stand-in raises UntrustedItem for arguments that torch.save does not write.
    """

    def plain(name: str, make: Callable[..., Any], *accepted: tuple[type, ...]) -> Callable[..., Any]:
        def stand_in(*given: Any) -> Any:
            if tuple(map(type, given)) not in accepted:
                raise UntrustedItem(f"the pickle calls {name} as torch.save does not", where)
            return make(*given)

        return stand_in

    def encoded(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise UntrustedItem("the pickle encodes text as torch.save does not", where)
        return text.encode("latin1")

    def gathered(name: str, make: Callable[[list[Any]], Any]) -> Callable[..., Any]:
        def stand_in(*given: Any) -> Any:
            if len(given) != 1 or type(given[0]) is not list or not all(map(_quick_to_hash, given[0])):
                raise UntrustedItem(f"the pickle makes a {name} of more than plain values", where)
            return make(given[0])

        return stand_in

    numbers = plain("range", range, (int, int, int))
    builtin = {
        "bytes": plain("bytes", bytes, ()),
        "bytearray": plain("bytearray", bytearray, (), (bytes,)),
        "complex": plain("complex", complex, (float, float)),
        "set": gathered("set", set),
        "frozenset": gathered("frozenset", frozenset),
        "range": numbers,
        "xrange": numbers,
    }
    names: dict[tuple[str, str], Any] = {(home, name): made for home in _HOMES for name, made in builtin.items()}
    names["_codecs", "encode"] = plain("encode", encoded, (str, str))
    names["collections", "Counter"] = plain("Counter", collections.Counter, (), (dict,))
    names["torch", "device"] = plain("torch.device", torch.device, (str,), (str, int))
    names["torch", "Size"] = plain("torch.Size", lambda sizes: torch.Size(as_sizes(sizes)), (tuple,))
    names["torch.serialization", "_get_layout"] = plain("torch.layout", _LAYOUTS.__getitem__, (str,))
    kind = type("dtype", (_NumpyType,), {})
    names["numpy", "dtype"] = kind
    scalar = plain("a numpy scalar", _scalar, (kind, bytes))
    return names | {(home, "scalar"): scalar for home in _NUMPY_HOMES}


def _quick_to_hash(value: Any) -> bool:
    """Whether it holds no tuples within tuples, which can be endlessly many."""
    return not isinstance(value, tuple) or not any(isinstance(each, tuple) for each in value)


class _NumpyType:
    """A numpy dtype of single numbers or texts, as it is pickled: a name, then a state with the byte order."""

    def __init__(self, *told: Any) -> None:
        self.name = told[0] if told and type(told[0]) is str and _NUMPY_TYPE.fullmatch(told[0]) else ""
        self.order = ""

    def __setstate__(self, state: Any) -> None:
        fits = type(state) is tuple and len(state) > 1 and state[0] == 3 and state[1] in ("<", "|")
        self.order = state[1] if fits else ""


def _scalar(kind: _NumpyType, data: bytes) -> Any:
    if not kind.name or not kind.order:
        raise ValueError("a numpy scalar of a type that is not plain")
    dtype = np.dtype(kind.order + kind.name)
    if len(data) != dtype.itemsize:
        raise ValueError("a numpy scalar of another size than its type")
    return np.frombuffer(data, dtype)[0]
