"""Damage that keeps enough of a document's form to get past the first check."""

from __future__ import annotations

import random
from typing import Any

NUMBERS = (0, 1, -1, 7, 63, 64, 255, 256, 4095, 4096, 1 << 31, -(1 << 31), 1 << 32, (1 << 63) - 1, 1 << 63)
NUMBERS += ((1 << 64) - 1, -(1 << 63), 1 << 40, 1 << 62)
TEXTS = (
    "",
    "..",
    "/",
    "../../etc/passwd",
    "s3://other/key",
    "data/x",
    "\0",
    "é" * 40,
    "float32",
    "item",
    "object",
    "w",
)
SIMPLE = (None, True, False, 0.5, float("nan"), float("inf"), b"", b"\0" * 9, [], {}, [[]])


def mutated(rng: random.Random, document: Any, *, changes: int = 3) -> Any:
    """`document`, of lists, dicts and scalars, with a few of its values changed, doubled, moved or lost."""
    for _ in range(rng.randint(1, changes)):
        document = _changed(rng, document, depth=rng.randint(0, 6))
    return document


def _changed(rng: random.Random, value: Any, depth: int) -> Any:
    if depth and isinstance(value, list | tuple) and value:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(rng, value[at], depth - 1), *value[at + 1 :]]
    if depth and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {**value, key: _changed(rng, value[key], depth - 1)}
    return _replaced(rng, value)


def _replaced(rng: random.Random, value: Any) -> Any:
    if rng.random() < 0.2:
        return _any(rng)
    if isinstance(value, bool) or value is None:
        return _any(rng)
    if isinstance(value, int):
        return rng.choice([*NUMBERS, value + 1, value - 1, -value, value * 2, value ^ 1 << rng.randrange(63)])
    if isinstance(value, str):
        return rng.choice([*TEXTS, value[:-1], value + "0", value.replace("0", "1"), value * 3])
    if isinstance(value, bytes):
        return scrambled(rng, value)
    if isinstance(value, list | tuple):
        return _reordered(rng, list(value))
    if isinstance(value, dict):
        return _fewer(rng, dict(value))
    return _any(rng)


def _any(rng: random.Random) -> Any:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        nest: Any = 0
        for _ in range(rng.choice([3, 30, 300])):
            nest = [nest] if rng.random() < 0.5 else {"d": nest}
        return nest
    if kind == 3:
        return [rng.choice(NUMBERS)] * rng.choice([1, 3, 65, 5000])
    return rng.choice(SIMPLE)


def _reordered(rng: random.Random, value: list[Any]) -> list[Any]:
    kind = rng.randrange(5)
    if kind == 0 and value:
        value.pop(rng.randrange(len(value)))
    elif kind == 1 and value:
        value.append(rng.choice(value))
    elif kind == 2:
        value.append(_any(rng))
    elif kind == 3:
        rng.shuffle(value)
    else:
        value = value * rng.choice([0, 2, 50])
    return value


def _fewer(rng: random.Random, value: dict[Any, Any]) -> dict[Any, Any]:
    if value and rng.random() < 0.6:
        gone = value.pop(rng.choice(list(value)))
        if rng.random() < 0.5:
            value[rng.choice(TEXTS)] = gone
    else:
        value[rng.choice(TEXTS)] = _any(rng)
    return value


def scrambled(rng: random.Random, data: bytes, *, changes: int = 4) -> bytes:
    """`data` with a few bytes flipped, lost, doubled, put in or cut off."""
    found = bytearray(data)
    for _ in range(rng.randint(1, changes)):
        at = rng.randrange(len(found) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            found[at : at + rng.randint(1, 8)] = b""
        elif kind == 2:
            found[at:at] = rng.randbytes(rng.randint(1, 8))
        elif kind == 3:
            found[at:at] = found[at : at + rng.randint(1, 40)]
        elif kind == 4 and at < len(found):
            found[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif rng.random() < 0.1:
            del found[at:]
    return bytes(found)
