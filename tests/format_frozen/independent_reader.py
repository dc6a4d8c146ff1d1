"""Reads a checkpoint in a local directory by docs/format.md alone: nothing of ckpt_cloud, no torch.

Slow and whole in memory; it is here to show that the page suffices, and as a start for readers in other languages.
"""

import hashlib
import itertools
import json
import math
import re
from pathlib import Path

import msgspec

KEY = re.compile(r"data/([0-9a-f]{32}/manifest|([0-9a-f]{1,4}-)?[0-9a-f]{32}/[0-9]{1,9}\.safetensors)")
WIDTHS = {"float16": 2, "bfloat16": 2, "complex32": 4, "complex64": 8, "complex128": 16, "bits16": 2}
WIDTHS |= {f"{kind}{bits}": bits // 8 for kind in ("int", "uint", "float") for bits in (16, 32, 64)}
SAFETENSORS = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    **{f"{short}{bits}": f"{long}{bits}" for short, long in (("U", "uint"), ("I", "int")) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
}


class Damaged(Exception):
    """What is stored breaks the format."""


def require(condition, what):
    if not condition:
        raise Damaged(what)


def _crc_table():
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        yield value


TABLE = list(_crc_table())


def crc32c(data):
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def width(dtype):
    """Bytes of one element: section 7 says which types take more than one."""
    return WIDTHS.get(dtype, 1)


def read(root):
    """{fqn: (dtype, shape, bytes)} of the tensors, {fqn: bytes} of the items, and the planner's data."""
    register = read_register(root)
    manifest = read_manifest(root, register["manifest"])
    objects = [read_object(root, *entry[:4]) for entry in manifest["objects"]]
    tensors = {name: _tensor(objects, *entry[:3]) for name, entry in manifest["tensors"].items()}
    items = {name: _item(objects, *entry) for name, entry in manifest["items"].items()}
    if manifest.get("paths") is not None:
        return tensors, items, {name: tuple(path) for name, path in manifest["paths"].items()}
    return tensors, items, raise_up(manifest.get("planner_data"))


def read_register(root):
    data = (root / "COMMIT").read_bytes()
    require(len(data) <= 65536, "COMMIT is too long")
    register = json.loads(data)
    require(register["format"] == "ckpt-cloud", "another format")
    require(register["version"] <= 1, "a newer version")
    require(not register.get("flags"), "an unknown flag")
    require(register["state"] == "committed", "not committed")
    return register


def read_manifest(root, reference):
    data = path_of(root, reference["key"]).read_bytes()
    require(len(data) == reference["size"], "size of the manifest")
    require(hashlib.sha256(data).hexdigest() == reference["sha256"], "SHA-256 of the manifest")
    require(data[:8] == b"CKPTCLD1", "magic of the manifest")
    return msgspec.msgpack.decode(data[8:])


def path_of(root, key):
    require(KEY.fullmatch(key), f"key {key!r}")
    return root / key


def read_object(root, key, size, block_size, sums):
    """The whole object, with every block checked."""
    data = path_of(root, key).read_bytes()
    require(len(data) == size, f"size of {key}")
    found = [crc32c(data[at : at + block_size]) for at in range(0, size, block_size)]
    require(b"".join(value.to_bytes(4, "little") for value in found) == sums, f"checksums of {key}")
    return data


def _tensor(objects, dtype, shape, chunks):
    whole = bytearray(math.prod(shape) * width(dtype))
    covered = 0
    for offsets, sizes, number, start in chunks:
        if number >= 0:
            nbytes = math.prod(sizes) * width(dtype)
            stored = objects[number][start : start + nbytes]
            require(len(stored) == nbytes, "a chunk outside its object")
            put(whole, shape, stored, offsets, sizes, width(dtype))
            covered += nbytes
    require(covered == len(whole), "chunks that do not cover their tensor")
    return dtype, tuple(shape), bytes(whole)


def put(whole, shape, chunk, offsets, sizes, itemsize):
    """Copies a row-major chunk to its box in a row-major tensor, one innermost row after the other."""
    row = (sizes[-1] if sizes else 1) * itemsize
    for number, index in enumerate(itertools.product(*map(range, sizes[:-1]))):
        element = 0
        for offset, place, length in zip(offsets, (*index, 0), shape, strict=True) if shape else ():
            element = element * length + offset + place
        whole[element * itemsize : element * itemsize + row] = chunk[number * row : (number + 1) * row]


def _item(objects, inline, number=-1, start=0, nbytes=0):
    return inline if inline is not None else objects[number][start : start + nbytes]


def raise_up(value):
    """The inverse of the lowering of section 8."""
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "d":
        return {raise_up(key): raise_up(content) for key, content in content}
    return {"l": list, "t": tuple}[tag](map(raise_up, content))


def read_pack(data):
    """Chunks of one pack without a manifest: (fqn, dtype, shape, offsets, sizes, bytes) of each."""
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    metadata = table.pop("__metadata__")
    chunks = json.loads(metadata.get("ckpt_cloud.chunks", "{}"))
    require(8 + length + max(entry["data_offsets"][1] for entry in table.values()) == len(data), "size of the pack")
    for name, entry in table.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if name in chunks:
            c = chunks[name]
            yield c["fqn"], c["dtype"], tuple(c["shape"]), c["offsets"], c["sizes"], data[start:end]
        else:
            shape = tuple(entry["shape"])
            yield name, SAFETENSORS[entry["dtype"]], shape, [0] * len(shape), shape, data[start:end]


def recover(packs):
    """As `read`, from the packs of one save alone: what is empty or inline is not in them."""
    tensors, items, filled = {}, {}, {}
    for path in packs:
        for fqn, dtype, shape, offsets, sizes, data in read_pack(Path(path).read_bytes()):
            if dtype == "item":
                items[fqn] = data
                continue
            whole = filled.setdefault(fqn, bytearray(math.prod(shape) * width(dtype)))
            put(whole, shape, data, offsets, sizes, width(dtype))
            tensors[fqn] = dtype, shape, whole
    return {fqn: (dtype, shape, bytes(whole)) for fqn, (dtype, shape, whole) in tensors.items()}, items
