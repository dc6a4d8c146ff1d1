"""Reads a checkpoint in a local directory by docs/format.md alone: nothing of ckpt_cloud, no torch.

Slow and whole in memory; it is here to show that the page suffices, and as a start for readers in other languages.
"""

import hashlib
import hmac
import itertools
import json
import math
import re
from pathlib import Path

import msgspec
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

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


class Encrypted:
    """The directory of an encrypted checkpoint, with the key of 32 bytes: may be given for any `root` below."""

    def __init__(self, root, key):
        self.root = root
        self.key = key

    def __truediv__(self, key):
        return self.root / key


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
    """{fqn: (dtype, shape, bytes)} of the tensors, the items, and the planner's data.

    Of an item that is a plain value {fqn: [value]}, of another {fqn: bytes}.
    """
    register = read_register(root)
    manifest = read_manifest(root, register["manifest"])
    objects = [read_object(root, *entry) for entry in manifest["objects"]]
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
    require(register["version"] <= 2, "a newer version")
    encrypted = isinstance(root, Encrypted)
    flags = set(register.get("flags", []))
    require(flags <= {"coded-chunks", "encrypted"}, "an unknown flag")
    require(("encrypted" in flags) == ("encryption" in register), "a flag that the register belies")
    require(("encrypted" in flags) == encrypted, "encrypted, and no key, or the other way round")
    if encrypted:
        note = register["encryption"]
        require(note["algorithm"] == "aes-256-gcm", "another algorithm")
        require(derived(root.key, b"ckpt-cloud key check 1\n")[:8].hex() == note["check"], "another key")
    require(register["state"] == "committed", "not committed")
    return register


def derived(key, info):
    """32 bytes by HKDF-SHA256 without a salt."""
    return hmac.digest(hmac.digest(bytes(32), key, "sha256"), info + b"\1", "sha256")


def whole(root, key):
    """An object, or the manifest, as it was before it was encrypted."""
    data = path_of(root, key).read_bytes()
    return opened(root.key, key, data, 0, len(data)) if isinstance(root, Encrypted) else data


def ranged(root, key, start, size):
    """A part of it."""
    path = path_of(root, key)
    if not isinstance(root, Encrypted):
        return part_of(path, start, size)
    first, end = start // 65536, -(-(start + size) // 65536)
    blocks = part_of(path, first * 65564, (end - first) * 65564)
    plain = opened(root.key, key, blocks, first, path.stat().st_size)
    return plain[start - first * 65536 :][:size]


def part_of(path, start, size):
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def opened(secret, key, blocks, first, stored_size):
    """What was sealed in blocks of an object, of which `first` is the number of the first."""
    name = b"ckpt-cloud sealed object 1\n" + key.encode()
    cipher = AESGCM(derived(secret, name))
    plain = []
    for number, at in enumerate(range(0, len(blocks), 65564), first):
        block = blocks[at : at + 65564]
        last = number * 65564 + len(block) == stored_size
        about = name + b"\n" + number.to_bytes(8, "little") + bytes([last])
        try:
            plain.append(cipher.decrypt(block[:12], block[12:], about))
        except (InvalidTag, ValueError):
            raise Damaged(f"block {number} of {key} does not open") from None
    return b"".join(plain)


def signed_message(register):
    """The bytes that the signature of a register is over."""
    reference = register["manifest"]
    lines = ["ckpt-cloud commit 2", register["attempt"], reference["key"], str(reference["size"])]
    return "".join(f"{line}\n" for line in [*lines, reference["sha256"], str(reference.get("root", 0))]).encode()


def read_manifest(root, reference):
    """The whole manifest, with `objects`, `tensors`, `items` and `paths` as version 1 has them."""
    data = whole(root, reference["key"])
    require(len(data) == reference["size"], "size of the manifest")
    if not reference.get("root"):
        require(hashlib.sha256(data).hexdigest() == reference["sha256"], "SHA-256 of the manifest")
        require(data[:8] == b"CKPTCLD1", "magic of the manifest")
        return msgspec.msgpack.decode(data[8:])
    require(data[:8] == b"CKPTCLD2", "magic of the manifest")
    manifest = read_root(data, reference)
    require(pages_end(manifest) == len(data) - reference["root"], "pages that do not fill the manifest")
    counts = manifest["counts"]
    manifest["objects"] = [entry for page in manifest["objects"] for entry in read_page(data, page)]
    require(len(manifest["objects"]) == counts[0], "the number of objects")
    for name, count in zip(("tensors", "items", "paths"), counts[1:], strict=True):
        manifest[name] = in_order([read_page(data, page) for page in manifest[name]], count)
    if not manifest["has_paths"]:
        manifest["paths"] = None
    return manifest


def read_root(data, reference):
    """The root, which may be all of `data` or the end of it."""
    root = data[-reference["root"] :]
    require(hashlib.sha256(root).hexdigest() == reference["sha256"], "SHA-256 of the root")
    require(int.from_bytes(root[-8:], "little") == len(root) - 8, "length of the root")
    return msgspec.msgpack.decode(root[:-8])


def pages_end(manifest):
    """Where the pages end, which follow one another from the magic on."""
    end = 8
    for _, start, size, _ in itertools.chain(*(manifest[name] for name in ("objects", "tensors", "items", "paths"))):
        require(start == end and size > 0, "pages that do not follow one another")
        end += size
    return end


def read_page(data, page, data_start=0):
    """A page, out of `data` that begins at `data_start` in the manifest."""
    _, start, size, digest = page
    found = data[start - data_start : start - data_start + size]
    require(len(found) == size and hashlib.sha256(found).digest() == digest, "SHA-256 of a page")
    return msgspec.msgpack.decode(found)


def in_order(columns, count):
    """{name: entry} in the order in which they were saved, of pages sorted by name."""
    rows = [row for orders, names, entries in columns for row in zip(orders, names, entries, strict=True)]
    names = [name for _, name, _ in rows]
    require(names == sorted(set(names)), "names that are not in order")
    rows.sort(key=lambda row: row[0])
    require([order for order, _, _ in rows] == list(range(count)), "places that do not add up")
    return {name: entry for _, name, entry in rows}


def read_tensor(root, name):
    """One tensor by the least that must be read of the manifest: (dtype, shape, bytes), or None."""
    reference = read_register(root)["manifest"]
    key, size = reference["key"], reference["size"]
    manifest = read_root(ranged(root, key, size - reference["root"], reference["root"]), reference)
    require(pages_end(manifest) == size - reference["root"], "pages that do not fill the manifest")

    def page_of(pages, name):
        *_, page = [page for page in pages if page[0] <= name] or [None]
        return page and read_page(ranged(root, key, page[1], page[2]), page, page[1]), page and page[0]

    found, _ = page_of(manifest["tensors"], name)
    entries = dict(zip(found[1], found[2], strict=True)) if found else {}
    if name not in entries:
        return None
    objects = {-1: b""}
    coded = [extent[0] for chunk in entries[name][2] if is_coded(chunk) for extent in chunk[4][3]]
    for number in {chunk[2] for chunk in entries[name][2]} - {-1} | set(coded):
        page, first = page_of(manifest["objects"], number)
        objects[number] = read_object(root, *page[number - first])
    return _tensor(objects, *entries[name][:3])


def path_of(root, key):
    require(KEY.fullmatch(key), f"key {key!r}")
    return root / key


def read_object(root, key, size, block_size, sums, e_tag=None, digests=b"", *_):
    """The whole object, with every block checked."""
    data = whole(root, key)
    require(len(data) == size, f"size of {key}")
    found = [crc32c(data[at : at + block_size]) for at in range(0, size, block_size)]
    require(b"".join(value.to_bytes(4, "little") for value in found) == sums, f"checksums of {key}")
    blocks = (data[at : at + block_size] for at in range(0, size, block_size))
    require(not digests or b"".join(hashlib.sha256(b).digest() for b in blocks) == digests, f"digests of {key}")
    return data


def _tensor(objects, dtype, shape, chunks):
    whole = bytearray(math.prod(shape) * width(dtype))
    covered = 0
    for chunk in chunks:
        offsets, sizes, number, start = chunk[:4]
        if number >= 0 or is_coded(chunk):
            nbytes = math.prod(sizes) * width(dtype)
            stored = undone(objects, chunk[4], nbytes) if is_coded(chunk) else objects[number][start : start + nbytes]
            require(len(stored) == nbytes, "a chunk outside its object")
            put(whole, shape, stored, offsets, sizes, width(dtype))
            covered += nbytes
    require(covered == len(whole), "chunks that do not cover their tensor")
    return dtype, tuple(shape), bytes(whole)


def is_coded(chunk):
    return len(chunk) > 4 and chunk[4] is not None


def undone(objects, coded, nbytes):
    """The plain bytes of a coded chunk, or item, of `nbytes`."""
    codec, frame, sizes, extents = coded[:4]
    stored = b"".join(objects[number][start : start + length] for number, start, length in extents)
    require(len(stored) == sum(extent[2] for extent in extents), "a coded chunk outside its object")
    frames = [int.from_bytes(sizes[at : at + 4], "little") for at in range(0, len(sizes), 4)]
    return decoded(codec, frame, frames, stored, nbytes)


def decoded(codec, frame, frames, stored, nbytes):
    """The plain bytes of `stored`."""
    if not frame:
        require(codec == ["stream.zstd/1"], f"a transform {codec}")
        return zstandard.ZstdDecompressor().stream_reader(stored).read(nbytes + 1)
    require(codec == ["zstd"], f"a codec {codec}")
    require(len(frames) == -(-nbytes // frame) and sum(frames) == len(stored), "sizes of frames")
    plain, at = [], 0
    for number, size in enumerate(frames):
        length = min(frame, nbytes - number * frame)
        data = stored[at : at + size]
        at += size
        if size != length:
            require(zstandard.frame_content_size(data) == length, "length of a frame")
            data = zstandard.ZstdDecompressor().decompress(data)
        plain.append(data)
    return b"".join(plain)


def put(whole, shape, chunk, offsets, sizes, itemsize):
    """Copies a row-major chunk to its box in a row-major tensor, one innermost row after the other."""
    row = (sizes[-1] if sizes else 1) * itemsize
    for number, index in enumerate(itertools.product(*map(range, sizes[:-1]))):
        element = 0
        for offset, place, length in zip(offsets, (*index, 0), shape, strict=True) if shape else ():
            element = element * length + offset + place
        whole[element * itemsize : element * itemsize + row] = chunk[number * row : (number + 1) * row]


def _item(objects, inline, number=-1, start=0, nbytes=0, value=None, coded=None, *_):
    if value is not None:
        return [raise_up(value[0])]
    if coded is not None:
        return undone(objects, coded, nbytes)
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
    """Chunks of one pack without a manifest: (fqn, dtype, shape, offsets, sizes, bytes, coded) of each."""
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    metadata = table.pop("__metadata__")
    chunks = json.loads(metadata.get("ckpt_cloud.chunks", "{}"))
    require(8 + length + max(entry["data_offsets"][1] for entry in table.values()) == len(data), "size of the pack")
    for name, entry in table.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if name in chunks:
            c = chunks[name]
            yield c["fqn"], c["dtype"], tuple(c["shape"]), c["offsets"], c["sizes"], data[start:end], c.get("coded")
        else:
            shape = tuple(entry["shape"])
            yield name, SAFETENSORS[entry["dtype"]], shape, [0] * len(shape), shape, data[start:end], None


def recover(packs):
    """As `read`, from the packs of one save alone, paths or bytes: what is empty or inline is not in them."""
    tensors, items, filled, parts = {}, {}, {}, {}

    def found(fqn, dtype, shape, offsets, sizes, data):
        if dtype == "item":
            items[fqn] = data
            return
        whole = filled.setdefault(fqn, bytearray(math.prod(shape) * width(dtype)))
        put(whole, shape, data, offsets, sizes, width(dtype))
        tensors[fqn] = dtype, shape, whole

    for pack in packs:
        content = pack if isinstance(pack, bytes) else Path(pack).read_bytes()
        for fqn, dtype, shape, offsets, sizes, data, coded in read_pack(content):
            if coded is None:
                found(fqn, dtype, shape, offsets, sizes, data)
            else:
                key = fqn, dtype, shape, tuple(offsets), tuple(sizes)
                parts.setdefault(key, []).append((coded["at"], data, coded))
    for key, pieces in parts.items():
        pieces.sort(key=lambda piece: piece[0])
        stored = b"".join(data for _, data, _ in pieces)
        frames = [size for _, _, coded in pieces for size in coded["sizes"]]
        first = pieces[0][2]
        found(*key, decoded(first["codec"], first["frame"], frames, stored, first["nbytes"]))
    return {fqn: (dtype, shape, bytes(whole)) for fqn, (dtype, shape, whole) in tensors.items()}, items
