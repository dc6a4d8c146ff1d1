"""Places to save to, and what is stored there seen from outside."""

import secrets
import sys
from pathlib import Path

import boto3
import pytest

from ckpt_cloud import bridge
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import open_store, parse_url

# Spawned ranks import what they are to do by name.
sys.path.insert(0, str(Path(__file__).parent))

CLOUDS = {"s3": ("moto_server", "s3"), "azure": ("azurite", "az"), "gcs": ("fake_gcs", "gs")}
"""Fixture and scheme."""


@pytest.fixture(scope="session", autouse=True)
def no_ranks_left():
    """Ranks that were kept from test to test end with the session."""
    yield
    if "ranks" in sys.modules:
        sys.modules["ranks"].close()


@pytest.fixture
def cloud_root(request, monkeypatch, nobodys_cloud):
    """Makes a new bucket on a cloud's server, sets the environment that leads there, and gives its URL."""

    def root(cloud):
        fixture, scheme = CLOUDS[cloud]
        server = request.getfixturevalue(fixture)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        bucket = f"bucket-{secrets.token_hex(4)}"
        server.create_bucket(bucket)
        return f"{scheme}://{bucket}"

    return root


@pytest.fixture(params=["memory", "file", *CLOUDS])
def url(request, tmp_path, cloud_root):
    """A URL where nothing is yet, on each kind of store."""
    if request.param == "memory":
        return f"memory://{secrets.token_hex(4)}/run/step-1"
    if request.param == "file":
        return f"file://{tmp_path}/run/step-1"
    return f"{cloud_root(request.param)}/run/step-1"


@pytest.fixture
def file_url(tmp_path):
    """A local URL where nothing is yet."""
    return f"file://{tmp_path}/run/step-1"


def _keys(url: str) -> list[str]:
    """Keys under `url`, sorted; by the store's own tools where it has some."""
    location = parse_url(url)
    if location.scheme == "file":
        root = Path(location.path)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    if location.scheme == "s3":
        listed = boto3.session.Session().client("s3").list_objects_v2(Bucket=location.bucket, Prefix=location.path)
        return sorted(entry["Key"].removeprefix(f"{location.path}/") for entry in listed.get("Contents", []))

    async def everything() -> list[str]:
        return sorted([info.key async for info in open_store(location, StoreOptions()).list()])

    return bridge.run(everything())


@pytest.fixture
def keys():
    """Tells the keys under a URL."""
    return _keys
