"""A manifest of a million chunks: seconds to encode and decode, its size, and what reading one tensor fetches of it."""

from __future__ import annotations

import time
from typing import Any

import ckpt_cloud
from ckpt_cloud import StoreOptions, bridge
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.checksum import sums_length
from ckpt_cloud.format.layout import manifest_key, mint_id, pack_key
from ckpt_cloud.format.manifest import Chunk, Manifest, ObjectEntry, TensorEntry
from ckpt_cloud.format.register import Register
from ckpt_cloud.stores import ObjectInfo, ObjectStore, open_store, parse_url
from ckpt_cloud.stores.intercept import intercepted

_TENSORS, _RANKS = 10_000, 100
_OBJECTS, _OBJECT_BYTES, _BLOCK_BYTES = 1_000, 256 << 20, 64 << 10
_ROWS, _COLUMNS = 64, 1024


def run() -> dict[str, float]:
    """Of 10,000 tensors, each in 100 chunks, in 1,000 objects of 256 MiB with a checksum for every 64 KiB."""
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
        "fetched_for_one": float(_fetched_for_one(manifest.attempt, data)),
    }


def _fetched_for_one(attempt: str, data: bytes) -> int:
    """Bytes of COMMIT and manifest that are fetched to know one tensor."""
    url = "memory://bench-manifest/it"
    store = open_store(parse_url(url), StoreOptions())
    reference = manifests.reference(manifest_key(attempt), data)
    bridge.run(store.put(reference.key, data))
    bridge.run(store.put("COMMIT", registers.encode(Register("committed", attempt, manifest=reference))))
    fetched: list[int] = []
    with intercepted(lambda opened: Counting(opened, fetched)):
        checkpoint = ckpt_cloud.open(url, keys=["model.layers.4711.weight"])
    if checkpoint.get_slice("model.layers.4711.weight").shape != (_ROWS * _RANKS, _COLUMNS):
        raise SystemExit("another tensor was found")
    return sum(fetched)


class Counting:
    """A store that notes how many bytes each read gave."""

    def __init__(self, store: ObjectStore, fetched: list[int]) -> None:
        self._store = store
        self._fetched = fetched

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, key: str, *, limit: int) -> tuple[bytes, ObjectInfo]:
        data, info = await self._store.get(key, limit=limit)
        self._fetched.append(len(data))
        return data, info

    async def get_range(self, key: str, start: int, end: int, version: str | None = None) -> memoryview:
        self._fetched.append(end - start)
        return await self._store.get_range(key, start, end, version)


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
