"""Plain Python values as msgpack, with tuples and any-key dicts kept apart; nothing else, so nothing can run."""

from __future__ import annotations

from typing import Any

from ckpt_cloud.errors import CorruptManifest, Unsupported

_SCALARS = (str, bytes, int, float, bool, type(None))
_INT64 = range(-(1 << 63), 1 << 64)


def lower(value: Any, name: str) -> Any:
    """`value` in terms of what msgpack tells apart: `{"l": …}` a list, `{"t": …}` a tuple, `{"d": …}` a dict's pairs.

    Raises:
        Unsupported: a value of any other type, or one that holds itself; `name` says where.
    """
    try:
        return _lowered(value, name)
    except RecursionError:
        raise Unsupported(f"{name} is nested too deeply, or holds itself") from None


def raise_up(value: Any) -> Any:
    """The inverse of `lower`.

    Raises:
        CorruptManifest: a structure that `lower` does not make.
    """
    try:
        return _raised(value)
    except (TypeError, RecursionError):
        raise CorruptManifest("the manifest holds an unhashable key, or a value nested too deeply") from None


def _lowered(value: Any, name: str) -> Any:
    if type(value) in _SCALARS and (type(value) is not int or value in _INT64):
        return value
    if type(value) is list:
        return {"l": [_lowered(v, name) for v in value]}
    if type(value) is tuple:
        return {"t": [_lowered(v, name) for v in value]}
    if type(value) is dict:
        return {"d": [[_lowered(k, name), _lowered(v, name)] for k, v in value.items()]}
    hint = "use str, bytes, int, float, bool, None, and lists, tuples and dicts of them"
    raise Unsupported(f"{name} holds a {type(value).__name__}, which cannot be stored without pickle", hint=hint)


def _raised(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, dict) and len(value) == 1:
        (tag, content), *_ = value.items()
        if tag == "l" and isinstance(content, list):
            return [_raised(v) for v in content]
        if tag == "t" and isinstance(content, list):
            return tuple(_raised(v) for v in content)
        if tag == "d" and isinstance(content, list) and all(map(_is_pair, content)):
            return {_raised(k): _raised(v) for k, v in content}
    raise CorruptManifest("the manifest holds a value of unknown form")


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2
