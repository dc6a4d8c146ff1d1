"""Between us and the store: certificates, authorities of one's own, proxies, and names that nobody knows."""

import contextlib

import pytest

from ckpt_cloud.errors import CkptCloudError, FixRequest, StoreUnavailable, UntrustedServer
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import open_store, parse_url
from tests.faults import server as faults
from tests.faults.certificates import certificate
from tests.faults.server import FaultServer

pytestmark = pytest.mark.timeout(60)

QUICK = RetryOptions(max_retries=2, max_backoff_s=0.05)


@pytest.fixture
def secure(tmp_path, monkeypatch, nobodys_cloud):
    """An HTTPS server whose authority nobody knows."""
    cert, key = certificate(tmp_path, "127.0.0.1")
    with FaultServer(tls=faults.server_context(cert, key)) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.create_bucket("bucket")
        server.cert = cert
        yield server


def opened(engine, **options):
    return open_store(parse_url("s3://bucket/run"), StoreOptions(engine=engine, retry=QUICK, **options))


async def test_an_unknown_authority_is_refused_at_once(secure, engine):
    store = opened(engine)
    for request in (lambda: store.put("k", b"x"), lambda: store.get("k", limit=1), store.list_children):
        with pytest.raises(UntrustedServer) as refused:
            await request()
        assert "ca_bundle" in refused.value.hint
        assert isinstance(refused.value, FixRequest), "waiting does not help"
    assert secure.requests == []


@pytest.mark.parametrize("how", ["argument", "environment"])
async def test_an_authority_of_ones_own(secure, engine, how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("AWS_CA_BUNDLE", str(secure.cert))
        store = opened(engine)
    else:
        store = opened(engine, ca_bundle=str(secure.cert))
    await store.put("k", b"x")
    assert (await store.get("k", limit=1))[0] == b"x"
    assert await store.list_uploads() == []


async def test_a_certificate_for_another_name(tmp_path, engine, nobodys_cloud, monkeypatch):
    cert, key = certificate(tmp_path, "other.example")
    with FaultServer(tls=faults.server_context(cert, key)) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UntrustedServer):
            await opened(engine, ca_bundle=str(cert)).get("k", limit=1)


async def test_plain_text_where_tls_was_expected(server, engine):
    with pytest.raises(StoreUnavailable):
        await opened(engine, endpoint_url=server.url.replace("http:", "https:")).get("k", limit=1)


async def test_a_name_that_nobody_knows(engine, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    with pytest.raises(StoreUnavailable) as failure:
        await opened(engine, endpoint_url="http://no-such-host.invalid").get("k", limit=1)
    assert "endpoint" in failure.value.hint


@pytest.mark.parametrize("how", ["argument", "environment"])
async def test_a_proxy(server, engine, how, monkeypatch):
    """The fault server answers as a forward proxy too: it does not care which host is asked for."""
    server.create_bucket("bucket")
    options = {"endpoint_url": "http://s3.example.test"}
    if how == "argument":
        options["proxy_url"] = server.url
    else:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.setenv("http_proxy", server.url)
    store = opened(engine, **options)
    await store.put("k", b"x")
    assert (await store.get("k", limit=1))[0] == b"x"
    assert server.requests[0].headers["host"] == "s3.example.test"


async def test_a_proxy_that_answers_for_itself(server, engine):
    server.fault(faults.page(200))
    store = opened(engine, endpoint_url="http://s3.example.test", proxy_url=server.url)
    for request in (lambda: store.get_range("k", 0, 1000), store.list_children):
        with pytest.raises(CkptCloudError):
            await request()


CLOUDS = {
    "gcs": ("gs://bucket/run", {"access_token": "hunter2"}),
    "azure": ("az://bucket/run", {"account_name": "acme", "account_key": "aHVudGVyMg=="}),
}


@pytest.fixture(params=CLOUDS)
def cloud(request, engine):
    """Opens a store of another cloud's dialect, which our server does not speak, but whose requests it sees."""
    url, keys = CLOUDS[request.param]

    def cloud(endpoint, **options):
        path = "/acme" if request.param == "azure" else ""
        given = {**keys, **options, "endpoint_url": f"{endpoint}{path}", "engine": engine}
        return open_store(parse_url(url), StoreOptions(retry=RetryOptions(max_retries=0), **given))

    return cloud


async def test_an_unknown_authority_on_other_clouds(secure, cloud):
    with pytest.raises(UntrustedServer):
        await cloud(secure.url).put("k", b"x")
    assert secure.requests == []


async def test_an_authority_of_ones_own_on_other_clouds(secure, cloud):
    with contextlib.suppress(CkptCloudError):
        await cloud(secure.url, ca_bundle=str(secure.cert)).put("k", b"x")
    assert secure.requests


@pytest.mark.parametrize("how", ["argument", "environment"])
async def test_a_proxy_on_other_clouds(server, cloud, how, monkeypatch):
    options = {}
    if how == "argument":
        options["proxy_url"] = server.url
    else:
        monkeypatch.setenv("HTTP_PROXY", server.url)
        monkeypatch.setenv("http_proxy", server.url)
    with contextlib.suppress(CkptCloudError):
        await cloud("http://store.example.test", **options).put("k", b"x")
    assert server.requests[0].headers["host"] == "store.example.test"
