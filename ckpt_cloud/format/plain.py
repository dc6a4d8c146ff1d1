"""Plain Python values as msgpack, with tuples and any-key dicts kept apart; nothing else, so nothing can run."""

from __future__ import annotations

from typing import Any

from ckpt_cloud.errors import CorruptManifest, Unsupported

_SCALARS = (str, bytes, int, float, bool, type(None))
_INT64 = range(-(1 << 63), 1 << 64)


def lower(value: Any, name: str) -> Any:
    """`value` in terms of what msgpack tells apart: a list is a list, `["t", …]` a tuple, `["d", …]` a dict.

    Raises:
        Unsupported: a value of any other type; `name` says where.
    """
    if type(value) in _SCALARS and (type(value) is not int or value in _INT64):
        return value
    if type(value) is list:
        return {"l": [lower(v, name) for v in value]}
    if type(value) is tuple:
        return {"t": [lower(v, name) for v in value]}
    if type(value) is dict:
        return {"d": [[lower(k, name), lower(v, name)] for k, v in value.items()]}
    hint = "use str, bytes, int, float, bool, None, and lists, tuples and dicts of them"
    raise Unsupported(f"{name} holds a {type(value).__name__}, which cannot be stored without pickle", hint=hint)


def raise_up(value: Any) -> Any:
    """The inverse of `lower`.

    Raises:
        CorruptManifest: a structure that `lower` does not make.
    """
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (tag, content), *_ = value.items()
        if tag == "l":
            return [raise_up(v) for v in content]
        if tag == "t":
            return tuple(raise_up(v) for v in content)
        if tag == "d":
            return {raise_up(k): raise_up(v) for k, v in content}
    raise CorruptManifest("the manifest holds a value of unknown form")
