"""A store that ignores conditional writes is found out before anything is saved to it."""

import secrets

import boto3
import pytest
import torch

import ckpt_cloud
from ckpt_cloud import bridge
from ckpt_cloud.errors import Unsupported
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores import capabilities, open_store, parse_url

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(params=["s3", "fsspec+s3"], ids=["native", "fsspec"])
def careless_url(request, rclone, monkeypatch):
    """A URL on a server that takes every write, whatever its conditions, for each engine."""
    for name, value in rclone.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(4)}"
    rclone.create_bucket(bucket)
    return f"{request.param}://{bucket}/run"


def keys(url):
    bucket = parse_url(url).bucket
    return [
        entry["Key"]
        for entry in boto3.session.Session().client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])
    ]


def ask(url):
    return bridge.run(open_store(parse_url(url), StoreOptions()).capabilities())


def test_servers_that_keep_conditions(s3_url):
    assert ask(s3_url) == capabilities.ALL
    assert keys(s3_url) == []


@pytest.mark.parametrize("url", ["memory://probe/run", "file:///nowhere/at/all"])
def test_stores_that_are_known_are_not_asked(url):
    assert ask(url) == capabilities.ALL


def test_a_careless_server_is_found_out(careless_url):
    assert ask(careless_url) == capabilities.Capabilities(conditional_create=False, conditional_replace=False)


def test_nothing_is_saved_to_a_careless_server(careless_url):
    with pytest.raises(Unsupported, match="ignores conditional writes") as refused:
        ckpt_cloud.save({"w": torch.ones(2)}, checkpoint_id=careless_url)
    assert "allow_unsafe_commit" in refused.value.hint
    assert keys(careless_url) == []


def test_unless_the_user_takes_the_risk(careless_url):
    writer = ckpt_cloud.ObjectStoreWriter(careless_url, allow_unsafe_commit=True)
    ckpt_cloud.save({"w": torch.ones(2)}, storage_writer=writer)
    assert "run/COMMIT" in keys(careless_url)
    assert ckpt_cloud.latest(careless_url.removesuffix("/run")) == careless_url
