"""The conformance suite against the fsspec engine, with a side door past the code under test."""

import json
import secrets
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import boto3
import fsspec
import pytest
from botocore.config import Config
from fsspec.implementations.dirfs import DirFileSystem

from ckpt_cloud.errors import BucketNotFound, CkptCloudError, PermissionDenied, Unsupported
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import CREATE, Replace, open_store, parse_url
from localstack.dialects.shared_key import signed
from tests.stores.conformance import LIMIT, MIB, StoreConformance, listed, stream

pytestmark = pytest.mark.timeout(60)

OPTIONS = StoreOptions(engine="fsspec", retry=RetryOptions(max_retries=2, deadline_s=10))


@pytest.fixture(scope="module")
def buckets():
    """One on each server for all its tests."""
    return {}


@pytest.fixture(scope="module")
def clients():
    """boto3's, one for each server, since making one takes a while."""
    return {}


class ServerConformance(StoreConformance):
    """Subclasses give the fixtures `server` and `place`, and `scheme`."""

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
        return f"run {secrets.token_hex(4)}/step-1"

    async def test_neighbours_are_not_listed(self, place):
        place.write("k", b"mine")
        await open_store(parse_url(place.url + "0"), OPTIONS).put("k", b"the neighbour's")
        assert await listed(place.store) == ["k"]

    async def test_a_bucket_that_is_not_there(self, place):
        store = open_store(parse_url(f"{self.scheme}://no-such-bucket-anywhere/run"), OPTIONS)
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
        return f"s3://{bucket}/{prefix}", OPTIONS

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


class TestS3fsMoto(S3Conformance):
    @pytest.fixture
    def server(self, moto_server):
        return moto_server


class TestS3fsMotoInProcess(S3Conformance):
    @pytest.fixture
    def server(self, moto_in_process):
        return moto_in_process


class TestS3fsSeaweedFS(S3Conformance):
    @pytest.fixture
    def server(self, seaweedfs):
        return seaweedfs

    async def test_a_wrong_secret(self, place, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
        store = open_store(parse_url(place.url), OPTIONS)
        requests = [lambda: store.get("k", limit=LIMIT), lambda: store.put("k", b"x", CREATE), store.list_children]
        for request in requests:
            with pytest.raises(PermissionDenied) as refused:
                await request()
            assert "hunter2" not in f"{refused.value!r} {refused.value} {getattr(refused.value, '__notes__', '')}"

    async def test_store_checksums(self, place):
        options = StoreOptions(engine="fsspec", store_checksums=True)
        store = open_store(parse_url(place.url), options)
        await store.put("small", b"x")
        await store.put_multipart("big", stream(b"x" * (11 * MIB)), part_size=5 * MIB, concurrency=2)
        assert len(place.read("big")) == 11 * MIB
        assert place.read("small") == b"x"


class TestUsersS3fs(S3Conformance):
    """A filesystem as users make it, which sends requests again by itself."""

    @pytest.fixture
    def server(self, seaweedfs):
        return seaweedfs

    def opened(self, server, bucket, prefix):
        fs = fsspec.filesystem(
            "s3",
            key=server.env["AWS_ACCESS_KEY_ID"],
            secret=server.env["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=server.endpoint_url,
            skip_instance_cache=True,
        )
        return f"s3://{bucket}/{prefix}", StoreOptions(filesystem=fs, retry=OPTIONS.retry)


class TestUsersDirectoryOfS3fs(TestUsersS3fs):
    """The bucket is not in the URL."""

    def opened(self, server, bucket, prefix):
        _, options = super().opened(server, bucket, prefix)
        return f"s3://{prefix}", StoreOptions(
            filesystem=DirFileSystem(bucket, fs=options.filesystem), retry=OPTIONS.retry
        )

    async def test_neighbours_are_not_listed(self, place):
        await place.store.put("k", b"mine")
        assert await listed(place.store) == ["k"]
        assert place.keys() == {"k"}

    async def test_a_bucket_that_is_not_there(self, place):
        """There is no such URL."""


def http(request):
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read()


class TestGcsfsFakeGCS(ServerConformance):
    scheme = "gs"

    @pytest.fixture
    def server(self, fake_gcs):
        return fake_gcs

    @pytest.fixture
    def place(self, server, bucket, prefix, monkeypatch):
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

        def call(method, path, data=None):
            return http(urllib.request.Request(server.endpoint_url + path, data, method=method))

        def quoted(key):
            return urllib.parse.quote(f"{prefix}/{key}", safe="")

        def keys():
            # No test makes more than one page of them.
            path = f"/storage/v1/b/{bucket}/o?prefix={urllib.parse.quote(prefix + '/')}"
            items = json.loads(call("GET", path)).get("items", [])
            return {item["name"].removeprefix(f"{prefix}/") for item in items}

        def write(key, data):
            call("POST", f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quoted(key)}", data)

        url = f"gs://{bucket}/{prefix}"
        return SimpleNamespace(
            url=url,
            store=open_store(parse_url(url), OPTIONS),
            read=lambda key: call("GET", f"/download/storage/v1/b/{bucket}/o/{quoted(key)}?alt=media"),
            write=write,
            keys=keys,
            unfinished=lambda: [key for key in keys() if ".part-" in key],
            # The server keeps each object in a file.
            files=True,
            fast=False,
        )

    async def test_unfinished_uploads(self, place):
        for name in (
            "a.part-0123456789ab-00000",
            "a.part-0123456789ab-00001",
            "b.part-0123456789ab-c0-00000",
            "a.part-9",
        ):
            place.write(f"data/{name}", b"x")
        uploads = await place.store.list_uploads("data")
        assert sorted((upload.key, upload.id) for upload in uploads) == [
            ("data/a", "0123456789ab"),
            ("data/b", "0123456789ab"),
        ]
        for upload in uploads:
            await place.store.abort_upload(upload)
            await place.store.abort_upload(upload)
        assert place.keys() == {"data/a.part-9"}

    async def test_more_parts_than_one_request_composes(self, place, monkeypatch):
        content = secrets.token_bytes(70)
        await place.store.put_multipart("big", stream(content), part_size=1, concurrency=8)
        assert place.read("big") == content
        assert place.keys() == {"big"}


class TestAdlfsAzurite(ServerConformance):
    scheme = "az"

    @pytest.fixture
    def server(self, azurite):
        return azurite

    @pytest.fixture
    def place(self, server, bucket, prefix):
        def url_of(key):
            return f"{server.endpoint_url}/{bucket}/{urllib.parse.quote(f'{prefix}/{key}')}"

        def keys():
            where = f"?restype=container&comp=list&prefix={urllib.parse.quote(prefix + '/')}"
            listing = http(signed("GET", f"{server.endpoint_url}/{bucket}{where}")).decode()
            names = (name.text for name in ET.fromstring(listing).iter("Name"))
            return {name.removeprefix(f"{prefix}/") for name in names}

        url = f"az://{bucket}/{prefix}"
        return SimpleNamespace(
            url=url,
            store=open_store(parse_url(url), OPTIONS),
            read=lambda key: http(signed("GET", url_of(key))),
            write=lambda key, data: http(signed("PUT", url_of(key), data, {"x-ms-blob-type": "BlockBlob"})),
            keys=keys,
            unfinished=list,
            files=False,
            fast=False,
        )


class GenericConformance(StoreConformance):
    """What no filesystem can do at large is said, and not done by halves."""

    async def test_replace_exactly_one_version(self, place):
        with pytest.raises(Unsupported):
            await place.store.put("k", b"x", Replace("v"))
        assert place.keys() == set()

    test_replace_what_others_wrote = test_replace_what_is_gone = test_replace_exactly_one_version
    test_one_of_eight_replacements_wins = test_replace_exactly_one_version

    async def test_keeps_conditions(self, place):
        capabilities = await place.store.capabilities()
        assert capabilities.conditional_create
        assert not capabilities.conditional_replace
        assert place.keys() == set()

    async def test_put_and_get(self, place):
        assert await place.store.put("a/b", b"content") is None
        data, info = await place.store.get("a/b", limit=LIMIT)
        assert (data, info.key, info.size, info.version) == (b"content", "a/b", 7, None)

    async def test_put_over_an_object(self, place):
        await place.store.put("k", b"first")
        await place.store.put("k", b"second")
        assert place.read("k") == b"second"

    async def test_a_read_of_one_version(self, place):
        await place.store.put("k", b"old")
        with pytest.raises(CkptCloudError):
            await place.store.get_range("k", 0, 3, "v")


class TestFsspecMemory(GenericConformance):
    @pytest.fixture
    def place(self):
        name = secrets.token_hex(4)
        url = f"memory://{name}/run/1"
        fs = fsspec.filesystem("memory")
        root = f"/{name}/run/1"
        return SimpleNamespace(
            url=f"fsspec+{url}",
            store=open_store(parse_url(f"fsspec+{url}"), StoreOptions()),
            read=lambda key: fs.cat_file(f"{root}/{key}"),
            write=lambda key, data: fs.pipe_file(f"{root}/{key}", data),
            keys=lambda: {path.removeprefix(f"{root}/") for path in fs.find(root)},
            unfinished=list,
            files=True,
            fast=True,
        )


class TestFsspecLocal(GenericConformance):
    @pytest.fixture
    def place(self, tmp_path):
        root = tmp_path / "my run #1 100% ü" / "step-1"

        def write(key, data):
            path = root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        def keys():
            return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}

        return SimpleNamespace(
            url=f"fsspec+file://{root}",
            store=open_store(parse_url(f"fsspec+file://{root}"), StoreOptions()),
            read=lambda key: (root / key).read_bytes(),
            write=write,
            keys=keys,
            unfinished=list,
            files=True,
            fast=True,
        )
