"""Frames undo to what they were, or are an error; a coded chunk that contradicts itself is told from others."""

import tracemalloc

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from ckpt_cloud.errors import CorruptManifest, InvalidOption
from ckpt_cloud.format import codec
from ckpt_cloud.format import manifest as manifests
from ckpt_cloud.format.checksum import pack_sums, unpack_sums
from ckpt_cloud.format.codec import BadFrame, Coded, Zstd, fault, undone
from ckpt_cloud.format.manifest import Chunk, ItemEntry, Manifest, ObjectEntry, TensorEntry
from ckpt_cloud.format.structure import check, faults
from tests import forge

ID = "0190b5c4f00e7abc8def0123456789ab"
FRAME = 4096


def coded_bytes(plain, frame=FRAME, level=3):
    """What is stored of `plain`, and how it is told."""
    stored, sizes = Zstd(frame, level).code(memoryview(plain))
    return stored, Coded(("zstd",), frame, sizes, ((0, 100, len(stored)),))


def manifest(coded, nbytes, *, size=100_000, objects=1):
    entries = [ObjectEntry(f"data/{ID}/{n}.safetensors", size, size, bytes(4)) for n in range(objects)]
    tensor = TensorEntry("uint8", (nbytes,), [Chunk((0,), (nbytes,), -1, 0, coded)])
    return Manifest(attempt=ID, writer="test", objects=entries, tensors={"w": tensor}, items={})


plains = st.binary(min_size=1, max_size=300) | st.builds(lambda b, n: b * n, st.binary(min_size=1), st.integers(1, 40))


@given(plains, st.sampled_from([16, 64, 100, 1000]), st.sampled_from([-5, 1, 3, 19]))
def test_frames_undo_to_what_they_were(plain, frame, level):
    stored, coded = coded_bytes(plain, frame, level)
    assert fault(coded, len(plain)) is None
    assert len(stored) <= len(plain)
    assert b"".join(undone(memoryview(stored), tuple(coded.frames(len(plain))))) == plain


def test_what_does_not_shrink_is_stored_as_it_is():
    plain = bytes(range(256)) * 16 + bytes(range(20))
    stored, coded = coded_bytes(plain, 256)
    assert list(unpack_sums(coded.sizes)) == [256] * 16 + [20]
    assert stored == plain


@given(st.data())
def test_damage_to_a_frame_is_found(data):
    """By Zstandard's own checksum, even where nobody looked at ours."""
    plain = b"a line of text that compresses well\n" * 60
    stored, coded = coded_bytes(plain)
    at = data.draw(st.integers(0, len(stored) - 1))
    bad = bytearray(stored)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        got = b"".join(undone(memoryview(bad), tuple(coded.frames(len(plain)))))
    except BadFrame:
        return
    # Some bits of a frame's header say nothing that matters.
    assert got == plain


def frame_of(plain, **options):
    return zstandard.ZstdCompressor(**options).compress(plain)


@pytest.mark.parametrize(
    "frame",
    [
        frame_of(bytes(5000)),
        frame_of(bytes(3000)),
        frame_of(bytes(4096), write_content_size=False),
        frame_of(bytes(4096)) + b"more",
        frame_of(bytes(1 << 30)),
        b"not a frame at all",
        b"\x28\xb5\x2f\xfd",
    ],
    ids=["longer", "shorter", "of unknown length", "with more behind it", "a bomb", "no frame", "cut off"],
)
def test_a_frame_of_another_length_is_refused_before_memory_is_taken(frame):
    tracemalloc.start()
    with pytest.raises(BadFrame):
        list(undone(memoryview(frame), ((len(frame), 4096),)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


GOOD = Coded(("zstd",), FRAME, pack_sums([10, 4096, 20]), ((0, 0, 4106), (1, 7, 20)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": ()}, "without a codec"),
        ({"extents": ()}, "without a codec, a place"),
        ({"extents": ((0, 0, 4000), (1, 7, 126))}, "do not hold its frames"),
        ({"extents": ((0, 0, 4106),)}, "do not hold its frames"),
        ({"extents": ((0, 0, 4106), (1, 7, 20), (1, 50, 1))}, "do not hold its frames"),
        ({"extents": ((0, -1, 4106), (1, 7, 20))}, "impossible place"),
        ({"extents": ((-1, 0, 4106), (1, 7, 20))}, "impossible place"),
        ({"extents": ((0, 0, 4106), (1, 7, 20), (1, 50, 0))}, "impossible place"),
        ({"frame": -1}, "frames of -1"),
        ({"frame": codec.MAX_FRAME + 1, "sizes": pack_sums([4126])}, "in frames of"),
        ({"frame": 0}, "one stream"),
        ({"sizes": pack_sums([10, 4096])}, "another number of frames"),
        ({"sizes": GOOD.sizes + b"\0"}, "another number of frames"),
        ({"sizes": pack_sums([10, 4097, 19])}, "impossible size"),
        ({"sizes": pack_sums([0, 4096, 20])}, "impossible size"),
        ({"sizes": pack_sums([10, 2000, 2116])}, "impossible size"),
    ],
)
def test_contradictions_of_a_coded_chunk(changes, said):
    nbytes = 2 * FRAME + 100
    assert fault(GOOD, nbytes) is None
    wrong = structs.replace(GOOD, **changes)
    assert said in fault(wrong, nbytes)
    with pytest.raises(CorruptManifest, match="'w' has a chunk that"):
        check(manifest(wrong, nbytes, objects=2), "memory://x/y", whole=True)


def test_a_frame_cannot_claim_more_than_zstandard_can_hold():
    def claimed(stored):
        return Coded(("zstd",), 1 << 20, pack_sums([stored, stored]), ((0, 0, 2 * stored),))

    assert fault(claimed(32), 2 << 20) is None
    assert "cannot hold so much" in fault(claimed(31), 2 << 20)
    assert "without a codec, a place or a byte" in fault(claimed(32), 0)


@pytest.mark.parametrize(
    ("extents", "said"),
    [
        (((5, 0, 4106), (1, 7, 20)), "in no object"),
        (((0, 1 << 63, 4106), (1, 7, 20)), "in no object"),
        (((0, 99_000, 4106), (1, 7, 20)), "outside data/"),
        (((1, 0, 4106), (1, 4100, 20)), "shares bytes"),
    ],
)
def test_places_of_a_coded_chunk(extents, said):
    nbytes = 2 * FRAME + 100
    assert list(faults(manifest(GOOD, nbytes, objects=2))) == []
    wrong = structs.replace(GOOD, extents=extents)
    assert said in " ".join(faults(manifest(wrong, nbytes, objects=2)))


def test_coded_items():
    whole = manifest(GOOD, 2 * FRAME + 100, objects=2)
    for item, said in [
        (
            ItemEntry(
                None, -1, 0, 2 * FRAME + 100, None, structs.replace(GOOD, extents=((0, 5000, 4106), (1, 50, 20)))
            ),
            "",
        ),
        (ItemEntry(None, -1, 0, 2 * FRAME + 100, None, GOOD), "shares bytes"),
        (ItemEntry(None, -1, 0, FRAME, None, GOOD), "another number of frames"),
        (ItemEntry(None, -1, 0, -5, None, GOOD), "without"),
        (ItemEntry(b"x", -1, 0, 1, None, GOOD), "coded and in the manifest"),
    ]:
        found = " ".join(faults(structs.replace(whole, items={"i": item})))
        assert (said in found) if said else not found


def test_what_is_not_coded_is_stored_as_it_ever_was():
    """A chunk as an array of 4, an item of 5: not one byte more."""
    entry = ObjectEntry(f"data/{ID}/0.safetensors", 100, 100, bytes(4))
    chunk, item = Chunk((0,), (4,), 0, 7), ItemEntry(None, value=[5])
    plain = Manifest(
        attempt=ID,
        writer="w",
        objects=[entry],
        tensors={"w": TensorEntry("uint8", (4,), [chunk])},
        items={"i": item},
    )
    _, contents = forge.taken_apart(manifests.encode(plain))
    assert contents["tensors"] == [[[0], ["w"], [["uint8", [4], [[[0], [4], 0, 7]], False]]]]
    assert contents["items"] == [[[0], ["i"], [[None, -1, 0, 0, [5]]]]]
    assert not manifests.is_coded(plain)


def test_coded_chunks_and_items_come_back():
    whole = manifest(GOOD, 2 * FRAME + 100, objects=2)
    whole.items["i"] = ItemEntry(None, -1, 0, 2 * FRAME + 100, None, structs.replace(GOOD, extents=((0, 5000, 4126),)))
    assert manifests.is_coded(whole)
    assert forge.opened(manifests.encode(whole)) == whole
    assert whole.tensors["w"].chunks[0].objects == [0, 1]
    assert manifests.objects_of(whole.tensors, {}) == [0, 1]
    assert manifests.objects_of({}, whole.items) == [0]


def test_an_older_reader_would_ignore_the_field_and_therefore_needs_the_flag():
    class Older(msgspec.Struct, array_like=True):
        offsets: tuple[int, ...]
        sizes: tuple[int, ...]
        object: int
        start: int

    _, contents = forge.taken_apart(manifests.encode(manifest(GOOD, 2 * FRAME + 100, objects=2)))
    (chunk,) = contents["tensors"][0][2][0][2]
    assert msgspec.convert(chunk, Older).object == -1


def test_codecs_are_refused_by_name(monkeypatch):
    codec.require("zstd")
    with pytest.raises(InvalidOption, match=r"'lz4'.*'zstd'"):
        codec.require("lz4")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert not codec.is_available()
    with pytest.raises(InvalidOption, match="zstandard, which is not installed") as refused:
        codec.require("zstd")
    assert "ckpt-cloud[zstd]" in refused.value.hint
