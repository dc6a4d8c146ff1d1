"""Pack objects: each a valid safetensors file, so that any tool opens it, and a lost manifest loses no tensor.

    8 bytes      length of the header, little-endian
    header       JSON: name → {dtype, shape, data_offsets}, and `__metadata__`; padded with spaces to 8 bytes
    data         entries back to back, in the header's order

What safetensors cannot say (a shard's place in its tensor, a dtype that it does not know, a non-tensor item) stands in
`__metadata__["ckpt_cloud.chunks"]`, as JSON: name → {fqn, shape, offsets, dtype}; and `coded`, of stored bytes that are
not the chunk's own (`format.codec`): {codec, frame, nbytes, at, sizes}.
Format: the README of safetensors 0.8 (header of at most 100 MB, no holes, U8/F32/... names).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.dtypes import SAFETENSORS

HEADER_ALIGNMENT = 8
MAX_HEADER_BYTES = 100_000_000
ITEM_DTYPE = "item"
"""Stands for a non-tensor item: bytes as DCP's planner made them."""


class _Tensor(msgspec.Struct, frozen=True, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class CodedPart(msgspec.Struct, frozen=True, gc=False):
    """What an entry has of a coded chunk.

    Attributes:
        codec, frame: as `format.codec.Coded` has them.
        nbytes: plain bytes of the chunk.
        at: which of the chunk's stored bytes is the entry's first.
        sizes: stored bytes of each frame that the entry has.
    """

    codec: tuple[str, ...]
    frame: int
    nbytes: int
    at: int
    sizes: list[int]


class PackEntry(msgspec.Struct, frozen=True, gc=False):
    """One stored chunk.

    Attributes:
        fqn: key in the flattened state dict.
        dtype: torch's name, or `ITEM_DTYPE`.
        shape: of the whole tensor.
        offsets: where the chunk begins in the tensor, one number per dimension.
        sizes: of the chunk.
        nbytes: that it takes.
        coded: what it has of the chunk, if that is coded.
    """

    fqn: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int
    coded: CodedPart | None = None


def header(entries: Sequence[PackEntry], attempt: str) -> bytes:
    """The length and the header of a pack that holds `entries` back to back."""
    table: dict[str, Any] = {}
    chunks: dict[str, Any] = {}
    at = 0
    for entry in entries:
        name = _unique(_name(entry), table)
        dtype = SAFETENSORS.get(entry.dtype) if entry.coded is None else None
        sizes = entry.sizes if dtype else (entry.nbytes,)
        table[name] = _Tensor(dtype or "U8", sizes, (at, at + entry.nbytes))
        if dtype is None or name != entry.fqn or entry.sizes != entry.shape:
            chunks[name] = {"fqn": entry.fqn, "dtype": entry.dtype, "shape": entry.shape}
            chunks[name] |= {"offsets": entry.offsets, "sizes": entry.sizes}
            if entry.coded is not None:
                chunks[name]["coded"] = entry.coded
        at += entry.nbytes
    metadata = {"format": "pt", "ckpt_cloud.attempt": attempt}
    if chunks:
        metadata["ckpt_cloud.chunks"] = msgspec.json.encode(chunks).decode()
    text = msgspec.json.encode({"__metadata__": metadata, **table})
    text += b" " * (-(len(text) + 8) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def parse_header(data: bytes) -> tuple[int, dict[str, Any]]:
    """Bytes that length and header take, and the header's JSON.

    Raises:
        CorruptManifest: not the start of a safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise CorruptManifest("not the start of a safetensors file")
    try:
        table = msgspec.json.decode(data[8 : 8 + length], type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptManifest(f"the pack's header does not decode: {error}") from error
    return 8 + length, table


def header_bytes_bound(entry: PackEntry) -> int:
    """At most this many bytes of header does `entry` take.

    Its name stands there three times, a character escaped as up to 6 bytes, and 7 within the metadata's own JSON; for
    each dimension there are six numbers of up to 20 digits.
    """
    return (6 + 7 + 7) * len(entry.fqn) + 172 * len(entry.shape) + 260


def _name(entry: PackEntry) -> str:
    if entry.fqn == "__metadata__":
        return "__metadata__@"
    whole = entry.sizes == entry.shape
    return entry.fqn if whole else f"{entry.fqn}@{','.join(map(str, entry.offsets))}"


def _unique(name: str, taken: dict[str, Any]) -> str:
    while name in taken:
        name += "'"
    return name
