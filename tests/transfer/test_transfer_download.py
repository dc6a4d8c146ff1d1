"""Downloads: verified, within the memory budget, and never a wrong byte."""

import asyncio
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_cloud.errors import ChecksumMismatch, MissingObject, StoreUnavailable
from ckpt_cloud.events import Recorder
from ckpt_cloud.format.checksum import BlockSums
from ckpt_cloud.format.manifest import ObjectEntry
from ckpt_cloud.planning.load import Want, plan_fetches
from ckpt_cloud.transfer import download as download_room
from ckpt_cloud.transfer.download import download
from ckpt_cloud.transfer.staging import plain_memory

ID = "0190b5c4f00e7abc8def0123456789ab"
BLOCK = 64

pytestmark = pytest.mark.timeout(30)


def some_bytes(size, seed=1):
    return bytes((seed * 37 + at * 11) % 253 for at in range(size))


class Buffers:
    """A sink of one byte buffer for each want; those in `direct` take their bytes as they come."""

    allocate = staticmethod(plain_memory)

    def __init__(self, wants, direct=()):
        self.buffers = [bytearray(want.sizes[0]) for want in wants]
        self.direct = set(direct)
        self.moved_bytes = 0

    def memory(self, placement):
        if placement.want not in self.direct:
            return None
        (offset,), (size,) = placement.offsets, placement.sizes
        return memoryview(self.buffers[placement.want])[offset : offset + size]

    def place(self, placements, data):
        for placement in placements:
            self.place_one(placement, data)

    def place_one(self, placement, data):
        (offset,), (size,) = placement.offsets, placement.sizes
        self.moved_bytes += size
        self.buffers[placement.want][offset : offset + size] = data[placement.source : placement.source + size]

    def describe(self, placement):
        return f"tensor.{placement.want}"


class Scene:
    """Objects in a store, wants of their bytes, and the fetches that serve them."""

    def __init__(self, store, sizes=(2000,), wants=None, range_size=256):
        self.store = store
        self.entries = []
        for number, size in enumerate(sizes):
            key = f"data/{ID}/{number}.safetensors"
            store.objects[key] = some_bytes(size, number)
            sums = BlockSums(BLOCK)
            sums.update(store.objects[key])
            self.entries.append(ObjectEntry(key, size, BLOCK, sums.finish()))
        wholes = [Want(number, 0, 1, (size,), (0,), (size,)) for number, size in enumerate(sizes)]
        self.wants = wholes if wants is None else wants
        self.fetches = plan_fetches(self.wants, self.entries, range_size=range_size, gap_size=0)
        self.sink = Buffers(self.wants)
        self.recorder = Recorder()

    async def load(self, options):
        await download(self.store, self.sink, self.fetches, self.entries, options=options, recorder=self.recorder)

    def expected(self):
        contents = list(self.store.objects.values())
        return [contents[want.object][want.start + want.offsets[0] :][: want.sizes[0]] for want in self.wants]


@pytest.fixture(autouse=True)
def _every_size_may_go_direct(monkeypatch):
    monkeypatch.setattr(download_room, "_MIN_DIRECT", 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.lists(st.integers(1, 1500), min_size=1, max_size=3), st.integers(64, 600))
def test_every_byte_comes_to_its_place(new_store, small_options, draw, sizes, range_size):
    wants = []
    for number, size in enumerate(sizes):
        for _ in range(draw.draw(st.integers(0, 3))):
            start = draw.draw(st.integers(0, size - 1))
            chunk = draw.draw(st.integers(1, size - start))
            offset = draw.draw(st.integers(0, chunk - 1))
            wants.append(Want(number, start, 1, (chunk,), (offset,), (draw.draw(st.integers(1, chunk - offset)),)))
    scene = Scene(new_store(), sizes, wants, range_size)
    scene.sink.direct = draw.draw(st.sets(st.sampled_from(range(len(wants))))) if wants else set()

    asyncio.run(scene.load(small_options()))

    assert [bytes(buffer) for buffer in scene.sink.buffers] == scene.expected()
    report = scene.recorder.report
    assert report.requests == len(scene.store.reads) == len(scene.fetches)
    assert report.bytes_moved == sum(end - start for _, start, end in scene.store.reads)
    assert report.objects == len({want.object for want in wants})


async def test_bytes_that_can_are_received_where_they_belong(store, small_options, monkeypatch):
    monkeypatch.setattr(download_room, "_MIN_DIRECT", 100)
    wants = [Want(0, at, 1, (size,), (0,), (size,)) for at, size in ((10, 50), (60, 200), (260, 700), (960, 99))]
    scene = Scene(store, [1200], wants, range_size=512)
    scene.sink.direct = {0, 1, 2, 3}
    await scene.load(small_options())
    assert [bytes(buffer) for buffer in scene.sink.buffers] == scene.expected()
    assert 50 + 99 <= scene.sink.moved_bytes < 50 + 99 + 100, "only the small ones, and the ends of those that were cut"


@pytest.mark.parametrize(("direct", "at_once"), [((), 2), ((0, 1, 2), 4)], ids=["through-a-buffer", "direct"])
async def test_ranges_stay_within_the_budget(store, small_options, direct, at_once):
    scene = Scene(store, [8192, 8192, 8192])
    scene.sink.direct = set(direct)

    async def slow(key, number):
        await asyncio.sleep(0.001 * (number % 5))

    store.before_read = slow
    await scene.load(small_options(memory_budget=1024, max_requests=6))
    assert [bytes(buffer) for buffer in scene.sink.buffers] == scene.expected()
    assert 256 <= store.fetched_bytes.peak <= 1024
    assert store.fetched_bytes.now == 0
    assert store.requests.peak == at_once  # as many ranges of 256 bytes, and buffers for them, as the budget holds


async def test_a_buffer_takes_no_more_of_the_budget_than_goes_through_it(store, small_options):
    wants = []
    for at in range(0, 8192, 256):
        wants += [Want(0, at, 1, (224,), (0,), (224,)), Want(0, at + 224, 1, (32,), (0,), (32,))]
    scene = Scene(store, [8192], wants)
    scene.sink.direct = set(range(0, len(wants), 2))

    async def slow(key, number):
        await asyncio.sleep(0.001 * (number % 5))

    store.before_read = slow
    await scene.load(small_options(memory_budget=1024, max_requests=6))
    assert [bytes(buffer) for buffer in scene.sink.buffers] == scene.expected()
    assert store.requests.peak == 3, "256 bytes for the store and 32 for the buffer of each"


async def test_requests_are_bounded(store, small_options):
    scene = Scene(store, [8000])
    await scene.load(small_options(memory_budget=100_000, max_requests=6))
    assert store.requests.peak == 6


async def test_a_range_larger_than_the_budget_is_fetched_alone(store, small_options):
    scene = Scene(store, [2000, 2000], range_size=2048)
    await scene.load(small_options(memory_budget=100))
    assert store.requests.peak == 1
    assert [bytes(buffer) for buffer in scene.sink.buffers] == scene.expected()


async def test_nothing_to_fetch(store, small_options):
    scene = Scene(store, [100], wants=[])
    await scene.load(small_options())
    assert store.reads == []


def flipped(data, bit):
    damaged = bytearray(data)
    damaged[bit // 8 % len(damaged)] ^= 1 << bit % 8
    return bytes(damaged)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_range_damaged_on_the_way_is_fetched_once_more(new_store, small_options, draw):
    scene = Scene(new_store())
    struck = draw.draw(st.integers(0, len(scene.fetches) - 1))
    bit = draw.draw(st.integers(0, 8 * 256 - 1))
    scene.store.on_read = lambda key, number, data: flipped(data, bit) if number == struck else data

    asyncio.run(scene.load(small_options()))

    assert [bytes(buffer) for buffer in scene.sink.buffers] == scene.expected()
    assert len(scene.store.reads) == len(scene.fetches) + 1 == scene.recorder.report.requests
    assert scene.store.reads.count(scene.store.reads[struck]) == 2


async def test_a_damaged_object_is_named_to_the_byte(store, small_options):
    sizes = [1000, 1000]
    wants = [Want(1, 0, 1, (700,), (0,), (700,)), Want(1, 700, 1, (300,), (0,), (300,))]
    scene = Scene(store, sizes, wants, range_size=1024)
    key = scene.entries[1].key
    store.objects[key] = flipped(store.objects[key], 8 * 970 + 3)

    with pytest.raises(ChecksumMismatch) as failure:
        await scene.load(small_options())

    message = str(failure.value)
    assert key in message
    assert "bytes 960 to 1000" in message  # the last block, which is short
    assert "tensor.0, tensor.1" in message  # both are served by the range
    assert len(store.reads) == 2
    assert all(not any(buffer) for buffer in scene.sink.buffers), "nothing of a range that did not verify is placed"


async def test_both_fetches_damaged_in_other_places(store, small_options):
    scene = Scene(store)
    store.on_read = lambda key, number, data: flipped(data, number * 999)
    with pytest.raises(ChecksumMismatch):
        await scene.load(small_options(max_requests=1))
    assert len(store.reads) == 2


async def test_a_short_block_is_no_match(store, small_options):
    scene = Scene(store)
    store.on_read = lambda key, number, data: data[:-1]
    with pytest.raises(ChecksumMismatch):
        await scene.load(small_options())


async def test_a_missing_object(store, small_options):
    scene = Scene(store, [500, 500])
    del store.objects[scene.entries[1].key]
    with pytest.raises(MissingObject) as failure:
        await scene.load(small_options())
    assert scene.entries[1].key in str(failure.value)


async def test_a_failed_read_cancels_the_others(store, small_options):
    scene = Scene(store, [3000])

    async def before_read(key, number):
        if number == 3:
            raise StoreUnavailable("read: 3 bytes came instead of 256", f"{store.url}/{key}")
        await asyncio.sleep(60)

    store.before_read = before_read
    with pytest.raises(StoreUnavailable, match="3 bytes came instead of 256"):
        await asyncio.wait_for(scene.load(small_options()), 10)
    assert store.requests.now == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_nothing_is_placed_after_a_failed_load_has_ended(store, small_options):
    """A thread that still wrote into the tensors would spoil what is loaded into them next."""
    scene = Scene(store, [512])
    placing, go_on = threading.Event(), threading.Event()
    placed = []

    class Slow(Buffers):
        def place(self, placements, data):
            placing.set()
            go_on.wait(5)
            placed.extend(placements)

    scene.sink = Slow(scene.wants)

    async def before_read(key, number):
        if number == 1:
            while not placing.is_set():
                await asyncio.sleep(0.001)
            asyncio.get_running_loop().call_later(0.05, go_on.set)
            raise StoreUnavailable("read: reset")

    store.before_read = before_read
    with pytest.raises(StoreUnavailable):
        await scene.load(small_options())
    count = len(placed)
    go_on.set()
    await asyncio.sleep(0.02)
    assert len(placed) == count
