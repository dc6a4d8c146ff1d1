"""The manifest: what was written is read; damage with a digest to match it is an error of ours, at no great cost."""

import hashlib
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.checksum import sums_length
from ckpt_cloud.format.manifest import (
    MAGIC_1,
    Chunk,
    ItemEntry,
    Manifest,
    ObjectEntry,
    TensorEntry,
    decode,
    encode,
    reference,
)
from ckpt_cloud.format.register import ManifestRef

ID = "0190b5c4f00e7abc8def0123456789ab"
KEY = f"data/{ID}/manifest"
URL = f"s3://bucket/run/{KEY}"

ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
counts = st.integers(0, 2**40)
shapes = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)


@st.composite
def object_entries(draw):
    key = f"data/{draw(ids)}/{draw(st.integers(0, 999))}.safetensors"
    block_size, size = draw(st.integers(1, 100)), draw(st.integers(0, 1000))
    sums = bytes(sums_length(size, block_size))
    return ObjectEntry(key, size, block_size, sums, draw(st.none() | st.text(max_size=5)))


chunks = st.builds(Chunk, shapes, shapes, st.integers(-1, 3), counts)
tensors = st.builds(TensorEntry, st.text(max_size=10), shapes, st.lists(chunks, max_size=3), st.booleans())
items = st.builds(ItemEntry, st.binary(max_size=20)) | st.builds(
    ItemEntry, st.none(), st.integers(0, 3), counts, counts
)
names = st.text(max_size=10)
manifests = st.builds(
    Manifest,
    attempt=ids,
    writer=names,
    objects=st.lists(object_entries(), max_size=3),
    tensors=st.dictionaries(names, tensors, max_size=3),
    items=st.dictionaries(names, items, max_size=3),
    paths=st.none() | st.dictionaries(names, st.lists(names | st.integers(-5, 5), max_size=3).map(tuple), max_size=3),
    storage_meta=st.none() | st.dictionaries(names, st.none() | names, max_size=3),
    dcp_version=st.none() | names,
)


def opened(data):
    """Decodes `data` as if `COMMIT` named exactly these bytes."""
    return decode(data, reference(KEY, data), URL)


def refused(data):
    with pytest.raises(CorruptManifest) as refusal:
        opened(data)
    return refusal.value


def small(**changes):
    """A manifest of version 1, in one piece."""
    fields = {"attempt": ID, "writer": "test", "objects": [], "tensors": {}, "items": {}} | changes
    return MAGIC_1 + msgspec.msgpack.encode(fields)


def with_raw(name, raw):
    """A manifest whose field `name` is `raw`, bytes of MessagePack that may lie."""
    return MAGIC_1 + b"\x86" + small()[len(MAGIC_1) + 1 :] + msgspec.msgpack.encode(name) + raw


@given(manifests)
def test_round_trip(manifest):
    assert opened(encode(manifest)) == manifest


def test_reference_says_what_commit_must_know():
    data = small()
    assert reference(KEY, data) == ManifestRef(KEY, len(data), hashlib.sha256(data).hexdigest())


@given(st.data())
def test_any_flipped_bit_is_found(draw):
    data = bytearray(small(writer="w" * 20))
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    expected = reference(KEY, bytes(data))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptManifest, match="SHA-256"):
        decode(bytes(data), expected, URL)


@pytest.mark.parametrize(
    "change", [lambda data: data + b"x", lambda data: data[:-1], lambda data: b""], ids=["longer", "shorter", "empty"]
)
def test_another_length_is_found(change):
    data = small()
    with pytest.raises(CorruptManifest, match="SHA-256"):
        decode(change(data), reference(KEY, data), URL)


def test_another_major_version_has_another_magic():
    for data in (small(), encode(opened(small()))):
        other = b"CKPTCLD9" + data[8:]
        expected = msgspec.structs.replace(reference(KEY, data), key=KEY)
        if not expected.root:
            expected = msgspec.structs.replace(expected, sha256=hashlib.sha256(other).hexdigest())
        with pytest.raises(CorruptManifest, match="magic") as refusal:
            decode(other, expected, URL)
        assert URL in str(refusal.value)


PACK = f"data/{ID}/0.safetensors"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(MAGIC_1, id="no-body"),
        pytest.param(small()[:-1], id="cut-off"),
        pytest.param(small() + b"\0", id="more-behind-it"),
        pytest.param(small(attempt="../x"), id="malformed-attempt"),
        pytest.param(small(objects=[["../x", 0, 1, b""]]), id="traversal"),
        pytest.param(small(objects=[["/etc/passwd", 0, 1, b""]]), id="absolute"),
        pytest.param(small(objects=[["s3://other/key", 0, 1, b""]]), id="other-bucket"),
        pytest.param(small(objects=[[PACK, 10, 4, bytes(8)]]), id="too-few-sums"),
        pytest.param(small(objects=[[PACK, 10, 4, bytes(13)]]), id="ragged-sums"),
        pytest.param(small(objects=[[PACK, -1, 4, b""]]), id="negative-size"),
        pytest.param(small(objects=[[PACK, 10, 0, b""]]), id="no-block-size"),
        pytest.param(small(objects=[[PACK, 10, -4, b""]]), id="negative-block-size"),
        pytest.param(small(objects=[[PACK]]), id="short-entry"),
        pytest.param(small(objects=[[PACK, 10, 4, bytes(12), None, bytes(64)]]), id="too-few-digests"),
        pytest.param(small(objects=[[PACK, 10, 4, bytes(12), None, bytes(97)]]), id="ragged-digests"),
        pytest.param(with_raw("writer", b"\xa2\xff\xfe"), id="not-utf8"),
        pytest.param(with_raw("planner_data", b"\x91" * 100_000 + b"\x00"), id="deep-lists"),
        pytest.param(with_raw("planner_data", b"\x81\xa1l" * 100_000 + b"\x00"), id="deep-maps"),
        pytest.param(with_raw("planner_data", b"\x81\x81\x01\x01\x02"), id="map-as-key"),
        pytest.param(with_raw("planner_data", b"\xc1"), id="no-such-type"),
    ],
)
def test_corrupt(data):
    refused(data)


@pytest.mark.parametrize(
    "kind", [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"], ids=["list", "map", "bin", "str", "ext"]
)
@pytest.mark.parametrize("name", ["planner_data", "objects", "tensors", "paths", "writer"])
def test_a_lying_length_allocates_nothing(kind, name):
    data = with_raw(name, kind + (2**32 - 1).to_bytes(4, "big"))
    tracemalloc.start()
    try:
        refused(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def decodes_or_is_refused(data):
    try:
        manifest = opened(data)
    except CorruptManifest:
        return
    assert isinstance(manifest, Manifest)


@given(st.binary(max_size=200))
def test_garbage_behind_the_magic(body):
    decodes_or_is_refused(MAGIC_1 + body)


@given(
    manifests, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5), st.binary(max_size=6)), min_size=1, max_size=3)
)
def test_other_bytes_in_a_valid_manifest(manifest, changes):
    data = bytearray(encode(manifest))
    for where, gone, new in changes:
        at = len(MAGIC_1) + round(where * (len(data) - len(MAGIC_1)))
        data[at : at + gone] = new
    decodes_or_is_refused(bytes(data))
