"""Uploads: every byte where the plan says, within the memory budget, all together or not at all."""

import asyncio
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_cloud.errors import StoreUnavailable
from ckpt_cloud.events import BytesMoved, PartEnded, Recorder
from ckpt_cloud.format.checksum import first_bad_block, unpack_sums
from ckpt_cloud.format.layout import pack_key
from ckpt_cloud.format.pack import ITEM_DTYPE, PackEntry
from ckpt_cloud.format.sealing import BLOCK, MasterKey, sealed_size
from ckpt_cloud.planning.save import Sizes, parts, plan_packs
from ckpt_cloud.transfer.upload import upload_packs

ID = "0190b5c4f00e7abc8def0123456789ab"

pytestmark = pytest.mark.timeout(30)


class Memory:
    """A source of byte strings; those in `views` may be handed over as they are, the others must be copied.

    Those in `made` are made when they are asked for.
    """

    def __init__(self, values, views=(), made=()):
        self.values = values
        self.made = set(made)
        self.allocate = None
        self.views = set(views)
        self.released = []
        self.copied_bytes = 0

    def view(self, entry):
        return memoryview(self.values[entry]) if entry in self.views else None

    def lasts(self, entry):
        return entry not in self.made

    def copy(self, segments, into):
        at = 0
        for segment in segments:
            self.copy_one(segment.entry, segment.start, segment.end, into[at : at + segment.end - segment.start])
            at += segment.end - segment.start

    def copy_one(self, entry, start, end, into):
        into[:] = self.values[entry][start:end]
        self.copied_bytes += end - start

    def release(self, entry):
        self.released.append(entry)


def planned(values, *, pack_size, part_size):
    entries = [
        PackEntry(f"w{number}", ITEM_DTYPE, (len(value),), (0,), (len(value),), len(value))
        for number, value in enumerate(values)
    ]
    packs = plan_packs(entries, ID, Sizes(pack_size, part_size, 10_000, 5 << 30))
    return [(pack_key(ID, number), pack) for number, pack in enumerate(packs)]


def some_bytes(size, seed=1):
    return bytes((seed * 37 + at * 11) % 253 for at in range(size))


async def upload(store, source, packs, options, recorder=None):
    nbytes = [len(value) for value in source.values]
    source.allocate = store.allocate
    return await upload_packs(store, source, packs, nbytes, options=options, recorder=recorder or Recorder())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(1, 900), st.booleans()), min_size=1, max_size=30),
    st.integers(1, 3000),
    st.integers(50, 2000),
    st.integers(1, 200),
)
def test_every_byte_lies_where_the_plan_says(new_store, small_options, entries, pack_size, part_size, block_size):
    store = new_store()
    source = Memory(
        [some_bytes(size, seed) for seed, (size, _) in enumerate(entries)],
        [number for number, (_, view) in enumerate(entries) if view],
    )
    packs = planned(source.values, pack_size=pack_size, part_size=part_size)

    objects = asyncio.run(upload(store, source, packs, small_options(block_size=block_size)))

    assert [entry.key for entry in objects] == [key for key, _ in packs]
    for entry, (key, plan) in zip(objects, packs, strict=True):
        stored = store.objects[key]
        assert stored == plan.header + b"".join(source.values[index] for index in plan.entries)
        assert (entry.size, entry.block_size, entry.e_tag) == (len(stored), block_size, f"v-{key}")
        sums = unpack_sums(entry.sums)
        assert len(sums) == -(-len(stored) // block_size)
        assert first_bad_block([stored], 0, entry.sums, block_size) is None
        assert store.parts.get(key) in (
            None,
            [plan.part_size] * (len(stored) // plan.part_size) + [*rest(stored, plan)],
        )
    assert sorted(source.released) == list(range(len(entries)))


def rest(stored, plan):
    return [len(stored) % plan.part_size] if len(stored) % plan.part_size else []


async def test_staged_parts_stay_within_the_budget(store, small_options):
    source = Memory([some_bytes(7000, seed) for seed in range(12)])
    packs = planned(source.values, pack_size=14_000, part_size=500)
    assert len(packs) == 6

    async def some_turns(key, number):
        for _ in range(number % 7):
            await asyncio.sleep(0.001)

    store.before_part = some_turns
    options = small_options(memory_budget=4000, max_requests=8)
    await upload(store, source, packs, options)

    assert store.staged_bytes.now == 0
    assert 2000 < store.staged_bytes.peak <= 4000
    assert 4 < store.requests.peak <= 8
    assert store.uploads.peak == 6
    assert store.allocated == [500] * len(store.allocated), "a last part is staged where others were"
    assert len(store.allocated) <= 8 < sum(-(-plan.size // 500) for _, plan in packs)


async def test_a_budget_of_two_parts_is_enough(store, small_options):
    source = Memory([some_bytes(3000, seed) for seed in range(8)])
    packs = planned(source.values, pack_size=3000, part_size=500)
    await asyncio.wait_for(upload(store, source, packs, small_options(memory_budget=1000)), 30)
    assert store.staged_bytes.peak <= 1000
    assert len(store.objects) == len(packs) == 8


async def test_views_are_handed_over_without_a_copy(store, small_options):
    source = Memory([some_bytes(5000)], views=[0])
    packs = planned(source.values, pack_size=9000, part_size=500)
    owners = []

    class Watching(type(store)):
        def _see(self, buffer):
            owners.append(memoryview(buffer).obj)
            super()._see(buffer)

    store.__class__ = Watching
    await upload(store, source, packs, small_options(memory_budget=1))
    assert source.copied_bytes == 0
    assert {id(owner) for owner in owners} == {id(source.values[0]), id(packs[0][1].header)}


async def test_packs_that_are_all_views_share_the_requests(store, small_options):
    source = Memory([some_bytes(5000, seed) for seed in range(6)], views=range(6))
    packs = planned(source.values, pack_size=5200, part_size=500)
    recorder = Recorder()

    async def some_turns(key, number):
        await asyncio.sleep(0.001)

    store.before_part = some_turns
    objects = await upload(store, source, packs, small_options(memory_budget=1, max_requests=12), recorder)

    assert store.requests.peak <= 12
    assert sorted(source.released) == list(range(6))
    assert recorder.report.requests == sum(-(-plan.size // 500) for _, plan in packs)
    for entry, (key, plan) in zip(objects, packs, strict=True):
        assert store.objects[key] == plan.header + b"".join(source.values[index] for index in plan.entries)
        assert first_bad_block([store.objects[key]], 0, entry.sums, entry.block_size) is None


async def test_a_large_pack_gets_more_of_the_requests(store, small_options):
    sizes = [1000] * 12
    sizes[9] = 30_000
    source = Memory([some_bytes(size, seed) for seed, size in enumerate(sizes)], views=range(12))
    packs = planned(source.values, pack_size=1200, part_size=500)
    large, size = next((key, plan.size) for key, plan in packs if plan.size > 30_000)
    under_way, most = Counter(), Counter()

    async def some_turns(key, number):
        under_way[key] += 1
        most[key] = max(most[key], under_way[key])
        await asyncio.sleep(0.001)
        under_way[key] -= 1

    store.before_part = some_turns
    objects = await upload(store, source, packs, small_options(memory_budget=1, max_requests=16))

    assert store.begun[0] == large
    assert most[large] == 16 * size // sum(plan.size for _, plan in packs) > 8
    assert store.requests.peak <= 16
    assert [entry.key for entry in objects] == [key for key, _ in packs]


async def test_what_was_made_to_be_saved_is_let_go_part_by_part(store, small_options):
    """Or a planner that converts would have as much in memory as packs are uploaded beside each other."""
    source = Memory([some_bytes(500, seed) for seed in range(40)], views=range(40), made=[3])
    packs = planned(source.values, pack_size=100_000, part_size=500)
    released_before = []

    async def some_turns(key, number):
        released_before.append(len(source.released))

    store.before_part = some_turns
    await upload(store, source, packs, small_options(max_requests=2))
    assert len(packs) == 1
    assert max(released_before) > 30
    assert source.copied_bytes == 0


async def test_a_view_that_fails_takes_the_upload_with_it(store, small_options):
    source = Memory([some_bytes(5000, seed) for seed in range(3)], views=range(3))
    packs = planned(source.values, pack_size=5200, part_size=500)

    async def refused(key, number):
        raise StoreUnavailable("upload: no answer", f"{store.url}/{key}")

    store.before_part = refused
    with pytest.raises(StoreUnavailable):
        await upload(store, source, packs, small_options())
    assert store.objects == {}
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_part_of_many_small_entries_is_one_buffer(store, small_options):
    source = Memory([some_bytes(20, seed) for seed in range(100)], views=range(100))
    ((key, plan),) = planned(source.values, pack_size=9000, part_size=1000)
    seen = []

    class Watching(type(store)):
        def _see(self, buffer):
            seen.append(type(memoryview(buffer).obj).__name__)
            super()._see(buffer)

    store.__class__ = Watching
    await upload(store, source, [(key, plan)], small_options(memory_budget=100_000))

    expected = []
    for segments in parts(plan, [20] * 100):
        expected += ["StagedMemory"] if len(segments) > 16 else ["bytes"] * len(segments)
    assert seen == expected
    assert "StagedMemory" in seen
    assert store.objects[key] == plan.header + b"".join(source.values)


async def test_the_report_counts_every_request_and_byte(store, small_options):
    source = Memory([some_bytes(3000, seed) for seed in range(3)])
    packs = planned(source.values, pack_size=3000, part_size=500)
    events = []
    recorder = Recorder(events.append)
    await upload(store, source, packs, small_options(), recorder)

    stored = sum(map(len, store.objects.values()))
    parts = sum(-(-plan.size // 500) for _, plan in packs)
    assert (recorder.report.bytes_moved, recorder.report.requests, recorder.report.objects) == (stored, parts, 3)
    assert {type(event) for event in events} == {BytesMoved, PartEnded}
    for kind in (BytesMoved, PartEnded):
        assert sum(event.size_bytes for event in events if isinstance(event, kind)) == stored
    assert {event.direction for event in events} == {"up"}


async def test_nothing_to_upload(store, small_options):
    assert await upload(store, Memory([]), [], small_options()) == []


@pytest.mark.parametrize("part_size", [500, 100_000], ids=["multipart", "single-put"])
async def test_one_failure_cancels_the_other_uploads(store, small_options, part_size):
    source = Memory([some_bytes(3000, seed) for seed in range(6)])
    packs = planned(source.values, pack_size=3000, part_size=part_size)
    failing = packs[1][0]

    async def before_part(key, number):
        while len(store.begun) < 6:
            await asyncio.sleep(0.001)
        if key == failing:
            raise StoreUnavailable("upload: no answer", f"{store.url}/{key}")
        await asyncio.sleep(60)

    store.before_part = before_part
    with pytest.raises(StoreUnavailable, match="upload: no answer"):
        await asyncio.wait_for(upload(store, source, packs, small_options(memory_budget=20_000)), 10)

    assert store.objects == {}
    assert sorted(store.aborted) == sorted(store.begun)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert store.requests.now == store.uploads.now == 0


class Broken(Memory):
    """Gives up in the middle of entry 2."""

    def copy_one(self, entry, start, end, into):
        if entry == 2 and start > 0:
            raise MemoryError("no room to stage it")
        super().copy_one(entry, start, end, into)


async def test_what_the_source_raises_comes_out_as_it_is(store, small_options):
    source = Broken([some_bytes(3000, seed) for seed in range(4)])
    packs = planned(source.values, pack_size=3000, part_size=500)
    with pytest.raises(MemoryError, match="no room to stage it"):
        await upload(store, source, packs, small_options())
    assert packs[2][0] not in store.objects
    assert packs[2][0] in store.aborted


async def test_cancelled_from_outside(store, small_options):
    source = Memory([some_bytes(3000, seed) for seed in range(4)])
    packs = planned(source.values, pack_size=3000, part_size=500)
    begun = asyncio.Event()

    async def never(key, number):
        begun.set()
        await asyncio.sleep(60)

    store.before_part = never
    task = asyncio.create_task(upload(store, source, packs, small_options()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.objects == {}
    assert store.requests.now == store.uploads.now == 0


async def test_sealed_parts_stay_within_the_budget(store, small_options):
    """One buffer for each part, whether it is sealed from where it lies or copied first."""
    source = Memory([bytes([seed]) * 300_000 for seed in range(12)], views=range(0, 12, 2))
    packs = planned(source.values, pack_size=600_000, part_size=2 * BLOCK)
    part = sealed_size(2 * BLOCK)
    nbytes = [len(value) for value in source.values]
    source.allocate = store.allocate
    options = small_options(memory_budget=4 * part, max_requests=8, part_size=2 * BLOCK)

    async def some_turns(key, number):
        for _ in range(number % 7):
            await asyncio.sleep(0.001)

    store.before_part = some_turns
    key = MasterKey(bytes(32))
    objects = await upload_packs(store, source, packs, nbytes, options=options, recorder=Recorder(), seal=key.of_object)

    assert store.staged_bytes.now == 0
    assert part < store.staged_bytes.peak <= 4 * part
    for entry, (name, plan) in zip(objects, packs, strict=True):
        stored = store.objects[name]
        assert len(stored) == sealed_size(entry.size)
        assert set(store.parts[name][:-1]) == {part}
        whole = memoryview(bytearray(entry.size))
        assert not key.of_object(name).open(memoryview(stored), [whole], first_block=0, last=True)
        assert whole == plan.header + b"".join(source.values[index] for index in plan.entries)
        assert first_bad_block([whole], 0, entry.sums, entry.block_size) is None
    assert sorted(source.released) == list(range(12))
