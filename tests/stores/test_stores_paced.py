"""What the wrapper adds to an engine that sends each request once: retries, a deadline and a pace, but for commits."""

import asyncio
import inspect
from types import SimpleNamespace

import pytest

from ckpt_cloud.errors import (
    AlreadyExists,
    NotFound,
    PermissionDenied,
    StoreUnavailable,
    Throttled,
)
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import ANY, CREATE, AtHand, ObjectStore, Replace
from ckpt_cloud.stores.paced import FailingFor, PacedStore

pytestmark = pytest.mark.timeout(30)

QUICK = RetryOptions(max_retries=6, max_backoff_s=0.001)


class Scripted:
    """A store whose every call takes the next of `answers`: an error is raised, anything else is given back."""

    url = "scripted://bucket/run"
    max_parts = 10_000
    max_part_bytes = 5 << 30

    def __init__(self, *answers):
        self.answers = list(answers)
        self.calls = []
        self.taken = []

    async def _next(self, *call):
        self.calls.append(call)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def put(self, key, data, condition=ANY):
        return await self._next("put", key, condition)

    async def get(self, key, *, limit):
        return await self._next("get", key)

    async def get_range(self, key, start, end, version=None):
        return await self._next("get_range", key, version)

    async def list_children(self, prefix=""):
        return await self._next("list_children", prefix)

    async def delete(self, keys):
        return await self._next("delete", tuple(keys))

    async def list_uploads(self, prefix=""):
        return await self._next("list_uploads", prefix)

    async def abort_upload(self, upload):
        return await self._next("abort_upload", upload)

    async def capabilities(self):
        return await self._next("capabilities")

    async def put_multipart(self, key, source, *, part_size, concurrency):
        self.taken.append([])
        async for buffer in source():
            self.taken[-1].append(bytes(buffer))
            # Held while the next is waited for, it would keep its part's turn.
            del buffer
        return await self._next("put_multipart", key)


def paced(store, retry=QUICK, **how):
    return PacedStore(store, StoreOptions(retry=retry), **how)


def test_it_forwards_all_of_the_protocol():
    methods = {
        name for name, value in vars(ObjectStore).items() if inspect.isfunction(value) and not name.startswith("_")
    }
    assert methods <= set(vars(PacedStore))
    assert set(ObjectStore.__annotations__) <= set(vars(paced(Scripted())))


REQUESTS = {
    "put": lambda store: store.put("k", b"x"),
    "get": lambda store: store.get("k", limit=9),
    "get_range": lambda store: store.get_range("k", 0, 9, "v"),
    "list_children": lambda store: store.list_children("p"),
    "delete": lambda store: store.delete(["k"]),
    "list_uploads": lambda store: store.list_uploads("p"),
    "abort_upload": lambda store: store.abort_upload("u"),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("error", [StoreUnavailable, Throttled])
async def test_what_may_be_sent_again_is(name, error):
    below = Scripted(error("1"), error("2"), "answer")
    answer = await REQUESTS[name](paced(below))
    assert answer in ("answer", None)
    assert [call[0] for call in below.calls] == [name] * 3
    assert len(set(below.calls)) == 1


@pytest.mark.parametrize("condition", [CREATE, Replace("v")])
@pytest.mark.parametrize("error", [StoreUnavailable, Throttled])
async def test_a_conditional_write_is_sent_once(condition, error):
    below = Scripted(error("1"), "never asked for")
    with pytest.raises(error):
        await paced(below).put("COMMIT", b"x", condition)
    assert below.calls == [("put", "COMMIT", condition)]


@pytest.mark.parametrize("error", [NotFound, PermissionDenied, AlreadyExists, ValueError])
async def test_what_would_end_the_same_is_not_sent_again(error):
    below = Scripted(error("no"))
    with pytest.raises(error):
        await paced(below).get("k", limit=9)
    assert len(below.calls) == 1


async def test_retries_end():
    below = Scripted(*[StoreUnavailable(f"{number}") for number in range(20)])
    with pytest.raises(StoreUnavailable, match="6"):
        await paced(below).get("k", limit=9)
    assert len(below.calls) == 7
    below = Scripted(StoreUnavailable("at once"))
    with pytest.raises(StoreUnavailable):
        await paced(below, RetryOptions(max_retries=0)).get("k", limit=9)


def test_no_pause_ends_after_the_deadline():
    """Counted from the first failure, since a large object may be under way for longer than that."""

    def stops(ended, pause):
        return deadline(SimpleNamespace(outcome_timestamp=ended, upcoming_sleep=pause))

    deadline = FailingFor(5)
    assert not stops(1000, 4.9)
    assert not stops(1004, 0.9)
    assert stops(1004, 1.1)
    assert stops(1005, 0)
    assert FailingFor(5)(SimpleNamespace(outcome_timestamp=0, upcoming_sleep=5))


@pytest.mark.parametrize("first_contact", [False, True])
async def test_the_first_contact_is_given_up_sooner(first_contact):
    below = Scripted(*[StoreUnavailable("down")] * 50)
    retry = RetryOptions(max_retries=49, deadline_s=60, first_contact_s=1e-9, max_backoff_s=0.001)
    with pytest.raises(StoreUnavailable):
        await paced(below, retry, first_contact=first_contact).get("k", limit=9)
    assert len(below.calls) == (1 if first_contact else 50)


async def test_an_upload_begins_again_with_the_same_bytes():
    below = Scripted(StoreUnavailable("1"), Throttled("2"), "version")
    begun = 0

    def source():
        async def buffers():
            for piece in (b"abc", b"", bytearray(b"defgh"), memoryview(b"ij")):
                yield piece

        nonlocal begun
        begun += 1
        return buffers()

    assert await paced(below).put_multipart("k", source, part_size=4, concurrency=2) == "version"
    assert begun == 3
    assert {b"".join(taken) for taken in below.taken} == {b"abcdefghij"}
    assert [list(map(len, taken)) for taken in below.taken] == [[3, 1, 4, 2]] * 3, "cut where parts end"


async def test_what_the_source_raises_is_not_tried_again():
    below = Scripted()

    async def broken():
        yield b"x"
        raise KeyError("the source gave up")

    with pytest.raises(KeyError, match="gave up"):
        await paced(below).put_multipart("k", broken, part_size=4, concurrency=2)
    assert below.calls == []


class Concurrent(Scripted):
    """Holds every read until `let` allows; counts how many are held at once."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.peaks = []
        self.limit = 4

    async def get_range(self, key, start, end, version=None):
        self.now += 1
        self.peaks.append(self.now)
        try:
            for _ in range(5):
                await asyncio.sleep(0)
            if self.now > self.limit:
                raise Throttled("slow down")
            return memoryview(b"x")
        finally:
            self.now -= 1


async def test_fewer_reads_fly_while_the_store_throttles_and_more_later():
    below = Concurrent()
    store = paced(below, RetryOptions(max_retries=1000, max_backoff_s=0.0001))

    async def many(count):
        below.peaks.clear()
        await asyncio.gather(*(store.get_range("k", 0, 1) for _ in range(count)))
        return max(below.peaks)

    assert await many(32) == 32
    # Once it has learned, it stays within one more than what the store takes.
    await many(200)
    assert await many(200) <= below.limit + 2
    below.limit = 16
    await many(400)
    assert await many(200) >= 8


class Parts(Scripted):
    """Takes buffers as fast as they come and lets go of them when told to."""

    def __init__(self):
        super().__init__()
        self.held = []

    async def put_multipart(self, key, source, *, part_size, concurrency):
        async for buffer in source():
            self.held.append(buffer)
            del buffer
        return "version"


async def test_parts_have_a_turn_until_their_buffers_are_let_go():
    below = Parts()
    store = paced(below)
    # Throttled once, with two in flight: one at a time from now on.
    entered = [await store.pace.enter() for _ in range(2)]
    store.pace.throttled(entered[0])
    store.pace.leave()
    store.pace.leave()
    assert store.pace.limit == 1

    def source():
        async def buffers():
            for _ in range(4):
                yield b"12"

        return buffers()

    upload = asyncio.ensure_future(store.put_multipart("k", source, part_size=4, concurrency=9))
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(below.held) == 2, "one part of two buffers"
    below.held.clear()
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(below.held) == 2, "the next"
    below.held.clear()
    assert await upload == "version"
    below.held.clear()
    for _ in range(5):
        await asyncio.sleep(0)
    assert store.pace.in_flight == 0
    assert store.pace.limit > 1


async def test_buffers_at_hand_go_as_they_are_until_the_store_throttles():
    taken = []

    class Below(Scripted):
        async def put_multipart(self, key, source, *, part_size, concurrency):
            buffers = source()
            taken.append((type(buffers) is AtHand, store.pace.in_flight))
            if len(taken) == 1:
                raise Throttled("upload: SlowDown", "s3://b/k")
            assert [bytes(buffer) async for buffer in buffers] == [b"12", b"34"]
            return "version"

    store = paced(Below())
    buffers = [memoryview(b"12"), memoryview(b"34")]
    assert await store.put_multipart("k", lambda: AtHand(buffers), part_size=4, concurrency=6) == "version"
    assert taken[0] == (True, 6)
    assert taken[1][0] is False, "now each part waits for its turn"
    assert store.pace.limit == 3


async def test_buffers_at_hand_do_not_hold_up_a_store_that_throttles():
    """Each part has its turn until it is let go, though the buffers stay."""

    class Below(Scripted):
        async def put_multipart(self, key, source, *, part_size, concurrency):
            whole = bytearray()
            async for buffer in source():
                whole += buffer
                del buffer
            return bytes(whole)

    store = paced(Below())
    store.pace.limit = 1
    buffers = [memoryview(bytes([at]) * 4) for at in range(20)]
    stored = await store.put_multipart("k", lambda: AtHand(buffers), part_size=4, concurrency=6)
    assert stored == b"".join(buffers)
