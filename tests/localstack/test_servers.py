"""What every server does; each test runs once for each of them."""

import os
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest

import localstack
from localstack.recipes import RECIPES

ON_DISK = [recipe.name for recipe in RECIPES.values() if recipe.keeps_data]
CONDITIONAL = [recipe.name for recipe in RECIPES.values() if recipe.conditional_writes]
S3 = [recipe.name for recipe in RECIPES.values() if recipe.dialect == "s3"]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_stores_and_returns(server, bucket):
    here = bucket(server)
    assert here.get("key") is None
    data = os.urandom(100_000)
    assert here.put("key", data) in {200, 201}
    assert here.get("key") == data


def test_a_conditional_create_is_honoured_or_known_not_to_be(server, bucket):
    here = bucket(server)
    assert here.put("key", b"first", only_new=True) in {200, 201}
    again = here.put("key", b"second", only_new=True)
    if server.conditional_writes:
        assert again in {409, 412}  # Azurite: 409
        assert here.get("key") == b"first"
    else:
        assert again == 200
        assert here.get("key") == b"second"


@pytest.mark.parametrize("server", CONDITIONAL, indirect=True)
def test_of_many_conditional_creates_one_wins(server, bucket):
    here = bucket(server)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: here.put("key", b"%d" % number, only_new=True), range(16)))
    winners = [number for number, status in enumerate(answers) if status in {200, 201}]
    assert len(winners) == 1
    assert here.get("key") == b"%d" % winners[0]


def test_a_bucket_may_be_created_twice(server, bucket):
    bucket(server, "twice")
    server.create_bucket("twice")
    server.create_bucket("twice")
    assert bucket(server, "twice").put("key", b"x") in {200, 201}


def test_killed_it_comes_back_with_its_data(server, bucket, eventually):
    here, pid, env = bucket(server), server.pid, dict(server.env)
    here.put("survivor", b"kept")
    if server.name == "azurite":  # writes its index every few seconds
        index = server.directory / "__azurite_db_blob__.json"
        eventually(lambda: b"survivor" in index.read_bytes())
    server.kill()
    assert not server.running
    assert not alive(pid)
    server.restart()
    assert server.running
    assert server.pid != pid
    assert dict(server.env) == env
    assert here.get("survivor") == (b"kept" if server.name in ON_DISK else None)


def test_two_side_by_side_and_stopped_without_a_trace(server, bucket):
    here = bucket(server)
    here.put("key", b"here")
    with localstack.start(server.name) as other:
        assert other.endpoint_url != server.endpoint_url
        there = bucket(other)
        there.put("key", b"there")
        assert (here.get("key"), there.get("key")) == (b"here", b"there")
        directory, pid = other.directory, other.pid
        assert directory.is_dir()
    assert not other.running
    assert not alive(pid)
    assert not directory.exists()
    other.stop()
    assert here.get("key") == b"here"


@pytest.mark.parametrize("name", ON_DISK)
def test_a_directory_of_ones_own_is_kept(name, installed, bucket, tmp_path):
    installed(name)
    directory = tmp_path / "data"
    with localstack.start(name, directory=directory) as first:
        first.create_bucket("mine")
        bucket(first, "mine").put("key", b"kept")
    with localstack.start(name, directory=directory) as second:
        assert second.directory == directory
        assert bucket(second, "mine").get("key") == b"kept"
    assert directory.is_dir()


@pytest.mark.parametrize("server", S3, indirect=True)
def test_the_environment_is_all_that_boto3_needs(server, monkeypatch):
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    boto3.client("s3").create_bucket(Bucket="through-the-environment")
    assert "through-the-environment" in [each["Name"] for each in boto3.client("s3").list_buckets()["Buckets"]]


def test_nothing_of_the_check_is_left(started, installed):
    installed("seaweedfs")
    env = started("seaweedfs").env
    client = boto3.client(
        "s3",
        endpoint_url=env["AWS_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name=env["AWS_REGION"],
    )
    assert [each["Name"] for each in client.list_buckets()["Buckets"] if each["Name"].startswith("localstack-")] == []


@pytest.mark.parametrize("name", localstack.names())
def test_no_proxy_is_asked_for_it(name, installed, monkeypatch):
    installed(name)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    with localstack.start(name, deadline_s=30) as server:
        server.create_bucket("bucket")
        assert server.env["no_proxy"] == server.env["NO_PROXY"] == "example.org,127.0.0.1"
