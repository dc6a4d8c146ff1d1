"""Servers to test, each started once and shared; what a test starts besides, it stops."""

import os
import secrets
import threading
import time
from contextlib import ExitStack

import boto3
import botocore.exceptions
import pytest
import requests
from botocore.config import Config

import localstack
from localstack.dialects.shared_key import signed
from localstack.recipes.azurite import VARIABLE

IN_CI = os.environ.get("CI") == "true"
# The fixture that clears the environment for each test takes this too.
AZURITE = os.environ.get(VARIABLE)


@pytest.fixture(autouse=True)
def where_azurite_is(nobodys_cloud, monkeypatch):
    if AZURITE:
        monkeypatch.setenv(VARIABLE, AZURITE)


@pytest.fixture
def installed(where_azurite_is):
    """Skips a test whose server is not on this machine; in CI that is an error."""

    def check(name):
        reason = localstack.missing(name)
        if reason and not IN_CI:
            pytest.skip(f"{name}: {reason}")
        assert reason is None

    return check


@pytest.fixture(scope="session")
def started():
    """Running servers by name."""
    with ExitStack() as stack:
        servers = {}

        def get(name):
            if name not in servers:
                servers[name] = stack.enter_context(localstack.start(name))
            return servers[name]

        yield get


@pytest.fixture(params=localstack.names())
def server(request, started, installed):
    """Each server in turn."""
    installed(request.param)
    return started(request.param)


class S3Bucket:
    def __init__(self, env, name):
        self._name = name
        self._client = boto3.session.Session().client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
            region_name=env["AWS_REGION"],
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def put(self, key, data, *, only_new=False):
        condition = {"IfNoneMatch": "*"} if only_new else {}
        try:
            answer = self._client.put_object(Bucket=self._name, Key=key, Body=data, **condition)
        except botocore.exceptions.ClientError as error:
            answer = error.response
        return answer["ResponseMetadata"]["HTTPStatusCode"]

    def get(self, key):
        try:
            return self._client.get_object(Bucket=self._name, Key=key)["Body"].read()
        except (self._client.exceptions.NoSuchKey, self._client.exceptions.NoSuchBucket):
            return None


class GCSBucket:
    def __init__(self, env, name):
        self._url, self._name = env["STORAGE_EMULATOR_HOST"], name

    def put(self, key, data, *, only_new=False):
        head = f'--xx\r\nContent-Type: application/json\r\n\r\n{{"name": "{key}"}}\r\n--xx\r\n\r\n'.encode()
        return requests.post(
            f"{self._url}/upload/storage/v1/b/{self._name}/o",
            params={"uploadType": "multipart"} | ({"ifGenerationMatch": "0"} if only_new else {}),
            data=head + data + b"\r\n--xx--\r\n",
            headers={"Content-Type": "multipart/related; boundary=xx"},
            timeout=10,
        ).status_code

    def get(self, key):
        url = f"{self._url}/storage/v1/b/{self._name}/o/{key}"
        answer = requests.get(url, params={"alt": "media"}, timeout=10)
        return answer.content if answer.ok else None


class AzureContainer:
    def __init__(self, env, name):
        settings = dict(pair.split("=", 1) for pair in env["AZURE_STORAGE_CONNECTION_STRING"].split(";"))
        self._url = f"{settings['BlobEndpoint']}/{name}"

    def put(self, key, data, *, only_new=False):
        condition = {"if-none-match": "*"} if only_new else {}
        return self._send(signed("PUT", f"{self._url}/{key}", data, {"x-ms-blob-type": "BlockBlob"} | condition))[0]

    def get(self, key):
        status, body = self._send(signed("GET", f"{self._url}/{key}"))
        return body if status == 200 else None

    def _send(self, request):
        answer = requests.request(
            request.method, request.full_url, data=request.data, headers=dict(request.header_items()), timeout=10
        )
        return answer.status_code, answer.content


@pytest.fixture
def bucket():
    """A plain client of a bucket, reached through nothing but `server.env`; makes the bucket unless told its name."""
    kinds = {"s3": S3Bucket, "gcs": GCSBucket, "azure": AzureContainer}

    def make(server, name=None):
        if name is None:
            name = f"bucket-{secrets.token_hex(4)}"
            server.create_bucket(name)
        return kinds[server.dialect](server.env, name)

    return make


@pytest.fixture
def eventually():
    """Waits, at most ten seconds, until something holds."""

    def wait(holds):
        deadline, tick = time.monotonic() + 10, threading.Event()
        while not holds():
            assert time.monotonic() < deadline
            tick.wait(0.02)

    return wait
