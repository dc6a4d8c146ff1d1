"""A store of the tests' own, so that what moves can be counted, slowed, broken and cut."""

import asyncio
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from ckpt_cloud.errors import NotFound
from ckpt_cloud.events import Recorder
from ckpt_cloud.stores import ANY


class Gauge:
    """A number that goes up and down, and its peak."""

    def __init__(self):
        self.now = self.peak = 0

    def add(self, amount):
        self.now += amount
        self.peak = max(self.peak, self.now)


class StagedMemory(np.ndarray):
    """What a source of these tests allocates, so that staged buffers can be told from views."""


class Pieces(list):
    """Slices that make up a part, and the buffers that they come from, let go once the part is stored."""

    def __init__(self):
        super().__init__()
        self.origins = []


class Fetched(bytearray):
    """Bytes of a ranged read whose end can be seen."""


class FakeStore:
    """An `ObjectStore` in memory.

    `before_part` and `before_read` are awaited for every request with its key and number; what they raise is the
    request's answer. `on_read` may replace what a read gives.
    """

    url = "fake://bucket/run"

    def __init__(self):
        self.objects = {}
        self.requests = Gauge()
        self.uploads = Gauge()
        self.staged_bytes = Gauge()
        self.fetched_bytes = Gauge()
        self.reads = []
        self.allocated = []
        self.parts = {}
        self.begun = []
        self.aborted = []
        self.before_part = self.before_read = self._a_few_turns
        self.on_read = lambda key, number, data: data
        self._known = set()

    def allocate(self, size):
        self.allocated.append(size)
        return np.empty(size, dtype=np.uint8).view(StagedMemory)

    async def put(self, key, data, condition=ANY):
        self._see(data)
        self.begun.append(key)
        self.uploads.add(1)
        try:
            await self._part(key, 0, [data])
        except BaseException:
            self.aborted.append(key)
            raise
        finally:
            self.uploads.add(-1)
        self.objects[key] = bytes(data)
        return f"v-{key}"

    async def put_multipart(self, key, source, *, part_size, concurrency):
        gate = asyncio.Semaphore(concurrency)
        done = {}
        self.begun.append(key)
        self.uploads.add(1)

        async def send(number, pieces):
            try:
                await self._part(key, number, pieces)
                done[number] = b"".join(pieces)
            finally:
                gate.release()

        try:
            async with asyncio.TaskGroup() as group:
                number = 0
                async for pieces in self._cut(source(), part_size):
                    await gate.acquire()
                    group.create_task(send(number, pieces))
                    del pieces
                    number += 1
        except BaseException as error:
            self.aborted.append(key)
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        finally:
            self.uploads.add(-1)
        self.parts[key] = [len(done[number]) for number in range(len(done))]
        self.objects[key] = b"".join(done[number] for number in range(len(done)))
        return f"v-{key}"

    async def get_range(self, key, start, end, version=None):
        number = len(self.reads)
        self.reads.append((key, start, end))
        self.requests.add(1)
        try:
            await self.before_read(key, number)
        finally:
            self.requests.add(-1)
        if key not in self.objects:
            raise NotFound("read: no such object", f"{self.url}/{key}")
        data = Fetched(self.on_read(key, number, self.objects[key][start:end]))
        self.fetched_bytes.add(len(data))
        weakref.finalize(data, self.fetched_bytes.add, -len(data))
        return memoryview(data)

    async def get_range_into(self, key, start, end, into, version=None):
        data = await self.get_range(key, start, end, version)
        for view in into:
            view[: len(data)] = data[: len(view)]
            data = data[len(view) :]

    async def _part(self, key, number, pieces):
        self.requests.add(1)
        try:
            await self.before_part(key, number)
        finally:
            self.requests.add(-1)

    async def _cut(self, buffers, part_size):
        """Lists of pieces, `part_size` bytes in each, without a copy and without keeping hold of one."""
        pieces, room = Pieces(), part_size
        async for buffer in buffers:
            self._see(buffer)
            view, origin = memoryview(buffer), [buffer]
            del buffer
            while view:
                pieces.append(view[:room])
                pieces.origins += origin
                room -= len(pieces[-1])
                view = view[len(pieces[-1]) :]
                if room == 0:
                    full, pieces, room = [pieces], Pieces(), part_size
                    if not len(view):
                        view = b""
                        origin.clear()
                    yield full.pop()
            del view, origin
        if pieces:
            yield pieces

    def _see(self, buffer):
        owner = memoryview(buffer).obj
        if isinstance(owner, StagedMemory) and id(owner) not in self._known:
            self._known.add(id(owner))
            self.staged_bytes.add(len(owner))
            weakref.finalize(owner, self._gone, id(owner), len(owner))

    def _gone(self, number, size):
        self._known.discard(number)
        self.staged_bytes.add(-size)

    @staticmethod
    async def _a_few_turns(key, number):
        for _ in range(3):
            await asyncio.sleep(0)


@pytest.fixture
def new_store():
    """Makes stores; a property test needs one for each example."""
    return FakeStore


@pytest.fixture
def store():
    return FakeStore()


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def small_options():
    """Transfer options below what users may set, so that a few kilobytes go through every branch."""

    def make(*, memory_budget=4000, max_requests=8, block_size=64, part_size=500, range_size=256):
        return SimpleNamespace(
            memory_budget=memory_budget,
            max_requests=max_requests,
            block_size=block_size,
            part_size=part_size,
            range_size=range_size,
            block_digests=False,
        )

    return make
