"""The manifest in pages: any damage is found, and a reader of one tensor needs little of it."""

import hashlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format import pages
from ckpt_cloud.format.manifest import (
    Chunk,
    ItemEntry,
    Manifest,
    ObjectEntry,
    TensorEntry,
    decode,
    decode_tensors,
    encode,
    objects_of,
    part,
    reference,
)
from ckpt_cloud.format.register import ManifestRef

ID = "0190b5c4f00e7abc8def0123456789ab"
KEY = f"data/{ID}/manifest"
URL = f"s3://bucket/run/{KEY}"


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch):
    monkeypatch.setattr(pages, "PAGE_BYTES", 300)


def many(count=40):
    objects = [ObjectEntry(f"data/{ID}/{n}.safetensors", 1000, 64, bytes(64)) for n in range(count)]
    tensors = {
        f"layers.{n}.weight": TensorEntry("uint8", (20,), [Chunk((0,), (10,), n, 8), Chunk((10,), (10,), n // 2, 18)])
        for n in range(count)
    }
    items = {f"step.{n}": ItemEntry(None, value=[n]) for n in range(count)}
    paths = {name: tuple(name.split(".", 1)) for name in (*tensors, *items)}
    return Manifest(attempt=ID, writer="test", objects=objects, tensors=tensors, items=items, paths=paths)


def opened(data):
    return decode(data, reference(KEY, data), URL)


def root_of(data):
    return pages.decode_root(memoryview(data)[-reference(KEY, data).root :], len(data))


@given(st.permutations(range(25)))
def test_everything_comes_back_in_the_order_in_which_it_was_saved(order):
    manifest = many(25)
    names = list(manifest.tensors)
    shuffled = msgspec.structs.replace(manifest, tensors={names[n]: manifest.tensors[names[n]] for n in order})
    again = opened(encode(shuffled))
    assert again == shuffled
    assert list(again.tensors) == list(shuffled.tensors)
    assert len(root_of(encode(shuffled)).tensors) > 3


def test_commit_knows_the_root_and_the_root_the_pages():
    data = encode(many())
    known = reference(KEY, data)
    assert known == ManifestRef(KEY, len(data), hashlib.sha256(data[-known.root :]).hexdigest(), known.root)
    for page in root_of(data).tensors:
        assert page.sha256 == hashlib.sha256(data[page.start : page.start + page.size]).digest()


@given(st.data())
def test_any_flipped_bit_is_found(draw):
    data = encode(many(10))
    expected = reference(KEY, data)
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptManifest):
        decode(bytes(damaged), expected, URL)


@pytest.mark.parametrize("name", ["layers.0.weight", "layers.17.weight", "layers.9.weight"])
def test_one_tensor_needs_one_page_of_tensors_and_those_of_its_objects(name):
    manifest = many()
    data = encode(manifest)
    root = root_of(data)

    def body(page):
        return memoryview(data)[page.start : page.start + page.size]

    page = pages.page_of(root.tensors, name)
    found = {name: decode_tensors(body(page))[name]}
    needed = {pages.page_of(root.objects, number) for number in objects_of(found, {})}
    some = part(root, found, {}, [(p.first, body(p)) for p in needed], URL)

    assert list(some.tensors) == [name]
    whole = manifest.tensors[name]
    for ours, theirs in zip(some.tensors[name].chunks, whole.chunks, strict=True):
        assert some.objects[ours.object] == manifest.objects[theirs.object]
        assert (ours.offsets, ours.sizes, ours.start) == (theirs.offsets, theirs.sizes, theirs.start)
    assert page.size + sum(p.size for p in needed) < len(data) / 5


def test_a_name_before_all_others_is_on_no_page():
    assert pages.page_of(root_of(encode(many())).tensors, "a") is None
    assert pages.page_of([], "a") is None


def forged(change):
    """A manifest whose root was changed and whose digest matches it."""
    data = encode(many(10))
    length = reference(KEY, data).root
    root = msgspec.msgpack.decode(data[-length : -pages.LENGTH_BYTES])
    change(root)
    body = msgspec.msgpack.encode(root)
    return data[:-length] + body + len(body).to_bytes(8, "little")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda root: root["tensors"].pop(), id="a-page-less"),
        pytest.param(lambda root: root["tensors"].append(root["tensors"][-1]), id="a-page-twice"),
        pytest.param(lambda root: root["tensors"].reverse(), id="pages-in-another-order"),
        pytest.param(lambda root: root["tensors"][0].__setitem__(1, 0), id="a-page-elsewhere"),
        pytest.param(lambda root: root["tensors"][0].__setitem__(2, 1 << 60), id="an-endless-page"),
        pytest.param(lambda root: root["tensors"][0].__setitem__(0, 0), id="a-number-for-a-name"),
        pytest.param(lambda root: root["objects"][0].__setitem__(0, "0"), id="a-name-for-a-number"),
        pytest.param(lambda root: root["tensors"][1].__setitem__(0, ""), id="firsts-that-do-not-ascend"),
        pytest.param(lambda root: root["tensors"][0].__setitem__(3, bytes(32)), id="another-digest"),
        pytest.param(lambda root: root.__setitem__("counts", [10, 9, 10, 20]), id="too-few"),
        pytest.param(lambda root: root.__setitem__("counts", [10, 1 << 60, 10, 20]), id="too-many"),
        pytest.param(lambda root: root.__setitem__("counts", [10, -1, 10, 20]), id="negative"),
        pytest.param(lambda root: root.__setitem__("attempt", "../x"), id="malformed-attempt"),
        pytest.param(lambda root: root.pop("writer"), id="no-writer"),
    ],
)
def test_a_root_that_contradicts_its_pages(change):
    assert opened(forged(lambda root: None)) == many(10)
    with pytest.raises(CorruptManifest):
        opened(forged(change))


@pytest.mark.parametrize("size", [0, 7, 8, 15, 16, 17])
def test_too_short_to_be_one(size):
    with pytest.raises(CorruptManifest):
        reference(KEY, pages.MAGIC + bytes(size))


@given(st.binary(max_size=100))
def test_garbage_as_a_page(body):
    for decoder in (decode_tensors,):
        try:
            decoder(body)
        except CorruptManifest:
            continue
