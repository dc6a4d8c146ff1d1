"""What is fuzzed of other people's checkpoints: DCP's own, `torch.save` files and Hugging Face's safetensors.

They have no checksums, so that other values may come back; anything but an error of ours is a finding all the same.
"""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch.distributed import checkpoint as dcp

import ckpt_cloud
from ckpt_cloud import StoreOptions, bridge
from ckpt_cloud.format.pickles import rebuilt
from ckpt_cloud.interop.dcp_metadata import ParsedMetadata, names
from ckpt_cloud.interop.torch_pickles import open_pickle
from ckpt_cloud.items import screened
from ckpt_cloud.stores import open_store, parse_url
from tests.fuzz.mutate import mutated, scrambled

ROOT = "memory://fuzz-foreign"


def _state() -> dict[str, object]:
    return {"w": torch.arange(24, dtype=torch.float32).reshape(4, 6), "b": {"x": torch.ones(3)}, "step": 7, "odd": {2j}}


@functools.cache
def _dcp() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        dcp.save(_state(), checkpoint_id=directory, no_dist=True)
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@functools.cache
def _torch() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        torch.save(_state(), Path(directory) / "model.pt")
        return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@functools.cache
def _hugging_face() -> dict[str, bytes]:
    shards = {
        "model-00001-of-00002.safetensors": {"w": torch.ones(4, 6)},
        "model-00002-of-00002.safetensors": {"b": torch.ones(3), "c": torch.zeros(2, 0)},
    }
    index = {
        "metadata": {"total_size": 108},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
    files = {file: safetensors_bytes(tensors) for file, tensors in shards.items()}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


def _opened(files: Mapping[str, bytes], *, path: str) -> None:
    """All that a user gets out of a checkpoint of these files."""
    store = open_store(parse_url(ROOT), StoreOptions())

    async def replace() -> None:
        await store.delete([info.key async for info in store.list()])
        for name, data in files.items():
            await store.put(f"run/{name}", data)

    bridge.run(replace())
    with ckpt_cloud.open(f"{ROOT}/run/{path}".rstrip("/")) as opened:
        for name in opened:
            opened[name]


def fuzz_dcp_metadata(rng: random.Random) -> None:
    """Other bytes in DCP's `.metadata`, a pickle."""
    files = dict(_dcp())
    files[".metadata"] = scrambled(rng, files[".metadata"])
    _opened(files, path="")


_GLOBALS = [
    f"c{module}\n{name}\n".encode()
    for module, name in (*names(), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_sparse_tensor"))
]
_ATOMS = (b")", b"]", b"}", b"N", b"K\1", b"K\0", b"\x8a\5\0\0\0\0\x40", b"X\1\0\0\0a", b"\x88")


def _program(rng: random.Random, depth: int = 5) -> bytes:
    """Opcodes that make one value, of parts that may stand for endlessly many: no damage, and still no good."""
    if depth == 0 or rng.random() < 0.1:
        return rng.choice(_ATOMS)

    def part() -> bytes:
        return _program(rng, depth - 1)

    times = rng.choice([1, 1, 2, 60]) if rng.random() < 0.98 else 50_000
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\2tQ"

    def parts() -> bytes:
        return b"".join(part() for _ in range(rng.randrange(4)))

    ways: list[Callable[[], bytes]] = [
        lambda: part() + b"q\0h\0\x86" * min(times, 60),
        lambda: part() + b"\x85" * times,
        lambda: b"](" + part() + b"q\1" + b"h\1" * times + b"e",
        lambda: b"}" + part() + part() + b"s",
        lambda: b"}(" + part() + part() + part() + part() + b"u",
        lambda: b"(" + parts() + b"t",
        lambda: rng.choice(_GLOBALS) + b"(" + parts() + b"tR",
        lambda: rng.choice(_GLOBALS) + b"(" + parts() + b"t\x81",
        lambda: rng.choice(_GLOBALS) + b")\x81" + part() + b"b",
        lambda: b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + part() + part() + b"\x89}tR",
    ]
    return rng.choice(ways)()


def fuzz_pickle_program(rng: random.Random) -> None:
    """Pickles that are not damaged but written by hand, as metadata, as a `torch.save` file, and as an item."""
    which = rng.randrange(3)
    if which == 0:
        ParsedMetadata(b"\x80\4" + _program(rng) + b".", "")
    elif which == 1:
        open_pickle(b"\x80\2" + _program(rng) + b".", "")
    else:
        archive = {"data.pkl": b"\x80\2" + _program(rng) + b".", "version": b"3\n", "data/0": bytes(8)}
        torch.load(io.BytesIO(screened("item", rebuilt(archive))), weights_only=False, map_location="cpu")


def fuzz_dcp_file(rng: random.Random) -> None:
    """Other bytes in a `.distcp`, where each tensor is an archive of its own."""
    files = dict(_dcp())
    name = rng.choice([name for name in files if name != ".metadata"])
    files[name] = scrambled(rng, files[name], changes=8)
    _opened(files, path="")


def fuzz_torch_file(rng: random.Random) -> None:
    """Other bytes in what `torch.save` wrote."""
    files = {name: scrambled(rng, data) for name, data in _torch().items()}
    _opened(files, path="model.pt")


def fuzz_safetensors(rng: random.Random) -> None:
    """Other bytes in a file's header, or other values in it."""
    files = dict(_hugging_face())
    name = rng.choice([name for name in files if not name.endswith(".json")])
    data = files[name]
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.5:
        header = json.dumps(mutated(rng, json.loads(data[8 : 8 + length])), default=repr).encode()
        files[name] = len(header).to_bytes(8, "little") + header + data[8 + length :]
    else:
        files[name] = scrambled(rng, data[: 8 + length]) + data[8 + length :]
    _opened(files, path="")


def fuzz_index(rng: random.Random) -> None:
    """The index of a sharded model."""
    files = dict(_hugging_face())
    name = "model.safetensors.index.json"
    if rng.random() < 0.5:
        files[name] = json.dumps(mutated(rng, json.loads(files[name])), default=repr).encode()
    else:
        files[name] = scrambled(rng, files[name])
    _opened(files, path="")
