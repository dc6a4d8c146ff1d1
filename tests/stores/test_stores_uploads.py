"""Unfinished uploads: found and aborted by age, under a prefix, and nothing else touched."""

import json
import os
import secrets
import subprocess
import sys
import time
from datetime import timedelta

import boto3
import pytest
from azure.storage.blob import BlobBlock, ContainerClient

import ckpt_cloud
from ckpt_cloud import bridge
from ckpt_cloud.errors import InvalidOption
from ckpt_cloud.stores import open_store, parse_url

ID = "0190b5c4f00e7abc8def0123456789ab"


@pytest.fixture
def s3_url(seaweedfs, monkeypatch, nobodys_cloud):
    """On SeaweedFS alone: moto says of every upload that it began in 2010."""
    for name, value in seaweedfs.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(4)}"
    seaweedfs.create_bucket(bucket)
    return f"s3://{bucket}/run"


@pytest.fixture
def begin(s3_url):
    """Begins uploads of keys beside and below `s3_url`, as a process that was killed leaves them."""
    bucket = s3_url.split("/")[2]
    client = boto3.session.Session().client("s3")

    def begin(key):
        upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 100)
        return upload

    begin.left = lambda: {u["Key"] for u in client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])}
    return begin


def test_s3(s3_url, begin):
    ids = {key: begin(key) for key in ("run/step-1/data/a", "run/step-2/data/b", "run-2/data/c", "other")}

    found = ckpt_cloud.list_uploads(s3_url)
    assert {upload.key for upload in found} == {"step-1/data/a", "step-2/data/b"}
    assert {upload.id for upload in found} == {ids["run/step-1/data/a"], ids["run/step-2/data/b"]}
    assert all(abs(upload.started_unix_s - time.time()) < 60 for upload in found)
    assert [upload.key for upload in ckpt_cloud.list_uploads(f"{s3_url}/step-2")] == ["data/b"]

    assert ckpt_cloud.list_uploads(s3_url, older_than=timedelta(hours=1)) == []
    assert ckpt_cloud.abort_uploads(s3_url) == [], "by default they may belong to a save that still runs"
    assert len(begin.left()) == 4

    aborted = ckpt_cloud.abort_uploads(s3_url, older_than=timedelta(0))
    assert {upload.key for upload in aborted} == {"step-1/data/a", "step-2/data/b"}
    assert begin.left() == {"run-2/data/c", "other"}
    assert ckpt_cloud.abort_uploads(s3_url, older_than=timedelta(0)) == []


def test_more_uploads_than_one_page(moto_server, monkeypatch):
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{secrets.token_hex(4)}"
    moto_server.create_bucket(bucket)
    client = boto3.session.Session().client("s3")
    for number in range(5):
        for _ in range(3):
            client.create_multipart_upload(Bucket=bucket, Key=f"run/{number}")
    assert len(ckpt_cloud.list_uploads(f"s3://{bucket}/run")) == 15
    assert len(ckpt_cloud.abort_uploads(f"s3://{bucket}/run", older_than=timedelta(0))) == 15
    assert ckpt_cloud.list_uploads(f"s3://{bucket}/run") == []


def test_a_checkpoint_is_not_touched(s3_url, begin):
    state = {"w": __import__("torch").arange(10)}
    with pytest.warns(UserWarning, match=r"torch\.distributed"):
        ckpt_cloud.save(state, checkpoint_id=f"{s3_url}/step-1")
    begin(f"run/step-1/data/{ID}/0.safetensors")
    assert len(ckpt_cloud.abort_uploads(s3_url, older_than=timedelta(0))) == 1
    state["w"].zero_()
    with pytest.warns(UserWarning, match=r"torch\.distributed"):
        ckpt_cloud.load(state, checkpoint_id=f"{s3_url}/step-1")
    assert state["w"].tolist() == list(range(10))


def test_local_files(tmp_path):
    drafts = [tmp_path / f"step-1/data/{ID}/0.safetensors#1", tmp_path / "step-2/COMMIT#77"]
    bystanders = [
        tmp_path / "step-1/notes#1",
        tmp_path / f"step-1/data/{ID}/0.safetensors",
        tmp_path / f"step-1/data/{ID}/0.safetensors#x",
    ]
    for path in (*drafts, *bystanders):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    os.utime(drafts[0], (time.time() - 7200,) * 2)

    assert [upload.key for upload in ckpt_cloud.list_uploads(tmp_path)] == [
        f"step-1/data/{ID}/0.safetensors",
        "step-2/COMMIT",
    ]
    aborted = ckpt_cloud.abort_uploads(tmp_path, older_than=timedelta(hours=1))
    assert [upload.key for upload in aborted] == [f"step-1/data/{ID}/0.safetensors"]
    assert not drafts[0].exists()
    assert all(path.exists() for path in (drafts[1], *bystanders))


def test_nothing_is_there(tmp_path):
    assert ckpt_cloud.list_uploads(tmp_path / "nothing") == []
    assert ckpt_cloud.list_uploads("memory://nothing") == []


@pytest.mark.parametrize("engine", ["native", "fsspec"])
def test_azure(azurite, monkeypatch, engine):
    for name, value in azurite.env.items():
        monkeypatch.setenv(name, value)
    container = f"container-{secrets.token_hex(4)}"
    azurite.create_bucket(container)
    store = ckpt_cloud.StoreOptions(engine=engine)
    connection = azurite.env["AZURE_STORAGE_CONNECTION_STRING"]
    with ContainerClient.from_connection_string(connection, container) as client:
        for key in ("run/step-1/data/a", "run/step-2/data/b", "run-2/data/c"):
            client.get_blob_client(key).stage_block("QUFBQQ==", b"x" * 100)
        client.upload_blob("run/step-1/COMMIT", b"committed")
        client.get_blob_client("run/step-1/COMMIT").stage_block("QUFBQQ==", b"never committed")
        root = f"az://{container}/run"

        found = ckpt_cloud.list_uploads(root, store=store)
        assert {upload.key for upload in found} == {"step-1/data/a", "step-2/data/b"}
        assert all(abs(upload.started_unix_s - time.time()) < 60 for upload in found)
        assert ckpt_cloud.abort_uploads(root, store=store) == []

        # Completed after it was listed: an object, which must stay.
        client.get_blob_client("run/step-2/data/b").commit_block_list([BlobBlock("QUFBQQ==")])
        opened = open_store(parse_url(root), store)
        for upload in found:
            bridge.run(opened.abort_upload(upload))
        everything = {blob.name for blob in client.list_blobs(include=["uncommittedblobs"])}
        assert everything == {"run/step-1/COMMIT", "run/step-2/data/b", "run-2/data/c"}
        assert client.get_blob_client("run/step-2/data/b").download_blob().readall() == b"x" * 100


def test_a_negative_age():
    with pytest.raises(InvalidOption):
        ckpt_cloud.abort_uploads("memory://x", older_than=timedelta(hours=-1))


def test_the_command(s3_url, begin):
    begin("run/step-1/data/a")

    def command(*args):
        done = subprocess.run(
            [sys.executable, "-c", "from ckpt_cloud.cli import main; main()", "uploads", s3_url, *args],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "0 unfinished" in command()
    assert [upload["key"] for upload in json.loads(command("--older-than", "0", "--json"))] == ["step-1/data/a"]
    assert "--abort would abort 1" in command("--older-than", "0")
    assert begin.left() == {"run/step-1/data/a"}
    assert "Aborted 1" in command("--older-than", "0", "--abort", "--yes")
    assert begin.left() == set()
