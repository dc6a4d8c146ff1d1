"""The policies of docs/security.md are enough, and no more than enough, on a server that enforces them."""

import json
import urllib.request
from pathlib import Path

import boto3
import pytest
import torch

import ckpt_cloud
from ckpt_cloud import ObjectStoreReader, ObjectStoreWriter, TransferOptions
from ckpt_cloud.errors import PermissionDenied
from tests.conftest import running

POLICIES = Path(__file__).parents[2] / "docs" / "policies"
BUCKET = "checkpoints"
ROOT = f"s3://{BUCKET}/team/run"
MIB = 1 << 20
SMALL = TransferOptions(pack_size=12 * MIB, part_size=5 * MIB)
pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def users():
    """Credentials of one user for each policy, on a moto server of its own that enforces them."""
    for server in running("moto"):
        server.create_bucket(BUCKET)
        keys = {"aws_access_key_id": "root", "aws_secret_access_key": "root", "region_name": "us-east-1"}
        iam = boto3.session.Session().client("iam", endpoint_url=server.endpoint_url, **keys)
        users = {}
        for role in ("writer", "reader", "collector"):
            iam.create_user(UserName=role)
            text = (POLICIES / f"aws-{role}.json").read_text().replace("BUCKET", BUCKET).replace("PREFIX", "team")
            policy = json.loads(text)
            if role == "collector":
                # moto asks for this of the bucket, where S3 asks of each key.
                quirk = {"Effect": "Allow", "Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{BUCKET}"}
                policy["Statement"].append(quirk)
            iam.put_user_policy(UserName=role, PolicyName=role, PolicyDocument=json.dumps(policy))
            made = iam.create_access_key(UserName=role)["AccessKey"]
            users[role] = {
                "endpoint_url": server.endpoint_url,
                "region": "us-east-1",
                "access_key_id": made["AccessKeyId"],
                "secret_access_key": made["SecretAccessKey"],
            }
        # From the next request on, moto asks the policies.
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{server.endpoint_url}/moto-api/reset-auth", b"0", headers, method="POST")
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["status"] == "ok"
        yield users


def save(user, name, **options):
    # Large enough for a multipart upload.
    state = {"w": torch.arange(3 * MIB, dtype=torch.int32), "n": 1}
    ckpt_cloud.save(state, storage_writer=ObjectStoreWriter(f"{ROOT}/{name}", transfer=SMALL, **options, **user))


def load(user, name):
    state = {"w": torch.zeros(3 * MIB, dtype=torch.int32), "n": 0}
    ckpt_cloud.load(state, storage_reader=ObjectStoreReader(f"{ROOT}/{name}", **user))
    return state


def options(user):
    return ckpt_cloud.StoreOptions(**user)


def test_a_writer_saves_replaces_and_loads_without_deleting(users):
    save(users["writer"], "a")
    save(users["writer"], "a", overwrite=True)
    assert load(users["writer"], "a")["n"] == 1
    assert ckpt_cloud.verify(f"{ROOT}/a", deep=True, store=options(users["writer"])).ok
    with pytest.raises(PermissionDenied):
        ckpt_cloud.delete(f"{ROOT}/a", store=options(users["writer"]))
    with pytest.raises(PermissionDenied):
        ckpt_cloud.save({"n": 1}, storage_writer=ObjectStoreWriter(f"s3://{BUCKET}/other/x", **users["writer"]))


def test_a_reader_reads_and_lists_only(users):
    save(users["writer"], "b")
    assert torch.equal(load(users["reader"], "b")["w"], torch.arange(3 * MIB, dtype=torch.int32))
    assert f"{ROOT}/b" in [info.url for info in ckpt_cloud.list_checkpoints(ROOT, store=options(users["reader"]))]
    assert ckpt_cloud.verify(f"{ROOT}/b", deep=True, store=options(users["reader"])).ok
    with pytest.raises(PermissionDenied):
        save(users["reader"], "c")
    with pytest.raises(PermissionDenied):
        ckpt_cloud.delete(f"{ROOT}/b", store=options(users["reader"]))


def test_a_collector_deletes_but_writes_no_data(users):
    save(users["writer"], "d")
    with pytest.raises(PermissionDenied):
        save(users["collector"], "e")
    ckpt_cloud.delete(f"{ROOT}/d", store=options(users["collector"]))
    states = {info.name: info.state for info in ckpt_cloud.list_checkpoints(ROOT, store=options(users["reader"]))}
    assert states["d"] == "deleted"
    ckpt_cloud.gc(ROOT, store=options(users["collector"]))
