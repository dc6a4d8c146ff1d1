"""A manifest that contradicts itself is told from one that does not, whatever numbers it claims."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.manifest import Chunk, ItemEntry, Manifest, ObjectEntry, TensorEntry
from ckpt_cloud.format.structure import check, faults

ID = "0190b5c4f00e7abc8def0123456789ab"
BIG = 1 << 63


def manifest(tensor, *, size=1000, items=None, **fields):
    entry = ObjectEntry(f"data/{ID}/0.safetensors", size, 256, b"")
    tensors = {} if tensor is None else {"w": tensor}
    return Manifest(attempt=ID, writer="test", tensors=tensors, items=items or {}, **{"objects": [entry], **fields})


def cut(draw, offsets, sizes, depth):
    """A box as one, or cut in two somewhere and each half again."""
    long = [dim for dim, size in enumerate(sizes) if size > 1]
    if depth == 0 or not long or draw(st.booleans()):
        return [(offsets, sizes)]
    dim = draw(st.sampled_from(long))
    at = draw(st.integers(1, sizes[dim] - 1))
    low = tuple(at if d == dim else size for d, size in enumerate(sizes))
    high = tuple(size - at if d == dim else size for d, size in enumerate(sizes))
    beyond = tuple(offset + at if d == dim else offset for d, offset in enumerate(offsets))
    return cut(draw, offsets, low, depth - 1) + cut(draw, beyond, high, depth - 1)


@st.composite
def tilings(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    chunks, at = [], 0
    for offsets, sizes in draw(st.permutations(cut(draw, (0,) * len(shape), shape, 3))):
        chunks.append(Chunk(offsets, sizes, 0, at))
        at += math.prod(sizes)
    return TensorEntry("uint8", shape, chunks), at


@given(tilings())
def test_any_tiling_is_right(tiling):
    tensor, size = tiling
    assert list(faults(manifest(tensor, size=size))) == []


@given(tilings(), st.data())
def test_a_tiling_with_a_chunk_lost_grown_or_moved_is_wrong(tiling, data):
    tensor, size = tiling
    chunks = list(tensor.chunks)
    victim = data.draw(st.integers(0, len(chunks) - 1))
    chunk = chunks.pop(victim)
    if data.draw(st.booleans()) and tensor.shape:
        dim = data.draw(st.integers(0, len(tensor.shape) - 1))
        change = data.draw(st.sampled_from(["offsets", "sizes"]))
        moved = list(getattr(chunk, change))
        moved[dim] += data.draw(st.sampled_from([-1, 1]))
        chunks.append(structs.replace(chunk, **{change: tuple(moved)}))
    wrong = structs.replace(tensor, chunks=chunks)
    found = list(faults(manifest(wrong, size=10 * size)))
    assert found
    with pytest.raises(CorruptManifest, match="contradicts itself"):
        check(manifest(wrong, size=10 * size), "memory://x/y", whole=True)


def one(offsets, sizes, object_=0, start=0, shape=(4,), dtype="float32"):
    return TensorEntry(dtype, shape, [Chunk(offsets, sizes, object_, start)])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (manifest(one((0,), (4,), object_=7)), "in no object"),
        (manifest(one((0,), (4,), object_=-1)), "in no object"),
        (manifest(one((0,), (4,), start=-4)), "in no object"),
        (manifest(one((0,), (4,), start=992)), "outside data/"),
        (manifest(one((0,), (4,), start=1 << 64)), "in no object"),
        (manifest(one((0,), (-4,))), "outside its shape"),
        (manifest(one((-1,), (4,))), "outside its shape"),
        (manifest(one((0,), (5,))), "outside its shape"),
        (manifest(one((0, 0), (4, 1))), "outside its shape"),
        (manifest(one((0,), (BIG,), shape=(BIG,))), "impossible shape"),
        (manifest(one((0,), (1 << 62,), shape=(1 << 62,))), "larger than can be"),
        (manifest(one((0,) * 65, (1,) * 65, shape=(1,) * 65)), "impossible shape"),
        (manifest(one((0,), (4,), dtype="object")), "elements of type 'object'"),
        (manifest(TensorEntry("uint8", (4,), [Chunk((0,), (4,), 0, 0), Chunk((0,), (4,), 0, 4)])), "two chunks"),
        (manifest(TensorEntry("uint8", (4,), [Chunk((0,), (2,), 0, 0), Chunk((2,), (2,), 0, 1)])), "shares bytes"),
        (manifest(TensorEntry("uint8", (4,), [])), "not covered"),
        (manifest(one((0,), (4,)), items={"w": ItemEntry(b"x")}), "both"),
        (manifest(None, items={"i": ItemEntry(None, 3, 0, 1)}), "in no object"),
        (manifest(None, items={"i": ItemEntry(None, 0, 999, 2)}), "outside data/"),
        (manifest(None, items={"i": ItemEntry(None, 0, 0, -1)}), "in no object"),
        (manifest(None, objects=[ObjectEntry("data/x", 1, 1, b"")] * 2), "2 times"),
        (manifest(None, size=BIG), "larger than can be"),
    ],
)
def test_contradictions(wrong, said):
    assert said in " ".join(faults(wrong))


def test_a_ranks_own_checkpoint_need_not_cover_its_tensors():
    part = one((2,), (2,))
    assert list(faults(manifest(part, ranks=2))) == []
    assert "not covered" in " ".join(faults(manifest(part)))


def test_a_tensor_of_many_dimensions_costs_no_more():
    shape = (2,) + (1,) * 40
    chunks = [Chunk((at,) + (0,) * 40, (1,) * 41, 0, at) for at in (0, 1)]
    assert list(faults(manifest(TensorEntry("uint8", shape, chunks)))) == []
