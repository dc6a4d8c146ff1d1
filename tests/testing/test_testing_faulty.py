"""Faults happen to exactly the operations that were named; without rules a `FaultyStore` is the store itself."""

import asyncio
import inspect
import pickle
import secrets
import subprocess
import sys
import threading
from types import SimpleNamespace

import obstore
import pytest

from ckpt_cloud import testing
from ckpt_cloud.errors import (
    AlreadyExists,
    InvalidOption,
    NotFound,
    PermissionDenied,
    RangeNotSatisfiable,
    StoreUnavailable,
    Throttled,
)
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import ANY, CREATE, ObjectInfo, ObjectStore, UnfinishedUpload, open_store, parse_url
from ckpt_cloud.stores.intercept import apply, intercepted
from ckpt_cloud.testing import Crashed, Faults, FaultyStore
from ckpt_cloud.testing.faulty import OPERATIONS
from tests.stores.conformance import StoreConformance

LIMIT = 1 << 20
UPLOAD = UnfinishedUpload("data/x/1", "id", 0.0)


async def no_bytes():
    yield b""


CALLS = {
    "put": (("data/x/1", b"bytes", CREATE), {}),
    "put_multipart": (("data/x/1", no_bytes), {"part_size": 5, "concurrency": 2}),
    "get": (("data/x/1",), {"limit": 7}),
    "head": (("data/x/1",), {}),
    "get_range": (("data/x/1", 2, 4, "version"), {}),
    "list": (("data/x/1",), {}),
    "list_children": (("data/x/1",), {}),
    "capabilities": ((), {}),
    "delete": ((["data/x/1", "data/x/2"],), {}),
    "list_uploads": (("data/x/1",), {}),
    "abort_upload": ((UPLOAD,), {}),
}


class Noting:
    """A store that notes its calls, with a distinct answer to each."""

    url = "noting://bucket/run"
    max_parts = 17
    max_part_bytes = 23

    def __init__(self):
        self.calls = []
        self.answers = {
            "get": (b"abcd", ObjectInfo("data/x/1", 4, "version", 0.0)),
            "get_range": memoryview(b"cd"),
            "list": ["one", "two"],
            "delete": None,
            "abort_upload": None,
        }

    def __getattr__(self, name):
        async def answer(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self.answers.get(name, f"answer to {name}")

        async def stream(*args, **kwargs):
            for info in await answer(*args, **kwargs):
                yield info

        return stream if name == "list" else answer


async def ask(store, name):
    args, kwargs = CALLS[name]
    if name == "list":
        return [info async for info in store.list(*args, **kwargs)]
    return await getattr(store, name)(*args, **kwargs)


@pytest.fixture
def faults():
    return Faults()


@pytest.fixture
def memory():
    return open_store(parse_url(f"memory://{secrets.token_hex(8)}/run"), StoreOptions())


@pytest.fixture
def store(memory, faults):
    return FaultyStore(memory, faults)


class TestConformance(StoreConformance):
    """With no rules, and with rules for others."""

    @pytest.fixture
    def place(self, memory, faults):
        raw = memory._clients.once
        faults.fail("*", "other/*", times=None)
        faults.corrupt("other/*")

        def read(key):
            return bytes(obstore.get(raw, f"run/{key}").bytes())

        return SimpleNamespace(
            url=memory.url,
            store=FaultyStore(memory, faults),
            read=read,
            write=lambda key, data: obstore.put(raw, f"run/{key}", data),
            keys=lambda: {m["path"].removeprefix("run/") for batch in obstore.list(raw, "run") for m in batch},
            unfinished=list,
            files=False,
            fast=True,
        )


class TestForwarding:
    def test_every_method_of_the_protocol_is_there(self):
        methods = {name for name, member in vars(ObjectStore).items() if callable(member) and name[0] != "_"}
        assert methods - {"get_range_into"} == set(OPERATIONS) == set(CALLS)
        for name in methods:
            ours, theirs = (inspect.signature(getattr(owner, name)) for owner in (FaultyStore, ObjectStore))
            assert ours == theirs, name

    def test_every_attribute_of_the_protocol_is_there(self, faults):
        inner = Noting()
        attributes = inspect.get_annotations(ObjectStore)
        assert attributes
        for name in attributes:
            assert vars(FaultyStore(inner, faults))[name] == getattr(inner, name)

    @pytest.mark.parametrize("name", OPERATIONS)
    async def test_each_operation_is_handed_on_and_noted(self, name, faults):
        inner = Noting()
        answer = await ask(FaultyStore(inner, faults), name)
        assert inner.calls == [(name, *CALLS[name])]
        assert answer == inner.answers.get(name, f"answer to {name}")
        assert faults.operations == [(name, "" if name == "capabilities" else "data/x/1", "done")]

    @pytest.mark.parametrize("name", OPERATIONS)
    async def test_each_operation_can_fail_before_it_is_done(self, name, faults):
        inner = Noting()
        faults.fail(name)
        with pytest.raises(StoreUnavailable) as failed:
            await ask(FaultyStore(inner, faults), name)
        assert inner.calls == []
        assert failed.value.url == inner.url + ("" if name == "capabilities" else "/data/x/1")

    @pytest.mark.parametrize("name", OPERATIONS)
    async def test_each_operation_can_lose_its_answer(self, name, faults):
        inner = Noting()
        faults.fail(name, applied=True)
        with pytest.raises(StoreUnavailable):
            await ask(FaultyStore(inner, faults), name)
        assert inner.calls == [(name, *CALLS[name])]

    def test_what_is_shown(self, faults):
        faults.fail()
        shown = repr(FaultyStore(Noting(), faults))
        assert shown.startswith("<FaultyStore <")
        assert shown.endswith(" <Faults 1 rules, 0 operations>>")


class TestFail:
    async def test_only_the_named_operation_and_key(self, store, faults):
        faults.fail("put", key="COMMIT")
        await store.put("data/x/1", b"")
        with pytest.raises(NotFound):
            await store.get("COMMIT", limit=LIMIT)
        with pytest.raises(StoreUnavailable):
            await store.put("COMMIT", b"")
        await store.put("COMMIT", b"")
        assert [operation.outcome for operation in faults.operations] == [
            "done",
            "NotFound",
            "StoreUnavailable",
            "done",
        ]

    async def test_patterns(self, faults):
        store = FaultyStore(Noting(), faults)
        faults.fail("put*", key="data/*", times=None)
        for name in ("put", "put_multipart"):
            with pytest.raises(StoreUnavailable):
                await ask(store, name)
        await ask(store, "get")

    async def test_one_of_several_keys(self, store, faults):
        faults.fail("delete", key="b")
        await store.delete(["a", "c"])
        with pytest.raises(StoreUnavailable):
            await store.delete(["a", "b"])

    async def test_times_and_after(self, store, faults):
        faults.fail("put", times=2, after=1)
        for number in range(5):
            if number in (1, 2):
                with pytest.raises(StoreUnavailable):
                    await store.put("k", b"")
            else:
                await store.put("k", b"")

    async def test_the_first_rule_that_is_due_counts_and_the_next_takes_over(self, store, faults):
        faults.fail("put", error=Throttled)
        faults.fail("put", error=PermissionDenied)
        for error in (Throttled, PermissionDenied):
            with pytest.raises(error):
                await store.put("k", b"")
        await store.put("k", b"")

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            pytest.param(OSError, "put: a fault that the test asked for", id="class"),
            pytest.param(OSError("mine"), "mine", id="instance"),
            pytest.param(lambda operation, key: OSError(f"{operation} of {key}"), "put of k", id="function"),
        ],
    )
    async def test_the_error(self, error, message, store, faults):
        faults.fail(error=error)
        with pytest.raises(OSError, match=message):
            await store.put("k", b"")

    async def test_an_answer_that_is_lost(self, store, memory, faults):
        faults.fail("put", applied=True)
        with pytest.raises(StoreUnavailable):
            await store.put("k", b"there", CREATE)
        assert (await memory.get("k", limit=LIMIT))[0] == b"there"
        with pytest.raises(AlreadyExists):
            await store.put("k", b"there", CREATE)

    async def test_the_stores_own_error_goes_before_a_lost_answer(self, store, faults):
        faults.fail("get", applied=True)
        with pytest.raises(NotFound):
            await store.get("k", limit=LIMIT)

    @pytest.mark.parametrize(
        "wrong",
        [
            pytest.param(lambda faults: faults.fail("putt"), id="operation"),
            pytest.param(lambda faults: faults.fail("url"), id="attribute"),
            pytest.param(lambda faults: faults.fail(times=0), id="times"),
            pytest.param(lambda faults: faults.fail(after=-1), id="after"),
            pytest.param(lambda faults: faults.fail(error=KeyboardInterrupt), id="error"),
            pytest.param(lambda faults: faults.hang("sleep"), id="hang"),
            pytest.param(lambda faults: faults.crash_at(0), id="crash"),
            pytest.param(lambda faults: faults.shorten("k", size=-1), id="size"),
            pytest.param(lambda faults: faults.corrupt("k", at=-1), id="at"),
            pytest.param(lambda faults: faults.wait_for("putt"), id="wait"),
        ],
    )
    def test_what_can_never_happen_is_refused(self, wrong, faults):
        with pytest.raises(InvalidOption):
            wrong(faults)


class TestCrash:
    async def test_the_nth_and_all_later_operations(self, store, memory, faults):
        await store.put("0", b"")
        faults.crash_at(2)
        await store.put("1", b"")
        for name in ("put", "get", "list", "delete"):
            with pytest.raises(Crashed):
                await ask(store, name)
        assert [info.key async for info in memory.list()] == ["0", "1"]
        faults.clear()
        await store.put("2", b"")

    async def test_goes_before_all_rules(self, store, faults):
        faults.fail("put", error=Throttled)
        faults.crash_at(1)
        with pytest.raises(Crashed):
            await store.put("k", b"")

    def test_is_what_a_process_sees_whose_store_is_gone(self):
        crash = pickle.loads(pickle.dumps(Crashed("gone", "s3://bucket/run")))
        assert isinstance(crash, StoreUnavailable)
        assert (crash.kind, crash.url) == ("crashed", "s3://bucket/run")


class TestHang:
    async def test_until_it_is_released(self, store, memory, faults):
        faults.hang("put", "slow", times=None)
        waiting = asyncio.create_task(store.put("slow", b"late"))
        await asyncio.to_thread(faults.wait_for, "put", "slow", timeout_s=10)
        await store.put("quick", b"")
        assert faults.operations == [("put", "slow", "under way"), ("put", "quick", "done")]
        with pytest.raises(NotFound):
            await memory.get("slow", limit=LIMIT)
        threading.Thread(target=faults.release).start()
        await waiting
        assert (await memory.get("slow", limit=LIMIT))[0] == b"late"
        await store.put("slow", b"no more hang")

    async def test_clear_releases(self, store, faults):
        faults.hang(times=None)
        waiting = [asyncio.create_task(store.put(f"{number}", b"")) for number in range(3)]
        await asyncio.to_thread(faults.wait_for, "put", "2", timeout_s=10)
        faults.clear()
        await asyncio.gather(*waiting)
        assert faults.operations == []

    async def test_one_that_gives_up_leaves_the_others_hanging(self, store, faults):
        faults.hang(times=2)
        waiting = [asyncio.create_task(store.put(f"{number}", b"")) for number in range(2)]
        await asyncio.to_thread(faults.wait_for, "put", "1", timeout_s=10)
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert [operation.outcome for operation in faults.operations] == ["CancelledError", "under way"]
        faults.release()
        await waiting[1]

    async def test_waiting_for_what_is_yet_to_come(self, store, faults):
        waiting = asyncio.create_task(asyncio.to_thread(faults.wait_for, "put", "late", timeout_s=20))
        while not faults._changed._waiters:
            await asyncio.sleep(0)
        await store.put("early", b"")
        await store.put("late", b"")
        await asyncio.wait_for(waiting, timeout=10)

    def test_waiting_for_what_does_not_come(self, faults):
        with pytest.raises(TimeoutError, match="no put of COMMIT within 0 s"):
            faults.wait_for("put", "COMMIT", timeout_s=0)


class TestDamage:
    async def test_one_bit_in_the_middle_of_what_is_read(self, store, memory, faults):
        await store.put("k", bytes(11))
        faults.corrupt("k")
        assert bytes(await store.get_range("k", 2, 7)) == b"\0\0\x80\0\0"
        data, info = await store.get("k", limit=LIMIT)
        assert (data, info.size) == (b"\0\0\0\0\0\x80\0\0\0\0\0", 11)
        assert (await memory.get("k", limit=LIMIT))[0] == bytes(11)

    async def test_one_place_in_the_object(self, store, faults):
        await store.put("k", bytes(10))
        faults.corrupt("k", at=4, times=3)
        assert bytes(await store.get_range("k", 0, 4)) == bytes(4)
        assert bytes(await store.get_range("k", 5, 10)) == bytes(5)
        assert bytes(await store.get_range("k", 3, 6)) == b"\0\x80\0"
        assert bytes(await store.get_range("k", 4, 6)) == b"\x80\0"
        assert (await store.get("k", limit=LIMIT))[0] == b"\0\0\0\0\x80\0\0\0\0\0"
        assert bytes(await store.get_range("k", 3, 6)) == bytes(3)

    async def test_no_bytes_cannot_be_damaged(self, store, faults):
        await store.put("k", b"")
        faults.corrupt("k")
        assert (await store.get("k", limit=LIMIT))[0] == b""

    async def test_an_object_cut_short(self, store, faults):
        await store.put("k", b"0123456789")
        faults.shorten("k", size=6)
        assert bytes(await store.get_range("k", 2, 6)) == b"2345"
        with pytest.raises(RangeNotSatisfiable, match="has 6 bytes, 7 were asked for") as short:
            await store.get_range("k", 2, 7)
        assert short.value.url == f"{store.url}/k"
        data, info = await store.get("k", limit=LIMIT)
        assert (data, info.size) == (b"012345", 6)
        faults.clear()
        assert bytes(await store.get_range("k", 2, 7)) == b"23456"


class TestEverywhere:
    def opened(self):
        return open_store(parse_url(f"memory://{secrets.token_hex(8)}/run"), StoreOptions())

    async def test_all_stores_that_are_opened_meanwhile(self, faults):
        with faults.everywhere():
            stores = [self.opened(), self.opened()]
        for store in stores:
            await store.put("k", b"", ANY)
        assert faults.operations == [("put", "k", "done")] * 2
        assert not isinstance(self.opened(), FaultyStore)

    def test_one_in_another(self, faults):
        store = Noting()
        with intercepted(lambda inner: ("a", inner)):
            with intercepted(lambda inner: ("b", inner)):
                assert apply(store) == ("b", ("a", store))
            assert apply(store) == ("a", store)
        assert apply(store) is store

    def test_ends_with_an_error_too(self, faults):
        with pytest.raises(ZeroDivisionError), faults.everywhere():
            _ = 1 / 0
        assert not isinstance(self.opened(), FaultyStore)


class TestNames:
    def test_promised(self):
        assert testing.__all__ == sorted(testing.__all__) == dir(testing)
        for name in testing.__all__:
            assert getattr(testing, name).__module__ == "ckpt_cloud.testing"
            assert getattr(testing, name).__doc__

    def test_unknown(self):
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = testing.no_such_name

    @pytest.mark.parametrize(
        ("statement", "absent"),
        [
            pytest.param("import ckpt_cloud, ckpt_cloud.cli, ckpt_cloud.stores", ["ckpt_cloud.testing"], id="package"),
            pytest.param(
                "import ckpt_cloud.testing.plugin", ["torch", "boto3", "botocore", "moto", "obstore"], id="plugin"
            ),
            pytest.param("import ckpt_cloud.testing", ["pytest", "ckpt_cloud.stores", "asyncio"], id="testing"),
            pytest.param("from ckpt_cloud.testing import Faults", ["pytest", "moto", "torch", "boto3"], id="faults"),
        ],
    )
    def test_nothing_is_imported_before_it_is_needed(self, statement, absent):
        code = f"{statement}\nimport sys\nprint(*[name for name in {absent!r} if name in sys.modules])"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        assert result.stdout.split() == []
