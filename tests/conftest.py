"""Hypothesis profiles, a clean environment for every test, and the store servers."""

import os
import secrets
from contextlib import ExitStack
from types import SimpleNamespace

import boto3
import pytest
from hypothesis import settings

IN_CI = os.environ.get("CI") == "true"

# Cores are shared, so an example has no deadline. Choose one by hand with pytest's --hypothesis-profile.
settings.register_profile("default", deadline=None)
# The same examples in each run, so that a change is never blamed for what an earlier one did.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=200, print_blob=True)
settings.register_profile("nightly", deadline=None, max_examples=5000, print_blob=True)
settings.load_profile("ci" if IN_CI else "default")

CLOUD_VARIABLES = (
    "AWS_",
    "AZURE_",
    "AZURITE_",
    "GOOGLE_",
    "GCLOUD_",
    "GCE_",
    "CLOUDSDK_",
    "STORAGE_EMULATOR_",
    "CKPT_",
)
SERVER_FIXTURES = {"seaweedfs", "moto_server", "rclone", "fake_gcs", "azurite", "s3_url"}


def pytest_collection_modifyitems(items):
    for item in items:
        if SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.servers)


@pytest.fixture(autouse=True)
def nobodys_cloud(monkeypatch):
    """No test finds the developer's credentials, a cloud's metadata service, or what another test has set."""
    for name in os.environ:
        if name.startswith(CLOUD_VARIABLES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")


def running(name):
    """Runs one of localstack's servers; a missing one is a skip, or an error in CI."""
    import localstack

    with ExitStack() as stack:
        try:
            server = stack.enter_context(localstack.start(name))
        except localstack.NotInstalled as missing:
            if IN_CI:
                raise
            pytest.skip(f"{name}: {missing}")
        yield server


@pytest.fixture(scope="session")
def seaweedfs():
    """A SeaweedFS S3 server, shared by the whole session; take a bucket of your own."""
    yield from running("seaweedfs")


@pytest.fixture(scope="session")
def moto_server():
    """A moto S3 server, shared by the whole session; take a bucket of your own."""
    yield from running("moto")


@pytest.fixture(scope="session")
def rclone():
    """An S3 server that ignores conditional writes, shared by the whole session."""
    yield from running("rclone")


@pytest.fixture(scope="session")
def fake_gcs():
    """A server of Google's JSON API, shared by the whole session."""
    yield from running("fake-gcs")


@pytest.fixture(scope="session")
def azurite():
    """An Azure Blob server, shared by the whole session."""
    yield from running("azurite")


@pytest.fixture
def moto_in_process(checkpoint_url, ckpt_cloud_s3_port):
    """The S3 server of our own pytest plug-in, a thread of this process, in the form of localstack's servers."""
    endpoint = f"http://127.0.0.1:{ckpt_cloud_s3_port}"
    client = boto3.session.Session().client("s3", endpoint_url=endpoint)
    return SimpleNamespace(
        name="moto in process",
        env={name: value for name, value in os.environ.items() if name.startswith("AWS_")},
        endpoint_url=endpoint,
        create_bucket=lambda bucket: client.create_bucket(Bucket=bucket),
    )


@pytest.fixture(params=["seaweedfs", "moto"])
def s3_url(request, monkeypatch, nobodys_cloud):
    """An `s3://` URL in a new bucket, once for each server, with the environment that leads there."""
    server = request.getfixturevalue({"seaweedfs": "seaweedfs", "moto": "moto_server"}[request.param])
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(4)}"
    server.create_bucket(bucket)
    return f"s3://{bucket}/run"
