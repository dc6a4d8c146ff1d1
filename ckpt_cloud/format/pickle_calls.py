"""The few calls in a pickle that make plain values, each with the arguments that a pickler gives it and no others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ckpt_cloud.format.dtypes import SIZES

_NUMBER = re.compile(r"b1|[iu][1248]|f[248]|c(?:8|16)")
_TEXT = re.compile(r"([SU])(\d{1,9})")
SATURATED: Final = 1 << 62


@dataclass(slots=True, eq=False)
class Node:
    """What stands on the pickle machine's stack in place of a value.

    Attributes:
        kind: `none` stands for the booleans too; `mapping` is an OrderedDict, `scalar` any other plain value.
        text: of a string, or the dotted name of a global.
        value: of an integer; the size of bytes and dtypes.
        children: of a tuple.
        data: of bytes.
        weight: what hashing it costs, in words; shared parts count as often as they are met.
        elements_hash: of a list, whether all of its elements can be hashed; changes as it grows.
        elements_weight: of a list, the sum of its elements' weights; likewise.
        shown: elements of the tensors in it, which may be many more than are stored; changes as a container grows.
        held: whether it is in another; changes once.
    """

    kind: str
    text: str = ""
    value: int = 0
    children: tuple[Node, ...] = ()
    data: bytes = b""
    weight: int = 1
    depth: int = 0
    hashable: bool = True
    elements_hash: bool = True
    elements_weight: int = 0
    shown: int = 0
    held: bool = False

    def __post_init__(self) -> None:
        if self.children:
            self.weight = min(SATURATED, 1 + sum(child.weight for child in self.children))
            self.depth = 1 + max(child.depth for child in self.children)
            self.hashable = all(child.hashable for child in self.children)
            self.shown = min(SATURATED, sum(child.shown for child in self.children))
            for child in self.children:
                child.held = True
        elif self.kind == "int":
            self.weight = 1 + self.value.bit_length() // 64
        elif self.kind in ("list", "dict", "mapping", "set", "bytearray"):
            self.hashable = False


Arguments = tuple[Node, ...]


def plain_global(name: str) -> Node:
    """A global; torch's element types are plain values of their own."""
    head, _, tail = name.rpartition(".")
    return Node("scalar") if head == "torch" and tail in SIZES else Node("global", text=name)


def rebuilt_tensor(callee: str, arguments: Arguments) -> Node:
    """What a call that is not plain makes: of one that makes a tensor, with the elements that it shows."""
    if callee == _TYPED and len(arguments) > 2:
        # Of a subclass: the function that makes it, and the arguments of that.
        callee, arguments = arguments[0].text, arguments[2].children
    if not _REBUILDS.fullmatch(callee):
        return Node("object", shown=sum(argument.shown for argument in arguments))
    sizes = arguments[2].children if len(arguments) > 2 else ()
    shown = 1
    for size in sizes:
        shown = min(SATURATED, shown * max(0, size.value))
    told = len(arguments) > 2 and arguments[2].kind == "tuple" and all(size.kind == "int" for size in sizes)
    return Node("object", shown=shown if told else SATURATED)


_TYPED = "torch._tensor._rebuild_from_type_v2"
_REBUILDS = re.compile(r"torch\._utils\._rebuild_q?tensor(_v[0-9])?")
"""They take a storage, an offset, and sizes."""


def finish_dtype(target: Node, state: Node) -> bool:
    """Whether BUILD with `state` makes of `target` the numpy dtype of one plain number or text; notes that it does."""
    kinds = [child.kind for child in state.children]
    if target.kind not in ("dtype", "built dtype") or kinds != ["int", "str", *["none"] * 3, *["int"] * 3]:
        return False
    version, _, _, _, _, size, alignment, flags = (child.value for child in state.children)
    expected = {(-1, -1, 0)} if target.text not in "SU" else {(target.value, 1, 0), (target.value, 4, 8)}
    fits = version == 3 and state.children[1].text in ("<", "|") and (size, alignment, flags) in expected
    target.kind = "built dtype" if fits else "object"
    return fits


def _dtype(arguments: Arguments) -> Node | None:
    if [argument.kind for argument in arguments] != ["str", "none", "none"]:
        return None
    text = arguments[0].text
    if _NUMBER.fullmatch(text):
        return Node("dtype", text=text[0], value=int(text[1:]))
    found = _TEXT.fullmatch(text)
    return Node("dtype", text=found[1], value=int(found[2]) * (4 if found[1] == "U" else 1)) if found else None


def _numpy_scalar(arguments: Arguments) -> Node | None:
    if [argument.kind for argument in arguments] != ["built dtype", "bytes"]:
        return None
    dtype, data = arguments
    if len(data.data) != dtype.value or dtype.value == 0:
        return None
    if dtype.text == "U":
        try:
            data.data.decode("utf-32-le")
        except UnicodeDecodeError:
            return None
    return Node("scalar")


def _encoded(arguments: Arguments) -> Node | None:
    if [argument.kind for argument in arguments] != ["str", "str"] or arguments[1].text != "latin1":
        return None
    try:
        return Node("bytes", data=arguments[0].text.encode("latin1"))
    except UnicodeEncodeError:
        return None


def _empty_bytes(arguments: Arguments) -> Node | None:
    return None if arguments else Node("bytes")


def _bytearray(arguments: Arguments) -> Node | None:
    return Node("bytearray") if [argument.kind for argument in arguments] in ([], ["bytes"]) else None


def _complex(arguments: Arguments) -> Node | None:
    return Node("scalar") if [argument.kind for argument in arguments] == ["float", "float"] else None


def _range(arguments: Arguments) -> Node | None:
    fits = [argument.kind for argument in arguments] == ["int"] * 3 and arguments[2].value != 0
    return Node("scalar") if fits else None


def _size(arguments: Arguments) -> Node | None:
    if [argument.kind for argument in arguments] != ["tuple"]:
        return None
    fits = all(child.kind == "int" and -(1 << 63) <= child.value < 1 << 63 for child in arguments[0].children)
    return Node("scalar") if fits else None


def _set(arguments: Arguments) -> Node | None:
    fits = [argument.kind for argument in arguments] == ["list"] and arguments[0].elements_hash
    return Node("set", weight=arguments[0].elements_weight) if fits else None


def _frozenset(arguments: Arguments) -> Node | None:
    made = _set(arguments)
    return made and Node("scalar", weight=made.weight)


def _ordered_dict(arguments: Arguments) -> Node | None:
    return None if arguments else Node("mapping")


CALLS: dict[str, Callable[[Arguments], Node | None]] = {
    "_codecs.encode": _encoded,
    "__builtin__.bytes": _empty_bytes,
    "__builtin__.bytearray": _bytearray,
    "__builtin__.complex": _complex,
    "__builtin__.frozenset": _frozenset,
    "__builtin__.set": _set,
    "__builtin__.xrange": _range,
    "collections.OrderedDict": _ordered_dict,
    "numpy.dtype": _dtype,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "torch.Size": _size,
}
"""By the callee's name in a pickle of protocol 2, where `builtins` is `__builtin__`. None: not plain."""
