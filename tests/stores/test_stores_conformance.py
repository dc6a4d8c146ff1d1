"""The conformance suite against the native engine, with a side door to write and read past the code under test."""

import asyncio
import secrets
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import obstore
import pytest
from azure.storage.blob import ContainerClient
from botocore.config import Config

from ckpt_cloud.errors import BucketNotFound, CkptCloudError, PermissionDenied, PreconditionFailed, StoreUnavailable
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import CREATE, Replace, open_store, parse_url
from tests.stores.conformance import LIMIT, MIB, StoreConformance, listed, stream

pytestmark = pytest.mark.timeout(60)


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


@pytest.fixture(scope="module")
def buckets():
    """One on each server for all its tests."""
    return {}


@pytest.fixture(scope="module")
def clients():
    """boto3's, one for each server, since making one takes a while."""
    return {}


class S3Conformance(StoreConformance):
    """Subclasses give the fixture `server`."""

    @pytest.fixture
    def bucket(self, server, buckets):
        if server.name not in buckets:
            buckets[server.name] = f"conformance-{secrets.token_hex(4)}"
            server.create_bucket(buckets[server.name])
        return buckets[server.name]

    @pytest.fixture
    def place(self, server, bucket, clients, monkeypatch, nobodys_cloud):
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        prefix = f"run {secrets.token_hex(4)}/step-1"
        if server.name not in clients:
            clients[server.name] = boto3.session.Session().client(
                "s3", endpoint_url=server.endpoint_url, config=Config(s3={"addressing_style": "path"})
            )
        client = clients[server.name]

        def keys():
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
            return {entry["Key"].removeprefix(f"{prefix}/") for page in pages for entry in page.get("Contents", [])}

        def unfinished():
            uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
            return [upload["Key"] for upload in uploads if upload["Key"].startswith(prefix)]

        url = f"s3://{bucket}/{prefix}"
        options = StoreOptions(retry=RetryOptions(max_retries=2, deadline_s=10))
        return SimpleNamespace(
            url=url,
            store=open_store(parse_url(url), options),
            read=lambda key: client.get_object(Bucket=bucket, Key=f"{prefix}/{key}")["Body"].read(),
            write=lambda key, data: client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=data),
            keys=keys,
            unfinished=unfinished,
            files=False,
            fast=False,
        )

    async def test_neighbours_are_not_listed(self, place, bucket):
        place.write("k", b"mine")
        await open_store(parse_url(place.url + "0"), StoreOptions()).put("k", b"the neighbour's")
        assert await listed(place.store) == ["k"]

    async def test_a_bucket_that_is_not_there(self, place):
        store = open_store(parse_url("s3://no-such-bucket-anywhere/run"), StoreOptions())
        requests = [
            lambda: store.put("k", b"x"),
            lambda: store.put("k", b"x", CREATE),
            lambda: store.get("k", limit=LIMIT),
            lambda: store.get_range("k", 0, 1),
            store.list_children,
            lambda: store.put_multipart("k", stream(b"x" * (6 * MIB)), part_size=5 * MIB, concurrency=1),
        ]
        for request in requests:
            with pytest.raises(BucketNotFound) as missing:
                await request()
            assert "no-such-bucket-anywhere" in missing.value.url
            assert "never creates" in missing.value.hint


class TestMoto(S3Conformance):
    @pytest.fixture
    def server(self, moto_server):
        return moto_server


class TestMotoInProcess(S3Conformance):
    @pytest.fixture
    def server(self, moto_in_process):
        return moto_in_process


class TestSeaweedFS(S3Conformance):
    @pytest.fixture
    def server(self, seaweedfs):
        return seaweedfs

    async def test_a_wrong_secret(self, place, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
        store = open_store(parse_url(place.url), StoreOptions())
        requests = [lambda: store.get("k", limit=LIMIT), lambda: store.put("k", b"x", CREATE), store.list_children]
        for request in requests:
            with pytest.raises(PermissionDenied) as refused:
                await request()
            assert "hunter2" not in f"{refused.value!r} {refused.value} {getattr(refused.value, '__notes__', '')}"

    async def test_store_checksums(self, place):
        options = StoreOptions(store_checksums=True)
        store = open_store(parse_url(place.url), options)
        await store.put("small", b"x")
        await store.put_multipart("big", stream(b"x" * (11 * MIB)), part_size=5 * MIB, concurrency=2)
        assert len(place.read("big")) == 11 * MIB
        assert place.read("small") == b"x"


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


class TestAzurite(StoreConformance):
    @pytest.fixture
    def container(self, azurite, buckets):
        if azurite.name not in buckets:
            buckets[azurite.name] = f"conformance-{secrets.token_hex(4)}"
            azurite.create_bucket(buckets[azurite.name])
        return buckets[azurite.name]

    @pytest.fixture
    def place(self, azurite, container, monkeypatch, nobodys_cloud):
        for name, value in azurite.env.items():
            monkeypatch.setenv(name, value)
        prefix = f"run {secrets.token_hex(4)}/step-1"
        url = f"az://{container}/{prefix}"
        connection = azurite.env["AZURE_STORAGE_CONNECTION_STRING"]
        options = StoreOptions(retry=RetryOptions(max_retries=2, deadline_s=10))
        with ContainerClient.from_connection_string(connection, container, retry_total=0) as client:

            def names(**include):
                listed = client.list_blobs(name_starts_with=f"{prefix}/", **include)
                return [blob.name.removeprefix(f"{prefix}/") for blob in listed]

            yield SimpleNamespace(
                url=url,
                store=open_store(parse_url(url), options),
                read=lambda key: client.get_blob_client(f"{prefix}/{key}").download_blob().readall(),
                write=lambda key, data: client.upload_blob(f"{prefix}/{key}", data, overwrite=True),
                keys=lambda: set(names()),
                # Blocks that were never committed are dropped by the service; nobody can abort them.
                unfinished=list,
                files=False,
                fast=False,
            )

    async def test_neighbours_are_not_listed(self, place):
        place.write("k", b"mine")
        await open_store(parse_url(place.url + "0"), StoreOptions()).put("k", b"the neighbour's")
        assert await listed(place.store) == ["k"]

    async def test_a_container_that_is_not_there(self, place):
        store = open_store(parse_url("az://no-such-container/run"), StoreOptions())
        requests = [
            lambda: store.put("k", b"x"),
            lambda: store.put("k", b"x", CREATE),
            lambda: store.get("k", limit=LIMIT),
            lambda: store.get_range("k", 0, 1),
            store.list_children,
            lambda: store.put_multipart("k", stream(b"x" * (6 * MIB)), part_size=5 * MIB, concurrency=1),
        ]
        for request in requests:
            with pytest.raises(BucketNotFound) as missing:
                await request()
            assert "no-such-container" in missing.value.url
            assert "never creates" in missing.value.hint

    async def test_a_wrong_key(self, place, azurite, container):
        endpoint = azurite.endpoint_url
        options = StoreOptions(endpoint_url=endpoint, account_name="devstoreaccount1", account_key="aHVudGVyMg==")
        store = open_store(parse_url(place.url), options)
        requests = [lambda: store.get("k", limit=LIMIT), lambda: store.put("k", b"x", CREATE), store.list_children]
        for request in requests:
            with pytest.raises(PermissionDenied) as refused:
                await request()
            said = f"{refused.value!r} {refused.value} {refused.value.__notes__}"
            assert "aHVudGVyMg" not in said
            assert "hunter2" not in said
            assert "AZURE_STORAGE" in refused.value.hint
