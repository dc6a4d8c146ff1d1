"""The fsspec engine beside the conformance suite: what is sent once, what is let go, and what errors become."""

import asyncio
import base64
import gc
import itertools
import threading
import weakref
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud import errors as ours
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import ANY, CREATE, Replace, parse_url
from ckpt_cloud.stores.fsspec_engine import errors, open_fsspec
from ckpt_cloud.stores.fsspec_engine.loops import at_once, on_loop
from ckpt_cloud.stores.fsspec_engine.parts import Parts, in_lanes, joined

KEY = base64.b64encode(b"hunter2" * 8).decode()
MIB = 1 << 20


@contextmanager
def server(decide):
    """An HTTP server that notes each request and answers with a status, or hangs up where that is None."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __getattr__(self, name):
            if name.startswith("do_"):
                return self.answer
            raise AttributeError(name)

        def answer(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(f"{self.command} {self.path}")
            status = decide(seen)
            if status is None:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", seen
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def opened(dialect, endpoint, **more):
    if dialect == "s3":
        options = StoreOptions(endpoint_url=endpoint, access_key_id="someone", secret_access_key=KEY, **more)
        return open_fsspec(parse_url("s3://bucket/run"), options)
    if dialect == "user's s3":
        fs = fsspec.filesystem("s3", key="someone", secret=KEY, endpoint_url=endpoint, skip_instance_cache=True)
        return open_fsspec(parse_url("s3://bucket/run"), StoreOptions(filesystem=fs))
    if dialect == "gcs":
        return open_fsspec(parse_url("gs://bucket/run"), StoreOptions(endpoint_url=endpoint, anonymous=True, **more))
    options = StoreOptions(endpoint_url=f"{endpoint}/someone", account_name="someone", account_key=KEY, **more)
    return open_fsspec(parse_url("az://bucket/run"), options)


DIALECTS = ["s3", "user's s3", "gcs", "azure"]


CONDITIONS = {"any": ANY, "create": CREATE, "replace": Replace('"1"')}
# How often an unconditional request is sent is the user's choice where the filesystem is theirs.
SENT_ONCE = [pair for pair in itertools.product(DIALECTS, CONDITIONS) if pair != ("user's s3", "any")]


@pytest.mark.parametrize("status", [None, 500, 503], ids=["hang-up", "500", "503"])
@pytest.mark.parametrize(("dialect", "condition"), SENT_ONCE)
async def test_a_put_is_sent_once(dialect, status, condition):
    with server(lambda _: status) as (endpoint, seen):
        store = opened(dialect, endpoint)
        with pytest.raises(ours.TryAgain) as failure:
            await store.put("k", b"x", CONDITIONS[condition])
    assert len(seen) == 1
    assert "hunter2" not in f"{failure.value!r}{failure.value}{failure.value.__notes__}{store!r}"
    assert KEY not in f"{failure.value!r}{failure.value}{failure.value.__notes__}{store!r}"


@pytest.mark.parametrize("dialect", ["s3", "gcs", "azure"])
async def test_a_put_on_a_connection_that_was_kept_is_sent_once(dialect):
    # 404 keeps the connection, on which the next request then breaks.
    with server(lambda seen: 404 if len(seen) == 1 else None) as (endpoint, seen):
        store = opened(dialect, endpoint)
        with pytest.raises(ours.CkptCloudError):
            await store.put("k", b"first")
        seen[1:] = []
        with pytest.raises(ours.StoreUnavailable):
            await store.put("k", b"second", CREATE)
    assert len(seen) == 2


@pytest.mark.parametrize("dialect", ["s3", "gcs", "azure"])
async def test_a_silent_server_is_given_up(dialect, monkeypatch):
    silence = threading.Event()
    with server(lambda _: silence.wait(10) and None) as (endpoint, _):
        store = opened(dialect, endpoint)
        object.__setattr__(store._options, "request_timeout_s", 0.2)
        try:
            with pytest.raises(ours.StoreUnavailable):
                await store.put("k", b"x")
        finally:
            silence.set()


# Parts


def source_of(buffers):
    async def stream():
        for buffer in buffers:
            yield buffer

    return stream()


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 30))
def test_parts_are_the_stream_cut_exactly(buffers, part_size):
    async def collect():
        parts, found = Parts(source_of(buffers), part_size), []
        while (part := await parts.next()) is not None:
            found.append((joined(part.pieces), part.size))
        assert await parts.next() is None
        return found

    found = asyncio.run(collect())
    whole = b"".join(buffers)
    assert [data for data, _ in found] == [whole[at : at + part_size] for at in range(0, len(whole), part_size)]
    assert [size for _, size in found] == [len(data) for data, _ in found]


@given(st.lists(st.integers(0, 40), max_size=20), st.integers(1, 30), st.integers(1, 4))
def test_no_more_parts_are_held_than_allowed(sizes, part_size, concurrency):
    """A source whose pieces end where parts do, as the one that counts parts in flight."""
    total = sum(sizes)
    pieces = [min(part_size, total - at) for at in range(0, total, part_size)]
    live = peak = 0

    def gone():
        nonlocal live
        live -= 1

    async def source():
        nonlocal live, peak
        for size in pieces:
            view = [memoryview(bytes(size))]
            weakref.finalize(view[0], gone)
            live += 1
            peak = max(peak, live)
            yield view.pop()

    sent = []

    async def send(number, part):
        await asyncio.sleep(0)
        sent.append(number)
        return joined(part.pieces)

    async def go():
        return await in_lanes(Parts(source(), part_size).next, send, concurrency=concurrency)

    assert [len(data) for data in asyncio.run(go())] == pieces
    assert sorted(sent) == list(range(len(pieces)))
    assert peak <= concurrency + 1
    assert live == 0


async def test_pieces_are_held_until_their_part_is_sent():
    piece = memoryview(bytearray(b"12345"))
    alive = weakref.ref(piece)
    pieces = [piece]
    del piece

    async def source():
        yield pieces.pop()

    part = await Parts(source(), 5).next()
    gc.collect()
    assert alive() is not None
    part.release()
    assert alive() is None


async def test_nothing_is_copied_that_is_one_already():
    data = b"12345"
    part = await Parts(source_of([data]), 5).next()
    assert joined(part.pieces) is data


async def test_the_first_failure_comes_out_as_it_is():
    async def source():
        yield b"12"
        raise KeyError("the source gave up")

    async def send(number, part):
        await asyncio.sleep(60)

    with pytest.raises(KeyError, match="gave up"):
        await in_lanes(Parts(source(), 1).next, send, concurrency=2)


async def test_a_part_that_fails_ends_a_source_that_waits():
    ended = []

    async def source():
        try:
            yield b"1"
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def send(number, part):
        raise ours.Throttled("slow down")

    with pytest.raises(ours.Throttled):
        await in_lanes(Parts(source(), 1).next, send, concurrency=2)
    assert ended == [True]


# Loops


@pytest.fixture
def other_loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def test_work_runs_on_the_other_loop(other_loop):
    async def where():
        return asyncio.get_running_loop()

    assert await on_loop(other_loop, where) is other_loop
    assert await on_loop(asyncio.get_running_loop(), where) is asyncio.get_running_loop()


async def test_a_failure_crosses(other_loop):
    async def fails():
        raise KeyError("over there")

    with pytest.raises(KeyError, match="over there"):
        await on_loop(other_loop, fails)


async def test_a_cancellation_crosses_and_waits_for_the_end(other_loop):
    events = []

    async def slow():
        events.append("began")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            events.append("ended")

    task = asyncio.create_task(on_loop(other_loop, slow))
    while not events:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert events == ["began", "ended"]


async def test_a_cancellation_before_the_beginning(other_loop):
    async def work():
        await asyncio.sleep(0)

    task = asyncio.create_task(on_loop(other_loop, work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_at_once_keeps_order_and_stops_at_a_failure():
    async def slow(number):
        await asyncio.sleep(0.01 / (number + 1))
        return number

    assert await at_once([lambda n=n: slow(n) for n in range(5)], limit=2) == [0, 1, 2, 3, 4]

    async def fails():
        raise KeyError("no")

    with pytest.raises(KeyError):
        await at_once([fails, lambda: asyncio.sleep(60)], limit=2)


# Errors


def s3_error(code, status):
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": code, "Message": "words"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")


def azure_error(kind, code, status):
    from azure.core import exceptions

    response = SimpleNamespace(status_code=status, reason="because", headers={})
    error = getattr(exceptions, kind)(message=f"no\nsignature hunter2 {code}", response=response)
    error.error_code = code
    return error


def lazily(path, *args, **kwargs):
    module, _, name = path.rpartition(".")
    return lambda: getattr(__import__(module, fromlist=["_"]), name)(*args, **kwargs)


CASES = [
    ("s3", lambda: s3_error("NoSuchKey", 404), ours.NotFound),
    ("s3", lambda: s3_error("404", 404), ours.NotFound),
    ("s3", lambda: s3_error("NoSuchUpload", 404), ours.StoreUnavailable),
    ("s3", lambda: s3_error("NoSuchBucket", 404), ours.BucketNotFound),
    ("s3", lambda: s3_error("PreconditionFailed", 412), ours.PreconditionFailed),
    ("s3", lambda: s3_error("412", 412), ours.PreconditionFailed),
    ("s3", lambda: s3_error("ConditionalRequestConflict", 409), ours.StoreUnavailable),
    ("s3", lambda: s3_error("AccessDenied", 403), ours.PermissionDenied),
    ("s3", lambda: s3_error("403", 403), ours.PermissionDenied),
    ("s3", lambda: s3_error("SignatureDoesNotMatch", 403), ours.PermissionDenied),
    ("s3", lambda: s3_error("SlowDown", 503), ours.Throttled),
    ("s3", lambda: s3_error("TooManyRequests", 429), ours.Throttled),
    ("s3", lambda: s3_error("InternalError", 500), ours.StoreUnavailable),
    ("s3", lambda: s3_error("Unheard", 501), ours.Unsupported),
    ("s3", lambda: s3_error("InvalidArgument", 400), ours.RequestRefused),
    ("s3", lambda: s3_error("PermanentRedirect", 301), ours.WrongRegion),
    ("s3", lazily("botocore.exceptions.NoCredentialsError"), ours.MissingCredentials),
    ("s3", lazily("botocore.exceptions.EndpointConnectionError", endpoint_url="http://x"), ours.StoreUnavailable),
    ("s3", lazily("botocore.exceptions.ReadTimeoutError", endpoint_url="http://x"), ours.StoreUnavailable),
    (
        "s3",
        lazily("botocore.exceptions.IncompleteReadError", actual_bytes=1, expected_bytes=2),
        ours.StoreUnavailable,
    ),
    ("s3", lazily("botocore.exceptions.ParamValidationError", report="no"), ours.RequestRefused),
    ("s3", lazily("aiohttp.ClientPayloadError", "broken off"), ours.StoreUnavailable),
    ("gcs", lambda: FileNotFoundError("b/o"), ours.NotFound),
    ("gcs", lambda: FileExistsError("b/o"), ours.PreconditionFailed),
    ("gcs", lambda: OSError("Forbidden: b/o\nno"), ours.PermissionDenied),
    ("gcs", lambda: ValueError("Bad Request: invalid"), ours.RequestRefused),
    ("gcs", lazily("gcsfs.retry.HttpError", {"code": 401, "message": "Invalid Credentials"}), ours.PermissionDenied),
    ("gcs", lazily("gcsfs.retry.HttpError", {"code": 429, "message": "slow"}), ours.Throttled),
    ("gcs", lazily("gcsfs.retry.HttpError", {"code": "503", "message": "no"}), ours.StoreUnavailable),
    ("gcs", lazily("gcsfs.retry.HttpError", {"code": 400, "message": "no"}), ours.RequestRefused),
    ("gcs", lazily("requests.exceptions.ProxyError"), ours.StoreUnavailable),
    ("gcs", lazily("aiohttp.ServerDisconnectedError"), ours.StoreUnavailable),
    ("gcs", lambda: ConnectionResetError(104, "reset"), ours.StoreUnavailable),
    ("gcs", lazily("google.auth.exceptions.DefaultCredentialsError", "none"), ours.MissingCredentials),
    ("gcs", lazily("google.auth.exceptions.TransportError", "no route"), ours.StoreUnavailable),
    ("azure", lambda: azure_error("ResourceNotFoundError", "BlobNotFound", 404), ours.NotFound),
    ("azure", lambda: azure_error("ResourceNotFoundError", "ContainerNotFound", 404), ours.BucketNotFound),
    ("azure", lambda: azure_error("ResourceExistsError", "BlobAlreadyExists", 409), ours.AlreadyExists),
    ("azure", lambda: azure_error("ResourceModifiedError", "ConditionNotMet", 412), ours.PreconditionFailed),
    ("azure", lambda: azure_error("ClientAuthenticationError", "AuthenticationFailed", 403), ours.PermissionDenied),
    ("azure", lambda: azure_error("HttpResponseError", "ServerBusy", 503), ours.Throttled),
    ("azure", lambda: azure_error("HttpResponseError", "OperationTimedOut", 500), ours.StoreUnavailable),
    ("azure", lambda: azure_error("HttpResponseError", "Unheard", 400), ours.RequestRefused),
    ("azure", lazily("azure.core.exceptions.ServiceRequestError", "refused"), ours.StoreUnavailable),
    ("azure", lazily("azure.core.exceptions.ServiceResponseError", "reset"), ours.StoreUnavailable),
    ("azure", lazily("azure.core.exceptions.ClientAuthenticationError", "none"), ours.MissingCredentials),
    ("files", lambda: FileNotFoundError(2, "gone"), ours.NotFound),
    ("files", lambda: FileExistsError(17, "there"), ours.AlreadyExists),
    ("files", lambda: PermissionError(13, "no"), ours.PermissionDenied),
    ("files", lambda: OSError(28, "No space left on device"), ours.RequestRefused),
    ("files", lambda: OSError(5, "Input/output error"), ours.StoreUnavailable),
    ("files", TimeoutError, ours.StoreUnavailable),
    ("files", NotImplementedError, ours.Unsupported),
    ("files", lambda: ValueError("bad path"), ours.RequestRefused),
    ("files", lambda: Exception("a library's own"), ours.StoreUnavailable),
]
TABLES = {"s3": errors.of_s3, "gcs": errors.of_gcs, "azure": errors.of_azure, "files": errors.of_files}


@pytest.mark.parametrize(("library", "made", "expected"), CASES, ids=range(len(CASES)))
def test_foreign_errors(library, made, expected):
    error = made()
    with pytest.raises(ours.CkptCloudError) as raised, errors.translated("put", "s3://b/k", TABLES[library]):
        raise error
    assert type(raised.value) is expected, raised.value
    assert raised.value.url == "s3://b/k"
    assert raised.value.message.startswith("put: ")
    assert raised.value.__notes__
    assert "hunter2" not in f"{raised.value}{raised.value.__notes__}"
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("library", TABLES)
def test_our_own_errors_and_mistakes_pass(library):
    for error in (ours.Damaged("as it is"), TypeError("a mistake"), KeyError("another")):
        with pytest.raises(type(error)) as raised, errors.translated("put", "s3://b/k", TABLES[library]):
            raise error
        assert raised.value is error


# Opening


@pytest.mark.parametrize(
    ("url", "library", "extra"),
    [("s3://b/k", "s3fs", "s3"), ("gs://b/k", "gcsfs.core", "gcs"), ("az://b/k", "adlfs", "azure")],
)
def test_a_missing_library_is_named(url, library, extra, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ours.Unsupported) as missing:
        open_fsspec(parse_url(url), StoreOptions(account_name="someone", anonymous=True))
    assert f"pip install 'ckpt-cloud[{extra}]'" in missing.value.hint
    assert library.partition(".")[0] in missing.value.message


def test_a_missing_library_of_another_scheme(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "paramiko", None)
    with pytest.raises(ours.Unsupported) as missing:
        open_fsspec(parse_url("sftp://host/k"), StoreOptions())
    assert "paramiko" in missing.value.hint


def test_an_asynchronous_filesystem_is_refused():
    fs = fsspec.filesystem("s3", anon=True, asynchronous=True, skip_instance_cache=True)
    with pytest.raises(ours.Unsupported, match="asynchronous=True"):
        open_fsspec(parse_url("s3://b/k"), StoreOptions(filesystem=fs))


def test_no_credentials_anywhere(monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/at/all.json")
    with pytest.raises(ours.CkptCloudError):
        open_fsspec(parse_url("gs://b/k"), StoreOptions())
    with pytest.raises(ours.MissingCredentials):
        open_fsspec(parse_url("az://b/k"), StoreOptions())


async def test_no_credentials_on_s3(monkeypatch):
    store = open_fsspec(parse_url("s3://b/k"), StoreOptions(endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(ours.MissingCredentials):
        await store.get("k", limit=1)


@pytest.mark.parametrize("dialect", ["s3", "gcs", "azure"])
async def test_a_proxy_is_asked(dialect):
    with server(lambda _: 503) as (endpoint, seen):
        store = opened(dialect, "http://store.invalid", proxy_url=endpoint)
        with pytest.raises(ours.TryAgain):
            await store.put("k", b"x")
    (request,) = seen
    assert request.split()[1].startswith("http://store.invalid")


@pytest.mark.parametrize("dialect", ["s3", "gcs", "azure"])
async def test_an_unreachable_server(dialect):
    store = opened(dialect, "http://127.0.0.1:9")
    for request in (lambda: store.put("k", b"x"), lambda: store.get("k", limit=1), store.list_children):
        with pytest.raises(ours.StoreUnavailable):
            await request()


async def test_an_asynchronous_filesystem_of_no_engine_of_its_own():
    from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

    fs = AsyncFileSystemWrapper(fsspec.filesystem("memory"), asynchronous=False)
    store = open_fsspec(parse_url("memory://wrapped/run"), StoreOptions(filesystem=fs))
    await store.put("a/k", b"0123456789")
    assert bytes(await store.get_range("a/k", 2, 5)) == b"234"
    assert [info.key async for info in store.list()] == ["a/k"]
    assert await store.list_children() == ["a"]
    with pytest.raises(ours.Unsupported):
        await store.put("k", b"x", CREATE)
    await store.delete(["a/k", "gone"])
    assert [info.key async for info in store.list()] == []


async def test_the_root_of_a_filesystem():
    fs = fsspec.filesystem("memory", global_store=False, skip_instance_cache=True)
    from fsspec.implementations.dirfs import DirFileSystem

    store = open_fsspec(parse_url("memory://x/run"), StoreOptions(filesystem=DirFileSystem("/deep/down", fs=fs)))
    await store.put("k", b"x")
    assert fs.find("/") == ["/deep/down/x/run/k"]
    assert [info.key async for info in store.list()] == ["k"]


async def test_a_filesystem_of_a_users_own_class():
    class Tree(fsspec.get_filesystem_class("memory")):
        """As a library may derive one."""

    store = open_fsspec(parse_url("memory://tree/run"), StoreOptions(filesystem=Tree(skip_instance_cache=True)))
    await store.put("k", b"x", CREATE)
    with pytest.raises(ours.AlreadyExists):
        await store.put("k", b"y", CREATE)
    await store.delete(["k"])


def test_encryption_goes_with_the_requests_that_take_it():
    options = StoreOptions(server_side_encryption="aws:kms", sse_kms_key_id="alias/mine", sse_bucket_key=True)
    store = open_fsspec(parse_url("s3://b/k"), options)
    assert store._fs.s3_additional_kwargs == {
        "ServerSideEncryption": "aws:kms",
        "SSEKMSKeyId": "alias/mine",
        "BucketKeyEnabled": True,
    }


def test_a_filesystem_that_reaches_nobody_as_it_is_made():
    with pytest.raises(ours.StoreUnavailable, match=r"open: no answer \(refused\)"):
        open_fsspec(parse_url("ftp://127.0.0.1:9/run"), StoreOptions())
