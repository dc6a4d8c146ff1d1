"""One request that goes wrong, on each engine: a typed error that says what to do, or a correct retry."""

import asyncio
import secrets

import pytest

from ckpt_cloud.errors import (
    AlreadyExists,
    BucketNotFound,
    CkptCloudError,
    PermissionDenied,
    RangeNotSatisfiable,
    RequestRefused,
    StoreUnavailable,
    Throttled,
    WrongRegion,
)
from ckpt_cloud.options import RetryOptions
from ckpt_cloud.stores import CREATE, Replace
from tests.faults import server as faults

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
ONCE = RetryOptions(max_retries=0)


def stream(*buffers):
    async def source():
        for buffer in buffers:
            yield buffer

    return source


def requests_of(store):
    return {
        "put": lambda: store.put("k", b"x"),
        "create": lambda: store.put("k", b"x", CREATE),
        "get": lambda: store.get("k", limit=9),
        "read": lambda: store.get_range("k", 0, 1),
        "list": store.list_children,
        "upload": lambda: store.put_multipart("k", stream(b"x" * 6 * MIB), part_size=5 * MIB, concurrency=2),
        "delete": lambda: store.delete(["k"]),
    }


REQUESTS = ["put", "create", "get", "read", "list", "upload", "delete"]


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize(
    ("act", "kind", "said"),
    [
        pytest.param(faults.refuse(404, "NoSuchBucket"), BucketNotFound, "does not exist", id="bucket"),
        pytest.param(faults.refuse(403, "AccessDenied"), PermissionDenied, "denied", id="denied"),
        pytest.param(faults.refuse(403, "SignatureDoesNotMatch"), PermissionDenied, "secret key", id="secret"),
        pytest.param(faults.refuse(400, "ExpiredToken"), PermissionDenied, "expired", id="expired"),
        pytest.param(faults.refuse(403, "RequestTimeTooSkewed"), PermissionDenied, "clock", id="clock"),
        pytest.param(
            faults.refuse(
                301,
                "PermanentRedirect",
                "<Endpoint>bucket.s3.eu-west-1.amazonaws.com</Endpoint>",
                {"x-amz-bucket-region": "eu-west-1"},
            ),
            WrongRegion,
            "eu-west-1",
            id="redirect",
        ),
        pytest.param(
            faults.refuse(400, "AuthorizationHeaderMalformed", "<Region>eu-west-1</Region>"),
            WrongRegion,
            "eu-west-1",
            id="region",
        ),
        pytest.param(faults.page(403), CkptCloudError, "", id="page-403"),
        pytest.param(faults.page(502), StoreUnavailable, "", id="page-502"),
        pytest.param(faults.refuse(400, "SomethingNew"), RequestRefused, "SomethingNew", id="unknown-400"),
        pytest.param(faults.refuse(500, "InternalError"), StoreUnavailable, "", id="500"),
        pytest.param(faults.refuse(503, "SlowDown"), Throttled, "fewer requests", id="slow-down"),
        pytest.param(faults.refuse(429, "TooManyRequests"), Throttled, "fewer requests", id="429"),
        pytest.param(faults.reset, StoreUnavailable, "", id="reset"),
    ],
)
async def test_a_store_that_always_refuses(server, opened, request_, act, kind, said):
    server.fault(act)
    with pytest.raises(kind) as error:
        await requests_of(opened(retry=RetryOptions(max_retries=1, max_backoff_s=0.01)))[request_]()
    told = str(error.value)
    assert said in told
    assert error.value.url.startswith("s3://bucket/")
    assert "hunter2" not in f"{told} {error.value!r} {getattr(error.value, '__notes__', '')}"
    if kind is WrongRegion:
        assert "AWS_REGION or region= to eu-west-1" in error.value.hint
    assert error.value.hint or kind in (RequestRefused, Throttled)


@pytest.mark.parametrize("request_", [name for name in REQUESTS if name != "create"])
@pytest.mark.parametrize(
    "act",
    [
        pytest.param(faults.refuse(503, "SlowDown"), id="slow-down"),
        pytest.param(faults.refuse(500, "InternalError"), id="500"),
        pytest.param(faults.refuse(429, "TooManyRequests"), id="429"),
        pytest.param(faults.page(502), id="page-502"),
        pytest.param(faults.reset, id="reset"),
        pytest.param(faults.reset_after_it_took_effect, id="lost-answer"),
    ],
)
async def test_what_passes_is_tried_again(server, opened, request_, act):
    store = opened()
    await store.put("k", b"x")
    before = len(server.requests)
    fault = server.fault(act, times=2)
    await requests_of(store)[request_]()
    assert fault.hits == 2
    assert len(server.requests) >= before + 3


@pytest.mark.parametrize("condition", [CREATE, Replace('"0123"')])
@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (faults.refuse(503, "SlowDown"), Throttled),
        (faults.refuse(500, "InternalError"), StoreUnavailable),
        (faults.reset, StoreUnavailable),
        (faults.reset_after_it_took_effect, StoreUnavailable),
        (faults.refuse(409, "ConditionalRequestConflict"), StoreUnavailable),
    ],
    ids=["slow-down", "500", "reset", "lost-answer", "conflict"],
)
async def test_a_conditional_write_is_sent_once_whatever_comes(server, opened, condition, act, kind):
    """A retry below the commit's own loop would turn a success whose answer was lost into a refusal."""
    server.fault(act)
    with pytest.raises(kind):
        await opened().put("COMMIT", b"x", condition)
    assert server.count("PUT") == 1


async def test_conditions_reach_the_store(server, opened):
    store = opened()
    version = await store.put("k", b"1", CREATE)
    with pytest.raises(AlreadyExists):
        await store.put("k", b"2", CREATE)
    await store.put("k", b"2", Replace(version))
    assert [request.headers.get("if-none-match") for request in server.requests] == ["*", "*", None]
    assert server.requests[-1].headers["if-match"] == version


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(faults.whole_object, id="whole-object"),
        pytest.param(faults.short(7), id="short-body"),
        pytest.param(faults.shorter(7), id="fewer-bytes"),
        pytest.param(faults.page(200), id="page-200"),
        pytest.param(faults.error_in_200("InternalError"), id="error-in-200"),
    ],
)
async def test_a_read_of_other_bytes_than_asked_for_is_tried_again(server, opened, act):
    store = opened()
    content = secrets.token_bytes(10_000)
    await store.put("k", content)
    fault = server.fault(act, method="GET", times=2)
    assert bytes(await store.get_range("k", 100, 5100)) == content[100:5100]
    assert fault.hits == 2
    server.fault(act, method="GET")
    with pytest.raises(StoreUnavailable) as error:
        await store.get_range("k", 100, 5100)
    assert not isinstance(error.value, RangeNotSatisfiable)


@pytest.mark.parametrize("act", [faults.short(7), faults.reset], ids=["short-body", "reset"])
async def test_a_whole_read_that_breaks_off_is_tried_again(server, opened, act):
    store = opened()
    content = secrets.token_bytes(10_000)
    await store.put("k", content)
    server.fault(act, method="GET", times=2)
    assert (await store.get("k", limit=MIB))[0] == content


async def test_a_read_that_stalls_is_given_up_and_tried_again(server, opened):
    store = opened(request_timeout_s=0.5)
    await store.put("k", b"0123456789")
    server.fault(faults.stall, method="GET", times=1)
    assert bytes(await store.get_range("k", 2, 5)) == b"234"


@pytest.mark.parametrize("query", ["uploads", "partNumber", "uploadId"])
@pytest.mark.parametrize(
    "act",
    [
        pytest.param(faults.refuse(503, "SlowDown"), id="slow-down"),
        pytest.param(faults.refuse(500, "InternalError"), id="500"),
        pytest.param(faults.reset, id="reset"),
        pytest.param(faults.reset_after_it_took_effect, id="lost-answer"),
    ],
)
async def test_an_upload_survives(server, opened, query, act):
    store = opened()
    content = secrets.token_bytes(11 * MIB)
    server.fault(act, query=query, times=2)
    await store.put_multipart("k", stream(content[: 6 * MIB], content[6 * MIB :]), part_size=5 * MIB, concurrency=2)
    (stored,) = [data for name, (data, _, _) in server.dialect.objects.items() if name.endswith("/k")]
    assert stored == content


async def test_a_part_that_fails_is_sent_again_by_itself(server, opened):
    fault = server.fault(faults.refuse(500, "InternalError"), query="partNumber", times=2, after=1)
    await opened().put_multipart("k", stream(b"x" * (16 * MIB)), part_size=5 * MIB, concurrency=1)
    assert fault.hits == 2
    assert server.count("PUT", "partNumber") == 6, "four parts, and one of them twice more"
    assert server.count("POST", "uploads") == 1


async def test_a_completion_that_fails_in_a_200_is_no_success(server, opened):
    store = opened()
    content = secrets.token_bytes(6 * MIB)
    fault = server.fault(faults.error_in_200("InternalError"), method="POST", query="uploadId", times=1)
    await store.put_multipart("k", stream(content), part_size=5 * MIB, concurrency=2)
    assert fault.hits == 1
    assert [data for data, _, _ in server.dialect.objects.values()] == [content]


async def test_an_upload_that_fails_for_good_is_aborted(server, opened):
    server.fault(faults.refuse(403, "AccessDenied"), query="partNumber", after=1)
    with pytest.raises(PermissionDenied):
        await opened().put_multipart("k", stream(b"x" * (16 * MIB)), part_size=5 * MIB, concurrency=1)
    assert server.dialect.uploads == {}
    assert server.dialect.objects == {}


async def test_a_token_that_expires_in_the_middle_of_an_upload(server, opened):
    server.fault(faults.refuse(400, "ExpiredToken"), query="partNumber", after=1)
    with pytest.raises(PermissionDenied, match="expired") as error:
        await opened().put_multipart("k", stream(b"x" * (16 * MIB)), part_size=5 * MIB, concurrency=1)
    assert "aws sso login" in error.value.hint
    assert server.dialect.objects == {}


async def test_bytes_that_change_on_their_way_up_are_refused_by_the_store(server, opened):
    """With `store_checksums`, of what goes as one request."""
    store = opened(store_checksums=True)
    fault = server.fault(faults.flipped_on_the_way_up, method="PUT", times=1)
    await store.put("k", b"content")
    assert fault.hits == 1
    assert server.count("PUT") == 2
    assert [data for data, _, _ in server.dialect.objects.values()] == [b"content"]


async def test_fewer_requests_fly_while_the_store_throttles(server, opened):
    """32 lanes meet a store that takes 6 at a time: all is read, and the crowd thins out."""
    store = opened(retry=RetryOptions(max_retries=200, deadline_s=50, max_backoff_s=0.02))
    await store.put("k", b"0123456789")
    server.most_in_flight = 6

    async def lane():
        for _ in range(8):
            assert bytes(await store.get_range("k", 2, 5)) == b"234"

    await asyncio.gather(*(lane() for _ in range(32)))
    server.peak_in_flight = 0
    await asyncio.gather(*(lane() for _ in range(32)))
    assert server.peak_in_flight <= 20
    store.pace.limit = 4
    server.most_in_flight = 64
    await asyncio.gather(*(lane() for _ in range(32)))
    assert store.pace.limit > 12, "more again"


async def test_fewer_parts_fly_while_the_store_throttles(server, opened):
    store = opened(retry=RetryOptions(max_retries=50, deadline_s=50, max_backoff_s=0.02))
    server.fault(faults.refuse(503, "SlowDown"), query="partNumber", times=30)
    content = secrets.token_bytes(MIB) * 40
    await store.put_multipart("k", stream(content), part_size=5 * MIB, concurrency=8)
    assert store.pace.limit is not None
    assert [data for data, _, _ in server.dialect.objects.values()] == [content]
    server.heal()
    store.pace.limit = 2
    server.peak_in_flight, server.most_in_flight = 0, 99
    await store.put_multipart("k", stream(content), part_size=5 * MIB, concurrency=8)
    assert server.peak_in_flight <= 4
