"""Reads straight into memory: that they happen, give what `get_range` gives, and leave everything odd to obstore."""

import asyncio
import gc
import itertools
import secrets
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from ckpt_cloud.errors import NotFound, PreconditionFailed, UntrustedServer
from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import aws, direct, open_store, parse_url
from ckpt_cloud.stores.direct import DirectReads
from tests.faults import server as faults
from tests.faults.certificates import certificate
from tests.faults.dialect import Answer
from tests.faults.proxy import FaultProxy
from tests.faults.server import FaultServer
from tests.stores.conformance import KEYS

pytestmark = pytest.mark.timeout(60)

SIGNED = "X-Amz-Signature"
"""In the URL of a direct read; obstore signs in a header."""
CONTENT = secrets.token_bytes(10_000)
QUICK = RetryOptions(max_retries=2, deadline_s=20, max_backoff_s=0.05)


def opened(url="s3://bucket/run", **options):
    return open_store(parse_url(url), StoreOptions(engine="native", retry=QUICK, **options))


def reads(server):
    """How many GETs of objects came directly, and how many from obstore."""
    gets = [request for request in server.requests if request.method == "GET" and request.key]
    directly = sum(SIGNED in request.query for request in gets)
    return directly, len(gets) - directly


def use(server, monkeypatch):
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    server.create_bucket("bucket")
    return server


@pytest.fixture
def server(monkeypatch, nobodys_cloud):
    with FaultServer() as server:
        yield use(server, monkeypatch)


@pytest.fixture
def secure(tmp_path, monkeypatch, nobodys_cloud):
    cert, key = certificate(tmp_path, "127.0.0.1")
    with FaultServer(tls=faults.server_context(cert, key)) as server:
        server.cert = cert
        yield use(server, monkeypatch)


@pytest.fixture(params=["plain", "tls"])
def either(request):
    return request.getfixturevalue({"plain": "server", "tls": "secure"}[request.param])


@pytest.fixture
def clock(monkeypatch):
    """Of the module under test."""
    clock = SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(direct, "time", clock)
    return clock


@pytest.fixture
async def store(server):
    store = opened()
    await store.put("k", CONTENT)
    return store


async def into_memory(store, start=100, end=5100, key="k", version=None):
    memory = bytearray(end - start)
    await store.get_range_into(key, start, end, [memoryview(memory)], version)
    return bytes(memory)


def connections(server):
    """Ports of the clients, as requests come in."""
    ports = []

    def act(exchange):
        ports.append(exchange.handler.client_address[1])
        faults.as_it_should(exchange)

    server.fault(act, query=SIGNED)
    return ports


def to(server, **options):
    """Direct reads of our server's objects alone, with URLs that tell how many signatures there were."""
    numbers = itertools.count(1)

    async def sign(key):
        return f"{server.url}/bucket/{key}?{SIGNED}={next(numbers)}"

    server.dialect.objects["bucket/k"] = (CONTENT, '"v1"', time.time())
    return DirectReads(sign, **{"connect_timeout_s": 5, "stalled_s": 10, "timeout_s": 20, **options})


async def filled(reading, version=None):
    memory = bytearray(5000)
    done = await reading.read("k", 100, 5100, [memoryview(memory)], version)
    assert not done or memory == CONTENT[100:5100]
    return done


@pytest.fixture(params=["ours", "seaweedfs"])
def any_server(request, monkeypatch, nobodys_cloud):
    if request.param == "ours":
        with FaultServer() as server:
            yield use(server, monkeypatch), "bucket"
    else:
        with FaultProxy(request.getfixturevalue("seaweedfs")) as server:
            for name, value in server.env.items():
                monkeypatch.setenv(name, value)
            bucket = f"direct-{secrets.token_hex(4)}"
            server.create_bucket(bucket)
            yield server, bucket


async def test_they_give_what_get_range_gives(any_server):
    server, bucket = any_server
    store = opened(f"s3://{bucket}/run 1 ü")
    for key in KEYS:
        version = await store.put(key, CONTENT)
        for start, end, pinned in ((0, 10_000, None), (0, 1, version), (4321, 9999, version)):
            before = reads(server)
            assert await into_memory(store, start, end, key, pinned) == CONTENT[start:end]
            assert reads(server) == (before[0] + 1, before[1]), key
            assert await store.get_range(key, start, end, pinned) == CONTENT[start:end]
    assert reads(server) == (3 * len(KEYS), 3 * len(KEYS))


async def test_many_at_once(any_server):
    server, bucket = any_server
    store = opened(f"s3://{bucket}/run")
    await store.put("k", CONTENT)
    got = await asyncio.gather(*(into_memory(store, at, at + 777) for at in range(0, 9000, 100)))
    assert got == [CONTENT[at : at + 777] for at in range(0, 9000, 100)]
    assert reads(server) == (90, 0)


async def test_a_pinned_version(server, store):
    version = await store.put("k", CONTENT)
    await into_memory(store, version=version)
    assert server.requests[-1].headers["if-match"] == version
    await store.put("k", CONTENT[::-1])
    with pytest.raises(PreconditionFailed):
        await into_memory(store, version=version)


async def test_a_connection_serves_one_read_after_another(server, store):
    ports = connections(server)
    for _ in range(5):
        await into_memory(store)
    assert len(ports) == 5
    assert len(set(ports)) == 1


def closes_silently(exchange):
    faults.as_it_should(exchange)
    exchange.handler.close_connection = True


def closes_as_it_says(exchange):
    answer = exchange.answer()
    answer.headers["Connection"] = "close"
    exchange.send(answer)


@pytest.mark.parametrize("act", [closes_silently, closes_as_it_says])
async def test_a_connection_that_the_store_closed_is_made_anew(server, store, act):
    server.fault(act)
    for _ in range(3):
        assert await into_memory(store) == CONTENT[100:5100]
    assert reads(server) == (3, 0)


async def test_a_connection_that_idled_long_is_not_used(server, clock):
    reading = to(server)
    ports = connections(server)
    for now in (0, 15, 30, 60):
        clock.now = 1000.0 + now
        assert await filled(reading)
    assert ports[0] == ports[1] == ports[2] != ports[3]


def of_another_range(exchange):
    answer = exchange.answer()
    exchange.send(Answer(206, answer.body, {**answer.headers, "Content-Range": "bytes 101-5100/10000"}))


def of_no_length(exchange):
    body = exchange.answer().body
    headers = {"Content-Range": "bytes 100-5099/10000", "Transfer-Encoding": "chunked", "Content-Length": ""}
    exchange.send(Answer(206, b"1388\r\n" + body + b"\r\n0\r\n\r\n", headers))


def of_no_http(exchange):
    exchange.handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")
    exchange.handler.close_connection = True


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept-alive"])
@pytest.mark.parametrize(
    "act",
    [
        pytest.param(faults.whole_object, id="whole-object"),
        pytest.param(faults.short(7), id="short-body"),
        pytest.param(faults.shorter(7), id="fewer-bytes"),
        pytest.param(of_another_range, id="another-range"),
        pytest.param(of_no_length, id="no-length"),
        pytest.param(of_no_http, id="no-http"),
        pytest.param(faults.page(200), id="page-200"),
        pytest.param(faults.page(206), id="page-206"),
        pytest.param(faults.error_in_200("InternalError"), id="error-in-200"),
        pytest.param(faults.refuse(403, "RequestExpired"), id="refused"),
        pytest.param(faults.refuse(503, "SlowDown"), id="slow-down"),
        pytest.param(faults.refuse(307, "TemporaryRedirect", "", {"Location": "http://127.0.0.1:9/"}), id="redirect"),
        pytest.param(faults.refuse(301, "PermanentRedirect", "", {"Location": "http://127.0.0.1:9/"}), id="moved"),
        pytest.param(faults.reset, id="reset"),
    ],
)
async def test_what_is_odd_is_left_to_obstore(server, store, act, kept):
    if kept:
        await into_memory(store)
    # Twice where there is no answer, which may mean a connection that was closed already.
    fault = server.fault(act, query=SIGNED, times=2 if kept and act in (faults.reset, of_no_http) else 1)
    before = reads(server)[1]
    assert await into_memory(store) == CONTENT[100:5100]
    assert fault.hits == fault.times
    assert reads(server)[1] == before + 1
    assert await into_memory(store) == CONTENT[100:5100], "and nothing is left over on a connection"


async def test_a_read_that_stalls_is_left_to_obstore(server):
    store = opened(request_timeout_s=5)
    await store.put("k", CONTENT)
    store._store._direct._connections._stalled_s = 0.3
    await into_memory(store)
    server.fault(faults.stall, query=SIGNED)
    assert await into_memory(store) == CONTENT[100:5100]
    assert reads(server) == (2, 1), "and not asked again on another connection"


def headers_and_then(sent):
    def act(exchange):
        wfile = exchange.handler.wfile
        wfile.write(b"HTTP/1.1 206 OK\r\nContent-Length: 5000\r\nContent-Range: bytes 100-5099/10000\r\n\r\n")
        wfile.write(CONTENT[100 : 100 + sent])
        faults.stall(exchange)

    return act


@pytest.mark.parametrize("sent", [0, 1, 4999])
async def test_a_body_that_stalls(either, sent):
    reading = to(either, stalled_s=0.2, ca=getattr(either, "cert", None))
    assert await filled(reading)
    fault = either.fault(headers_and_then(sent))
    assert not await filled(reading)
    assert fault.hits == 1
    either.heal()
    assert await filled(reading)


def trickle(exchange):
    """One byte now and again, for ever."""
    exchange.server.trickled = threading.Event()
    exchange.handler.wfile.write(
        b"HTTP/1.1 206 OK\r\nContent-Length: 5000\r\nContent-Range: bytes 100-5099/10000\r\n\r\n"
    )
    try:
        while not exchange.server.released.wait(0.01):
            exchange.handler.wfile.write(b"x")
    except OSError:
        exchange.server.trickled.set()
        raise


async def test_a_whole_read_has_a_limit_too(server):
    reading = to(server, timeout_s=0.3)
    server.fault(trickle)
    assert not await filled(reading)
    assert await asyncio.to_thread(server.trickled.wait, 20), "the connection is closed"


async def test_this_way_is_left_alone_after_failures_and_tried_again_later(server, clock):
    reading = to(server)
    fault = server.fault(faults.page(502))
    for _ in range(6):
        assert not await filled(reading)
    assert fault.hits == 3
    clock.now += 59
    assert not await filled(reading)
    assert fault.hits == 3
    clock.now += 2
    assert not await filled(reading)
    assert not await filled(reading)
    assert fault.hits == 4, "one failure is enough now"
    server.heal()
    clock.now += 61
    assert await filled(reading)
    server.fault(faults.page(502), times=2)
    assert [await filled(reading) for _ in range(3)] == [False, False, True], "all is forgotten"


async def test_refusals_that_are_the_stores_own_do_not_count(server, store):
    for _ in range(5):
        with pytest.raises(NotFound):
            await into_memory(store, key="no/such")
        with pytest.raises(PreconditionFailed):
            await into_memory(store, version='"another"')
    before = reads(server)
    assert await into_memory(store) == CONTENT[100:5100]
    assert reads(server) == (before[0] + 1, before[1])


async def test_a_signature_serves_for_a_while(server, clock):
    reading = to(server)
    for now in (0, 59, 61, 100):
        clock.now = 1000.0 + now
        assert await filled(reading)
    assert [request.query[SIGNED] for request in server.requests] == ["1", "1", "2", "2"]


async def test_a_signature_that_is_refused_is_made_anew(server):
    reading = to(server)
    assert await filled(reading)
    server.fault(faults.refuse(403, "ExpiredToken"), times=1)
    assert not await filled(reading)
    assert await filled(reading)
    assert [request.query[SIGNED] for request in server.requests] == ["1", "1", "2"]


async def test_opening_asks_for_no_credentials_and_a_failure_to_get_them_is_obstores(server, monkeypatch):
    asked = []

    def fails(self):
        asked.append(self)
        raise RuntimeError("no such role")

    monkeypatch.setattr(aws.CredentialProvider, "__call__", fails)
    store = opened()
    assert asked == []
    with pytest.raises(Exception, match="no such role"):
        await into_memory(store)
    assert server.requests == []


async def test_a_version_that_cannot_be_sent(server):
    assert not await filled(to(server), '"a"\r\nX: y')
    assert server.requests == []


async def test_nothing_is_written_after_a_cancellation(either):
    half, gone = threading.Event(), threading.Event()

    def act(exchange):
        answer = exchange.answer()
        exchange.send(answer, cut=2500)
        half.set()
        try:
            # The client goes away, and the rest is sent all the same.
            while exchange.handler.connection.recv(1):
                pass
            gone.set()
            exchange.handler.connection.sendall(answer.body[2500:])
        except OSError:
            gone.set()

    either.fault(act)
    reading = to(either, ca=getattr(either, "cert", None))
    memory = bytearray(5000)
    task = asyncio.create_task(reading.read("k", 100, 5100, [memoryview(memory)], None))
    assert await asyncio.to_thread(half.wait, 20)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    left = bytes(memory)
    assert await asyncio.to_thread(gone.wait, 20), "the connection is closed"
    assert memory == left
    assert reading._connections._idle == []


async def test_a_cancellation_waits_for_the_thread_that_writes(server, monkeypatch):
    writing, may_end = threading.Event(), threading.Event()

    def writes(request, connection):
        writing.set()
        may_end.wait(20)
        request._into[0][:] = b"x" * 5000
        return True

    monkeypatch.setattr(direct._Request, "_exchange", writes)
    memory = bytearray(5000)
    task = asyncio.create_task(to(server).read("k", 100, 5100, [memoryview(memory)], None))
    assert await asyncio.to_thread(writing.wait, 20)
    for _ in range(20):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done(), "however often it is cancelled"
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(memory) == {ord("x")}


async def test_a_cancellation_while_a_read_is_given_up_is_not_lost(server, monkeypatch):
    stopped, may_end = asyncio.Event(), threading.Event()

    def waits(request, connection):
        may_end.wait(20)
        return False

    def stop(request):
        stopped.set()
        return stop_(request)

    stop_ = direct._Request.stop
    monkeypatch.setattr(direct._Request, "_exchange", waits)
    monkeypatch.setattr(direct._Request, "stop", stop)
    task = asyncio.create_task(filled(to(server, timeout_s=0.05)))
    await stopped.wait()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancellation_does_not_wait_for_a_connection():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        async def sign(key):
            return f"https://127.0.0.1:{listening.getsockname()[1]}/{key}?{SIGNED}=1"

        reading = DirectReads(sign, connect_timeout_s=50, stalled_s=50, timeout_s=50)
        memory = bytearray(5)
        task = asyncio.create_task(reading.read("k", 0, 5, [memoryview(memory)], None))
        accepted, _ = await asyncio.to_thread(listening.accept)
        with accepted:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 20)
            accepted.settimeout(20)
            # The handshake has not ended: nobody waited for it.
            assert accepted.recv(1)


async def test_tls_with_an_authority_of_ones_own(secure):
    store = opened(ca_bundle=str(secure.cert))
    await store.put("k", CONTENT)
    ports = connections(secure)
    for _ in range(3):
        assert await into_memory(store) == CONTENT[100:5100]
    assert reads(secure) == (3, 0)
    assert len(set(ports)) == 1


async def test_an_authority_that_nobody_knows(secure):
    with pytest.raises(UntrustedServer):
        await into_memory(opened())
    assert secure.requests == []


async def test_the_bucket_in_the_host_name(server, monkeypatch):
    """Names that only direct reads can look up here, so that nothing else can have read it."""
    names = socket.getaddrinfo

    def looked_up(host, *args, **more):
        return names("127.0.0.1" if host == "bucket.store.test" else host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    port = server.url.rpartition(":")[2]
    # The server takes the first of the path for the bucket.
    server.create_bucket("run")
    server.dialect.objects["run/a b+c"] = (CONTENT, '"v1"', time.time())
    store = opened(endpoint_url=f"http://store.test:{port}", virtual_hosted_style=True)
    assert await into_memory(store, key="a b+c") == CONTENT[100:5100]
    assert server.requests[-1].headers["host"] == f"bucket.store.test:{port}"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"anonymous": True}, id="anonymous"),
        pytest.param({"requester_pays": True}, id="requester-pays"),
        pytest.param({"sse_customer_key": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="}, id="sse-c"),
    ],
)
async def test_what_needs_more_than_a_signed_url(server, store, options):
    assert await into_memory(opened(**options)) == CONTENT[100:5100]
    assert reads(server) == (0, 1)


@pytest.mark.parametrize("how", ["argument", "http_proxy", "all_proxy"])
async def test_through_a_proxy(server, store, how, monkeypatch):
    """The server answers as a proxy too, in the place of one that could be reached without."""
    with FaultServer() as behind:
        options = {"endpoint_url": behind.url}
        if how == "argument":
            options["proxy_url"] = server.url
        else:
            monkeypatch.setenv(how, server.url)
        assert await into_memory(opened(**options)) == CONTENT[100:5100]
        assert behind.requests == []
    assert reads(server) == (0, 1)


async def test_past_a_proxy(server, store, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert await into_memory(opened()) == CONTENT[100:5100]
    assert reads(server) == (1, 0)


async def test_connections_end_with_the_store(server):
    reading = to(server)
    await asyncio.gather(*(filled(reading) for _ in range(8)))
    assert server._http._open
    del reading
    gc.collect()
    deadline = time.monotonic() + 20
    while server._http._open and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    assert not server._http._open
