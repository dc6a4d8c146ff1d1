"""A manifest of a million chunks: seconds to encode and decode, its size, and what reading one tensor fetches of it."""

from __future__ import annotations

import time

from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.checksum import sums_length
from ckpt_cloud.format.layout import manifest_key, mint_id, pack_key
from ckpt_cloud.format.manifest import Chunk, Manifest, ObjectEntry, TensorEntry

_TENSORS, _RANKS = 10_000, 100
_OBJECTS, _OBJECT_BYTES, _BLOCK_BYTES = 1_000, 256 << 20, 256 << 10
_ROWS, _COLUMNS = 64, 1024


def run() -> dict[str, float]:
    """Of 10,000 tensors, each in 100 chunks, in 1,000 objects of 256 MiB with a checksum for every 256 KiB."""
    manifest = _manifest()
    began = time.perf_counter()
    data = manifests.encode(manifest)
    encode_s = time.perf_counter() - began
    reference = manifests.reference(manifest_key(manifest.attempt), data)
    began = time.perf_counter()
    decoded = manifests.decode(data, reference, "bench")
    decode_s = time.perf_counter() - began
    if decoded != manifest:
        raise SystemExit("the manifest came back changed")
    return {
        "chunks": float(_TENSORS * _RANKS),
        "encode_s": encode_s,
        "decode_s": decode_s,
        "size": float(len(data)),
        "fetched_for_one": float(_fetched_for_one(data)),
    }


def _fetched_for_one(data: bytes) -> int:
    """Bytes of the manifest that a reader of one tensor fetches: all, as long as it is read as one."""
    return len(data)


def _manifest() -> Manifest:
    id_ = mint_id(1_700_000_000_000, bytes(10))
    sums = bytes(sums_length(_OBJECT_BYTES, _BLOCK_BYTES))
    objects = [
        ObjectEntry(pack_key(id_, n), _OBJECT_BYTES, _BLOCK_BYTES, sums, f'"{n:032x}-16"') for n in range(_OBJECTS)
    ]
    chunk_bytes = _ROWS * _COLUMNS * 4
    per_object = _OBJECT_BYTES // chunk_bytes
    tensors: dict[str, TensorEntry] = {}
    for number in range(_TENSORS):
        places = (divmod(number * _RANKS + rank, per_object) for rank in range(_RANKS))
        chunks = [
            Chunk((rank * _ROWS, 0), (_ROWS, _COLUMNS), place % _OBJECTS, index * chunk_bytes)
            for rank, (place, index) in enumerate(places)
        ]
        tensors[f"model.layers.{number}.weight"] = TensorEntry("float32", (_ROWS * _RANKS, _COLUMNS), chunks)
    return Manifest(attempt=id_, writer="bench", objects=objects, tensors=tensors, items={})
