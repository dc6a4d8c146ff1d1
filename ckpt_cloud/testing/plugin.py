"""A pytest plug-in with two fixtures, `checkpoint_url` and `store_faults`; loaded by its entry point.

Nothing but pytest is imported before a fixture is used.
"""

from __future__ import annotations

import html
import http.client
import os
import re
import secrets
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ckpt_cloud.testing.faulty import Faults

_HOST = "127.0.0.1"
_TIMEOUT_S = 30.0
_SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, "
    "Signature=0"
}
"""moto asks that requests are signed, and checks no signature."""
_KEY = re.compile(r"<Key>(.*?)</Key>", re.DOTALL)


@pytest.fixture
def checkpoint_url(ckpt_cloud_s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh `s3://bucket/prefix` URL on an S3 server (moto) inside this process, which other processes reach too.

    The `AWS_*` variables lead there during the test, and to nowhere else. What the test stored is deleted after it.
    """
    bucket = f"test-{secrets.token_hex(8)}"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in _environment(ckpt_cloud_s3_port).items():
        monkeypatch.setenv(name, value)
    _request(ckpt_cloud_s3_port, "PUT", f"/{bucket}")
    yield f"s3://{bucket}/run"
    _empty(ckpt_cloud_s3_port, bucket)


@pytest.fixture
def store_faults() -> Iterator[Faults]:
    """A `Faults` that all stores obey which ckpt_cloud opens in this process during the test."""
    from ckpt_cloud.testing.faulty import Faults

    faults = Faults()
    with faults.everywhere():
        yield faults
    faults.clear()


@pytest.fixture(scope="session")
def ckpt_cloud_s3_port() -> Iterator[int]:
    """The port of the one server of this session."""
    try:
        from moto.server import ThreadedMotoServer
    except ModuleNotFoundError as missing:
        reason = f"checkpoint_url needs moto and its server ({missing}): pip install 'ckpt-cloud[testing]'"
        pytest.fail(reason, pytrace=False)
    server = ThreadedMotoServer(_HOST, 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


def _environment(port: int) -> dict[str, str]:
    """Leads boto3, s3fs, obstore and ckpt_cloud to the server, past the machine's own configuration and proxies."""
    beside = [os.environ[name] for name in ("NO_PROXY", "no_proxy") if os.environ.get(name)]
    no_proxy = ",".join([*beside, _HOST])
    return {
        "AWS_ENDPOINT_URL": f"http://{_HOST}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
    }


def _empty(port: int, bucket: str) -> None:
    """Deletes the bucket and all that is in it."""
    before: list[str] = []
    while (keys := _KEY.findall(_request(port, "GET", f"/{bucket}?list-type=2").decode())) != before:
        for key in keys:
            _request(port, "DELETE", f"/{bucket}/{urllib.parse.quote(html.unescape(key))}")
        before = keys
    _request(port, "DELETE", f"/{bucket}")


def _request(port: int, method: str, path: str) -> bytes:
    """What the server answers; without a library for S3, which would bring its own configuration."""
    connection = http.client.HTTPConnection(_HOST, port, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, headers=_SIGNED)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status >= http.client.BAD_REQUEST and answer.status != http.client.NOT_FOUND:
        raise RuntimeError(f"the test's S3 server answers {answer.status} to {method} {path}: {body[:500]!r}")
    return body
