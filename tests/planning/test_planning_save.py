"""Entries to packs: each once, where the plan says, in objects of like size; packs to parts: each byte once."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ckpt_cloud.errors import Unsupported
from ckpt_cloud.format.dtypes import SIZES
from ckpt_cloud.format.pack import ITEM_DTYPE, PackEntry
from ckpt_cloud.planning.save import (
    PackPlan,
    Segment,
    Sizes,
    part_size_for,
    parts,
    plan_packs,
    shared_part_size,
    shares,
)


def sizes(pack, part):
    return Sizes(pack, part, 10_000, 5 << 30)


ATTEMPT = "0190b5c4f00e7abc8def0123456789ab"
MIB = 1 << 20


def entry(number, dtype, count):
    nbytes = count * SIZES.get(dtype, 1)
    return PackEntry(f"layer.{number}", dtype, (count,), (0,), (count,), nbytes)


@st.composite
def batches(draw):
    kinds = st.tuples(st.sampled_from([*SIZES, ITEM_DTYPE]), st.integers(1, 300))
    return [entry(number, *kind) for number, kind in enumerate(draw(st.lists(kinds, max_size=40)))]


@given(batches(), st.integers(1, 5000), st.integers(64, 4096))
def test_every_entry_once_where_the_plan_says(entries, pack_size, part_size):
    packs = plan_packs(entries, ATTEMPT, sizes(pack_size, part_size))

    assert sorted(index for pack in packs for index in pack.entries) == list(range(len(entries)))
    for pack in packs:
        ends = [start + entries[index].nbytes for index, start in zip(pack.entries, pack.starts, strict=True)]
        assert [len(pack.header), *ends] == [*pack.starts, pack.size]
        table = json.loads(pack.header[8:])
        for index, start in zip(pack.entries, pack.starts, strict=True):
            low, high = table[entries[index].fqn]["data_offsets"]
            assert (len(pack.header) + low, high - low) == (start, entries[index].nbytes)


@given(batches(), st.integers(1, 5000))
def test_neighbours_stay_neighbours(entries, pack_size):
    packs = plan_packs(entries, ATTEMPT, sizes(pack_size, MIB))
    runs = [sorted(pack.entries) for pack in packs]
    assert [index for run in runs for index in run] == list(range(len(entries)))


@given(batches(), st.integers(1, 5000))
def test_packs_are_bounded_unless_one_entry_alone_is_larger(entries, pack_size):
    for pack in plan_packs(entries, ATTEMPT, sizes(pack_size, MIB)):
        assert pack.size - len(pack.header) <= pack_size or len(pack.entries) == 1


@given(batches(), st.integers(1, 5000))
def test_tensors_are_aligned_to_their_elements(entries, pack_size):
    for pack in plan_packs(entries, ATTEMPT, sizes(pack_size, MIB)):
        for index, start in zip(pack.entries, pack.starts, strict=True):
            assert start % min(8, SIZES.get(entries[index].dtype, 1)) == 0


@given(st.integers(1, 300), st.integers(1, 50), st.floats(1, 60))
def test_like_entries_make_like_packs(count, nbytes, packs_of):
    entries = [entry(number, "uint8", nbytes) for number in range(count)]
    pack_size = int(nbytes * packs_of)
    counts = [len(p.entries) for p in plan_packs(entries, ATTEMPT, sizes(pack_size, MIB))]
    # No pack is left with scraps, and there are no more packs than it takes.
    assert min(counts) >= max(counts) // 2
    assert len(counts) <= math.ceil(count / (pack_size // nbytes)) + 1


def test_33_entries_of_100_bytes_in_packs_of_1000():
    entries = [entry(number, "uint8", 100) for number in range(33)]
    packs = plan_packs(entries, ATTEMPT, sizes(1000, MIB))
    assert sorted(len(pack.entries) for pack in packs) == [8, 8, 8, 9]


def test_a_header_never_comes_near_what_safetensors_refuses():
    entries = [PackEntry("n" * 50_000 + str(number), "uint8", (1,), (0,), (1,), 1) for number in range(120)]
    packs = plan_packs(entries, ATTEMPT, sizes(MIB, MIB))
    assert len(packs) > 1
    assert max(len(pack.header) for pack in packs) < 50_000_000
    assert sum(len(pack.entries) for pack in packs) == len(entries)


def test_nothing_to_write_makes_no_pack():
    assert plan_packs([], ATTEMPT, sizes(MIB, MIB)) == []


S3 = (10_000, 5 << 30)
AZURE = (50_000, 4000 * MIB)


@pytest.mark.parametrize(("max_parts", "max_part"), [S3, AZURE], ids=["s3-and-gcs", "azure"])
@pytest.mark.parametrize("part_size", [5 * MIB, 16 * MIB, 1 << 30])
def test_part_size_doubles_just_above_the_most_parts(part_size, max_parts, max_part):
    limits = Sizes(part_size, part_size, max_parts, max_part)
    assert part_size_for(1, limits) == part_size
    assert part_size_for(max_parts * part_size, limits) == part_size
    assert part_size_for(max_parts * part_size + 1, limits) == 2 * part_size
    assert part_size_for(2 * max_parts * part_size, limits) == 2 * part_size


@pytest.mark.parametrize(("max_parts", "max_part"), [S3, AZURE], ids=["s3-and-gcs", "azure"])
@pytest.mark.parametrize("part_size", [5 * MIB, 16 * MIB, 3 << 30])
def test_the_largest_object_and_one_byte_more(part_size, max_parts, max_part):
    limits = Sizes(part_size, part_size, max_parts, max_part)
    largest = max_parts * max_part
    assert part_size_for(largest, limits) == max_part
    with pytest.raises(Unsupported, match=str(largest + 1)):
        part_size_for(largest + 1, limits)


@given(st.integers(0, 1 << 40), st.sampled_from([5, 8, 16, 64]), st.integers(1, 256), st.integers(12, 20))
def test_parts_shared_by_requests_are_what_stores_and_sums_take(total, most, requests, log_block):
    size = shared_part_size(total, most=most * MIB, requests=requests, block=1 << log_block)
    assert 5 * MIB <= size <= most * MIB
    assert size % (1 << log_block) == 0


@given(st.integers(6 * 32 * 5 * MIB, 1 << 36), st.integers(1, 32))
def test_requests_have_several_parts_each_unless_parts_would_be_too_small(total, requests):
    size = shared_part_size(total, most=16 * MIB, requests=requests, block=64 << 10)
    assert size == 5 * MIB or total / size > 5 * requests


def test_little_goes_in_one_request_and_much_in_the_parts_asked_for():
    def of(total):
        return shared_part_size(total, most=16 * MIB, requests=32, block=64 << 10) // MIB

    assert [of(16 * MIB), of(16 * MIB + 1), of(1 << 30), of(2 << 30), of(1 << 40)] == [16, 5, 6, 11, 16]


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 40), st.integers(1, 60), st.randoms())
def test_parts_cover_every_byte_once_in_order(nbytes, header_bytes, part_size, chance):
    order = [index for index in range(len(nbytes)) if nbytes[index]]
    chance.shuffle(order)
    size = header_bytes + sum(nbytes)
    plan = PackPlan(tuple(order), (), b"h" * header_bytes, size, part_size)

    found = list(parts(plan, nbytes))

    expected = [(-1, at) for at in range(header_bytes)] + [(e, at) for e in order for at in range(nbytes[e])]
    assert [(s.entry, at) for part in found for s in part for at in range(s.start, s.end)] == expected
    sizes = [sum(s.end - s.start for s in part) for part in found]
    assert sizes == [part_size] * (size // part_size) + [size % part_size] * (size % part_size > 0)
    assert all(before.entry != after.entry for part in found for before, after in pairwise(part))


@given(batches(), st.integers(100, 5000), st.integers(16, 500))
def test_parts_of_a_plan_add_up_to_it(entries, pack_size, part_size):
    nbytes = [e.nbytes for e in entries]
    for plan in plan_packs(entries, ATTEMPT, sizes(pack_size, part_size)):
        assume(plan.part_size < 10 * part_size)
        found = list(parts(plan, nbytes))
        assert len(found) == math.ceil(plan.size / plan.part_size)
        assert sum(s.end - s.start for part in found for s in part) == plan.size
        assert found[0][0] == Segment(-1, 0, min(plan.part_size, len(plan.header)))


@given(st.lists(st.integers(1, 1 << 40), max_size=30), st.integers(1, 64), st.integers(1, 16))
def test_requests_are_shared_by_bytes(sizes, requests, at_once):
    found = shares(sizes, requests, at_once=at_once)
    assert len(found) == len(sizes)
    assert all(share >= max(1, requests * size // sum(sizes)) for share, size in zip(found, sizes, strict=True))
    if len(sizes) > at_once:
        assert min(found) >= requests // at_once, "of many, only some go beside each other"
    elif sizes:
        assert sum(found) >= requests, "none is left over"
        assert sum(found) <= requests + len(sizes)


def test_equal_uploads_have_equal_shares():
    assert shares([256 << 20] * 4, 32, at_once=8) == [8] * 4
    assert shares([256 << 20] * 100, 32, at_once=8) == [4] * 100
    assert shares([8 << 30, *[256 << 20] * 32], 32, at_once=8) == [16, *[4] * 32]
