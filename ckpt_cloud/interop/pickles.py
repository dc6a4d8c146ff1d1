"""Pickles that others wrote, opened without running anything: an allow-list of names and of opcodes.

bytes ─► walk (`pickle_walk`): only opcodes that plain data needs, bounded memo and keys
      ─► C unpickler: only names that the caller allows

What the names stand for is the caller's: functions that take nothing but what they need, constants, and classes made
anew for each pickle, so that not even an attribute that a hostile pickle sets on one outlives it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, Self

from ckpt_cloud.errors import CorruptFile, UntrustedItem
from ckpt_cloud.interop.pickle_walk import walk


class Record:
    """An instance of a class that a pickle names: its state, and none of its code."""

    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        """An instance whose state is `args`, unless the pickle gives another."""
        record = super().__new__(cls)
        record.state = args
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def record_class(name: str) -> type[Record]:
    """A class of its own for one pickle."""
    return type(name, (Record,), {})


class _Ordered(dict[Any, Any]):
    """An OrderedDict, whose attributes, such as the versions of a state dict, are let go."""

    def __init__(self) -> None:
        """Empty: pickles fill it afterwards."""

    def __setstate__(self, state: Any) -> None:
        del state


def ordered_class() -> type[dict[Any, Any]]:
    """An OrderedDict of its own for one pickle."""
    return type("OrderedDict", (_Ordered,), {})


def load(
    data: bytes,
    names: Mapping[tuple[str, str], Any],
    where: str,
    *,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """What the pickle in `data` holds, in terms of what `names` gives for each (module, name).

    Args:
        names: what is called with a list must not hash what is in it (`pickle_walk`).
        persistent: what stands for a persistent id.

    Raises:
        UntrustedItem: it names anything else, or has an opcode that plain data does not need.
        CorruptFile: it is not a pickle, or cut short.
    """
    walk(data, where)
    try:
        return _Unpickler(data, names, where, persistent).load()
    except UntrustedItem:
        raise
    except CorruptFile as error:
        raise CorruptFile(error.message, where) from None
    except Exception as error:  # noqa: BLE001 - whatever a malformed pickle makes the unpickler raise
        raise CorruptFile(f"the pickle does not decode: {type(error).__name__}: {error}", where) from None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        names: Mapping[tuple[str, str], Any],
        where: str,
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names
        self._where = where
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        hint = "it is not of a kind that checkpoints hold, and would run code; do not open it with pickle either"
        raise UntrustedItem(f"the pickle names {module[:100]}.{name[:100]}", self._where, hint)

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise UntrustedItem("the pickle refers to objects outside it", self._where)
        return self._persistent(pid)
