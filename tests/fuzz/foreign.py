"""What is fuzzed of other people's checkpoints: DCP's own, `torch.save` files and Hugging Face's safetensors.

They have no checksums, so that other values may come back; anything but an error of ours is a finding all the same.
"""

from __future__ import annotations

import functools
import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from torch.distributed import checkpoint as dcp

import ckpt_cloud
from ckpt_cloud import StoreOptions, bridge
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
