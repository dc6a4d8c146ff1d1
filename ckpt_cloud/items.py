"""Non-tensor items of a checkpoint: looked at before DCP's planner opens them with everything that pickle can do."""

from __future__ import annotations

import io
import re

import torch

from ckpt_cloud.errors import UntrustedItem
from ckpt_cloud.format.pickles import NotPlain, is_plain, rebuilt, records

_UNSUPPORTED = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")
_HINT = (
    "allow its types with torch.serialization.add_safe_globals, or, if you trust whoever wrote the checkpoint, open it "
    "with trust=True"
)


def screened(name: str, value: bytes) -> bytes:
    """The item as the planner may open it: an archive of exactly what was looked at.

    Plain values (numbers, strings, bytes, None, lists, tuples, sets and dicts of them, numpy scalars) always pass. For
    the rest torch's own rules of `weights_only=True` hold, with `torch.serialization.add_safe_globals` to widen them,
    but for what would exhaust memory, time or the stack.

    Raises:
        UntrustedItem: it does not pass. Nothing of it was run.
    """
    try:
        found = records(value)
        archive = rebuilt(found)
        if not is_plain(found["data.pkl"]):
            _ask_torch(archive)
    except NotPlain as error:
        raise UntrustedItem(f"item {name!r} is not plain data: {error}", hint=_HINT) from None
    return archive


def _ask_torch(archive: bytes) -> None:
    try:
        torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)  # noqa: TID251 - the safe form
    except Exception as error:  # noqa: BLE001 - whatever torch raises, the item is not plain
        text = str(error).strip()
        global_ = _UNSUPPORTED.search(text)
        said = f"it holds a {global_[1]}" if global_ else (text.splitlines() or [type(error).__name__])[-1]
        raise NotPlain(said[:200]) from None
