"""The same bad answers on the dialects of Google and Azure, through a fault server in front of their own servers."""

import http.client
import secrets
import urllib.parse

import pytest

from ckpt_cloud.errors import BucketNotFound, PermissionDenied, StoreUnavailable, Throttled, UntrustedServer
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import CREATE, open_store, parse_url
from tests.faults import server as faults
from tests.faults.dialect import Answer
from tests.faults.server import FaultServer

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
QUICK = RetryOptions(max_retries=5, deadline_s=20, max_backoff_s=0.05)
ONCE = RetryOptions(max_retries=0)
_HOPS = {"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"}


def stream(*buffers):
    async def source():
        for buffer in buffers:
            yield buffer

    return source


class Upstream:
    """In the place of a dialect: what another server answers."""

    def __init__(self, endpoint):
        self._host = urllib.parse.urlsplit(endpoint).netloc

    def answer(self, request):
        connection = http.client.HTTPConnection(self._host, timeout=30)
        headers = {name: value for name, value in request.headers.items() if name != "transfer-encoding"}
        connection.request(request.method, request.target, request.body, headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _HOPS}
        if request.method == "HEAD":
            kept["Content-Length"] = response.getheader("content-length", "0")
        return Answer(response.status, body, kept)


@pytest.fixture(params=["azure-native", "azure-fsspec", "gcs-fsspec"])
def cloud(request, monkeypatch, nobodys_cloud):
    """A fault server before a cloud's own, and a way to open stores through it."""
    dialect, _, engine = request.param.partition("-")
    real = request.getfixturevalue({"azure": "azurite", "gcs": "fake_gcs"}[dialect])
    bucket = f"bucket-{secrets.token_hex(4)}"
    real.create_bucket(bucket)
    with FaultServer() as server:
        host = urllib.parse.urlsplit(real.endpoint_url).netloc
        for name, value in real.env.items():
            monkeypatch.setenv(name, value.replace(host, urllib.parse.urlsplit(server.url).netloc))
        server.dialect = Upstream(real.endpoint_url)

        def opened(retry=QUICK, **options):
            url = f"{'az' if dialect == 'azure' else 'gs'}://{bucket}/run"
            return open_store(parse_url(url), StoreOptions(engine=engine, retry=retry, **options))

        server.opened, server.cloud = opened, dialect
        yield server


def requests_of(store):
    return {
        "put": lambda: store.put("k", b"x"),
        "create": lambda: store.put("k", b"x", CREATE),
        "get": lambda: store.get("k", limit=9),
        "read": lambda: store.get_range("k", 0, 1),
        "list": store.list_children,
        "upload": lambda: store.put_multipart("k", stream(b"x" * 6 * MIB), part_size=5 * MIB, concurrency=2),
    }


REQUESTS = ["put", "create", "get", "read", "list", "upload"]


def azures(status, code):
    """Azure says the code in a header too, which is all that HEAD has."""
    return faults.refuse(status, code, headers={"x-ms-error-code": code})


CONTENT = secrets.token_bytes(10_000)


def all_of_it(exchange):
    """Not by leaving the range out, which is signed."""
    answer = exchange.answer()
    headers = {name: value for name, value in answer.headers.items() if name.lower() != "content-range"}
    exchange.send(Answer(200, CONTENT, headers))


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize(
    ("act", "kind"),
    [
        pytest.param(azures(404, "ContainerNotFound"), BucketNotFound, id="bucket"),
        pytest.param(azures(403, "AuthenticationFailed"), PermissionDenied, id="denied-or-clock"),
        pytest.param(azures(401, "InvalidAuthenticationInfo"), PermissionDenied, id="expired"),
        pytest.param(azures(500, "InternalError"), StoreUnavailable, id="500"),
        pytest.param(azures(429, "TooManyRequests"), Throttled, id="429"),
        pytest.param(faults.page(502), StoreUnavailable, id="page-502"),
        pytest.param(faults.reset, StoreUnavailable, id="reset"),
    ],
)
async def test_a_store_that_always_refuses(cloud, request_, act, kind):
    cloud.fault(act)
    with pytest.raises(kind) as error:
        await requests_of(cloud.opened(ONCE))[request_]()
    assert error.value.hint or kind is Throttled
    assert not isinstance(error.value, UntrustedServer)


@pytest.mark.parametrize("request_", [name for name in REQUESTS if name != "create"])
@pytest.mark.parametrize(
    "act",
    [
        pytest.param(azures(503, "ServerBusy"), id="busy"),
        pytest.param(azures(500, "InternalError"), id="500"),
        pytest.param(faults.page(502), id="page-502"),
        pytest.param(faults.reset, id="reset"),
        pytest.param(faults.reset_after_it_took_effect, id="lost-answer"),
    ],
)
async def test_what_passes_is_tried_again(cloud, request_, act):
    store = cloud.opened()
    await store.put("k", b"x")
    fault = cloud.fault(act, times=2)
    await requests_of(store)[request_]()
    assert fault.hits == 2


@pytest.mark.parametrize("act", [azures(503, "ServerBusy"), faults.reset_after_it_took_effect], ids=["busy", "lost"])
async def test_a_conditional_write_is_sent_once(cloud, act):
    store = cloud.opened()
    cloud.fault(act)
    with pytest.raises((StoreUnavailable, Throttled)):
        await store.put("COMMIT", b"x", CREATE)
    assert len(cloud.requests) == 1


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(all_of_it, id="whole-object"),
        pytest.param(faults.short(7), id="short-body"),
        pytest.param(faults.shorter(7), id="fewer-bytes"),
        pytest.param(faults.page(200), id="page-200"),
        pytest.param(faults.error_in_200("InternalError"), id="error-in-200"),
    ],
)
async def test_a_read_of_other_bytes_than_asked_for_is_tried_again(cloud, act):
    store = cloud.opened()
    await store.put("k", CONTENT)
    fault = cloud.fault(act, method="GET", times=2)
    assert bytes(await store.get_range("k", 100, 5100)) == CONTENT[100:5100]
    assert fault.hits == 2


async def test_a_page_that_is_no_listing(cloud):
    cloud.fault(faults.page(200), method="GET")
    with pytest.raises(StoreUnavailable):
        await cloud.opened(ONCE).list_children()


async def test_a_part_that_fails_is_sent_again_by_itself(cloud):
    content = secrets.token_bytes(MIB) * 16
    query = {"azure": "blockid", "gcs": "uploadType"}[cloud.cloud]
    fault = cloud.fault(azures(500, "InternalError"), query=query, times=1, after=1)
    store = cloud.opened()
    await store.put_multipart("k", stream(content), part_size=5 * MIB, concurrency=1)
    assert (await store.get("k", limit=32 * MIB))[0] == content
    assert fault.hits == 1
    assert cloud.count(query=query) == 5, "four parts, and one of them again"
