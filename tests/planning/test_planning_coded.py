"""From boxes of coded chunks to stored ranges and back, held against numpy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import CorruptManifest
from ckpt_cloud.format.checksum import pack_sums, unpack_sums
from ckpt_cloud.format.codec import Coded, Zstd, undone
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.planning import coded as planning
from ckpt_cloud.planning.coded import Job, Part, Placement, jobs
from ckpt_cloud.planning.load import Want, plan_fetches

ID = "0190b5c4f00e7abc8def0123456789ab"


def box_of(array, offsets, sizes):
    return array[*(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)), ...]


@st.composite
def loads(draw):
    """Objects as bytes, wants of coded and plain chunks, and what they should give."""
    objects = [bytearray(draw(st.binary(max_size=9))) for _ in range(draw(st.integers(1, 3)))]
    wants, expected = [], []
    for _ in range(draw(st.integers(1, 3))):
        chunk = tuple(draw(st.lists(st.integers(1, 12), max_size=3)))
        width = draw(st.sampled_from([1, 2, 4, 8, 16]))
        nbytes = math.prod(chunk) * width
        random = draw(st.randoms(use_true_random=False))
        plain = random.randbytes(nbytes) if draw(st.booleans()) else bytes([random.randrange(256)]) * nbytes
        kind = draw(st.sampled_from(["plain", "frames", "stream"]))
        number, start, coded = _stored(draw, objects, plain, kind)
        memory = np.frombuffer(plain, f"V{width}").reshape(chunk)
        for _ in range(draw(st.integers(1, 3))):
            offsets = tuple(draw(st.integers(0, size - 1)) for size in chunk)
            sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(chunk, offsets, strict=True))
            if draw(st.booleans()):
                offsets, sizes = (0,) * len(chunk), chunk
            wants.append(Want(number, start, width, chunk, offsets, sizes, coded))
            expected.append(box_of(memory, offsets, sizes).tobytes())
    entries = [
        ObjectEntry(f"data/{ID}/{number}.safetensors", len(data), draw(st.integers(1, 40)), b"")
        for number, data in enumerate(objects)
    ]
    return [bytes(data) for data in objects], entries, wants, expected


def _stored(draw, objects, plain, kind):
    """Puts a chunk into the objects: its place, or how it is coded."""
    if kind == "plain":
        number = draw(st.integers(0, len(objects) - 1))
        objects[number] += plain
        return number, len(objects[number]) - len(plain), None
    if kind == "frames":
        frame = draw(st.sampled_from([8, 24, 32, 100, 1000]))
        stored, sizes = Zstd(frame, 1).code(memoryview(plain))
        pieces = list(unpack_sums(sizes))
    else:
        frame, sizes, stored = 0, b"", bytes(reversed(plain))
        pieces = [1] * len(stored)
    extents, at = [], 0
    for size in pieces:
        number = extents[-1][0] if extents and draw(st.integers(0, 3)) else draw(st.integers(0, len(objects) - 1))
        last = extents[-1] if extents else None
        if last and last[0] == number and last[1] + last[2] == len(objects[number]):
            extents[-1] = number, last[1], last[2] + size
        else:
            objects[number] += bytes(draw(st.integers(0, 3)))
            extents.append((number, len(objects[number]), size))
        objects[number] += stored[at : at + size]
        at += size
    return -1, 0, Coded(("zstd",) if frame else ("reversed",), frame, sizes, tuple(extents))


def run(load, built, times, **options):
    """Carries a plan out; gives the bytes that were fetched."""
    contents, entries, wants, _ = load
    gathered, fetched = {}, 0

    def put(placement, data):
        width = wants[placement.want].itemsize
        steps = [step * width for step in placement.strides]
        source = np.ndarray(placement.sizes, f"V{width}", data, placement.source, steps)
        box_of(built[placement.want], placement.offsets, placement.sizes)[...] = source
        box_of(times[placement.want], placement.offsets, placement.sizes)[...] += 1

    for fetch in plan_fetches(wants, entries, **options):
        data = contents[fetch.object][fetch.start : fetch.end]
        fetched += len(data)
        for each in fetch.placements:
            if isinstance(each, Placement):
                put(each, data)
                continue
            assert isinstance(each, Part)
            unit = each.unit
            have = gathered.setdefault(id(unit), (unit, {}))[1]
            for place in range(each.end - each.source):
                assert each.at + place not in have
                have[each.at + place] = data[each.source + place]
    for unit, have in gathered.values():
        stored = bytes(have[at] for at in range(unit.stored))
        plain = b"".join(undone(memoryview(stored), unit.frames)) if unit.frames else bytes(reversed(stored))
        assert len(plain) == unit.nbytes
        for placement in unit.placements:
            put(placement, plain)
    return fetched


@given(loads(), st.integers(40, 200), st.integers(0, 100), st.sampled_from([1, 50, 4 << 20]))
def test_fetched_ranges_rebuild_every_box(load, range_size, gap_size, unit):
    wants, expected = load[2], load[3]
    built = [np.zeros(want.sizes, f"V{want.itemsize}") for want in wants]
    times = [np.zeros(want.sizes, int) for want in wants]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "UNIT_BYTES", unit)
        run(load, built, times, range_size=range_size, gap_size=gap_size)
    assert [array.tobytes() for array in built] == expected
    assert all((count == 1).all() for count in times)


@given(st.integers(1, 400), st.data())
def test_a_part_of_a_row_needs_its_frames_and_no_other(length, data):
    """Of compressed bytes, a box without gaps reads exactly the frames that it touches, each once."""
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    sizes = [data.draw(st.integers(1, 10)) for _ in range(-(-length // 10) - 1)]
    sizes.append(data.draw(st.integers(1, (length - 1) % 10 + 1)))
    coded = Coded(("other",), 10, pack_sums(sizes), ((0, 0, sum(sizes)),))
    want = Want(-1, 0, 1, (length,), (start,), (end - start,), coded)
    fetches = plan_fetches([want], [ObjectEntry("x", sum(sizes), 1, b"")], range_size=1000, gap_size=0)
    first, last = start // 10, -(-end // 10)
    assert [(f.start, f.end) for f in fetches] == [(sum(sizes[:first]), sum(sizes[:last]))]


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([4, 8]))
def test_a_whole_chunk_undoes_each_frame_once(rows, columns, width):
    nbytes = rows * columns * width
    frames = -(-nbytes // 16)
    coded = Coded(("other",), 16, pack_sums([1] * frames), ((0, 0, frames),))
    want = Want(-1, 0, width, (rows, columns), (0, 0), (rows, columns), coded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "UNIT_BYTES", 32)
        fetches = plan_fetches([want], [ObjectEntry("x", frames, 1, b"")], range_size=1000, gap_size=0)
    units = [part.unit for fetch in fetches for part in fetch.placements]
    assert sum(len(unit.frames) for unit in units) == frames


@pytest.mark.parametrize(
    ("coded", "said"),
    [
        (Coded(("zstd",), 16, pack_sums([16, 16]), ((3, 0, 32),)), "object 3"),
        (Coded(("zstd",), 16, pack_sums([16, 16]), ((0, 90, 32),)), "outside"),
        (Coded(("zstd",), 16, pack_sums([16]), ((0, 0, 16),)), "number of frames"),
        (Coded(("zstd",), 16, pack_sums([16, 16]), ()), "without a codec, a place"),
    ],
)
def test_a_chunk_that_contradicts_itself(coded, said):
    want = Want(-1, 0, 4, (8,), (0,), (8,), coded)
    with pytest.raises(CorruptManifest, match=said):
        plan_fetches([want], [ObjectEntry("x", 100, 1, b"")], range_size=1000, gap_size=0)


@given(st.lists(st.integers(1, 50), max_size=5), st.integers(0, 20))
def test_jobs_cover_every_entry(nbytes, step):
    found = list(jobs(nbytes, step))
    assert all(job.nbytes <= (step or 50) for job in found)
    for entry, size in enumerate(nbytes):
        own = [job for job in found if job.entry == entry]
        assert own[0].start == 0
        assert own[-1].end == size
        assert all(a.end == b.start for a, b in itertools.pairwise(own))
    assert found == sorted(found, key=lambda job: (job.entry, job.start))
    assert Job(0, 3, 5).nbytes == 2
