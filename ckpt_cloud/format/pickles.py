"""What an item is made of, found out without opening it: torch.save's archive, and the pickle in it opcode by opcode.

DCP's planners open items with a full unpickler. So each is read here first: nothing is called, nothing imported, and no
memory taken that the item itself does not take. What is plain (numbers, strings, bytes, None, containers of them, numpy
scalars) can do nothing when it is opened; what is not is left to torch's own allow-list, unless it is a bomb.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ckpt_cloud.format.pickle_calls import CALLS, SATURATED, Node, finish_dtype, plain_global, rebuilt_tensor
from ckpt_cloud.format.pickle_opcodes import opcodes

MAX_DEPTH = 1000
"""Of tuples in tuples: hashing one goes as deep, on the C stack."""
MAX_WEIGHT = 1 << 24
"""Of a tuple's elements, each counted as often as it is met: hashing one meets them all."""
MAX_SHOWN = 1 << 24
"""Of elements that a tensor shows beyond what may be stored: one element can be shown endlessly often, and whatever
copies such a tensor takes memory for all of them."""
_NAME = re.compile(
    r"[^/\0]{1,200}/"
    r"(data\.pkl|byteorder|version|\.format_version|\.storage_alignment|data/[0-9]{1,9}|\.data/serialization_id)"
)
_NUMBERS = ("version", ".format_version", ".storage_alignment")
_EPOCH = (1980, 1, 1, 0, 0, 0)


class NotPlain(Exception):
    """Why an item is neither plain nor for torch's allow-list to decide."""


def records(data: bytes) -> dict[str, bytes]:
    """Records of a `torch.save` archive, by their names below its one directory.

    Raises:
        NotPlain: any other form (older ones, TorchScript, compressed, damaged).
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
            _check_archive(infos, len(data))
            found = {info.filename.partition("/")[2]: archive.read(info) for info in infos}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise NotPlain(f"not an archive of torch.save ({type(error).__name__})") from None
    if not {"data.pkl", "version"} <= found.keys() or found.get("byteorder", b"little") not in (b"little", b"big"):
        raise NotPlain("not an archive of torch.save")
    if any(not found.get(name, b"1").strip().isdigit() or len(found.get(name, b"")) > 9 for name in _NUMBERS):
        raise NotPlain("not an archive of torch.save")
    return found


def rebuilt(found: Mapping[str, bytes]) -> bytes:
    """An archive of exactly these records, so that every reader of archives sees the same in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in ("data.pkl", *(name for name in found if name != "data.pkl")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}", _EPOCH), found[name])
    return out.getvalue()


def is_plain(pickled: bytes, stored: int = 0) -> bool:
    """Whether a pickle makes plain values only; False leaves it to torch's allow-list.

    Args:
        stored: bytes of the tensors that it may refer to.

    Raises:
        NotPlain: damaged, of another protocol than torch.save's, or made to exhaust memory, time or the stack.
    """
    machine = _Machine(hash_limit=MAX_WEIGHT + 16 * len(pickled), shown_limit=MAX_SHOWN + 2 * stored)
    try:
        for name, argument in opcodes(pickled):
            machine.step(name, argument)
    except (ValueError, IndexError, KeyError) as error:
        raise NotPlain(f"its pickle is damaged: {error}") from None
    return machine.plain


def _check_archive(infos: list[zipfile.ZipInfo], size: int) -> None:
    names = {info.filename for info in infos}
    if len(names) != len(infos) or len({name.partition("/")[0] for name in names}) != 1:
        raise ValueError("doubled records, or several directories")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise NotPlain("its archive is compressed or encrypted, which torch.save never does")
        if not _NAME.fullmatch(info.filename):
            raise NotPlain(f"its archive holds {info.filename[:60]!r}, which torch.save does not write")
    if sum(info.file_size for info in infos) > size:
        raise ValueError("records overlap")


def _stop(reason: str) -> NoReturn:
    raise NotPlain(reason)


class _Machine:
    """The pickle machine's stack and memo, with what values are made of in place of values."""

    def __init__(self, *, hash_limit: int, shown_limit: int) -> None:
        self.plain = True
        # What follows changes with every opcode.
        self._hashing_left = hash_limit
        self._shown_left = shown_limit
        self._stack: list[Node] = []
        self._marks: list[int] = []
        self._memo: dict[int, Node] = {}
        self._begun = False

    def step(self, name: str, argument: Any) -> None:
        """One opcode."""
        if not self._begun:
            if name != "PROTO" or argument != 2:
                _stop("its pickle is not of protocol 2, which torch.save writes")
            self._begun = True
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name](argument))
        else:
            _STEPS[name](self, argument)

    def pop(self) -> Node:
        """The topmost value above the last mark."""
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise IndexError("stack underflow")
        return self._stack.pop()

    def top(self) -> Node:
        """The topmost value, left where it is."""
        node = self.pop()
        self._stack.append(node)
        return node

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def since_mark(self) -> list[Node]:
        """What was pushed since the last mark, which goes too."""
        at = self._marks.pop()
        items = self._stack[at:]
        del self._stack[at:]
        return items

    def push_tuple(self, items: list[Node]) -> None:
        node = Node("tuple", children=tuple(items))
        if node.depth > MAX_DEPTH:
            _stop(f"it nests tuples more than {MAX_DEPTH} deep")
        if node.weight > MAX_WEIGHT:
            _stop("it holds tuples within tuples that would take forever to hash")
        self._stack.append(node)

    def append(self, items: list[Node]) -> None:
        target = self.top()
        if target.kind != "list":
            raise ValueError("APPEND to no list")
        target.elements_hash = target.elements_hash and all(item.hashable for item in items)
        target.elements_weight += sum(item.weight for item in items)
        self._show(target, items)

    def set_items(self, items: list[Node]) -> None:
        target = self.top()
        if target.kind not in ("dict", "mapping") or len(items) % 2:
            raise ValueError("SETITEM on no dict, or without a value")
        self._show(target, items)
        if not all(key.hashable for key in items[::2]):
            raise ValueError("a key that is not hashable")
        self._spend(sum(key.weight for key in items[::2]))

    def _spend(self, weight: int) -> None:
        self._hashing_left -= weight
        if self._hashing_left < 0:
            _stop("it holds keys that would take forever to hash")

    def _show(self, target: Node, items: Sequence[Node]) -> None:
        """Notes the tensors that come into a container, which nothing may hold yet: its own count would be wrong."""
        grown = sum(item.shown for item in items)
        if grown and target.held:
            _stop("it holds tensors in what holds itself")
        target.shown = min(SATURATED, target.shown + grown)
        for item in items:
            item.held = True

    def _give(self, callee: str, arguments: Node) -> None:
        """To a call, which may copy every element of every tensor that it is given."""
        self._shown_left -= arguments.shown
        if self._shown_left < 0:
            _stop(f"it calls {callee} with tensors of more elements than are stored")

    def put(self, index: int) -> None:
        self._memo[index] = self.top()

    def get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def push_global(self, argument: tuple[str, str]) -> None:
        module, name = argument
        if not module or not name or "." in name:
            raise ValueError("a malformed name")
        node = plain_global(f"{module}.{name}")
        self.plain = self.plain and (node.kind != "global" or node.text in CALLS)
        self._stack.append(node)

    def reduce(self, _: Any) -> None:
        arguments, callee = self.pop(), self.pop()
        if callee.kind != "global" or arguments.kind != "tuple":
            raise ValueError("a call of no function, or without arguments")
        made = CALLS[callee.text](arguments.children) if callee.text in CALLS else None
        reason = refusal(callee.text, arguments.children)
        if made is None and reason:
            _stop(reason)
        if made is not None and callee.text in ("__builtin__.set", "__builtin__.frozenset"):
            self._spend(made.weight)
        self._give(callee.text, arguments)
        self.plain = self.plain and made is not None
        self._stack.append(made or rebuilt_tensor(callee.text, arguments.children))

    def build(self, _: Any) -> None:
        state = self.pop()
        self._give("BUILD", state)
        self._show(self.top(), [state])
        self.plain = finish_dtype(self.top(), state) and self.plain

    def new_object(self, _: Any) -> None:
        arguments, callee = self.pop(), self.pop()
        if callee.kind != "global" or arguments.kind != "tuple":
            raise ValueError("a new object of no class, or without arguments")
        if callee.text in CALLS or callee.text.startswith("builtins."):
            raise ValueError(f"a new {callee.text} that is not made by a call")
        reason = refusal(callee.text, arguments.children)
        if reason:
            _stop(reason)
        self._give(callee.text, arguments)
        self.plain = False
        self._stack.append(Node("object", shown=arguments.shown))

    def persistent(self, _: Any) -> None:
        self.pop()
        self.plain = False
        self._stack.append(Node("object"))

    def stop(self, _: Any) -> None:
        self.pop()
        if self._stack or self._marks:
            raise ValueError("values left over")


_ALLOCATES = re.compile(r"torch(\.\w+)*\.\w*(Tensor|Storage)|(__builtin__|builtins)\.(bytearray|bytes)|_codecs\.encode")
"""Classes that take memory for a number, and an encoder that takes long for some encodings; torch allows them all."""


def refusal(callee: str, arguments: tuple[Node, ...]) -> str:
    """Why torch may not even be asked about this call."""
    if _ALLOCATES.fullmatch(callee):
        return f"it calls {callee} in a way that torch.save does not"
    if callee == "torch._tensor._rebuild_from_type_v2":
        inner = arguments[0].text if arguments else ""
        if not inner.startswith("torch._utils._rebuild_") or inner == callee:
            return f"it calls {callee} in a way that torch.save does not"
    return ""


_CONSTANTS: dict[str, Callable[[Any], Node]] = {
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE"), lambda _: Node("none")),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), lambda value: Node("int", value=value)),
    "BINFLOAT": lambda _: Node("float"),
    "BINUNICODE": lambda text: Node("str", text=text),
    "EMPTY_LIST": lambda _: Node("list"),
    "EMPTY_DICT": lambda _: Node("dict"),
    "EMPTY_TUPLE": lambda _: Node("tuple"),
}

_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": lambda m, _: m.push_tuple(m.since_mark()),
    "TUPLE1": lambda m, _: m.push_tuple([m.pop()]),
    "TUPLE2": lambda m, _: m.push_tuple([m.pop(), m.pop()][::-1]),
    "TUPLE3": lambda m, _: m.push_tuple([m.pop(), m.pop(), m.pop()][::-1]),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.since_mark()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.push_global,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "NEWOBJ": _Machine.new_object,
    "BINPERSID": _Machine.persistent,
    "STOP": _Machine.stop,
}
