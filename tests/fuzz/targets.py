"""What is fuzzed: a valid checkpoint in memory, one part of it damaged with every digest made right again, and loaded.

Each target takes a source of chance and returns without an error, or raises what a user would see. Anything else than
an error of ours is a finding; `RankFailed` too, which is how a foreign error comes out of `load`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from torch.distributed.checkpoint._extension import ZStandard

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, StoreOptions, TransferOptions, bridge
from ckpt_cloud.errors import CkptCloudError, CorruptManifest, RankFailed
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format import pages, pickles, plain
from ckpt_cloud.format import register as registers
from ckpt_cloud.format.checksum import BlockSums
from ckpt_cloud.format.pack import parse_header
from ckpt_cloud.format.register import ManifestRef, Register
from ckpt_cloud.items import screened
from ckpt_cloud.stores import ObjectStore, open_store, parse_url
from ckpt_cloud.transfer import encode
from tests import forge
from tests.fuzz import foreign
from tests.fuzz.mutate import mutated, scrambled

URL = "memory://fuzz/run"
SEALED_URL = "memory://fuzz/sealed"
KEY = bytes(range(32))
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
        "pickled": {2j},
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
    """A valid checkpoint, taken apart.

    Attributes:
        fields: of its manifest, as version 1 has them.
        manifest: the bytes of it, of version 2 and on several pages of each kind.
    """

    store: ObjectStore
    register: Register
    fields: dict[str, Any]
    manifest: bytes
    packs: dict[str, bytes]
    url: str = URL


@functools.cache
def coded_seed(kind: str) -> Seed:
    """Of chunks and an item in frames, or of streams; several objects."""
    url = f"memory://fuzz/{kind}"
    options = TransferOptions(block_size=4096, inline_limit=200, frame_size=4096)
    how = {"compression": "zstd"} if kind == "frames" else {"extensions": [ZStandard()]}
    with patch.multiple(encode, PACK_BYTES=5000, UNIT_BYTES=4096):
        ckpt_cloud.save(_state(), storage_writer=ObjectStoreWriter(url, transfer=options, **how), no_dist=True)
    store = open_store(parse_url(url), StoreOptions())
    register, data = bridge.run(_opened(store))
    manifest = forge.opened(data)
    with patch.object(pages, "PAGE_BYTES", 100):
        data = forge.changed(data)
    packs = {entry.key: bridge.run(store.get(entry.key, limit=1 << 30))[0] for entry in manifest.objects}
    return Seed(store, register, msgspec.msgpack.decode(msgspec.msgpack.encode(manifest)), data, packs, url)


@functools.cache
def seed() -> Seed:
    """Made once; its one tensor of several rows is cut in two chunks, as two ranks would store it."""
    ckpt_cloud.save(_state(), storage_writer=ObjectStoreWriter(URL, transfer=SMALL), no_dist=True)
    store = open_store(parse_url(URL), StoreOptions())
    register, data = bridge.run(_opened(store))
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(forge.opened(data)))
    (chunk,) = fields["tensors"]["w"][2]
    fields["tensors"]["w"][2] = [[[0, 0], [1, 6], *chunk[2:]], [[1, 0], [3, 6], chunk[2], chunk[3] + 24]]
    with patch.object(pages, "PAGE_BYTES", 100):
        data = forge.changed(data, tensors=fields["tensors"])
    packs = {entry[0]: bridge.run(store.get(entry[0], limit=1 << 30))[0] for entry in fields["objects"]}
    return Seed(store, register, fields, data, packs)


async def _opened(store: ObjectStore) -> tuple[Register, bytes]:
    data, _ = await store.get("COMMIT", limit=1 << 20)
    register = registers.decode(data, URL)
    assert register.manifest is not None
    body, _ = await store.get(register.manifest.key, limit=1 << 30)
    return register, body


def commit(manifest: bytes, found: Seed | None = None) -> None:
    """Commits these bytes as the manifest, with the digest that fits them."""
    found = found or seed()
    assert found.register.manifest is not None
    key = found.register.manifest.key
    try:
        reference = manifests.reference(key, manifest)
    except CorruptManifest:
        root = min(len(manifest), 100)
        reference = ManifestRef(key, len(manifest), hashlib.sha256(manifest[-root:]).hexdigest(), root)
    register = msgspec.structs.replace(found.register, manifest=reference)
    bridge.run(found.store.put(key, manifest))
    bridge.run(found.store.put("COMMIT", registers.encode(register)))


def load(url: str = URL) -> dict[str, Any]:
    """What a user would get."""
    state = _blank(_state())
    ckpt_cloud.load(state, storage_reader=ObjectStoreReader(url, transfer=SMALL), no_dist=True)
    return state


def untouched() -> bytes:
    return seed().manifest


def _with_other_values(rng: random.Random, found: Seed | None = None) -> bytes:
    """A manifest of version 1, or of version 2 with some of its pages changed, or its root, or both."""
    found = found or seed()
    if rng.random() < 0.3:
        return forge.in_one_piece(mutated(rng, found.fields))
    root, contents = forge.taken_apart(found.manifest)
    which = rng.randrange(3)
    if which:
        kind = rng.choice(forge.KINDS)
        at = rng.randrange(len(contents[kind]))
        contents[kind][at] = mutated(rng, contents[kind][at])
    root, body = forge.with_pages(root, contents)
    return forge.closed(root if which == 1 else mutated(rng, root), body)


def _with_other_bytes(rng: random.Random) -> bytes:
    """As bytes: version 1's, or version 2's with the digests of its pages right or not."""
    which = rng.randrange(3)
    if which == 0:
        return scrambled(rng, forge.in_one_piece(seed().fields))
    if which == 1:
        return scrambled(rng, untouched())
    root, contents = forge.taken_apart(untouched())
    kind = rng.choice(forge.KINDS)
    at = rng.randrange(len(contents[kind]))
    contents[kind][at] = msgspec.Raw(scrambled(rng, msgspec.msgpack.encode(contents[kind][at])))
    return forge.closed(*forge.with_pages(root, contents))


def fuzz_manifest(rng: random.Random) -> None:
    """Other values in the manifest: keys, ranges, shapes, counts, nesting."""
    commit(_with_other_values(rng))
    load()


def fuzz_manifest_bytes(rng: random.Random) -> None:
    """Other bytes in the manifest."""
    commit(_with_other_bytes(rng))
    load()


def fuzz_part(rng: random.Random) -> None:
    """As `manifest`, by a reader that fetches some pages only."""
    commit(_with_other_values(rng))
    keys = rng.choice([["w"], ["half", "one"], ["deep.list.0", "nothing"], ["empty"], ["step"]])
    with ckpt_cloud.open(URL, keys=keys, transfer=SMALL) as opened:
        for name in opened:
            opened[name]


def fuzz_verify(rng: random.Random) -> None:
    """As `manifest`, by the check that does not need torch."""
    commit(_with_other_values(rng))
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


def fuzz_coded(rng: random.Random) -> None:
    """As `manifest`, where chunks and items are coded."""
    found = coded_seed(rng.choice(["frames", "stream"]))
    if rng.random() < 0.5:
        commit(_with_other_values(rng, found), found)
    else:
        commit(_with_other_coding(rng, found), found)
    load(found.url)


def _with_other_coding(rng: random.Random, found: Seed) -> bytes:
    """Only how one of the chunks, or the item, is coded."""
    fields = copy.deepcopy(found.fields)
    rows = [chunk for tensor in fields["tensors"].values() for chunk in tensor[2] if chunk[4]]
    rows += [item for item in fields["items"].values() if item[5]]
    row = rng.choice(rows)
    row[-1] = mutated(rng, row[-1])
    return forge.in_one_piece(fields)


def fuzz_coded_bytes(rng: random.Random) -> None:
    """Other stored bytes under checksums that fit: what undoes all the same is of the right length."""
    found = coded_seed(rng.choice(["frames", "stream"]))
    fields = copy.deepcopy(found.fields)
    number = rng.randrange(len(fields["objects"]))
    entry = fields["objects"][number]
    data = scrambled(rng, found.packs[entry[0]])[: entry[1]].ljust(entry[1], b"\0")
    sums = BlockSums(entry[2])
    sums.update(data)
    entry[3] = sums.finish()
    bridge.run(found.store.put(entry[0], data))
    try:
        commit(forge.in_one_piece(fields), found)
        load(found.url)
    finally:
        bridge.run(found.store.put(entry[0], found.packs[entry[0]]))


@functools.cache
def _sealed() -> tuple[ObjectStore, dict[str, bytes]]:
    """All objects of an encrypted checkpoint as they are stored."""
    writer = ObjectStoreWriter(SEALED_URL, transfer=SMALL, encryption_key=KEY, compression="zstd")
    ckpt_cloud.save(_state(), storage_writer=writer, no_dist=True)
    store = open_store(parse_url(SEALED_URL), StoreOptions())

    async def stored() -> dict[str, bytes]:
        keys = [info.key async for info in store.list()]
        return {key: (await store.get(key, limit=1 << 30))[0] for key in keys}

    return store, bridge.run(stored())


def fuzz_sealed(rng: random.Random) -> None:
    """Other bytes in any object of an encrypted checkpoint, or one in the place of another: what loads is right."""
    store, objects = _sealed()
    key, other = rng.choice(list(objects)), rng.choice(list(objects))
    data = objects[other] if rng.random() < 0.1 else scrambled(rng, objects[key])
    bridge.run(store.put(key, data))
    state = _blank(_state())
    try:
        reader = ObjectStoreReader(SEALED_URL, transfer=SMALL, encryption_key=KEY)
        ckpt_cloud.load(state, storage_reader=reader, no_dist=True)
        assert saved(state) == saved(_state())
    finally:
        bridge.run(store.put(key, objects[key]))


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
    name.removeprefix("fuzz_"): value
    for name, value in [*globals().items(), *vars(foreign).items()]
    if name.startswith("fuzz_")
}


def is_finding(error: BaseException) -> bool:
    """Whether what a target raised is not what a user may be shown."""
    return not isinstance(error, CkptCloudError) or isinstance(error, RankFailed)
