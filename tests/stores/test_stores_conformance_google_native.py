"""The native engine's Google dialect, its XML API, against our own server: none that can be had speaks it."""

import secrets
from types import SimpleNamespace

import pytest

from ckpt_cloud.errors import Unsupported
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import Replace, open_store, parse_url
from tests.faults.dialect import Answer, Request
from tests.faults.server import FaultServer
from tests.stores.conformance import StoreConformance

# A second or two each, but ten times that on a machine that does much else.
pytestmark = pytest.mark.timeout(180)


class TestGoogleNative(StoreConformance):
    @pytest.fixture
    def server(self):
        with FaultServer() as server:
            server.create_bucket("bucket")
            yield server

    @pytest.fixture
    def place(self, server, monkeypatch, nobodys_cloud):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        prefix = f"run {secrets.token_hex(4)}/step-1"
        url = f"gs://bucket/{prefix}"
        dialect = server.dialect

        def request(method, key, data=b"") -> Answer:
            return dialect.answer(Request(method, "bucket", f"{prefix}/{key}", {}, {}, data))

        options = StoreOptions(engine="native", retry=RetryOptions(max_retries=2, deadline_s=10))
        return SimpleNamespace(
            url=url,
            store=open_store(parse_url(url), options),
            read=lambda key: request("GET", key).body,
            write=lambda key, data: request("PUT", key, data),
            keys=lambda: {name.removeprefix(f"bucket/{prefix}/") for name in dialect.objects},
            unfinished=lambda: list(dialect.uploads),
            files=False,
            fast=False,
        )

    async def test_list_says_size_and_version(self, place):
        """Without generations, since obstore passes them over in listings."""
        await place.store.put("k", b"12345")
        (info,) = [info async for info in place.store.list()]
        assert (info.key, info.size, info.version) == ("k", 5, None)

    async def test_conditions_are_generations(self, place, server):
        version = await place.store.put("k", b"1")
        generation, _, e_tag = version.partition(":")
        await place.store.put("k", b"2", Replace(version))
        assert server.requests[-1].headers["x-goog-if-generation-match"] == generation
        assert e_tag.startswith('"')

    async def test_the_token_is_sent(self, server, nobodys_cloud):
        options = StoreOptions(engine="native", endpoint_url=server.url, access_token="hunter2")
        await open_store(parse_url("gs://bucket/run"), options).put("k", b"x")
        assert server.requests[-1].headers["authorization"] == "Bearer hunter2"

    async def test_requester_pays(self, server, nobodys_cloud):
        options = StoreOptions(
            engine="native", endpoint_url=server.url, access_token="t", requester_pays=True, project="acme"
        )
        await open_store(parse_url("gs://bucket/run"), options).put("k", b"x")
        assert server.requests[-1].headers["x-goog-user-project"] == "acme"

    async def test_unfinished_uploads_are_not_its_business(self, place):
        with pytest.raises(Unsupported, match="lifecycle rule"):
            await place.store.list_uploads()
