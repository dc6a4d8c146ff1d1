"""Places to keep a state of many kinds."""

import secrets

import pytest

from tests.interop.states import make_state


@pytest.fixture
def state():
    return make_state()


@pytest.fixture
def moto_url(moto_server, monkeypatch, nobodys_cloud):
    """An `s3://` URL in a new bucket on moto."""
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(4)}"
    moto_server.create_bucket(bucket)
    return f"s3://{bucket}/run"
