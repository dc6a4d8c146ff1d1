"""Writes the frozen checkpoints of `tests/data/format-v2`; run it as `scripts/frozen`.

What is there stays as it is, and so does `format-v1`, which only older versions could write: a frozen checkpoint shows
that what was written once is still read. Each has an `expected.json` beside it, made from the state alone: tensors by
the SHA-256 of their bytes, items by their `repr`.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import ckpt_cloud
from ckpt_cloud import ObjectStoreWriter, TransferOptions
from ckpt_cloud.format import pages
from ckpt_cloud.transfer import encode

DATA = Path(__file__).parents[1] / "data" / "format-v2"
ENCRYPTION_KEY = bytes(range(32))
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def has_plain_bytes(dtype):
    """Quantized types do not; of others, such as bits8, DCP itself cannot tell the size."""
    try:
        return not str(dtype).startswith(("torch.q", "torch.quint")) and torch._utils._element_size(dtype) > 0
    except TypeError:
        return False


DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
PLAIN = [d for d in DTYPES if has_plain_bytes(d)]


def bits(dtype, shape):
    """A tensor of any type with any bits, NaNs included."""
    raw = torch.randint(0, 256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    return torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), 0, shape, torch.empty(shape, device="meta").stride())


def bytes_of(tensor):
    flat = torch.empty(0, dtype=torch.uint8)
    tensor = tensor.detach().contiguous()
    flat.set_(tensor.untyped_storage(), tensor.storage_offset() * tensor.itemsize, (tensor.nbytes,), (1,))
    return flat.numpy().tobytes()


def dtypes():
    """Every element type: a matrix of any bits, a scalar, and nothing at all."""
    shapes = {"": (3, 5), " scalar": (), " empty": (0, 4)}
    return {f"{str(d)[6:]}{name}": bits(d, shape) for d in PLAIN for name, shape in shapes.items()}


def nested():
    """A nested state; names that need escaping; items inline and, the long one, in a pack."""
    return {
        "model": {"w": torch.arange(12, dtype=torch.float32).view(3, 4).t(), "b": torch.ones(3, dtype=torch.bfloat16)},
        "list": [{"m": torch.full((2, 2), 0.5)}, 7, [1.5, "deep"]],
        "step": 1234,
        "text": "ünï\n",
        "none": None,
        "long": "0123456789abcdef" * 300,
        "__metadata__": torch.tensor([1, 2, 3]),
        "w@0,0": torch.tensor(2.5, dtype=torch.float64),
        'quote"and\\slash/é': torch.tensor([True, False]),
    }


def blocks():
    """Tensors that begin, end and cross over somewhere in blocks of 4 KiB."""
    return {"a": torch.randn(70, 50), "b": bits(torch.uint8, (5000,)), "c": bits(torch.complex64, (300, 3))}


def planned():
    return {"x": torch.arange(4), "n": 5}


def plain():
    """Plain values of every kind, some that only look plain, and one that is too long for the manifest."""
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, 127, 128, -(1 << 63), (1 << 64) - 1],
        "floats": [0.5, -0.0, float("inf"), float("nan"), 1e-320],
        "text": "ünï\n\0",
        "bytes": b"\0\xff",
        "empty": [(), [], {}, "", b""],
        "dict": {"b": 1, "a": {2: (3, [4])}, ("k", None): b"x", 1.5: "half", None: True},
        "tuple": (1, (2, [3])),
        "l": {"l": [1]},
        "huge": 1 << 64,
        "complex": 2j,
        "set": {7},
        "long": "0123456789abcdef" * 300,
        "w": torch.arange(5),
    }


def coded():
    """Tensors that compress, in part, and not at all; some too small to be coded; an item in a pack."""
    mixed = torch.arange(6000, dtype=torch.int16)
    mixed[2048:4096] = bits(torch.int16, (2048,))
    return {
        "zeros": torch.zeros(70, 40),
        "mixed": mixed.view(60, 100),
        "random": bits(torch.bfloat16, (50, 50)),
        "complex": torch.zeros(600, dtype=torch.complex128),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "long": "0123456789abcdef" * 300,
        "step": 7,
    }


def transformed():
    """Through a transform of DCP's: one stream for each chunk, small ones and items too."""
    return {"w": torch.arange(3000.0).view(30, 100), "scalar": torch.tensor(3), "step": 7, "empty": torch.empty(0, 3)}


def encrypted():
    """A pack of several sealed blocks, and a last one that is short."""
    state = {"w": torch.arange(16_000, dtype=torch.float32), "b": torch.randn(7)}
    return state | {"long": "0123456789abcdef" * 300, "n": 5}


def sharded():
    """Run on two ranks: rows, columns, a chunk for one rank only, and replicas of which one is stored."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {"rows": torch.randn(5, 3), "columns": torch.arange(14).view(2, 7), "one": torch.randn(1, 4)}
    whole["odd"] = bits(torch.complex64, (3, 2))
    dims = {"rows": 0, "columns": 1, "one": 0, "odd": 0}
    state = {name: distribute_tensor(value, mesh, [Shard(dims[name])]) for name, value in whole.items()}
    return state | {"replica": torch.arange(6.0), "epoch": 2}


class Notes(dcp.DefaultSavePlanner):
    """Adds planner data that is no flatten mapping."""

    def create_global_plan(self, all_plans):
        plans, metadata = super().create_global_plan(all_plans)
        data = {"tuple": (1, ("a", b"\x00\xff")), 7: [None, True, 0.5], ("k", 1): {}}
        return plans, replace(metadata, planner_data=data)


def expected(state, nested=True):
    """What a reader of the checkpoint must find."""
    flat = dcp._nested_dict.flatten_state_dict(state)[0] if nested else state
    tensors, items = {}, {}
    for name, value in flat.items():
        if isinstance(value, torch.Tensor):
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            digest = hashlib.sha256(bytes_of(whole)).hexdigest()
            tensors[name] = {"dtype": str(whole.dtype)[6:], "shape": list(whole.shape), "sha256": digest}
        else:
            items[name] = repr(value)
    return {"tensors": tensors, "items": items}


OPTIONS = {"nested": TransferOptions(inline_limit=4096), "blocks": TransferOptions(block_size=4096)}
OPTIONS["plain"] = OPTIONS["encrypted"] = OPTIONS["nested"]
OPTIONS["coded"] = TransferOptions(inline_limit=4096, compression="zstd", frame_size=4096, block_size=4096)
OPTIONS["coded-encrypted"] = OPTIONS["coded"]
STATES = {"dtypes": dtypes, "nested": nested, "blocks": blocks, "planner-data": planned, "sharded": sharded}
STATES |= {"per-rank": sharded, "plain": plain, "coded": coded, "transformed": transformed, "encrypted": encrypted}
STATES["coded-encrypted"] = coded
PLANNERS = {"planner-data": Notes, "plain": lambda: dcp.DefaultSavePlanner(False, False)}
"""Without flattening in the last: it makes strings of the keys of dicts."""
MORE = {"plain": {"sign": SIGNER, "metrics": {"loss": 0.25}, "user_metadata": {"commit": "0123abc", "tags": ["x", 1]}}}
MORE["transformed"] = {"extensions": [ZStandard()]}
MORE["encrypted"] = {"encryption_key": ENCRYPTION_KEY, "encryption_key_id": "first"}
MORE["coded-encrypted"] = MORE["encrypted"] | {"sign": SIGNER}
SMALL_PAGES = {"nested": 100, "sharded": 300, "plain": 200}
"""Others have one page of each kind."""


def save(name, where):
    """On each rank."""
    state = STATES[name]()
    # So that a chunk comes to lie in several objects.
    encode.PACK_BYTES = encode.UNIT_BYTES = 4096
    pages.PAGE_BYTES = SMALL_PAGES.get(name, pages.PAGE_BYTES)
    writer = ObjectStoreWriter(where / "checkpoint", transfer=OPTIONS.get(name), **MORE.get(name, {}))
    planner = PLANNERS.get(name, dcp.DefaultSavePlanner)()
    ckpt_cloud.save(state, storage_writer=writer, planner=planner, use_collectives=name != "per-rank")
    kept = {k: v for k, v in state.items() if name != "per-rank" or not isinstance(v, DTensor)}
    said = expected(kept, nested=name != "plain")
    if not dist.is_initialized() or dist.get_rank() == 0:
        (where / "expected.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n")


def save_as_rank(name, where, rank, meeting):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    save(name, where)
    dist.destroy_process_group()


def main():
    for name, state in STATES.items():
        where = DATA / name
        if where.exists():
            print(f"{name}: is there already, and stays")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            making = Path(scratch) / name
            making.mkdir()
            ranks = 2 if state is sharded else 1
            command = [sys.executable, __file__, name, str(making), str(Path(scratch) / "meeting"), str(ranks)]
            running = [subprocess.Popen([*command, str(rank)]) for rank in range(ranks)]
            codes = [process.wait() for process in running]
            if any(codes):
                sys.exit(f"{name} was not written")
            where.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(making, where)
        size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
        print(f"{name}: {size} bytes")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        torch.manual_seed(0)
        name, where, meeting, ranks, rank = sys.argv[1:]
        os.environ["OMP_NUM_THREADS"] = "1"
        if ranks == "1":
            save(name, Path(where))
        else:
            save_as_rank(name, Path(where), int(rank), meeting)
