"""What every store must do: one class, held against every engine × server pair by its subclasses."""

import asyncio
import gc
import secrets
import time
import weakref

import pytest

from ckpt_cloud.errors import (
    AlreadyExists,
    Damaged,
    NotFound,
    PreconditionFailed,
    RangeNotSatisfiable,
    StoreUnavailable,
)
from ckpt_cloud.stores import ANY, CREATE, AtHand, Replace

MIB = 1 << 20
LIMIT = 64 * MIB
KEYS = [
    "plain",
    "with space",
    "data/0190b5c4f00e7abc8def0123456789ab/0.safetensors",
    "ünï/cödé/層/\U0001f600",
    "100%",
    "a%20b",
    "%2F",
    "c#d",
    "c?d=e&f",
    "plus+plus",
    "quote'\"",
    "tilde~-_.",
    "~",
    "a..b",
    "x.",
    "{[(<^|>)]}",
    "semi;colon:at@",
]


def stream(*buffers):
    async def source():
        for buffer in buffers:
            yield buffer

    return source


async def listed(store, prefix=""):
    return sorted([info.key async for info in store.list(prefix)])


class StoreConformance:
    """Subclasses give the fixture `place`: a `store` at an empty place, and `read`, `write` and `keys` beside it."""

    atomic = True
    """Whether the store looks and writes in one step; else two may win, and nothing of ours could help it."""

    async def test_put_and_get(self, place):
        version = await place.store.put("a/b", b"content")
        assert place.read("a/b") == b"content"

        data, info = await place.store.get("a/b", limit=LIMIT)

        assert data == b"content"
        assert (info.key, info.size, info.version) == ("a/b", 7, version)
        assert version
        assert abs(info.modified_unix_s - time.time()) < 60

    async def test_every_buffer_type_may_be_put(self, place):
        for number, buffer in enumerate((b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4])):
            await place.store.put(f"{number}", buffer)
            assert place.read(f"{number}") == b"abc"

    async def test_reads_what_others_wrote(self, place):
        place.write("from/outside", b"0123456789")
        assert (await place.store.get("from/outside", limit=LIMIT))[0] == b"0123456789"
        assert bytes(await place.store.get_range("from/outside", 2, 5)) == b"234"
        assert await listed(place.store) == ["from/outside"]
        await place.store.delete(["from/outside"])
        assert place.keys() == set()

    async def test_what_is_stored_does_not_change_with_the_buffer(self, place):
        small, big = bytearray(b"small"), bytearray(b"x") * (6 * MIB)
        await place.store.put("small", small)
        await place.store.put_multipart("big", stream(memoryview(big)), part_size=5 * MIB, concurrency=2)
        small[:] = b"other"
        big[:] = b"y" * len(big)
        assert place.read("small") == b"small"
        assert set(place.read("big")) == {ord("x")}

    async def test_an_object_of_no_bytes(self, place):
        await place.store.put("empty", b"")
        assert place.read("empty") == b""
        data, info = await place.store.get("empty", limit=0)
        assert (data, info.size) == (b"", 0)
        assert await listed(place.store) == ["empty"]

    async def test_keys_mean_themselves(self, place):
        for key in KEYS:
            await place.store.put(key, key.encode())
        assert place.keys() == set(KEYS)
        assert await listed(place.store) == sorted(KEYS)
        for key in KEYS:
            assert place.read(key) == (await place.store.get(key, limit=LIMIT))[0] == key.encode()
            assert bytes(await place.store.get_range(key, 0, 1)) == key.encode()[:1]
            memory = bytearray(1)
            await place.store.get_range_into(key, 0, 1, [memoryview(memory)])
            assert memory == key.encode()[:1]
        await place.store.delete(KEYS[1:])
        assert place.keys() == {KEYS[0]}

    async def test_the_limit_of_a_get(self, place):
        place.write("k", b"12345")
        assert (await place.store.get("k", limit=5))[0] == b"12345"
        with pytest.raises(Damaged, match="5 bytes, more than 4"):
            await place.store.get("k", limit=4)

    async def test_the_head_of_an_object(self, place):
        version = await place.store.put("a/b", b"12345")
        info = await place.store.head("a/b")
        assert (info.key, info.size, info.version) == ("a/b", 5, version)

    async def test_nothing_there(self, place):
        requests = [
            lambda: place.store.head("no/such"),
            lambda: place.store.get("no/such", limit=LIMIT),
            lambda: place.store.get_range("no/such", 0, 5),
        ]
        for request in requests:
            with pytest.raises(NotFound) as missing:
                await request()
            assert missing.value.url == f"{place.store.url}/no/such"
            assert isinstance(missing.value, FileNotFoundError)

    async def test_ranges(self, place):
        content = bytes(range(256)) * 4
        place.write("k", content)
        for start, end in ((0, 1), (0, 1024), (1, 1023), (500, 501), (1023, 1024)):
            got = await place.store.get_range("k", start, end)
            assert isinstance(got, memoryview)
            assert bytes(got) == content[start:end]

    async def test_a_range_beyond_the_end(self, place):
        place.write("k", b"0123456789")
        for start, end in ((5, 11), (0, 999), (10, 12), (20, 25)):
            with pytest.raises(RangeNotSatisfiable, match="has 10 bytes") as short:
                await place.store.get_range("k", start, end)
            assert short.value.url == f"{place.store.url}/k"

    async def test_a_read_of_one_version(self, place):
        old = await place.store.put("k", b"old")
        assert bytes(await place.store.get_range("k", 0, 3, old)) == b"old"
        new = await place.store.put("k", b"new")
        assert bytes(await place.store.get_range("k", 0, 3, new)) == b"new"
        with pytest.raises(PreconditionFailed):
            await place.store.get_range("k", 0, 3, old)

    @pytest.mark.parametrize("sizes", [[1024], [1, 0, 7, 500, 3, 0], [0, 0, 1023, 1], [0], []], ids=str)
    async def test_ranges_into_memory(self, place, sizes):
        content = bytes(range(256)) * 5
        place.write("k", content)
        memory = bytearray(b"-" * 2000)
        views, at = [], 100
        for size in sizes:
            views.append(memoryview(memory)[at : at + size])
            at += size

        await place.store.get_range_into("k", 50, 50 + at - 100, views)

        assert memory == b"-" * 100 + content[50 : 50 + at - 100] + b"-" * (2000 - at), "and nothing beside it"

    async def test_an_empty_range(self, place):
        place.write("k", b"0123456789")
        for at in (0, 5, 10, 99):
            assert bytes(await place.store.get_range("k", at, at)) == b""

    async def test_ranges_into_memory_that_cannot_be(self, place):
        place.write("k", b"0123456789")
        with pytest.raises(NotFound) as missing:
            await place.store.get_range_into("no/such", 0, 5, [memoryview(bytearray(5))])
        assert missing.value.url == f"{place.store.url}/no/such"
        for start, end in ((5, 11), (0, 999), (10, 12)):
            with pytest.raises(RangeNotSatisfiable, match="has 10 bytes"):
                await place.store.get_range_into("k", start, end, [memoryview(bytearray(end - start))])

    async def test_one_version_into_memory(self, place):
        old = await place.store.put("k", b"old")
        memory = bytearray(3)
        await place.store.get_range_into("k", 0, 3, [memoryview(memory)], old)
        assert memory == b"old"
        await place.store.put("k", b"new")
        with pytest.raises(PreconditionFailed):
            await place.store.get_range_into("k", 0, 3, [memoryview(memory)], old)

    async def test_list_by_whole_segments(self, place):
        for key in ("a", "ab", "a/1", "a/b/2", "a b/3", "c/4"):
            place.write(key, b"x") if not place.files or key != "a" else None
        expected = {"ab", "a/1", "a/b/2", "a b/3", "c/4"} | (set() if place.files else {"a"})
        assert await listed(place.store) == sorted(expected)
        assert await listed(place.store, "a") == ["a/1", "a/b/2"]
        assert await listed(place.store, "a/b") == ["a/b/2"]
        assert await listed(place.store, "nothing") == []

    async def test_list_says_size_and_version(self, place):
        version = await place.store.put("k", b"12345")
        (info,) = [info async for info in place.store.list()]
        assert (info.key, info.size, info.version) == ("k", 5, version)
        assert abs(info.modified_unix_s - time.time()) < 60

    async def test_list_of_many(self, place):
        names = [f"many/{number:04}" for number in range(1100)]
        await asyncio.gather(*(place.store.put(name, b"") for name in names)) if place.fast else None
        assert await listed(place.store, "many") == (names if place.fast else [])

    async def test_list_children(self, place):
        for key in ("COMMIT", "step-2/COMMIT", "step-10/data/x/1", "step-1 ü/COMMIT", "step-10/COMMIT"):
            place.write(key, b"x")
        assert await place.store.list_children() == ["step-1 ü", "step-10", "step-2"]
        assert await place.store.list_children("step-10") == ["data"]
        assert await place.store.list_children("step-2") == []
        assert await place.store.list_children("nothing/here") == []

    async def test_delete(self, place):
        for key in ("a/1", "a/2", "b"):
            place.write(key, b"x")
        await place.store.delete(["a/1", "never/was", "b"])
        assert place.keys() == {"a/2"}
        await place.store.delete(["a/1"])
        await place.store.delete([])
        assert place.keys() == {"a/2"}
        await place.store.put("a/1", b"again")
        assert place.read("a/1") == b"again"

    async def test_put_over_an_object(self, place):
        first = await place.store.put("k", b"first")
        second = await place.store.put("k", b"second", ANY)
        assert place.read("k") == b"second"
        assert first != second

    async def test_create_only(self, place):
        version = await place.store.put("k", b"first", CREATE)
        with pytest.raises(AlreadyExists) as refused:
            await place.store.put("k", b"second", CREATE)
        assert isinstance(refused.value, FileExistsError)
        assert place.read("k") == b"first"
        assert (await place.store.get("k", limit=LIMIT))[1].version == version
        await place.store.delete(["k"])
        await place.store.put("k", b"third", CREATE)

    async def test_replace_exactly_one_version(self, place):
        first = await place.store.put("k", b"first", CREATE)
        second = await place.store.put("k", b"second", Replace(first))
        assert place.read("k") == b"second"
        with pytest.raises(PreconditionFailed):
            await place.store.put("k", b"third", Replace(first))
        assert place.read("k") == b"second"
        read_version = (await place.store.get("k", limit=LIMIT))[1].version
        assert read_version == second
        await place.store.put("k", b"third", Replace(read_version))
        assert place.read("k") == b"third"

    async def test_replace_what_others_wrote(self, place):
        place.write("k", b"theirs")
        version = (await place.store.get("k", limit=LIMIT))[1].version
        place.write("k", b"theirs, changed")
        with pytest.raises(PreconditionFailed):
            await place.store.put("k", b"ours", Replace(version))
        assert place.read("k") == b"theirs, changed"

    async def test_replace_what_is_gone(self, place):
        with pytest.raises(PreconditionFailed):
            await place.store.put("never/was", b"x", Replace('"00000000000000000000000000000000"'))
        version = await place.store.put("k", b"first")
        await place.store.delete(["k"])
        with pytest.raises(PreconditionFailed):
            await place.store.put("k", b"second", Replace(version))
        assert place.keys() == set()

    async def race(self, place, key, condition):
        """Eight puts at once; who won, and that the others were told."""
        answers = await asyncio.gather(
            *(place.store.put(key, f"writer {number}".encode(), condition) for number in range(8)),
            return_exceptions=True,
        )
        winners = [number for number, answer in enumerate(answers) if not isinstance(answer, Exception)]
        lost = [answer for answer in answers if isinstance(answer, Exception)]
        # A store may also say that a write of another was in progress, which decides nothing yet.
        refusals = AlreadyExists if condition is CREATE else PreconditionFailed
        assert all(isinstance(error, refusals | StoreUnavailable) for error in lost), lost
        assert len(winners) == 1 or (winners and not self.atomic)
        assert place.read(key) in [f"writer {winner}".encode() for winner in winners]

    async def test_one_of_eight_creates_wins(self, place):
        for number in range(10 if place.fast else 1):
            await self.race(place, f"race-{number}", CREATE)

    async def test_one_of_eight_replacements_wins(self, place):
        for number in range(10 if place.fast else 1):
            version = await place.store.put(f"race-{number}", b"before")
            await self.race(place, f"race-{number}", Replace(version))

    @pytest.mark.parametrize(
        "sizes",
        [
            pytest.param([], id="no-buffers"),
            pytest.param([0, 0], id="empty-buffers"),
            pytest.param([1], id="one-byte"),
            pytest.param([5 * MIB], id="exactly-a-part"),
            pytest.param([5 * MIB + 1], id="a-part-and-a-byte"),
            pytest.param([1, 0, 7, 5 * MIB - 1, 3, 4_999_999, 0, 13], id="odd-sizes"),
            pytest.param([12 * MIB], id="one-buffer-of-many-parts"),
        ],
    )
    async def test_multipart(self, place, sizes):
        content = secrets.token_bytes(1 << 16) * (-(-sum(sizes) >> 16) + 1)
        buffers, at = [], 0
        for number, size in enumerate(sizes):
            kind = (bytes, bytearray, memoryview)[number % 3]
            buffers.append(kind(content[at : at + size]))
            at += size

        version = await place.store.put_multipart("big", stream(*buffers), part_size=5 * MIB, concurrency=3)

        assert place.read("big") == content[:at]
        data, info = await place.store.get("big", limit=LIMIT)
        assert data == content[:at]
        assert (info.size, info.version) == (at, version)
        assert place.unfinished() == []

    async def test_multipart_over_an_object(self, place):
        place.write("big", b"old")
        await place.store.put_multipart("big", stream(b"x" * (6 * MIB)), part_size=5 * MIB, concurrency=2)
        assert len(place.read("big")) == 6 * MIB

    async def test_multipart_lets_go_of_what_is_stored(self, place):
        live, peak = 0, 0

        class Buffer(bytearray):
            pass

        def gone():
            nonlocal live
            live -= 1

        async def parts():
            nonlocal live, peak
            for _ in range(8):
                # Slow enough for a store that is done with a part to let go of it.
                while live == 3:
                    await asyncio.sleep(0.01)
                buffer = Buffer(5 * MIB)
                weakref.finalize(buffer, gone)
                live += 1
                peak = max(peak, live)
                view = memoryview(buffer)
                del buffer
                yield view
                del view

        await place.store.put_multipart("big", parts, part_size=5 * MIB, concurrency=2)
        assert len(place.read("big")) == 40 * MIB
        assert peak <= 3
        gc.collect()
        assert live == 0

    async def test_multipart_with_one_request_in_flight(self, place):
        """What a store that throttles hard brings a save down to."""
        if pace := getattr(place.store, "pace", None):
            pace.limit = 1
        pieces = [secrets.token_bytes(3 * MIB) for _ in range(7)]
        upload = place.store.put_multipart("big", stream(*pieces), part_size=5 * MIB, concurrency=4)
        await asyncio.wait_for(upload, 120)
        assert place.read("big") == b"".join(pieces)

    async def test_multipart_of_buffers_that_are_at_hand(self, place):
        pieces = [memoryview(secrets.token_bytes(size)) for size in (1, 3 * MIB, 5 * MIB - 1, 7 * MIB, 100)]
        await place.store.put_multipart("big", lambda: AtHand(pieces), part_size=5 * MIB, concurrency=3)
        assert place.read("big") == b"".join(pieces)

    @pytest.mark.parametrize("after", [0, 1, 11 * MIB], ids=["at-once", "early", "late"])
    async def test_a_failing_stream_leaves_nothing(self, place, after):
        place.write("other", b"x")

        async def fails():
            if after:
                yield b"x" * after
            raise KeyError("the source gave up")

        with pytest.raises(KeyError, match="the source gave up"):
            await place.store.put_multipart("big", fails, part_size=5 * MIB, concurrency=2)

        assert place.keys() == {"other"}
        assert place.unfinished() == []

    async def test_a_failing_stream_leaves_the_object_that_was_there(self, place):
        place.write("big", b"old")

        async def fails():
            yield b"x" * (6 * MIB)
            raise KeyError("the source gave up")

        with pytest.raises(KeyError):
            await place.store.put_multipart("big", fails, part_size=5 * MIB, concurrency=2)
        assert place.read("big") == b"old"

    async def test_a_cancelled_upload_leaves_nothing(self, place):
        waiting = asyncio.Event()

        async def stalls():
            yield b"x" * (6 * MIB)
            waiting.set()
            await asyncio.sleep(60)

        upload = asyncio.create_task(place.store.put_multipart("big", stalls, part_size=5 * MIB, concurrency=2))
        await waiting.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload

        assert place.keys() == set()
        deadline = time.monotonic() + 30
        while place.unfinished() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert place.unfinished() == []

    async def test_names_itself(self, place):
        assert place.store.url == place.url
        assert place.url in repr(place.store)

    async def test_keeps_conditions(self, place):
        capabilities = await place.store.capabilities()
        assert capabilities.conditional_create
        assert capabilities.conditional_replace
        assert place.keys() == set()
