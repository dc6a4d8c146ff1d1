"""What is fuzzed: a valid checkpoint in memory, one part of it damaged with every digest made right again, and loaded.

Each target takes a source of chance and returns without an error, or raises what a user would see. Anything else than
an error of ours is a finding; `RankFailed` too, which is how a foreign error comes out of `load`.
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, StoreOptions, TransferOptions, bridge
from ckpt_cloud.errors import CkptCloudError, RankFailed
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format import pickles, plain
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.pack import parse_header
from ckpt_cloud.format.register import Register
from ckpt_cloud.items import screened
from ckpt_cloud.stores import ObjectStore, open_store, parse_url
from tests.fuzz.mutate import mutated, scrambled

URL = "memory://fuzz/run"
SMALL = TransferOptions(block_size=4096, inline_limit=200)


def _state() -> dict[str, Any]:
    return {
        "w": torch.arange(24, dtype=torch.float32).reshape(4, 6),
        "half": torch.ones(5, 3, dtype=torch.bfloat16),
        "one": torch.tensor(3.5, dtype=torch.complex64),
        "empty": torch.zeros(0, 2),
        "deep": {"list": [torch.arange(9000), {"x": torch.zeros(2, 2, 2, dtype=torch.bool)}]},
        "step": 7,
        "loss": np.float64(0.5),
        "long": ["a plain value that does not fit inline"] * 20,
        "tuple": (torch.ones(3), {"k": b"\0\xff"}),
    }


def _blank(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: _blank(inner) for key, inner in value.items()}
    return [_blank(inner) for inner in value] if isinstance(value, list) else None


@dataclass(frozen=True)
class Seed:
    """A valid checkpoint, taken apart."""

    store: ObjectStore
    register: Register
    manifest: dict[str, Any]
    packs: dict[str, bytes]


@functools.cache
def seed() -> Seed:
    """Made once; its one tensor of several rows is cut in two chunks, as two ranks would store it."""
    ckpt_cloud.save(_state(), storage_writer=ObjectStoreWriter(URL, transfer=SMALL), no_dist=True)
    store = open_store(parse_url(URL), StoreOptions())
    register, data = bridge.run(_opened(store))
    manifest = msgspec.msgpack.decode(data[len(manifests.MAGIC) :])
    (chunk,) = manifest["tensors"]["w"][2]
    manifest["tensors"]["w"][2] = [[[0, 0], [1, 6], *chunk[2:]], [[1, 0], [3, 6], chunk[2], chunk[3] + 24]]
    packs = {entry[0]: bridge.run(store.get(entry[0], limit=1 << 30))[0] for entry in manifest["objects"]}
    return Seed(store, register, manifest, packs)


async def _opened(store: ObjectStore) -> tuple[Register, bytes]:
    data, _ = await store.get("COMMIT", limit=1 << 20)
    register = registers.decode(data, URL)
    assert register.manifest is not None
    body, _ = await store.get(register.manifest.key, limit=1 << 30)
    return register, body


def commit(manifest: bytes) -> None:
    """Commits these bytes as the manifest, with the digest that fits them."""
    found = seed()
    assert found.register.manifest is not None
    key = found.register.manifest.key
    register = msgspec.structs.replace(found.register, manifest=manifests.reference(key, manifest))
    bridge.run(found.store.put(key, manifest))
    bridge.run(found.store.put("COMMIT", registers.encode(register)))


def load() -> dict[str, Any]:
    """What a user would get."""
    state = _blank(_state())
    ckpt_cloud.load(state, storage_reader=ObjectStoreReader(URL, transfer=SMALL), no_dist=True)
    return state


def untouched() -> bytes:
    return manifests.MAGIC + msgspec.msgpack.encode(seed().manifest)


def fuzz_manifest(rng: random.Random) -> None:
    """Other values in the manifest: keys, ranges, shapes, counts, nesting."""
    commit(manifests.MAGIC + msgspec.msgpack.encode(mutated(rng, seed().manifest)))
    load()


def fuzz_manifest_bytes(rng: random.Random) -> None:
    """Other bytes in the manifest."""
    commit(scrambled(rng, untouched()))
    load()


def fuzz_verify(rng: random.Random) -> None:
    """As `manifest`, by the check that does not need torch."""
    commit(manifests.MAGIC + msgspec.msgpack.encode(mutated(rng, seed().manifest)))
    ckpt_cloud.verify(URL, deep=True, transfer=SMALL)


def fuzz_commit(rng: random.Random) -> None:
    """Other values, or bytes, in COMMIT."""
    commit(untouched())
    document = msgspec.to_builtins(seed().register)
    if rng.random() < 0.5:
        data = msgspec.json.encode(mutated(rng, document), enc_hook=repr)
    else:
        data = scrambled(rng, registers.encode(seed().register))
    bridge.run(seed().store.put("COMMIT", data))
    ckpt_cloud.list_checkpoints("memory://fuzz")
    load()


def fuzz_pack(rng: random.Random) -> None:
    """Other bytes in a data object: what loads all the same is right."""
    commit(untouched())
    key, data = rng.choice(list(seed().packs.items()))
    bridge.run(seed().store.put(key, scrambled(rng, data)))
    try:
        assert saved(load()) == saved(_state())
    finally:
        bridge.run(seed().store.put(key, data))


def fuzz_header(rng: random.Random) -> None:
    """The header of a pack, as recovery reads it."""
    data = rng.choice(list(seed().packs.values()))
    parse_header(scrambled(rng, data[: 8 + int.from_bytes(data[:8], "little")]) + data[-100:])


def fuzz_planner_data(rng: random.Random) -> None:
    """Lowered values."""
    lowered = plain.lower({("a", 1): [1, (2, b"x"), {"k": None}], 3: {(): [[]]}}, "x")
    plain.raise_up(mutated(rng, lowered))


def fuzz_item(rng: random.Random) -> None:
    """The pickle, or the archive, of an item: what passes opens."""
    data = saved(rng.choice(ITEMS))
    if rng.random() < 0.8:
        found = pickles.records(data)
        data = pickles.rebuilt({**found, "data.pkl": scrambled(rng, found["data.pkl"])})
    else:
        data = scrambled(rng, data)
    passed = screened("item", data)
    # As DCP's planner does; a device that this machine lacks is the planner's business.
    torch.load(io.BytesIO(passed), weights_only=False, map_location="cpu")


def saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


ITEMS: tuple[Any, ...] = (
    {"a": [1, -1, 1 << 70, None, True, 0.5, "text", b"\xff\0", bytearray(b"xy")], ("k", 2): {3, (4,)}},
    (np.float64(1.5), np.int32(7), np.str_("né"), np.bool_(True), 2j, frozenset({1}), range(3)),
    (torch.ones(3), torch.arange(6).reshape(2, 3)[:, 1], torch.nn.Parameter(torch.zeros(2))),
    [torch.Size([2, 3]), torch.float32, torch.device("cpu"), [[]] * 3, {"x": {"y": {"z": ()}}}],
)

TARGETS: dict[str, Callable[[random.Random], None]] = {
    name.removeprefix("fuzz_"): value for name, value in list(globals().items()) if name.startswith("fuzz_")
}


def is_finding(error: BaseException) -> bool:
    """Whether what a target raised is not what a user may be shown."""
    return not isinstance(error, CkptCloudError) or isinstance(error, RankFailed)
