"""The conformance suite against the fsspec engine, with a side door past the code under test."""

import json
import secrets
import urllib.parse
import urllib.request
from types import SimpleNamespace

import fsspec
import pytest
from crc32c import crc32c
from fsspec.implementations.dirfs import DirFileSystem

from ckpt_cloud.errors import CkptCloudError, Unsupported
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import Replace, open_store, parse_url
from tests.stores.conformance import LIMIT, MIB, StoreConformance, listed, stream
from tests.stores.server_conformance import (
    AzuriteConformance,
    S3Conformance,
    SeaweedFSConformance,
    ServerConformance,
)

# A second or two each, but ten times that on a machine that does much else.
pytestmark = pytest.mark.timeout(180)

OPTIONS = StoreOptions(engine="fsspec", retry=RetryOptions(max_retries=2, deadline_s=10))


class S3fsConformance(S3Conformance):
    engine = "fsspec"


class TestS3fsMoto(S3fsConformance):
    # It has a thread for each request, and no lock.
    atomic = False

    @pytest.fixture
    def server(self, moto_server):
        return moto_server


class TestS3fsMotoInProcess(S3fsConformance):
    # It has a thread for each request, and no lock.
    atomic = False

    @pytest.fixture
    def server(self, moto_in_process):
        return moto_in_process


class TestS3fsSeaweedFS(SeaweedFSConformance):
    engine = "fsspec"


class TestUsersS3fs(S3fsConformance):
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
        return f"s3://{bucket}/{prefix}", StoreOptions(filesystem=fs, retry=self.options.retry)


class TestUsersDirectoryOfS3fs(TestUsersS3fs):
    """The bucket is not in the URL; what stands in its place must look like one."""

    folder = "run-{}"

    def opened(self, server, bucket, prefix):
        _, options = super().opened(server, bucket, prefix)
        return f"s3://{prefix}", StoreOptions(
            filesystem=DirFileSystem(bucket, fs=options.filesystem), retry=self.options.retry
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
    engine = "fsspec"

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
            store=open_store(parse_url(url), self.options),
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

    async def test_listings_tell_the_stores_own_checksum(self, place):
        """Of objects of one request and of composed ones."""
        small, large = secrets.token_bytes(1000), secrets.token_bytes(11 * MIB)
        await place.store.put("small", small)
        await place.store.put_multipart("large", stream(large), part_size=5 * MIB, concurrency=2)
        found = {info.key: info.crc32c async for info in place.store.list()}
        assert found == {"small": crc32c(small), "large": crc32c(large)}


class TestAdlfsAzurite(AzuriteConformance):
    engine = "fsspec"


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

    async def test_one_version_into_memory(self, place):
        await place.store.put("k", b"old")
        with pytest.raises(CkptCloudError):
            await place.store.get_range_into("k", 0, 3, [memoryview(bytearray(3))], "v")


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
