"""The conformance suite against the native engine, with a side door to write and read past the code under test."""

import asyncio
import secrets
import time
from pathlib import Path
from types import SimpleNamespace

import obstore
import pytest

from ckpt_cloud.errors import CkptCloudError, PreconditionFailed, StoreUnavailable
from ckpt_cloud.format.sealing import BLOCK, MasterKey, blocks_of, plain_size, sealed_size
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import Replace, open_store, parse_url
from ckpt_cloud.stores.sealed import SealedStore
from tests.stores.conformance import StoreConformance, listed
from tests.stores.server_conformance import AzuriteConformance, S3Conformance, SeaweedFSConformance

# A second or two each, but ten times that on a machine that does much else.
pytestmark = pytest.mark.timeout(180)


class TestMemory(StoreConformance):
    @pytest.fixture
    def place(self):
        url = f"memory://{secrets.token_hex(4)}/run/1"
        store = open_store(parse_url(url), StoreOptions())
        raw = store._clients.once  # obstore's own, which is only in this process

        def read(key):
            return bytes(obstore.get(raw, f"run/1/{key}").bytes())

        return SimpleNamespace(
            url=url,
            store=store,
            read=read,
            write=lambda key, data: obstore.put(raw, f"run/1/{key}", data),
            keys=lambda: {m["path"].removeprefix("run/1/") for batch in obstore.list(raw, "run/1") for m in batch},
            unfinished=list,
            files=False,
            fast=True,
        )


class TestSealed(StoreConformance):
    """The store of an encrypted checkpoint: all that others see of it is sealed."""

    @pytest.fixture
    def place(self):
        url = f"memory://{secrets.token_hex(4)}/run/1"
        inner = open_store(parse_url(url), StoreOptions())
        raw = inner._clients.once
        key = MasterKey(bytes(32))

        def read(name):
            stored = bytes(obstore.get(raw, f"run/1/{name}").bytes())
            if not name.startswith("data/"):
                return stored
            whole = memoryview(bytearray(plain_size(len(stored))))
            assert not key.of_object(name).open(memoryview(stored), [whole], first_block=0, last=True)
            return bytes(whole)

        def write(name, data):
            if name.startswith("data/"):
                into = memoryview(bytearray(sealed_size(len(data))))
                nonces = secrets.token_bytes(12 * blocks_of(len(data)))
                key.of_object(name).seal([data], into, nonces, first_block=0, last=True)
                data = bytes(into)
            obstore.put(raw, f"run/1/{name}", data)

        return SimpleNamespace(
            url=url,
            store=SealedStore(inner, key),
            read=read,
            write=write,
            keys=lambda: {m["path"].removeprefix("run/1/") for batch in obstore.list(raw, "run/1") for m in batch},
            unfinished=list,
            files=False,
            fast=True,
        )

    @pytest.mark.parametrize("size", [0, 1, BLOCK, 3 * BLOCK, 5 * BLOCK + 7])
    @pytest.mark.parametrize("part_size", [BLOCK, 2 * BLOCK])
    async def test_in_parts(self, place, size, part_size):
        data = secrets.token_bytes(size)

        async def source():
            for start in range(0, size, 50_000):
                yield memoryview(data)[start : start + 50_000]

        await place.store.put_multipart("data/x", source, part_size=part_size, concurrency=2)
        assert place.read("data/x") == data
        assert (await place.store.head("data/x")).size == size
        assert [info.size async for info in place.store.list("data")] == [size]
        for start, end in ((0, size), (size // 3, size // 2), (max(0, size - 3), size)):
            assert bytes(await place.store.get_range("data/x", start, end)) == data[start:end]


class TestLocal(StoreConformance):
    @pytest.fixture
    def place(self, tmp_path):
        # The directory is yet to be made, and its name needs no escaping.
        root = tmp_path / "my run #1 100% ü" / "step-1"

        def write(key, data):
            path = root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        def keys():
            return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}

        return SimpleNamespace(
            url=f"file://{root}",
            store=open_store(parse_url(root), StoreOptions()),
            read=lambda key: (root / key).read_bytes(),
            write=write,
            keys=keys,
            unfinished=list,
            files=True,
            fast=True,
        )

    @pytest.fixture
    def root(self, place):
        return Path(place.url.removeprefix("file://"))

    async def test_names_itself(self, place):
        assert place.store.url == place.url

    async def test_deleting_takes_empty_directories_along_but_never_the_users(self, place, root):
        await place.store.put("data/x/1", b"1")
        await place.store.put("data/y/1", b"1")
        await place.store.delete(["data/x/1"])
        assert sorted(path.name for path in root.rglob("*")) == ["1", "data", "y"]
        await place.store.delete(["data/y/1"])
        assert list(root.rglob("*")) == []
        assert root.is_dir()

    async def test_empty_directories_are_no_children(self, place, root):
        (root / "step-1/data").mkdir(parents=True)
        place.write("step-2/data/x", b"x")
        assert await place.store.list_children() == ["step-2"]

    async def test_a_directory_that_is_not_there(self, place, root):
        assert await listed(place.store) == []
        assert await place.store.list_children() == []
        await place.store.delete(["x"])
        with pytest.raises(PreconditionFailed):
            await place.store.put("x", b"x", Replace("v"))
        assert not root.exists(), "asking makes no directory"

    async def test_a_directory_with_a_question_mark(self, tmp_path):
        store = open_store(parse_url(tmp_path / "why?"), StoreOptions())
        await store.put("k", b"x")
        assert (tmp_path / "why?/k").read_bytes() == b"x"
        assert await listed(store) == ["k"]

    async def test_a_file_where_a_directory_should_be(self, place):
        place.write("a", b"x")
        with pytest.raises(CkptCloudError):
            await place.store.put("a/b", b"x")

    async def test_two_stores_of_one_directory_race(self, place):
        other = open_store(parse_url(place.url), StoreOptions())
        for number in range(20):
            version = await place.store.put("k", b"before")
            answers = await asyncio.gather(
                place.store.put("k", b"mine %d" % number, Replace(version)),
                other.put("k", b"theirs %d" % number, Replace(version)),
                return_exceptions=True,
            )
            assert sum(isinstance(answer, PreconditionFailed) for answer in answers) == 1


class TestMoto(S3Conformance):
    # It has a thread for each request, and no lock.
    atomic = False

    @pytest.fixture
    def server(self, moto_server):
        return moto_server


class TestMotoInProcess(S3Conformance):
    # It has a thread for each request, and no lock.
    atomic = False

    @pytest.fixture
    def server(self, moto_in_process):
        return moto_in_process


class TestSeaweedFS(SeaweedFSConformance):
    pass


class TestAzurite(AzuriteConformance):
    pass


async def test_an_unreachable_server_is_reported_within_seconds(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    options = StoreOptions(endpoint_url="http://127.0.0.1:9", retry=RetryOptions(first_contact_s=1))
    store = open_store(parse_url("s3://bucket/run"), options, first_contact=True)
    began = time.monotonic()
    with pytest.raises(StoreUnavailable) as failure:
        await store.get("COMMIT", limit=1)
    assert time.monotonic() - began < 5
    assert failure.value.url == "s3://bucket/run/COMMIT"
    assert "hunter2" not in f"{failure.value!r} {failure.value.__notes__}"
