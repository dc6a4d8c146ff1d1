"""Manifests as one who can write to the store could make them: any values, under digests that fit."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.manifest import MAGIC_1, Manifest
from ckpt_cloud.format.pages import LENGTH_BYTES, MAGIC

KINDS = ("objects", "tensors", "items", "paths")
KEY = f"data/{'0' * 32}/manifest"
"""Of a manifest that is only decoded."""

Contents = dict[str, list[Any]]
"""What is on the pages of each kind."""


def opened(data: bytes) -> Manifest:
    """A valid manifest."""
    return manifests.decode(data, manifests.reference(KEY, data), "here")


def changed(data: bytes, **fields: Any) -> bytes:
    """A valid manifest with other values, given as MessagePack has them, in some of its fields."""
    kinds = msgspec.structs.fields(Manifest)
    given = {kind.name: msgspec.convert(fields[kind.name], kind.type) for kind in kinds if kind.name in fields}
    assert set(given) == set(fields)
    return manifests.encode(msgspec.structs.replace(opened(data), **given))


def in_one_piece(fields: Any) -> bytes:
    """Version 1."""
    return MAGIC_1 + msgspec.msgpack.encode(fields)


def taken_apart(data: bytes) -> tuple[dict[str, Any], Contents]:
    """The root of a manifest of version 2, and what is on its pages."""
    length = int.from_bytes(data[-LENGTH_BYTES:], "little")
    root = msgspec.msgpack.decode(data[-LENGTH_BYTES - length : -LENGTH_BYTES])
    return root, {kind: [_page(data, *where) for where in root[kind]] for kind in KINDS}


def _page(data: bytes, first: str | int, start: int, size: int, sha256: bytes) -> Any:
    return msgspec.msgpack.decode(data[start : start + size])


def with_pages(root: dict[str, Any], contents: Contents) -> tuple[dict[str, Any], bytes]:
    """The root that names pages with `contents`, and the pages; each keeps what the root said of its first entry."""
    body, named = MAGIC, {}
    for kind in KINDS:
        named[kind] = []
        for (first, *_), content in zip(root[kind], contents[kind], strict=True):
            data = msgspec.msgpack.encode(content)
            named[kind].append([first, len(body), len(data), hashlib.sha256(data).digest()])
            body += data
    return root | named, body


def closed(root: Any, pages: bytes) -> bytes:
    """A manifest of version 2."""
    body = msgspec.msgpack.encode(root)
    return pages + body + len(body).to_bytes(LENGTH_BYTES, "little")
