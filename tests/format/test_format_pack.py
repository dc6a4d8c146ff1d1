"""Packs as the real safetensors library sees them."""

import json
import math

import pytest
import safetensors
from hypothesis import assume, given
from hypothesis import strategies as st

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.dtypes import SAFETENSORS, SIZES
from ckpt_cloud.format.pack import ITEM_DTYPE, PackEntry, header, header_bytes_bound, parse_header

ATTEMPT = "0190b5c4f00e7abc8def0123456789ab"
CHUNKS = "ckpt_cloud.chunks"


def whole(fqn, dtype="uint8", sizes=(3,)):
    nbytes = math.prod(sizes) * SIZES[dtype]
    return PackEntry(fqn, dtype, sizes, (0,) * len(sizes), sizes, nbytes)


def shard(fqn, offset, dtype="uint8", size=2, of=10):
    return PackEntry(fqn, dtype, (of,), (offset,), (size,), size * SIZES[dtype])


def item(fqn, nbytes=5):
    return PackEntry(fqn, ITEM_DTYPE, (nbytes,), (0,), (nbytes,), nbytes)


def by_width(entries):
    """Widest first, as packs are planned: safetensors wants every tensor aligned to its elements."""
    return sorted(entries, key=lambda entry: -SIZES.get(entry.dtype, 1))


def fill(entries):
    return [bytes((31 * number + at) % 251 for at in range(entry.nbytes)) for number, entry in enumerate(entries)]


def found_in(pack):
    """What a reader of the safetensors file alone learns: (fqn, dtype, shape, offsets, sizes, bytes) of each entry."""
    size = int.from_bytes(pack[:8], "little")
    metadata = json.loads(pack[8 : 8 + size])["__metadata__"]
    assert all(isinstance(value, str) for value in metadata.values())
    assert metadata["ckpt_cloud.attempt"] == ATTEMPT
    chunks = json.loads(metadata.get(CHUNKS, "{}"))
    names = {theirs: ours for ours, theirs in SAFETENSORS.items()}
    found = []
    for name, tensor in safetensors.deserialize(pack):
        said = chunks.pop(name, None)
        if said is None:
            sizes = tuple(tensor["shape"])
            entry = (name, names[tensor["dtype"]], sizes, (0,) * len(sizes), sizes)
        else:
            entry = (said["fqn"], said["dtype"], *(tuple(said[field]) for field in ("shape", "offsets", "sizes")))
        found.append((*entry, bytes(tensor["data"])))
    assert not chunks, "every name in the metadata is one of the table"
    return found


def check(entries):
    data = fill(entries)
    pack = header(entries, ATTEMPT) + b"".join(data)
    expected = [
        (entry.fqn, entry.dtype, entry.shape, entry.offsets, entry.sizes, bytes_)
        for entry, bytes_ in zip(entries, data, strict=True)
    ]
    assert sorted(found_in(pack)) == sorted(expected)
    length, table = parse_header(pack)
    assert len(table) == len(entries) + 1
    assert pack[length:] == b"".join(data)
    assert length % 8 == 0


names = st.text(max_size=12) | st.sampled_from(
    ["__metadata__", "__metadata__@", "w@0", "w@1", "w", "w'", "\0", '"', "\\", "ü.é", "層", "\U0001f600", "a\nb", "@"]
)


@st.composite
def pack_entries(draw):
    fqn = draw(names)
    dtype = draw(st.sampled_from([*SIZES, ITEM_DTYPE]))
    if dtype == ITEM_DTYPE:
        return item(fqn, draw(st.integers(1, 20)))
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return PackEntry(fqn, dtype, shape, offsets, sizes, math.prod(sizes) * SIZES[dtype])


many_entries = st.lists(pack_entries(), max_size=6, unique_by=lambda entry: (entry.fqn, entry.offsets)).map(by_width)


@given(many_entries)
def test_safetensors_reads_any_pack(entries):
    check(entries)


@pytest.mark.parametrize("dtype", SIZES)
def test_every_element_type(dtype):
    check([whole("a", dtype, (2, 3)), whole("scalar", dtype, ())])


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([whole("w@2"), shard("w", 2)], id="whole-first"),
        pytest.param([shard("w", 2), whole("w@2")], id="shard-first"),
        pytest.param([whole("w@2'"), whole("w@2"), shard("w", 2)], id="twice"),
        pytest.param([whole("__metadata__"), whole("__metadata__@"), whole("__metadata__@'")], id="metadata"),
        pytest.param([shard("__metadata__", 0), shard("__metadata__", 2)], id="metadata-shards"),
        pytest.param([item("__metadata__")], id="metadata-item"),
        pytest.param([item("optimizer"), whole("optimizer@0")], id="item"),
        pytest.param([shard("w", 0), shard("w", 2), shard("w", 4)], id="three-shards"),
        pytest.param([whole("x" * 2000), whole("層" * 2000), shard("\1" * 2000, 3)], id="2000-characters"),
        pytest.param([whole("ckpt_cloud.chunks"), shard("format", 1)], id="our-own-names"),
    ],
)
def test_names_that_meet(entries):
    check(entries)


def test_safe_open_shows_tensors_under_their_names(tmp_path):
    entries = [whole("model.weight", "float32", (2, 2)), shard("model.bias", 4, "float32"), whole("step", "int64", ())]
    entries = by_width(entries)
    path = tmp_path / "0.safetensors"
    path.write_bytes(header(entries, ATTEMPT) + b"".join(fill(entries)))

    with safetensors.safe_open(path, framework="numpy") as pack:
        assert set(pack.keys()) == {"model.weight", "model.bias@4", "step"}
        assert pack.metadata()["format"] == "pt"
        for entry, data in zip(entries, fill(entries), strict=True):
            name = "model.bias@4" if entry.fqn == "model.bias" else entry.fqn
            tensor = pack.get_tensor(name)
            assert (tensor.shape, tensor.tobytes()) == (entry.sizes, data)


@given(many_entries)
def test_header_is_within_its_bound(entries):
    assert len(header(entries, ATTEMPT)) <= len(header([], ATTEMPT)) + 64 + sum(map(header_bytes_bound, entries))


HUGE = 2**62


@pytest.mark.parametrize("fqn", ["", "w", "\1" * 500, '"' * 500, "\\" * 500, "\U0001f600" * 500])
@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float4_e2m1fn_x2", "uint8", ITEM_DTYPE])
@pytest.mark.parametrize("dims", [0, 1, 8])
def test_the_longest_header_is_within_its_bound(fqn, dtype, dims):
    entry = PackEntry(fqn, dtype, (HUGE,) * dims, (HUGE // 2,) * dims, (HUGE // 2 + 1,) * dims, HUGE)
    assert len(header([entry], ATTEMPT)) <= len(header([], ATTEMPT)) + 64 + header_bytes_bound(entry)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\xff" * 8,
        (10).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"\xff\xfe{}",
        (50_000).to_bytes(8, "little") + b'{"a":' * 10_000,
    ],
)
def test_not_a_header(data):
    with pytest.raises(CorruptManifest):
        parse_header(data)


@given(many_entries, st.integers(0, 200), st.binary(min_size=1, max_size=4))
def test_other_bytes_in_a_header(entries, at, new):
    data = bytearray(header(entries, ATTEMPT))
    assume(at < len(data))
    data[at : at + len(new)] = new
    try:
        length, table = parse_header(bytes(data))
    except CorruptManifest:
        return
    assert length <= len(data)
    assert isinstance(table, dict)
