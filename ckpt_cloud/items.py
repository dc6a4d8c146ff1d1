"""Non-tensor items of a checkpoint: looked at before DCP's planner opens them with everything that pickle can do."""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from ckpt_cloud.errors import UntrustedItem
from ckpt_cloud.format.pickles import NotPlain, is_plain, rebuilt, records

_UNSUPPORTED = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")
_HINT = (
    "allow its types with torch.serialization.add_safe_globals, or, if you trust whoever wrote the checkpoint, open it "
    "with trust=True"
)


_BEFORE = b"".join(
    pickle.dumps(value, protocol=2)
    for value in (
        MAGIC_NUMBER,
        PROTOCOL_VERSION,
        {"protocol_version": PROTOCOL_VERSION, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 8}},
    )
)
_AFTER = pickle.dumps([], protocol=2)


def serialized(value: object) -> bytes:
    """A plain value as `torch.load` takes it: `torch.save`'s older form, which is the quickest to open."""
    return b"".join((_BEFORE, pickle.dumps(value, protocol=2), _AFTER))


def screened(name: str, value: bytes) -> bytes:
    """The item as the planner may open it: an archive of exactly what was looked at.

    Plain values (numbers, strings, bytes, None, lists, tuples, sets and dicts of them, numpy scalars) always pass. For
    the rest torch's own rules of `weights_only=True` hold, with `torch.serialization.add_safe_globals` to widen them,
    but for what would exhaust memory, time or the stack.

    Raises:
        UntrustedItem: it does not pass. Nothing of it was run.
    """
    try:
        archive, plain = _looked_at(value)
        if not plain:
            _ask_torch(archive)
    except NotPlain as error:
        raise UntrustedItem(f"item {name!r} is not plain data: {error}", hint=_HINT) from None
    return archive


def opened(value: bytes | memoryview) -> Any:
    """What `torch.save` saved in `value`, by the same rules.

    Raises:
        NotPlain: it does not pass. Nothing of it was run.
    """
    return _ask_torch(_looked_at(bytes(value))[0])


def _looked_at(value: bytes) -> tuple[bytes, bool]:
    """An archive of what `value` holds, and whether that is plain; nothing was opened yet."""
    found = records(value)
    return rebuilt(found), is_plain(found["data.pkl"], stored=len(value))


def _ask_torch(archive: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)  # noqa: TID251 - the safe form
    except Exception as error:  # noqa: BLE001 - whatever torch raises, the item is not plain
        text = str(error).strip()
        global_ = _UNSUPPORTED.search(text)
        said = f"it holds a {global_[1]}" if global_ else (text.splitlines() or [type(error).__name__])[-1]
        raise NotPlain(said[:200]) from None
