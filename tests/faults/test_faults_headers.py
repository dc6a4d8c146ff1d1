"""What goes over the line for each option, on each engine: seen by the server, not by looking inside a library."""

import base64
import secrets

import pytest

from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url

MIB = 1 << 20
CUSTOMER_KEY = base64.b64encode(b"k" * 32).decode()
SSE = "x-amz-server-side-encryption"


def stream(*buffers):
    async def source():
        for buffer in buffers:
            yield buffer

    return source


@pytest.fixture
def sent(server, opened):
    """Sends one of each request with the options, and gives their headers by name."""

    async def sent(**options):
        store = opened("p", **options)
        await store.put("k", b"0123456789")
        await store.put_multipart("big", stream(b"x" * (6 * MIB)), part_size=5 * MIB, concurrency=1)
        await store.get_range("k", 2, 5)
        await store.list_children()
        found = {}
        for request in server.requests:
            name = {"PUT": "put", "GET": "read", "POST": "post"}[request.method]
            if "uploads" in request.query:
                name = "begin"
            elif "uploadId" in request.query:
                name = "part" if request.method == "PUT" else "complete"
            elif request.method == "GET" and not request.key:
                name = "list"
            found.setdefault(name, request)
        assert set(found) == {"put", "begin", "part", "complete", "read", "list"}
        return found

    return sent


async def test_nothing_special_by_default(sent):
    for request in (await sent()).values():
        assert not [name for name in request.headers if name.startswith((SSE, "x-amz-request-payer"))]
        assert request.headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=someone/")
        assert request.headers.get("x-amz-content-sha256", "UNSIGNED-PAYLOAD") != "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"


async def test_sse_s3(sent):
    found = await sent(server_side_encryption="AES256")
    for name in ("put", "begin"):
        assert found[name].headers[SSE] == "AES256"
    for name in ("part", "complete", "read", "list"):
        assert SSE not in found[name].headers, "S3 refuses it where nothing is encrypted"


async def test_sse_kms(sent):
    found = await sent(server_side_encryption="aws:kms", sse_kms_key_id="arn:aws:kms:key", sse_bucket_key=True)
    for name in ("put", "begin"):
        assert found[name].headers[SSE] == "aws:kms"
        assert found[name].headers[f"{SSE}-aws-kms-key-id"] == "arn:aws:kms:key"
        assert found[name].headers[f"{SSE}-bucket-key-enabled"] == "true"
    for name in ("part", "read", "list"):
        assert SSE not in found[name].headers


async def test_sse_c(sent):
    found = await sent(sse_customer_key=CUSTOMER_KEY)
    for name in ("put", "begin", "part", "read"):
        assert found[name].headers[f"{SSE}-customer-algorithm"] == "AES256"
        assert found[name].headers[f"{SSE}-customer-key"] == CUSTOMER_KEY
        assert f"{SSE}-customer-key-md5" in found[name].headers
    assert f"{SSE}-customer-key" not in found["list"].headers
    assert CUSTOMER_KEY not in repr(StoreOptions(sse_customer_key=CUSTOMER_KEY))


async def test_requester_pays(sent):
    for name, request in (await sent(requester_pays=True)).items():
        assert request.headers.get("x-amz-request-payer") == "requester", name


def checksums(request):
    return {name for name in request.headers if name.startswith("x-amz-checksum-crc")}


async def test_no_checksum_unless_asked_for(sent):
    found = await sent()
    assert not checksums(found["put"])
    assert not checksums(found["part"])


@pytest.mark.parametrize("how", ["argument", "environment", "config"])
async def test_checksums(sent, how, monkeypatch, tmp_path):
    options = {}
    if how == "argument":
        options["store_checksums"] = True
    elif how == "environment":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    else:
        (tmp_path / "config").write_text("[default]\nrequest_checksum_calculation = when_supported\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    found = await sent(**options)
    assert checksums(found["put"])
    assert checksums(found["part"])


async def test_the_argument_wins_over_the_environment(sent, monkeypatch):
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    assert not checksums((await sent(store_checksums=False))["put"])


async def test_anonymous(sent):
    assert all("authorization" not in request.headers for request in (await sent(anonymous=True)).values())


@pytest.mark.parametrize("virtual", [True, False, None])
async def test_addressing(server, opened, virtual):
    """Through the fault server as a proxy, since its own address has no wildcards."""
    for bucket in ("bucket", "p"):
        server.create_bucket(bucket)
    store = opened("p", endpoint_url="http://s3.example.test", proxy_url=server.url, virtual_hosted_style=virtual)
    await store.put("k", b"x")
    request = server.requests[0]
    if virtual:
        assert (request.headers["host"], request.bucket, request.key) == ("bucket.s3.example.test", "p", "k")
    else:
        assert (request.headers["host"], request.bucket, request.key) == ("s3.example.test", "bucket", "p/k")


async def test_addressing_as_the_aws_config_says(server, opened, monkeypatch, tmp_path):
    (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    server.create_bucket("p")
    store = opened("p", endpoint_url="http://s3.example.test", proxy_url=server.url)
    await store.put("k", b"x")
    assert server.requests[0].headers["host"] == "bucket.s3.example.test"


async def test_credentials_are_renewed_in_the_middle_of_an_upload(server, engine, monkeypatch, tmp_path):
    """By a process that the AWS config names, whose keys are out of date at once."""
    count = tmp_path / "count"
    script = tmp_path / "keys.sh"
    script.write_text(
        f"""#!/bin/sh
echo x >> {count}
number=$(wc -l < {count})
echo '{{"Version": 1, "AccessKeyId": "key-'$number'", "SecretAccessKey": "s", "SessionToken": "t",'
echo '"Expiration": "'$(date -u -d '+3 seconds' +%Y-%m-%dT%H:%M:%SZ)'"}}'
"""
    )
    script.chmod(0o700)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {script}\nregion = us-east-1\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    store = open_store(parse_url("s3://bucket/p"), StoreOptions(engine=engine))
    await store.put_multipart("k", stream(*[secrets.token_bytes(5 * MIB)] * 6), part_size=5 * MIB, concurrency=1)
    keys = {request.headers["authorization"].split("Credential=")[1].split("/")[0] for request in server.requests}
    assert len(keys) > 1
    assert all(key.startswith("key-") for key in keys)
    assert all(request.headers["x-amz-security-token"] == "t" for request in server.requests)


def test_half_an_encryption_is_refused():
    for wrong in (
        {"sse_kms_key_id": "x"},
        {"server_side_encryption": "AES256", "sse_kms_key_id": "x"},
        {"server_side_encryption": "rot13"},
        {"sse_customer_key": "short"},
        {"sse_customer_key": CUSTOMER_KEY, "server_side_encryption": "AES256"},
    ):
        with pytest.raises(InvalidOption):
            StoreOptions(**wrong)
