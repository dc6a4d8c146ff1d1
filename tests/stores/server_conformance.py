"""The conformance suite against servers: what both engines share, with side doors by the clouds' own libraries."""

import secrets
from types import SimpleNamespace

import boto3
import pytest
from azure.storage.blob import ContainerClient
from botocore.config import Config

from ckpt_cloud.errors import BucketNotFound, PermissionDenied
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import CREATE, open_store, parse_url
from tests.stores.conformance import LIMIT, MIB, StoreConformance, listed, stream


class ServerConformance(StoreConformance):
    """Subclasses give the fixtures `server` and `place`, `scheme` and `engine`."""

    engine = "native"
    folder = "run {}"

    @property
    def options(self):
        return StoreOptions(engine=self.engine, retry=RetryOptions(max_retries=2, deadline_s=10))

    @pytest.fixture
    def bucket(self, server, buckets):
        if server.name not in buckets:
            buckets[server.name] = f"conformance-{secrets.token_hex(4)}"
            server.create_bucket(buckets[server.name])
        return buckets[server.name]

    @pytest.fixture
    def prefix(self, server, monkeypatch, nobodys_cloud):
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        return f"{self.folder.format(secrets.token_hex(4))}/step-1"

    async def test_neighbours_are_not_listed(self, place):
        place.write("k", b"mine")
        await open_store(parse_url(place.url + "0"), self.options).put("k", b"the neighbour's")
        assert await listed(place.store) == ["k"]

    async def test_a_bucket_that_is_not_there(self, place):
        store = open_store(parse_url(f"{self.scheme}://no-such-bucket-anywhere/run"), self.options)
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


class S3Conformance(ServerConformance):
    scheme = "s3"

    def opened(self, server, bucket, prefix):
        """URL and options of the store under test."""
        return f"s3://{bucket}/{prefix}", self.options

    @pytest.fixture
    def place(self, server, bucket, prefix, clients):
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

        def begin(key):
            client.create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{key}")

        url, options = self.opened(server, bucket, prefix)
        return SimpleNamespace(
            url=url,
            store=open_store(parse_url(url), options),
            read=lambda key: client.get_object(Bucket=bucket, Key=f"{prefix}/{key}")["Body"].read(),
            write=lambda key, data: client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=data),
            keys=keys,
            unfinished=unfinished,
            begin=begin,
            files=False,
            fast=False,
        )

    async def test_unfinished_uploads(self, place):
        place.begin("data/a")
        place.begin("other/b")
        (upload,) = await place.store.list_uploads("data")
        assert upload.key == "data/a"
        assert len(await place.store.list_uploads()) == 2
        await place.store.abort_upload(upload)
        await place.store.abort_upload(upload)
        assert [left.key for left in await place.store.list_uploads()] == ["other/b"]
        for left in await place.store.list_uploads():
            await place.store.abort_upload(left)
        assert place.unfinished() == []


class SeaweedFSConformance(S3Conformance):
    @pytest.fixture
    def server(self, seaweedfs):
        return seaweedfs

    async def test_a_wrong_secret(self, place, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
        store = open_store(parse_url(place.url), self.options)
        requests = [lambda: store.get("k", limit=LIMIT), lambda: store.put("k", b"x", CREATE), store.list_children]
        for request in requests:
            with pytest.raises(PermissionDenied) as refused:
                await request()
            assert "hunter2" not in f"{refused.value!r} {refused.value} {getattr(refused.value, '__notes__', '')}"

    async def test_store_checksums(self, place):
        options = StoreOptions(engine=self.engine, store_checksums=True)
        store = open_store(parse_url(place.url), options)
        await store.put("small", b"x")
        await store.put_multipart("big", stream(b"x" * (11 * MIB)), part_size=5 * MIB, concurrency=2)
        assert len(place.read("big")) == 11 * MIB
        assert place.read("small") == b"x"


class AzuriteConformance(ServerConformance):
    scheme = "az"

    @pytest.fixture
    def server(self, azurite):
        return azurite

    @pytest.fixture
    def place(self, server, bucket, prefix):
        connection = server.env["AZURE_STORAGE_CONNECTION_STRING"]
        url = f"az://{bucket}/{prefix}"
        with ContainerClient.from_connection_string(connection, bucket, retry_total=0) as client:

            def keys(**include):
                blobs = client.list_blobs(name_starts_with=f"{prefix}/", **include)
                return {blob.name.removeprefix(f"{prefix}/") for blob in blobs}

            yield SimpleNamespace(
                url=url,
                store=open_store(parse_url(url), self.options),
                read=lambda key: client.get_blob_client(f"{prefix}/{key}").download_blob().readall(),
                write=lambda key, data: client.upload_blob(f"{prefix}/{key}", data, overwrite=True),
                keys=keys,
                unfinished=list,
                files=False,
                fast=False,
            )

    async def test_a_wrong_key(self, place, azurite):
        endpoint = azurite.endpoint_url
        options = StoreOptions(
            endpoint_url=endpoint, account_name="devstoreaccount1", account_key="aHVudGVyMg==", engine=self.engine
        )
        store = open_store(parse_url(place.url), options)
        requests = [lambda: store.get("k", limit=LIMIT), lambda: store.put("k", b"x", CREATE), store.list_children]
        for request in requests:
            with pytest.raises(PermissionDenied) as refused:
                await request()
            said = f"{refused.value!r} {refused.value} {refused.value.__notes__}"
            assert "aHVudGVyMg" not in said
            assert "hunter2" not in said
            assert "AZURE_STORAGE" in refused.value.hint
