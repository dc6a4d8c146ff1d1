"""A fault server for each test, and stores of both engines that lead to it."""

import secrets

import pytest

from ckpt_cloud.options import RetryOptions, StoreOptions
from ckpt_cloud.stores import open_store, parse_url
from tests.faults.server import FaultServer


@pytest.fixture
def server(monkeypatch, nobodys_cloud):
    with FaultServer() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        server.create_bucket("bucket")
        yield server


@pytest.fixture(params=["native", pytest.param("fsspec", marks=pytest.mark.slow)])
def engine(request):
    return request.param


@pytest.fixture
def opened(server, engine):
    """Makes a store under a prefix of its own, that retries quickly."""

    def opened(prefix=None, *, retry=None, **options):
        quick = retry or RetryOptions(max_retries=5, deadline_s=20, max_backoff_s=0.05)
        url = f"s3://bucket/{prefix or secrets.token_hex(4)}"
        return open_store(parse_url(url), StoreOptions(retry=quick, engine=engine, **options))

    return opened
