"""What a checkpoint holds, opened for commands; without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from ckpt_cloud import bridge, commit
from ckpt_cloud.encryption import Keyring
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.dtypes import SIZES
from ckpt_cloud.format.layout import id_unix_ms
from ckpt_cloud.format.manifest import Chunk, ItemEntry, Manifest, TensorEntry
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import Location, ObjectStore, open_store, parse_url


@dataclass(frozen=True, slots=True)
class Contents:
    """A committed checkpoint, and what its objects are read from."""

    location: Location
    manifest: Manifest
    metrics: dict[str, float]
    store: ObjectStore

    @property
    def saved_unix_s(self) -> float:
        """When its save began."""
        return id_unix_ms(self.manifest.attempt) / 1000

    @property
    def stored_bytes(self) -> int:
        """Of all objects."""
        return sum(entry.size for entry in self.manifest.objects)


def read(url: str, keys: Keyring) -> Contents:
    """Opens the checkpoint at `url`."""
    location = parse_url(url)
    store = open_store(location, StoreOptions(), first_contact=True)
    register, data = bridge.run(commit.open_manifest(store, keys=keys))
    assert register.manifest is not None, "it is committed"
    manifest = manifests.decode(data, register.manifest, location.url)
    unsealed = bridge.run(keys.unsealed(open_store(location, StoreOptions()), register, manifest.objects))
    return Contents(location, manifest, dict(register.metrics or {}), unsealed)


def tensor_bytes(tensor: TensorEntry) -> int:
    """Of the whole tensor."""
    return math.prod(tensor.shape) * SIZES.get(tensor.dtype, 1)


def chunk_bytes(tensor: TensorEntry, chunk: Chunk) -> int:
    """Of one stored chunk."""
    return math.prod(chunk.sizes) * SIZES.get(tensor.dtype, 1)


def item_bytes(item: ItemEntry) -> int:
    """Of a value that is no tensor, as it is stored."""
    if item.value is not None:
        return len(msgspec.msgpack.encode(item.value))
    return item.nbytes if item.inline is None else len(item.inline)


def shape_text(tensor: TensorEntry) -> str:
    """For people."""
    return " × ".join(map(str, tensor.shape)) or "scalar"


def writers(manifest: Manifest) -> list[int]:
    """Of each object, which of the ranks that wrote any it is of: every rank mints an id of its own."""
    ids = {each: number for number, each in enumerate(dict.fromkeys(_id(entry.key) for entry in manifest.objects))}
    return [ids[_id(entry.key)] for entry in manifest.objects]


def _id(key: str) -> str:
    return key.split("/")[1].rpartition("-")[2]
