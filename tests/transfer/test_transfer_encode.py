"""Coded uploads: every byte comes back, in packs of a bounded size, within the memory budget, or not at all."""

import asyncio
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckpt_cloud.errors import StoreUnavailable
from ckpt_cloud.events import Recorder
from ckpt_cloud.format.codec import Zstd, fault, undone
from ckpt_cloud.format.layout import pack_key
from ckpt_cloud.format.pack import PackEntry, parse_header
from ckpt_cloud.format.sealing import BLOCK, MasterKey, sealed_size
from ckpt_cloud.transfer import encode
from ckpt_cloud.transfer.encode import upload_coded
from ckpt_cloud.transfer.staging import plain_memory

ID = "0190b5c4f00e7abc8def0123456789ab"

pytestmark = pytest.mark.timeout(60)


class Memory:
    """A source of byte strings; those in `views` may be handed over as they are, the others must be copied."""

    allocate = staticmethod(plain_memory)

    def __init__(self, values, views=()):
        self.values = values
        self.views = set(views)
        self.released = []

    def view(self, entry):
        return memoryview(self.values[entry]) if entry in self.views else None

    def copy(self, segments, into):
        assert sum(s.end - s.start for s in segments) == len(into)
        into[:] = b"".join(self.values[s.entry][s.start : s.end] for s in segments)

    def release(self, entry):
        self.released.append(entry)


class Deflate:
    """A transform: its output comes in pieces of odd sizes."""

    codec = ("deflate",)
    frame = 0

    def stream(self, write):
        return _Deflating(write)


class _Deflating:
    def __init__(self, write):
        self._write, self._stream = write, zlib.compressobj(1)

    def write(self, data):
        self._write(self._stream.compress(bytes(data)))

    def close(self):
        rest = self._stream.flush()
        self._write(rest[:7])
        self._write(rest[7:])


async def coded(store, source, coder, options, recorder=None, seal=None):
    entries = [
        PackEntry(f"w{number}", "uint8", (len(value),), (0,), (len(value),), len(value))
        for number, value in enumerate(source.values)
    ]
    keys = []

    def new_key(number):
        assert number == len(keys)
        keys.append(pack_key(ID, number))
        return keys[-1]

    recorder = recorder or Recorder()
    expected = []
    places, objects = await upload_coded(
        store,
        source,
        entries,
        coder,
        attempt=ID,
        new_key=new_key,
        options=options,
        recorder=recorder,
        expect=expected.append,
        seal=seal,
    )
    assert [entry.key for entry in objects] == keys
    assert expected[-1:] == ([sum(map(len, store.objects.values()))] if keys else [])
    return places, objects


def whole(store, objects, place):
    return b"".join(store.objects[objects[n].key][start : start + nbytes] for n, start, nbytes in place.extents)


def check(store, source, places, objects):
    """All values come back, and every pack is a safetensors file that says what is in it."""
    for value, place in zip(source.values, places, strict=True):
        stored = whole(store, objects, place)
        if place.frame:
            assert fault(place, len(value)) is None
            assert b"".join(undone(memoryview(stored), tuple(place.frames(len(value))))) == value
        else:
            assert zlib.decompress(stored) == value
    for entry in objects:
        data = store.objects[entry.key]
        assert len(data) == entry.size
        begin, table = parse_header(data)
        assert begin + max(each["data_offsets"][1] for n, each in table.items() if n != "__metadata__") == len(data)


values = st.lists(
    st.binary(min_size=1, max_size=700)
    | st.builds(lambda byte, n: byte * n, st.binary(min_size=1, max_size=3), st.integers(1, 900)),
    min_size=1,
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values, st.integers(128, 4000), st.sampled_from([16, 100, Deflate()]), st.data())
def test_everything_comes_back(new_store, small_options, given_values, budget, coder, data):
    views = data.draw(st.sets(st.integers(0, len(given_values) - 1)))
    source, store = Memory(given_values, views), new_store()
    coder = Zstd(coder, 1) if isinstance(coder, int) else coder
    options = small_options(memory_budget=budget, part_size=64)
    options.pack_size = 1000
    store.max_parts, store.max_part_bytes = 10_000, 1 << 30
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "_PIECE", 50)
        patch.setattr(encode, "UNIT_BYTES", 200)
        places, objects = asyncio.run(coded(store, source, coder, options))
    check(store, source, places, objects)
    assert sorted(source.released) == list(range(len(given_values)))


@pytest.fixture
def limits(small_options, store):
    """Packs of 50,000 bytes at most."""
    store.max_parts, store.max_part_bytes = 10_000, 1 << 30
    options = small_options(memory_budget=400_000, part_size=20_000, max_requests=4)
    options.pack_size = 100_000
    return options


def random_bytes(size, seed=1):
    import random

    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize("coder", [Zstd(1000, 1), Deflate()], ids=["frames", "stream"])
async def test_a_large_entry_is_spread_over_packs_of_a_bounded_size(store, limits, coder, monkeypatch):
    monkeypatch.setattr(encode, "_PIECE", 10_000)
    monkeypatch.setattr(encode, "UNIT_BYTES", 10_000)
    source = Memory([random_bytes(500), random_bytes(600_000), random_bytes(500)], views=[1])
    places, objects = await coded(store, source, coder, limits)
    check(store, source, places, objects)
    assert len(places[1].extents) > 10
    assert max(entry.size for entry in objects) < 60_000


@pytest.mark.parametrize("coder", [Zstd(1000, 1), Deflate()], ids=["frames", "stream"])
async def test_memory_stays_within_the_budget(store, limits, coder, monkeypatch):
    """Of what was coded and is not stored: held where the store takes its time."""
    monkeypatch.setattr(encode, "_PIECE", 10_000)
    monkeypatch.setattr(encode, "UNIT_BYTES", 10_000)
    budgets = []
    made = encode.Budget

    def noted(total):
        budgets.append(made(total))
        return budgets[-1]

    monkeypatch.setattr(encode, "Budget", noted)

    async def slow(key, number):
        await asyncio.sleep(0.001)

    store.before_part = slow
    source = Memory([random_bytes(30_000, n) for n in range(40)] + [random_bytes(900_000)])
    places, objects = await coded(store, source, coder, limits)
    check(store, source, places, objects)
    (budget,) = budgets
    assert budget.peak_bytes <= limits.memory_budget // 2
    assert budget.used_bytes == 0
    assert store.requests.peak <= limits.max_requests


@pytest.mark.parametrize("coder", [Zstd(1000, 1), Deflate()], ids=["frames", "stream"])
async def test_sealed_packs_stay_within_their_share(store, coder, small_options, monkeypatch):
    """A quarter of the budget for what is sealed, or one part where that is more; in parts of whole blocks."""
    monkeypatch.setattr(encode, "plain_memory", store.allocate)
    store.max_parts, store.max_part_bytes = 10_000, 1 << 30
    options = small_options(memory_budget=8 << 20, part_size=2 * BLOCK, max_requests=6)
    options.pack_size = 1 << 20
    key = MasterKey(bytes(32))

    async def slow(key, number):
        await asyncio.sleep(0.001)

    store.before_part = slow
    source = Memory([random_bytes(300_000, n) for n in range(20)])
    places, objects = await coded(store, source, coder, options, seal=key.of_object)
    assert 0 < store.staged_bytes.peak <= options.memory_budget // 4
    assert store.staged_bytes.now == 0
    for entry in objects:
        stored = store.objects[entry.key]
        assert len(stored) == sealed_size(entry.size)
        assert set(store.parts[entry.key][:-1]) == {sealed_size(2 * BLOCK)}
        opened = memoryview(bytearray(entry.size))
        assert not key.of_object(entry.key).open(memoryview(stored), [opened], first_block=0, last=True)
        store.objects[entry.key] = bytes(opened)
    check(store, source, places, objects)


async def test_coding_goes_on_while_packs_are_under_way(store, limits, monkeypatch):
    monkeypatch.setattr(encode, "UNIT_BYTES", 10_000)
    going_on = asyncio.Event()
    coder, loop = Zstd(1000, 1), asyncio.get_running_loop()

    class Noting:
        codec, frame = coder.codec, coder.frame
        calls = 0

        def code(self, plain):
            Noting.calls += 1
            if Noting.calls > 10:
                loop.call_soon_threadsafe(going_on.set)
            return coder.code(plain)

    async def waits(key, number):
        await going_on.wait()

    store.before_part = waits
    source = Memory([random_bytes(150_000)])
    places, objects = await coded(store, source, Noting(), limits)
    check(store, source, places, objects)


@pytest.mark.parametrize("coder", [Zstd(1000, 1), Deflate()], ids=["frames", "stream"])
@pytest.mark.parametrize("nth", [0, 3])
async def test_a_failed_upload_fails_all_and_ends(store, limits, coder, nth, monkeypatch):
    monkeypatch.setattr(encode, "_PIECE", 10_000)
    monkeypatch.setattr(encode, "UNIT_BYTES", 10_000)
    count = 0

    async def fails(key, number):
        nonlocal count
        count += 1
        if count > nth:
            raise StoreUnavailable("no answer", "fake://")

    store.before_part = fails
    with pytest.raises(StoreUnavailable):
        await coded(store, Memory([random_bytes(900_000)] * 3), coder, limits)
    assert store.requests.now == 0


@pytest.mark.parametrize("coder", [Zstd(1000, 1), Deflate()], ids=["frames", "stream"])
async def test_cancelled_it_ends(store, limits, coder, monkeypatch):
    monkeypatch.setattr(encode, "_PIECE", 10_000)
    monkeypatch.setattr(encode, "UNIT_BYTES", 10_000)
    begun = asyncio.Event()

    async def hangs(key, number):
        begun.set()
        await asyncio.Event().wait()

    store.before_part = hangs
    task = asyncio.create_task(coded(store, Memory([random_bytes(900_000)] * 3), coder, limits))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.requests.now == 0


async def test_an_error_of_the_coder_comes_out(store, limits):
    class Broken:
        codec, frame = ("x",), 0

        def stream(self, write):
            raise RuntimeError("no such key")

    for size in (10, 900_000):
        with pytest.raises(RuntimeError, match="no such key"):
            await coded(store, Memory([random_bytes(size)]), Broken(), limits)
